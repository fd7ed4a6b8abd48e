"""Group-relative advantages. Pure functions; shapes: Q groups, M members of a group."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, *, scale_by_std: bool = False) -> Tensor:
    """Return A_i = R_i - mean_j R_j over the members of each group whose reward is known (RIL, Eq. 2; Dr.GRPO).

    Args:
        rewards: float [Q, M], NaN where unknown.
        scale_by_std: Divide by the unbiased standard deviation of the group + 1e-4, as GRPO does. A group whose known
            rewards are all equal has advantage 0 either way.

    Returns:
        float [Q, M], 0 where the reward is unknown and in a group with one known reward.
    """
    known = ~rewards.isnan()
    count = known.sum(-1, keepdim=True)
    values = torch.where(known, rewards, 0.0)
    mean = values.sum(-1, keepdim=True) / count.clamp(min=1)
    centered = torch.where(known, values - mean, 0.0)
    if not scale_by_std:
        return centered
    variance = centered.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    return centered / (variance.sqrt() + 1e-4)
