"""One optimizer step: gradients made whole, checked, clipped, applied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from openril.errors import StateError


def take_step(
    accelerator: Accelerator, optimizer: Any, parameters: Sequence[nn.Parameter], max_grad_norm: float, what: str
) -> float:
    """Clip at ``max_grad_norm`` (0: not), step, forget the gradients; returns the norm before clipping.

    what: whose step, for the message. Raises StateError before anything is changed when the norm is not finite: one
    such step would make every weight NaN.
    """
    for p in parameters:
        if p.grad is None:  # parts no question of the batch used; with other processes they would be zero too
            p.grad = torch.zeros_like(p)
    norm = float(accelerator.clip_grad_norm_(list(parameters), max_grad_norm or float("inf")) or 0.0)
    if not math.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        raise StateError(
            f"{what}: the gradient norm is {norm}; its weights are as they were before this step. Lower the learning rate"
            " or look at the last step's rewards; the same command continues from the last checkpoint"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
