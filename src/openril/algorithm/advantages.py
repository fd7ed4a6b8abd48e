"""Group-relative advantages. Pure functions; shapes: Q groups, M members of a group."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, *, scale_by_std: bool = False) -> Tensor:
    """A_i = R_i - mean_j R_j over the members of each group whose reward is known (RIL, Eq. 2; Dr.GRPO).

    rewards: float [Q, M], NaN where unknown. Returns float [Q, M], 0 where unknown and where a group has one known
    reward. scale_by_std: divide by the group's standard deviation (unbiased) + 1e-4, as GRPO does; a group whose
    known rewards are all equal has advantage 0 either way.
    """
    known = ~rewards.isnan()
    count = known.sum(-1, keepdim=True)
    values = torch.where(known, rewards, 0.0)
    mean = values.sum(-1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(known, values - mean, 0.0)
    if not scale_by_std:
        return centred
    variance = centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + 1e-4)
