"""AdamW and the learning rate as a function of the step: no scheduler state to save or to get wrong on resume."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from openril.recipe.schema import OptimizerConfig


def build_optimizer(parameters: Iterable[nn.Parameter], settings: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that train, in one fused pass over each where the device has one."""
    trainable = [p for p in parameters if p.requires_grad]
    return torch.optim.AdamW(
        trainable,
        fused=all(p.device.type in ("cpu", "cuda") for p in trainable),
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )


def learning_rate(settings: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (0-based) of ``total_steps``.

    Warmup rises linearly and reaches the peak after ``warmup_steps``; linear and cosine then fall to
    ``final_learning_rate`` at the last step.
    """
    peak, final = settings.learning_rate, settings.final_learning_rate
    if step < settings.warmup_steps:
        return peak * (step + 1) / (settings.warmup_steps + 1)
    if settings.schedule == "constant":
        return peak
    done = (step - settings.warmup_steps) / max(1, total_steps - 1 - settings.warmup_steps)
    done = min(1.0, done)
    if settings.schedule == "linear":
        return peak + (final - peak) * done
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizer: Any, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
