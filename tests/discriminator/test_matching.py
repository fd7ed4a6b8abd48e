"""Length-matched comparison: which beginnings are compared, and that length alone teaches and earns nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from openril.discriminator.matching import Pair, matched_pairs, shown_tokens
from openril.records import Group, Question, Response, Rollout
from openril.training.discriminator_update import Discriminator
from openril.training.distributed import make_accelerator
from openril.training.setup import fresh_discriminator
from support.loop import tiny_recipe


def group(students: list[str], teachers: list[str], name: str = "q") -> Group:
    sides = (("student", students), ("a", teachers))
    return Group(
        Question(name, "What?"), [Rollout(Response(name, s, i, t)) for s, ts in sides for i, t in enumerate(ts)]
    )


def made(checkpoint: Path, folder: Path, **overrides: Any) -> Discriminator:
    settings = {"discriminator__match_length": True, "discriminator__optimizer": {"learning_rate": 3e-3}}
    recipe = tiny_recipe(folder / "run", checkpoint, **{**settings, **overrides})
    return fresh_discriminator(recipe, make_accelerator(recipe), recipe.discriminator.optimizer)


def test_shortest_is_paired_with_shortest():
    # students by length: 1 (3), 0 (9), 2 (20); teachers: 2 (5), 0 (10), 1 (12). Shown: all but the last of the shorter.
    assert matched_pairs([9, 3, 20], [10, 12, 5], 100) == [
        Pair(1, 2, 1 / 3, 2),
        Pair(0, 0, 1 / 3, 8),
        Pair(2, 1, 1 / 3, 11),
    ]


def test_sides_of_different_sizes_are_paired_with_parts_of_their_weight():
    # Two students of 1/2 each, three teachers of 1/3: the first student takes the first teacher and half of the second.
    assert matched_pairs([10, 20], [8, 12, 30], 100) == [
        Pair(0, 0, 2 / 6, 7),
        Pair(0, 1, 1 / 6, 9),
        Pair(1, 1, 1 / 6, 11),
        Pair(1, 2, 2 / 6, 19),
    ]


@pytest.mark.parametrize(("num_students", "num_teachers"), [(1, 1), (4, 4), (4, 1), (3, 7), (16, 32), (5, 2)])
def test_everyone_has_an_equal_share(num_students: int, num_teachers: int):
    pairs = matched_pairs([(7 * i) % 11 for i in range(num_students)], [(5 * i) % 13 for i in range(num_teachers)], 8)
    for i in range(num_students):
        assert sum(p.weight for p in pairs if p.student == i) == pytest.approx(1 / num_students)
    for i in range(num_teachers):
        assert sum(p.weight for p in pairs if p.teacher == i) == pytest.approx(1 / num_teachers)


def test_one_side_alone_has_no_pairs():
    assert matched_pairs([3, 4], [], 100) == matched_pairs([], [3], 100) == []


@pytest.mark.parametrize(
    ("a", "b", "shown"), [(9, 5, 4), (5, 5, 4), (2, 9, 1), (1, 9, 1), (0, 9, 0), (900, 800, 100), (101, 300, 100)]
)
def test_neither_shows_its_end(a: int, b: int, shown: int):
    assert shown_tokens(a, b, 100) == shown_tokens(b, a, 100) == shown


def test_both_of_a_pair_are_shown_the_same_number_of_tokens(tiny_student: Path, tmp_path: Path):
    d = made(tiny_student, tmp_path)
    g = group(
        ["It is red.", "", "I look, and it is blue"], ["I see one square which is red.", "red", "Well… größer ✓ 8."]
    )
    _, after = d.prompts.head(g.question)
    closing = d.encoder.tokenizer(after, add_special_tokens=False)["input_ids"]
    views = d._views(g)
    assert [v.member for v in views[:3]] == sorted(
        range(3), key=lambda i: d.prompts.length(g.rollouts[i].response.text)
    )
    for student, teacher in zip(views[:3], views[3:], strict=True):
        texts = [g.rollouts[v.member].response.text for v in (student, teacher)]
        whole = [d.encoder.tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
        shown = shown_tokens(len(whole[0]), len(whole[1]), 1024)
        for view, ids in zip((student, teacher), whole, strict=True):
            assert view.tokens.tolist() == ids[:shown] + closing
            assert view.tokens.dtype == torch.int64


@pytest.mark.parametrize("loss", ["bce", "bradley_terry"])
@pytest.mark.parametrize("longer", ["student", "teacher"])
def test_length_alone_teaches_and_earns_nothing(loss: str, longer: str, tiny_qwen: Path, tmp_path: Path):
    """Same words, same ends, other lengths: separated without matching, and equal to the last bit with it."""
    short, long = (["look" + " and look" * n + "." for n in ns] for ns in ((2, 4), (11, 12)))
    groups = [group(long, short) if longer == "student" else group(short, long)]
    metrics = {}
    for match in (True, False):
        d = made(tiny_qwen, tmp_path, discriminator__loss=loss, discriminator__match_length=match)
        for _ in range(20):
            metrics[match] = d.update(groups)
        d.score(groups)
        probabilities = [r.student_prob or 0.0 for r in groups[0].rollouts]
        if match:
            assert sorted(probabilities[:2]) == pytest.approx(sorted(probabilities[2:]), abs=1e-6)
    chance = 2 * math.log(2) if loss == "bce" else math.log(2)
    # Both beginnings are the same, so their predictions are too: one half at best.
    assert metrics[True]["loss"] >= chance - 1e-6
    assert metrics[True]["margin"] == pytest.approx(0, abs=1e-5)
    assert metrics[False]["accuracy"] == 1.0 and metrics[False]["loss"] < 0.5 * chance
    assert metrics[True]["length_only_accuracy"] == metrics[False]["length_only_accuracy"] == 1.0


def test_beginnings_that_differ_are_still_told_apart(tiny_qwen: Path, tmp_path: Path):
    """A direct answer next to a derivation, with no length in common."""
    d = made(tiny_qwen, tmp_path)
    groups = [group(["red.", "blue."], ["I look at the square. The answer is red.", "I look at it. It is blue."])]
    for _ in range(25):
        metrics = d.update(groups)
    d.score(groups)
    assert metrics["accuracy"] == 1.0
    assert min(r.student_prob or 0.0 for r in groups[0].students) > 0.5
    assert max(r.student_prob or 0.0 for r in groups[0].teachers) < 0.5


@pytest.mark.parametrize("loss", ["bce", "bradley_terry"])
def test_loss_and_scores_are_those_of_the_pairs(loss: str, tiny_qwen: Path, tmp_path: Path):
    """Two students and three teachers, by hand from the logits of each view on its own."""
    d = made(tiny_qwen, tmp_path, discriminator__loss=loss)
    with torch.no_grad():
        d.accelerator.unwrap_model(d.network).head.weight.mul_(20)
    g = group(
        ["It is red", "I look and it is blue, or green"], ["red", "The square is blue", "I see it. It is the red one."]
    )
    texts = [r.response.text for r in g.rollouts]
    pairs = matched_pairs(*([d.prompts.length(t) for t in side] for side in (texts[:2], texts[2:])), 1024)
    assert len(pairs) == 4
    shown = d._views(g)
    with torch.no_grad():
        [[piece]] = d._micro_batches([g], [shown], whole=True)
        ([z], _) = d._logits([piece])
    of_student, of_teacher = z[:4].tolist(), z[4:].tolist()
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    expected = 0.0
    means = [0.0] * 5
    for p, zs, zt in zip(pairs, of_student, of_teacher, strict=True):
        expected += p.weight * (softplus(-zs) + softplus(zt) if loss == "bce" else softplus(zt - zs))
        means[p.student] += 2 * p.weight * zs
        means[2 + p.teacher] += 3 * p.weight * zt
    d.score([g])
    zero = 0.0 if loss == "bce" else (sum(means[:2]) / 2 + sum(means[2:]) / 3) / 2
    assert [r.student_prob for r in g.rollouts] == pytest.approx(
        [1 / (1 + math.exp(zero - m)) for m in means], abs=1e-6
    )
    assert max(means) - min(means) > 1e-3
    assert d.update([g])["loss"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss", ["bce", "bradley_terry"])
def test_without_the_other_side_all_but_the_last_token_is_shown(loss: str, tiny_qwen: Path, tmp_path: Path):
    """A question whose teacher responses are all too long has none in its group."""
    d = made(tiny_qwen, tmp_path, discriminator__loss=loss)
    alone = group(["red red red", "blue"], [])
    lengths = [d.prompts.length(r.response.text) for r in alone.rollouts]
    tail = len(d.prompts.tail("", d.prompts.head(alone.question)[1]))
    assert [len(v.tokens) - tail for v in d._views(alone)] == [n - 1 if n > 1 else n for n in lengths]
    assert [v.weight for v in d._views(alone)] == [0.5, 0.5]
    metrics = d.update([alone, group(["red"], ["blue"], "other")])
    # At chance Eq. 1 is log 2 for the one side of the first group and 2 log 2 for the second; pairs are in the second alone.
    chance = math.log(2) * (1.5 if loss == "bce" else 0.5)
    assert metrics["loss"] - metrics["loss_minus_chance"] == pytest.approx(chance)
    d.score([alone])
    assert all(r.student_prob is not None for r in alone.rollouts)
