"""Compute means over skills and their intervals over seeds and questions.

Every mean gives each skill the same weight. Its interval is a percentile bootstrap that draws seeds, and questions within
each skill, with replacement. It draws one fewer of each than there are, which makes the variance of the drawn means an
unbiased estimate of the variance of the mean (Rao and Wu 1988). Drawing all would give (n - 1) / n of it, which is two
thirds for three seeds. All methods share the drawn seeds and questions, so their differences are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A measured value, its interval, and the number of seeds it comes from."""

    value: float
    low: float
    high: float
    seeds: int = 1

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.low > 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(value: float, drawn: Array, seeds: int) -> Estimate:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high), seeds)


class Resampling:
    """Draws of questions, the same for everything that is compared.

    Args:
        skills: The skill of each question [Q].
        number: The number of draws B.
    """

    def __init__(self, skills: Sequence[str], number: int = 4000, seed: int = 0) -> None:
        self.number = number
        self.seed = seed
        self.skills = list(dict.fromkeys(skills))
        rng = np.random.default_rng([seed, 0])
        self.weights = np.zeros((len(self.skills), len(skills)))
        """[K, Q]: the product of a row with scores is the mean of a skill."""
        self.drawn = np.zeros((number, len(skills)))
        """[B, Q]: weights of the questions in every draw, of all skills in one row."""
        for k, skill in enumerate(self.skills):
            members = np.flatnonzero([s == skill for s in skills])
            n = len(members)
            self.weights[k, members] = 1 / n
            take = max(1, n - 1)
            counts = rng.multinomial(take, np.full(n, 1 / n), size=number) if n > 1 else np.ones((number, 1))
            self.drawn[:, members] = counts / take

    def seed_draws(self, count: int) -> Array:
        """Return weights of the seeds in every draw [B, S]."""
        if count == 1:
            return np.ones((self.number, 1))
        rng = np.random.default_rng([self.seed, count])
        take = count - 1
        return rng.multinomial(take, np.full(count, 1 / count), size=self.number) / take

    def by_skill(self, values: Array) -> Array:
        """Return the means over seeds and the questions of a skill, [S, Q] to [K]."""
        return self.weights @ values.mean(0)

    def drawn_by_skill(self, values: Array) -> Array:
        """Return the drawn means, [S, Q] to [B, K]."""
        weighted = (self.seed_draws(len(values)) @ values) * self.drawn
        return weighted @ (self.weights > 0).T.astype(float)

    def skill_means(self, values: Array) -> dict[str, Estimate]:
        means, drawn = self.by_skill(values), self.drawn_by_skill(values)
        return {s: estimate(means[k], drawn[:, k], len(values)) for k, s in enumerate(self.skills)}

    def mean(self, values: Array) -> Estimate:
        """Return the mean over the skills of scores, or of differences of two methods' scores, [S, Q]."""
        return estimate(self.by_skill(values).mean(), self.drawn_by_skill(values).mean(1), len(values))


def paired(
    a: Array, b: Array, a_seeds: Sequence[int | None], b_seeds: Sequence[int | None]
) -> tuple[Array, list[int | None]]:
    """Return b - a [S, Q] on the common seeds. Scores without a seed are paired with every seed."""
    if list(a_seeds) == [None] or list(b_seeds) == [None]:
        seeds = list(b_seeds if list(a_seeds) == [None] else a_seeds)
        return b - a, seeds
    common = [s for s in a_seeds if s in b_seeds]
    return b[[b_seeds.index(s) for s in common]] - a[[a_seeds.index(s) for s in common]], common
