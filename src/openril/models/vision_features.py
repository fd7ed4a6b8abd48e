"""Run the vision side once per prompt: the output of its frozen part is kept and used again.

transformers' vision-language models take ready image features as ``mm_encoder_outputs``. What is kept depends on what
trains. If tower and projector are frozen, it is the features. If only the tower is frozen, it is the tower's output, and
the projector runs every time, with its gradient. If the tower trains, nothing is kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal

import torch
from cachetools import LRUCache
from torch import Tensor, nn

from openril.models.freezing import module_group
from openril.models.prompts import Prompt

Kept = Literal["features", "tower", "nothing"]


class _Outputs(SimpleNamespace):
    """Outputs of a vision side by name. transformers 5.24 asks what it returns for ``to_tuple``."""

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())


class FeatureCache:
    """Keep outputs of the vision side by key, up to ``max_bytes``; the least recently used are dropped first.

    They are kept on the CPU, so that they use no memory of the device. Several models may share a cache if their frozen
    parts have the same weights.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self._kept: LRUCache[Hashable, Any] = LRUCache(max_bytes, getsizeof=_size)

    @property
    def bytes(self) -> int:
        """Bytes of everything that is kept."""
        return int(self._kept.currsize)

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the output of ``key``. Its tensors are on the device where ``make`` put them, or on the CPU.

        Args:
            key: None is never kept.
            make: Computes the output if it is not kept.
        """
        if key is not None and key in self._kept:
            self.hits += 1
            return self._kept[key]
        self.misses += 1
        made = make()
        if key is not None and _size(made) <= self.max_bytes:
            self._kept[key] = _map(made, lambda t: t.to("cpu"))
        return made


class VisionFeatures:
    """Compute image features of prompts for one model.

    Args:
        model: A transformers vision-language model, without wrappers.
        store: Keeps the outputs of frozen parts.
        keep: What is kept; None decides by what trains. Models that share a store must keep the same.
    """

    def __init__(self, model: Any, store: FeatureCache | None = None, keep: Kept | None = None) -> None:
        self.model = model
        self.base = getattr(model, "model", model)
        self.store = store if store is not None else FeatureCache(0)
        self._parameters: Sequence[str] = ()
        if hasattr(self.base, "get_image_features") and "mm_encoder_outputs" in _arguments(model.forward):
            self._parameters = _arguments(self.base.get_image_features)
        self.tower = next((t for name in _TOWERS if isinstance(t := getattr(self.base, name, None), nn.Module)), None)
        self._patches = _convolution_of_patches(self.tower)
        self.keep: Kept = keep or self._by_training()

    @property
    def available(self) -> bool:
        """Whether the model takes ready features."""
        return bool(self._parameters)

    def __call__(self, prompts: Sequence[Prompt]) -> dict[str, Any] | None:
        """Return ``mm_encoder_outputs`` for prompts that follow each other in a row; None if they have no images."""
        outputs = [self._features(p) for p in prompts if p.vision]
        if not outputs:
            return None
        joined = _Outputs(pooler_output=_join([o.pooler_output for o in outputs]))
        if getattr(outputs[0], "deepstack_features", None) is not None:
            layers = zip(*(o.deepstack_features for o in outputs), strict=True)
            joined.deepstack_features = [_join(list(layer)) for layer in layers]
        return {"image": joined}

    def _by_training(self) -> Kept:
        trains = {module_group(name) for name, p in self.model.named_parameters() if p.requires_grad}
        if "vision_tower" in trains:
            return "nothing"
        if "projector" not in trains:
            return "features"
        return "tower" if self.tower is not None else "nothing"

    def _features(self, prompt: Prompt) -> Any:
        if self.keep == "nothing":
            return self._run(prompt)
        parameter = next(self.base.parameters())
        device, kind = parameter.device, parameter.device.type
        # Features that autocast rounded must not reach a pass in another precision.
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype
        key = None if prompt.images_key is None else (prompt.images_key, precision)
        if self.keep == "features":
            return _on(self.store.get(key, lambda: self._frozen(prompt)), device)
        mergers = self._mergers()
        if mergers:  # the projector is inside the tower
            kept = _on(self.store.get(key, lambda: self._unmerged(prompt)), device)
            last, *deepstack = (m(states.flatten(0, 1)) for m, states in zip(mergers, kept, strict=True))
            return _Outputs(
                pooler_output=(last,), deepstack_features=[(layer,) for layer in deepstack] if deepstack else None
            )
        kept = _on(self.store.get(key, lambda: self._tower_output(prompt)), device)
        with _answering(self.tower, lambda *args, **kwargs: _copy(kept)):
            return self._run(prompt)

    def _run(self, prompt: Prompt) -> Any:
        device = next(self.base.parameters()).device
        inputs = {k: v.to(device) for k, v in prompt.vision.items() if k in self._parameters}
        with _answering([self._patches] if self._patches is not None else [], self._embed_patches):
            return self.base.get_image_features(**inputs, return_dict=True)

    def _embed_patches(self, patches: Tensor) -> Tensor:
        """Compute a convolution over patches of the kernel's size as a matrix product, which is much faster."""
        conv: Any = self._patches
        return nn.functional.linear(patches.flatten(1), conv.weight.flatten(1), conv.bias)[..., None, None, None]

    @torch.no_grad()
    def _frozen(self, prompt: Prompt) -> Any:
        made = self._run(prompt)
        kept = _Outputs(pooler_output=made.pooler_output)
        if getattr(made, "deepstack_features", None) is not None:
            kept.deepstack_features = made.deepstack_features
        return kept

    def _mergers(self) -> list[nn.Module]:
        """Return the projectors inside Qwen's towers: of the last layer, then of the deepstack layers."""
        merger = getattr(self.tower, "merger", None)
        if not isinstance(merger, nn.Module):
            return []
        return [merger, *getattr(self.tower, "deepstack_merger_list", [])]

    @torch.no_grad()
    def _unmerged(self, prompt: Prompt) -> tuple[Tensor, ...]:
        """Return the input of each merger, float [merged tokens, patches of each, D]."""
        tower: Any = self.tower
        unit = int(tower.spatial_merge_size) ** 2

        def gather(states: Tensor) -> Tensor:
            return states.reshape(-1, unit * states.shape[-1])

        with _answering(self._mergers(), gather):
            made = self._run(prompt)
        layers = [made.pooler_output, *(getattr(made, "deepstack_features", None) or [])]
        return tuple((states := torch.cat(tuple(layer))).view(len(states), unit, -1) for layer in layers)

    @torch.no_grad()
    def _tower_output(self, prompt: Prompt) -> Any:
        seen: list[Any] = []
        tower: Any = self.tower
        handle = tower.register_forward_hook(lambda module, args, output: seen.append(_copy(output)))
        try:
            self._run(prompt)
        finally:
            handle.remove()
        assert len(seen) == 1, "the vision tower runs once a call"
        return seen[0]


