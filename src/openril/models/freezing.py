"""Choose the parameters that train, by the module groups of the paper's Table 5c and of the vision side."""

from __future__ import annotations

import re
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from openril.errors import ModelError
from openril.recipe.schema import ModuleGroup

# The first match wins. The vision side comes first, because its blocks have attention, norms and MLPs too.
_PATTERNS: tuple[tuple[ModuleGroup, re.Pattern[str]], ...] = (
    (
        "projector",
        re.compile(
            r"\b(multi_modal_projector|connector|modality_projection|mlp1|image_newline|"
            r"visual\.(merger|deepstack_merger_list))\b"
        ),
    ),
    ("vision_tower", re.compile(r"\b(visual|vision_tower|vision_model|vision_encoder)\b")),
    ("lm_head", re.compile(r"\blm_head\b")),
    ("word_embeddings", re.compile(r"\b(embed_tokens|wte|word_embeddings)\b")),
    ("layer_norms", re.compile(r"(layernorm|layer_norm|\bnorm\b|[qk]_norm)")),
    ("attention", re.compile(r"\b(self_attn|attention)\b")),
    ("mlp_gate", re.compile(r"\bgate_proj\b")),
    ("mlp_up", re.compile(r"\bup_proj\b")),
    ("mlp_down", re.compile(r"\bdown_proj\b")),
)


def module_group(parameter_name: str) -> ModuleGroup | None:
    """Return the group of a parameter of any AutoModelForImageTextToText by its name, or None."""
    for group, pattern in _PATTERNS:
        if pattern.search(parameter_name):
            return group
    return None


def freeze(model: nn.Module, groups: Collection[ModuleGroup]) -> dict[str, int]:
    """Turn gradients off for the parameters of ``groups`` and on for all others.

    Tied weights (embeddings and LM head) are frozen if either group is named.

    Returns:
        Number of trainable parameters by group.

    Raises:
        ModelError: A named group has no parameters, or nothing is left to train.
    """
    found: set[ModuleGroup | None] = set()
    trainable: dict[str, int] = {}
    frozen_ids = set()
    names = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in names:
        group = module_group(name)
        found.add(group)
        if group in groups:
            frozen_ids.add(id(parameter))
    seen: set[int] = set()
    for name, parameter in names:
        parameter.requires_grad_(id(parameter) not in frozen_ids)
        if parameter.requires_grad and id(parameter) not in seen:
            label = module_group(name) or "other"
            trainable[label] = trainable.get(label, 0) + parameter.numel()
        seen.add(id(parameter))
    tied = not any("lm_head" in name for name, _ in names)
    if missing := [g for g in groups if g not in found and not (g == "lm_head" and tied)]:
        raise ModelError(
            f"{type(model).__name__} has no parameters in {', '.join(missing)};"
            f" it has {', '.join(sorted(g for g in found if g))}"
        )
    if not trainable:
        raise ModelError(f"freezing {', '.join(groups)} leaves nothing of {type(model).__name__} to train")
    return trainable


def _holds(dtype: torch.dtype, p: Tensor) -> bool:
    """Return whether a type holds a parameter's values exactly; on the meta device, those of its checkpoint."""
    if isinstance(p, DTensor):
        return False  # each process has other values
    if p.is_meta:
        return getattr(p, "stored", None) == dtype
    return torch.equal(p.to(dtype).to(p.dtype), p)


def round_products(model: nn.Module, dtype: torch.dtype, *, lossless: bool = False) -> None:
    """Store frozen weights as autocast with ``dtype`` rounds them in every call, which changes no result under autocast.

    These are the linear layers' that train nothing and share no weight with embeddings.

    Args:
        lossless: Only those whose values ``dtype`` holds exactly, as for checkpoints that are published in it. Others
            are part of what a run saves, which rounding would change.
    """
    shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        if not isinstance(module, nn.Linear) or id(module.weight) in shared:
            continue
        parameters = list(module.parameters(recurse=False))
        if any(p.requires_grad for p in parameters):
            continue
        if lossless and not all(_holds(dtype, p) for p in parameters):
            continue
        for p in parameters:  # the data alone, because modules of adapters inside the layer may train
            p.data = p.data.to(dtype)
