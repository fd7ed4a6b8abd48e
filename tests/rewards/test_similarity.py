"""Similarity reward, worked by hand."""

import math
from pathlib import Path

import pytest

from openril.errors import StateError
from openril.recipe.schema import GateConfig
from openril.rewards.similarity import SimilarityGate, similarity_reward


@pytest.mark.parametrize(("student_prob", "reward"), [(0.0, 1.0), (0.49, 1.0), (0.5, 0.0), (0.51, 0.0), (1.0, 0.0)])
def test_binary_pays_what_the_discriminator_takes_for_a_teacher(student_prob, reward):
    assert similarity_reward(student_prob, "binary") == reward


def test_continuous_is_the_teacher_probability():
    assert similarity_reward(0.2, "continuous") == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("student_prob", "levels", "reward"),
    [
        (0.32, 11, 0.7),  # 0.68 -> 0.7
        (0.38, 11, 0.6),  # 0.62 -> 0.6
        (0.30, 3, 0.5),  # 0.70 lies nearer to 0.5 than to 1
        (0.20, 3, 1.0),  # 0.80 -> 1
        (0.25, 3, 0.5),  # 0.75, a tie: the lower value
        (0.75, 3, 0.0),  # 0.25, a tie: the lower value
        (0.0, 11, 1.0),
        (1.0, 11, 0.0),
    ],
)
def test_levels_round_to_the_nearest_value(student_prob, levels, reward):
    assert similarity_reward(student_prob, "levels", levels) == pytest.approx(reward)


@pytest.mark.parametrize("student_prob", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_two_levels_are_the_binary_reward(student_prob):
    assert similarity_reward(student_prob, "levels", 2) == similarity_reward(student_prob, "binary")


@pytest.mark.parametrize("broken", [float("nan"), -0.1, 1.1, float("inf")])
def test_what_is_no_probability_is_an_error(broken):
    with pytest.raises(ValueError, match="student_prob"):
        similarity_reward(broken, "binary")


@pytest.mark.parametrize(("student_prob", "reward"), [(0.5, 0.0), (0.2, math.log(4)), (0.8, -math.log(4))])
def test_the_raw_score_is_the_logit_of_the_teacher(student_prob, reward):
    assert similarity_reward(student_prob, "raw") == pytest.approx(reward)


def test_the_raw_score_of_a_sure_discriminator_is_finite():
    # 1e-12 is the closest that a probability counts: log((1 - 1e-12) / 1e-12) = 27.63.
    assert similarity_reward(0.0, "raw") == pytest.approx(27.631, abs=1e-3)
    assert similarity_reward(1.0, "raw") == pytest.approx(-27.631, abs=1e-3)


def test_the_gate_follows_a_moving_average():
    gate = SimilarityGate(GateConfig(enabled=True, closed_below=0.5, open_above=0.75, smoothing=0.5))
    assert gate.factor == 0.0  # nothing is known yet
    gate.see(0.625)
    assert (gate.accuracy, gate.factor) == (0.625, 0.5)  # the first value counts whole; half way from 0.5 to 0.75
    gate.see(0.875)
    assert (gate.accuracy, gate.factor) == (0.75, 1.0)
    gate.see(None)  # a step in which one side had no responses
    assert gate.accuracy == 0.75
    gate.see(0.25)
    assert (gate.accuracy, gate.factor) == (0.5, 0.0)


def test_the_gate_is_saved_exactly(tmp_path: Path):
    gate, again = (SimilarityGate(GateConfig(enabled=True)) for _ in range(2))
    for accuracy in (0.1 + 0.2, 2 / 3):
        gate.see(accuracy)
    gate.save(tmp_path / "gate.json")
    again.load(tmp_path / "gate.json")
    assert again.accuracy == gate.accuracy
    with pytest.raises(StateError, match=r"nothing\.json"):
        again.load(tmp_path / "nothing.json")
