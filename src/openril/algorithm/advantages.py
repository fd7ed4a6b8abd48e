"""Group-relative advantages. Pure functions; shapes: Q groups, M members of a group, K rewards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, *, scale_by_std: bool = False, baseline: Tensor | None = None) -> Tensor:
    """Return A_i = R_i - mean_j R_j over the members of each group whose reward is known (RIL, Eq. 2; Dr.GRPO).

    Args:
        rewards: float [Q, M], NaN where unknown.
        scale_by_std: Divide by the unbiased standard deviation of the group + 1e-4, as GRPO does. A group whose known
            rewards are all equal has advantage 0 either way.
        baseline: bool [Q, M], the members whose mean is subtracted; None for all. The standard deviation is that of the
            whole group.

    Returns:
        float [Q, M], 0 where the reward is unknown, in a group with one known reward, and in a group whose baseline has
        no known reward.
    """
    known = ~rewards.isnan()
    based = known if baseline is None else known & baseline
    values = torch.where(known, rewards, 0.0)
    base = torch.where(based, values, 0.0).sum(-1, keepdim=True) / based.sum(-1, keepdim=True).clamp(min=1)
    centered = torch.where(known & based.any(-1, keepdim=True), values - base, 0.0)
    if not scale_by_std:
        return centered
    count = known.sum(-1, keepdim=True)
    own = centered if baseline is None else torch.where(known, values - values.sum(-1, keepdim=True) / count, 0.0)
    variance = own.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    return centered / (variance.sqrt() + 1e-4)


def decoupled_advantages(rewards: Tensor, weights: Sequence[float], *, baseline: Tensor | None = None) -> Tensor:
    """Return sum_k w_k A_k, in which each reward is divided by its own standard deviation in the group (GDPO, 2601.05242).

    GDPO's second normalization, over the batch, is left out: groups then do not depend on each other.

    Args:
        rewards: float [K, Q, M], NaN where unknown. A member with an unknown reward has advantage 0 and is in no mean.
        baseline: See ``group_advantages``.
    """
    rewards = torch.where(rewards.isnan().any(0), torch.nan, rewards)
    parts = [
        w * group_advantages(r, scale_by_std=True, baseline=baseline) for r, w in zip(rewards, weights, strict=True)
    ]
    return torch.stack(parts).sum(0)


def shaped_advantages(
    advantages: Tensor, from_student: Tensor, *, negative_scale: float = 1.0, positive_teachers: bool = False
) -> Tensor:
    """Return the advantages with which the members of a group are learned; the defaults change nothing.

    Args:
        advantages: float [Q, M].
        from_student: bool [Q, M].
        negative_scale: Factor on negative advantages of student samples.
        positive_teachers: Set negative advantages of teacher responses to 0, so that cached text is never pushed down
            (self-imitation, 1806.05635; TOPR, 2503.14286).
    """
    negative = advantages < 0
    shaped = torch.where(negative & from_student, negative_scale * advantages, advantages)
    return torch.where(negative & ~from_student, 0.0, shaped) if positive_teachers else shaped
