"""Health numbers by hand, and the watch over them."""

from __future__ import annotations

import math

import pytest

from openril.discriminator.health import HealthWatch, Scored, health


def test_accuracy_by_source_entropy_and_margin():
    scored = [
        Scored("student", 2.0, 10),  # right
        Scored("student", -1.0, 20),  # wrong
        Scored("a", -3.0, 30),  # right
        Scored("b", 1.0, 40),  # wrong
    ]
    out = health(scored)
    assert out["accuracy"] == 0.5
    assert (out["accuracy_student"], out["accuracy_a"], out["accuracy_b"]) == (0.5, 1.0, 0.0)
    assert out["margin"] == pytest.approx((2 - 1) / 2 - (-3 + 1) / 2)  # 0.5 - (-1.0)
    p = [1 / (1 + math.exp(-z)) for z in (2.0, -1.0, -3.0, 1.0)]
    assert out["entropy"] == pytest.approx(sum(-q * math.log(q) - (1 - q) * math.log(1 - q) for q in p) / 4)
    assert out["student_prob_student"] == pytest.approx((p[0] + p[1]) / 2)
    assert out["length_only_accuracy"] == 1.0  # students are the shorter ones


def test_what_cannot_be_measured_is_left_out():
    assert health([]) == {}
    only_students = health([Scored("student", 1.0, 5)])
    assert "margin" not in only_students and "length_only_accuracy" not in only_students


def test_balanced_accuracy_weighs_both_sides_alike():
    scored = (
        [Scored("student", 1.0, 1)] * 3 + [Scored("student", -1.0, 1)] + [Scored("a", 1.0, 1), Scored("b", -1.0, 1)]
    )
    out = health(scored)
    assert out["accuracy"] == pytest.approx(4 / 6)
    assert out["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    # A classifier that calls everything the student's is right 4 times in 6, and knows nothing.
    everything = health([Scored(s.source, 1.0, 1) for s in scored])
    assert (everything["accuracy"], everything["balanced_accuracy"]) == (pytest.approx(4 / 6), 0.5)
    assert "balanced_accuracy" not in health(scored[:4])


def test_watch_warns_at_chance_and_when_saturated_once_each():
    watch = HealthWatch(window=3, at_chance=0.55, saturated=0.98)
    assert [watch.see(0.5), watch.see(0.5)] == [None, None]  # the window is not full
    assert "at chance" in (watch.see(0.5) or "")
    assert watch.see(0.5) is None  # the same episode
    for accuracy in (0.8, 0.8, 0.8):
        assert watch.see(accuracy) is None
    assert watch.see(None) is None
    assert [watch.see(1.0), watch.see(1.0)] == [None, None]
    assert "saturated" in (watch.see(1.0) or "")
    for accuracy in (0.8, 0.8, 0.5, 0.5):
        watch.see(accuracy)
    assert "at chance" in (watch.see(0.5) or "")  # a new episode


def test_the_warning_at_chance_names_the_options_and_promises_nothing():
    message = HealthWatch(window=1, at_chance=0.55, saturated=0.98).see(0.512) or ""
    for part in (
        "0.512", "noise", "length_only_accuracy", "discriminator.match_length", "discriminator.optimizer.learning_rate",
        "rewards.similarity.weight: 0",
    ):  # fmt: skip
        assert part in message
    assert "pre-train" not in message and "raise" not in message
