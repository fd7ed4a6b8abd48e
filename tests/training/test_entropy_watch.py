"""A run whose entropy runs away says so, once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from openril.training.entropy_watch import EntropyWatch


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
