"""Take one optimizer step on complete, checked and clipped gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from openril.errors import StateError


def take_step(
    accelerator: Accelerator, optimizer: Any, parameters: Sequence[nn.Parameter], max_grad_norm: float, what: str
) -> float:
    """Clip the gradients, take a step, and drop the gradients.

    Args:
        max_grad_norm: 0 does not clip.
        what: Whose step it is, for the error.

    Returns:
        The norm of the gradient before clipping.

    Raises:
        StateError: The norm is not finite, so that the step would make every weight NaN. Nothing was changed.
    """
    for p in parameters:
        if p.grad is None:  # not used by any question of the batch; with several processes it would be zero too
            p.grad = torch.zeros_like(p)
    total: Any = accelerator.clip_grad_norm_(list(parameters), max_grad_norm or float("inf"))
    norm = float((total.full_tensor() if isinstance(total, DTensor) else total) or 0.0)
    if not math.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        raise StateError(
            f"{what}: expected a finite gradient norm, got {norm}. The weights were not changed. Lower the learning rate or"
            " look at the rewards of the last step; the same command continues from the last checkpoint."
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
