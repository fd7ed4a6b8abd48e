"""Low-rank adapters of peft, on the language model only. The reference model is the base model without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

from torch import nn

from openril.errors import ModelError
from openril.models.freezing import module_group
from openril.recipe.schema import LoraConfig


def add_adapters(model: nn.Module, lora: LoraConfig) -> nn.Module:
    """Add LoRA to the named linear layers outside the vision side, and freeze everything else.

    Raises:
        ModelError: No layer has one of the names.
    """
    from peft import LoraConfig, get_peft_model

    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.rsplit(".", 1)[-1] in lora.target_modules
        and module_group(name) not in ("vision_tower", "projector")
    ]
    if not targets:
        raise ModelError(f"student.lora.target_modules: the model has no linear layer {', '.join(lora.target_modules)}")
    alpha: Any = lora.alpha  # annotated as int in peft, which divides it by r and takes any number
    config = LoraConfig(r=lora.r, lora_alpha=alpha, lora_dropout=lora.dropout, target_modules=targets)
    # peft puts adapters where their layers' weights are. On the meta device their first values would be lost.
    layers: list[Any] = [layer for n in targets if (layer := cast(Any, model.get_submodule(n))).weight.is_meta]
    waiting = [layer.weight for layer in layers]
    for layer, weight in zip(layers, waiting, strict=True):
        layer.weight = nn.Parameter(weight.new_zeros((), device="cpu").expand(weight.shape))
    adapted = get_peft_model(model, config)
    for layer, weight in zip(layers, waiting, strict=True):
        layer.weight = weight.requires_grad_(False)
    return adapted


def is_adapted(model: Any) -> bool:
    return hasattr(model, "disable_adapter") and hasattr(model, "get_base_model")


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Switch the adapters off for a while: the model is then the reference model of a LoRA run."""
    with model.disable_adapter() if is_adapted(model) else nullcontext():
        yield


def base_model(model: Any) -> Any:
    """Return the transformers model inside its adapters, or the model itself if it has none."""
    return model.get_base_model() if is_adapted(model) else model
