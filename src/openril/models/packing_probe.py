"""Decide by trial whether a model may run what the responses of a group share only once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from openril.models.group_attention import CannotPack
from openril.models.packing import GroupTokens

# How far the mean difference of a trial may be from 0, by the type of the weights: rounding, with a wide margin.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4}


class PackingProbe:
    """Whether one model packs. It is tried on the first groups, and again on the first images.

    Text proves nothing about images, whose tokens may attend to each other, so the first images need another trial.

    Args:
        enabled: If False, nothing is tried and the model never packs.
        who: The model's role, with which the warning begins.
        warn: Receives the warning when packing is refused.
        gather: Returns a value of this process in a list with those of all others, so that all decide alike.
        unit: What ``compare`` measures, for the warning.
        widen: Enters a context in which 16-bit copies of the weights, which a sharded model computes with, are float32.
    """

    def __init__(
        self,
        enabled: bool,
        who: str,
        warn: Callable[[str], None],
        *,
        gather: Callable[[list[str]], list[str]] = lambda reasons: reasons,
        unit: str = "nats a token",
        widen: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.state: Literal["not tried", "on for text", "on for images", "off"] = "not tried" if enabled else "off"
        self.who = who
        self.warn = warn
        self.gather = gather
        self.unit = unit
        self.widen = widen

    @property
    def on(self) -> bool | None:
        """Whether the model packs; None before the first trial."""
        return None if self.state == "not tried" else self.state != "off"

    def due(self, images: bool) -> bool:
        """Return whether a trial is needed before the next groups, which hold images or not."""
        return self.state == "not tried" or (self.state == "on for text" and images)

    @torch.no_grad()
    def run(self, model: nn.Module, compare: Callable[[], float], *, images: bool) -> None:
        """Try packing, and warn if it cannot be used.

        Args:
            model: The transformers model, named in the warning. It is in evaluation mode during the trial.
            compare: Runs both passes and returns their mean difference; raises CannotPack if there is no packed pass.
            images: Whether ``compare`` runs prompts with images.
        """
        reason = ""
        try:
            with evaluating(model), self.widen(), full_precision(model):
                allowed = tolerance(next(model.parameters()).dtype)
                difference = compare()
        except CannotPack as e:
            reason = str(e)
        else:
            if not difference <= allowed:  # NaN is refused too
                reason = f"it would be off by {difference:.2g} {self.unit}, more than rounding ({allowed:g})"
        reason = next(filter(None, self.gather([reason])), "")
        self.state = "off" if reason else "on for images" if images else "on for text"
        if reason:
            self.warn(
                f"{self.who}: {type(model).__name__} cannot run a shared prompt once ({reason}). Every response runs with"
                " its own copy of the prompt, which is slower."
            )


def trial_group(group: GroupTokens) -> GroupTokens:
    """Return a small group that shows every possible error: several responses, each of several tokens."""
    completions = [c if len(c) > 3 else c.repeat(4) for c in group.completions]
    return GroupTokens(group.prompt, (2 * completions)[:3])


def tolerance(dtype: torch.dtype) -> float:
    """Return the mean difference that still counts as rounding when the weights have this type."""
    return _ROUNDING.get(dtype, 0.05)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and restore each one's mode afterwards."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Compute in the precision of the weights: without autocast, and float32 without TF32 or bfloat16 products.

    Either would hide a small error behind its rounding, or report rounding as an error. Flash attention takes only
    16-bit numbers, so weights of more bits use torch's attention meanwhile. Linear layers whose frozen weights are stored
    in fewer bits (freezing.round_products) widen them one layer at a time.
    """
    parameter = next(model.parameters())
    narrow: list[Any] = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.dtype != parameter.dtype]
    backends: Any = torch.backends
    switches: list[tuple[Any, str, Any]] = [
        (backends.cuda.matmul, "allow_tf32", False),
        (backends.cudnn, "allow_tf32", False),
    ]
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # torch 2.9 and newer
        products = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
        switches = [(home, "fp32_precision", "ieee") for home in products]
    if parameter.dtype.itemsize > 2:
        configs: list[Any] = [m.config for m in model.modules() if hasattr(m, "config")]
        # The property without "internal" would change the configurations inside too, and not restore them.
        name = "_attn_implementation_internal"
        switches += [(c, name, "sdpa") for c in configs if "flash" in (getattr(c, name) or "")]
    before = [(home, name, getattr(home, name)) for home, name, _ in switches]
    try:
        for switch in switches:
            setattr(*switch)
        for layer in narrow:
            layer.forward = partial(_widened, layer)
        with torch.autocast(parameter.device.type, enabled=False):
            yield
    finally:
        for switch in before:
            setattr(*switch)
        for layer in narrow:
            del layer.forward


def _widened(layer: nn.Linear, states: Tensor) -> Tensor:
    bias = layer.bias.to(states.dtype) if layer.bias is not None else None
    return nn.functional.linear(states, layer.weight.to(states.dtype), bias)
