"""A run whose entropy runs away, or whose rewards teach nothing, says so, once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from openril.records import Group
from openril.training.student_watch import AdvantageWatch, EntropyWatch
from support.loop import SubstringRewards, make_trainer, tiny_recipe


def warnings(series: Sequence[float | None]) -> list[int]:
    """Return the steps, from 1, at which the watch warns."""
    watch = EntropyWatch()
    return [step for step, value in enumerate(series, start=1) if watch.see(value)]


@pytest.mark.parametrize(
    ("series", "expected"),
    [
        # First ten: mean 0.4, so the limit is max(0.8, 0.9). Ten steps of 1.0 follow: k of them give 0.4 + 0.06 k, which
        # is above 0.9 at k = 9. It stays above, and is not said again.
        ([0.4] * 10 + [1.0] * 30, [19]),
        # Mean 1.0: the limit is max(2.0, 1.5); 1.9 stays below it.
        ([1.0] * 10 + [1.9] * 30, []),
        # Twice a small entropy is no danger: the limit is 0.1 + 0.5.
        ([0.1] * 10 + [0.5] * 30, []),
        # It falls back after the first episode: a second one is said again.
        ([0.4] * 10 + [1.0] * 10 + [0.4] * 10 + [1.0] * 10, [19, 39]),
        ([0.4, None] * 10 + [float("nan")] + [1.0] * 10, [30]),  # steps without a number count as none
        ([3.0] * 9, []),
    ],
)
def test_the_rule(series: list[float | None], expected: list[int]):
    assert warnings(series) == expected


def test_the_warning_names_the_numbers_and_the_switches():
    watch = EntropyWatch()
    [message] = [m for value in [0.4] * 10 + [1.0] * 10 if (m := watch.see(value))]
    for part in ("train/entropy", "0.94", "0.40", "train.negative_scale", "train.kl_rows", "train.baseline"):
        assert part in message


@pytest.mark.parametrize(
    ("series", "expected"),
    [
        ([0.3] * 3 + [0.0] * 30, [13]),  # said once
        ([0.0] * 9 + [0.1] + [0.0] * 9, []),
        ([0.0] * 10 + [0.1] + [1e-17] * 10, [10, 21]),  # a second episode; rounding is no advantage
        ([0.0, None, float("nan")] * 10, [28]),  # steps without a number count as none
    ],
)
def test_rewards_that_teach_nothing(series: list[float | None], expected: list[int]):
    watch = AdvantageWatch()
    assert [step for step, value in enumerate(series, start=1) if watch.see(value)] == expected


@pytest.mark.parametrize(
    ("gate", "named"),
    [
        (0.0, ("rewards.similarity.gate.closed_below", "rewards.similarity.gate.enabled", "rewards.answer.weight")),
        (0.4, ("reward/student_answer", "train/unknown_reward_share")),
        (None, ("reward/student_answer", "train/unknown_reward_share")),
    ],
)
def test_the_warning_names_what_to_do_about_a_closed_gate_or_flat_answers(gate: float | None, named: tuple[str, ...]):
    watch = AdvantageWatch()
    [message] = [m for _ in range(10) if (m := watch.see(0.0, gate))]
    for part in ("train/advantage_abs", *named):
        assert part in message
    assert ("gate" in message) == (gate == 0.0)


def test_the_warning_counts_the_unparsed_answers_of_the_steps_that_it_is_about():
    watch = AdvantageWatch()
    assert watch.see(0.3, None, 100.0) is None  # a step with an advantage
    [message] = [m for n in range(10) if (m := watch.see(0.0, None, 4.0 if n else 1.0))]
    for part in ("In 37 answers", "reward/unparsed", "rewards.answer.rule", "rules_then_judge"):
        assert part in message
    parsed = AdvantageWatch()
    [message] = [m for _ in range(10) if (m := parsed.see(0.0, None, 0.0))]
    assert "unparsed" not in message


class FlatRewards(SubstringRewards):
    """Everything is worth the same."""

    def score(self, groups: Sequence[Group]) -> dict[str, float]:
        for rollout in (r for g in groups for r in g.rollouts):
            rollout.verdict = rollout.reward = 0.0
        return {}


def test_a_run_that_learns_nothing_says_so_also_when_it_was_continued(tiny_qwen: Path, tmp_path: Path):
    settings = {"discriminator__mode": "none", "rewards": {"similarity": {"weight": 0}}, "train__beta": 0}
    said: list[str] = []
    for steps in (6, 11):
        assert said == []
        recipe = tiny_recipe(tmp_path / "run", tiny_qwen, train__max_steps=steps, **settings)
        make_trainer(recipe, tmp_path / "data", FlatRewards(), warn=said.append).train()
    [message] = said
    assert "train/advantage_abs" in message
