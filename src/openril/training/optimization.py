"""AdamW and the learning rate as a function of the step, so that no scheduler state has to be saved and restored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from openril.recipe.schema import OptimizerConfig

# Values that are updated at a time, because the update needs float32 copies of them.
_CHUNK = 2**24


def build_optimizer(parameters: Iterable[nn.Parameter], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """Return AdamW over the parameters that train.

    It is torch's, in one fused pass over each parameter where the device has one, or ``CompensatedAdamW`` if a
    parameter is bfloat16.
    """
    trainable = [p for p in parameters if p.requires_grad]
    rate, betas, decay = settings.learning_rate, settings.betas, settings.weight_decay
    if any(p.dtype == torch.bfloat16 for p in trainable):
        return CompensatedAdamW(trainable, rate, betas, decay)
    fused = all(p.device.type in ("cpu", "cuda") for p in trainable)
    return torch.optim.AdamW(trainable, rate, betas, weight_decay=decay, fused=fused)


class CompensatedAdamW(torch.optim.Optimizer):
    """AdamW for bfloat16 weights that keeps what rounding takes from them.

    At a learning rate of 1e-6 nearly every update is smaller than half the distance to the next bfloat16 value, and would
    be lost. Like Kahan summation, the state ``remainder`` (int16) keeps the lost part; weight and remainder together are
    the float32 weight, bit for bit. The second moments are float32, because a decay of 0.999 is smaller than bfloat16's
    rounding too; the first moments have the weight's type. A parameter takes 8 bytes of state a value.
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float, eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
        if p.dtype == torch.bfloat16 and "remainder" not in state:
            state["remainder"] = torch.zeros_like(p, dtype=torch.int16)
        state["step"] += 1
        (beta1, beta2), step = group["betas"], float(state["step"])
        step_size, correction = group["lr"] / (1 - beta1**step), math.sqrt(1 - beta2**step)
        assert p.grad is not None
        tensors = [p, p.grad, state["exp_avg"], state["exp_avg_sq"], state.get("remainder", p)]
        tensors = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]  # values do not depend on each other
        for weight, gradient, first, second, remainder in zip(*map(_chunks, tensors), strict=True):
            g = gradient.float()
            mean = first.float().lerp_(g, 1 - beta1)
            first.copy_(mean)
            second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            whole = join(weight, remainder) if weight.dtype == torch.bfloat16 else weight
            whole.mul_(1 - group["lr"] * group["weight_decay"])
            whole.addcdiv_(mean, (second.sqrt() / correction).add_(group["eps"]), value=-step_size)
            if weight.dtype == torch.bfloat16:
                rounded, lost = split(whole)
                weight.copy_(rounded)
                remainder.copy_(lost)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state exactly: torch's own method would cast all of it to the parameter's type."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, parameters, strict=True):
            kinds = {
                "exp_avg": p.dtype,
                "exp_avg_sq": torch.float32,
                "remainder": torch.int16,
                "average": torch.float32,
            }
            for key, value in state_dict["state"].get(number, {}).items():
                if key in kinds:
                    self.state[p][key] = value.to(p.device, kinds[key], copy=True)


def split(whole: Tensor) -> tuple[Tensor, Tensor]:
    """Return a float32 tensor rounded to bfloat16, and the int16 remainder that ``join`` needs to restore it exactly."""
    bits = whole.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def join(rounded: Tensor, remainder: Tensor) -> Tensor:
    """Return the float32 tensor that was ``split``."""
    return ((rounded.view(torch.int16).int() << 16) + remainder.int()).view(torch.float32)


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield views of the tensor's rows, of about ``_CHUNK`` values each."""
    if tensor.dim() == 0 or tensor.numel() <= _CHUNK:
        yield tensor
        return
    yield from tensor.split(max(1, _CHUNK * len(tensor) // tensor.numel()))


def learning_rate(settings: OptimizerConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of optimizer step ``step`` (from 0) of ``total_steps``.

    Warmup rises linearly and reaches the peak after ``warmup_steps``; linear and cosine then fall to
    ``final_learning_rate`` at the last step.
    """
    peak, final = settings.learning_rate, settings.final_learning_rate
    if step < settings.warmup_steps:
        return peak * (step + 1) / (settings.warmup_steps + 1)
    if settings.schedule == "constant":
        return peak
    done = min(1.0, (step - settings.warmup_steps) / max(1, total_steps - 1 - settings.warmup_steps))
    if settings.schedule == "linear":
        return peak + (final - peak) * done
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizer: Any, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value