_TOWERS = ("visual", "vision_tower", "vision_model")


def _convolution_of_patches(tower: nn.Module | None) -> nn.Module | None:
    """Return the patch embedding of Qwen's towers, which take separate patches."""
    conv = getattr(getattr(tower, "patch_embed", None), "proj", None)
    if isinstance(conv, nn.Conv3d) and conv.kernel_size == conv.stride and not any(conv.padding):
        return conv
    return None


def _arguments(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@contextmanager
def _answering(modules: Any, answer: Callable[..., Any]) -> Iterator[None]:
    """Replace the modules' forward by ``answer`` for a while."""
    modules = modules if isinstance(modules, list) else [modules]
    before = [m.__dict__.get("forward") for m in modules]
    for module in modules:
        module.forward = answer
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _join(parts: list[Any]) -> Any:
    """Join features of several prompts; models return one tensor, or one tensor per image."""
    if all(isinstance(p, Tensor) for p in parts):
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    return tuple(t for p in parts for t in ([p] if isinstance(p, Tensor) else p))


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, SimpleNamespace):
        return _Outputs(**{k: _map(v, change) for k, v in vars(value).items()})
    if isinstance(value, dict):  # transformers' outputs are dictionaries too
        changed = {k: _map(v, change) for k, v in value.items()}
        return changed if type(value) is dict else type(value)(**changed)
    if isinstance(value, list | tuple):
        return tuple(_map(v, change) for v in value)
    return value


def _size(value: Any) -> int:
    """Bytes of all tensors in ``value``."""
    sizes: list[int] = []
    _map(value, lambda t: sizes.append(t.numel() * t.element_size()) or t)  # type: ignore[func-returns-value]
    return sum(sizes)


def _on(value: Any, device: torch.device) -> Any:
    return _map(value, lambda t: t.to(device))


def _copy(value: Any) -> Any:
    """Copy the containers, because models write into the output object they get. Tensors are shared."""
    return _map(value, lambda t: t)
