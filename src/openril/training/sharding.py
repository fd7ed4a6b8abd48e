"""Shard weights, gradients and optimizer states over the processes (ZeRO-3) with torch's ``fully_shard``.

Every decoder layer of the language model is a unit, gathered while it runs. Everything else (embeddings, final norm, LM
head, and a vision side that trains) is in the root unit, gathered from the beginning of a pass to the end of its backward
pass. A frozen vision side is whole in every process, because its outputs are cached, so that processes run it unequally
often, and what runs unequally often must not communicate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from openril.models.adapters import base_model
from openril.models.freezing import module_group
from openril.models.loading import PendingWeights


def shard(root: nn.Module, transformer: nn.Module, *, compute: torch.dtype | None = None, head: Any = None) -> None:
    """Shard ``root`` in place. Every process must call this with equal weights, or with weights on the meta device.

    Args:
        root: The module whose ``forward`` is called; set which parameters train before.
        transformer: The transformers model in it.
        compute: Type in which weights are gathered; None for their own. Gradients are then reduced in float32.
        head: A module in it whose weights are gathered in their own type.
    """
    # cast_forward_inputs would rebuild dataclasses, so that every layer would get its own group layout and masks.
    plain = MixedPrecisionPolicy(cast_forward_inputs=False)
    mixed = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False) if compute else plain
    for layer in decoder_layers(transformer):
        fully_shard(layer, mp_policy=mixed, reshard_after_forward=True)
    if head is not None:
        fully_shard(head, mp_policy=plain, reshard_after_forward=True)
    fully_shard(root, mp_policy=mixed, reshard_after_forward=False, ignored_params=frozen_vision(root))


def decoder_layers(transformer: Any) -> list[nn.Module]:
    """Return the decoder layers of a transformers model's language part, each of which runs once a pass."""
    return list(base_model(transformer).get_decoder().layers)


def frozen_vision(root: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of vision tower and projector that do not train."""
    sides = ("vision_tower", "projector")
    return {p for name, p in root.named_parameters() if not p.requires_grad and module_group(name) in sides}


def is_sharded(module: Any) -> TypeGuard[FSDPModule]:
    """Return whether ``shard`` was called on the module."""
    return isinstance(module, FSDPModule)


def units(root: Any) -> list[FSDPModule]:
    """Return the sharded units, the root first."""
    return [m for m in root.modules() if isinstance(m, FSDPModule)]


def reshard(module: Any) -> None:
    """Free gathered weights after passes that no backward pass follows. Does nothing for other modules."""
    if is_sharded(module):
        # It also forgets the order of the passes, from which the next backward pass would gather in advance.
        module.reset_iter_state()


@contextmanager
def whole(root: Any) -> Iterator[None]:
    """Hold all weights in this process inside, so that parts of the module run without communication.

    Every process must enter it, and may then run what it likes, except training. Does nothing for other modules.
    """
    if not is_sharded(root):
        yield
        return
    first, *others = _started(root)
    for unit in (first, *others):
        unit.unshard()
    first.set_reshard_after_forward(False)
    try:
        yield
    finally:
        for unit in others:
            unit.set_reshard_after_forward(True, recurse=False)
        reshard(root)


def _started(root: FSDPModule) -> list[FSDPModule]:
    # Otherwise the first layer that runs, or is gathered, alone would take itself for the root.
    fully_shard.state(root)._lazy_init()  # type: ignore[attr-defined]
    return units(root)


@contextmanager
def in_float32(root: Any) -> Iterator[None]:
    """Compute with float32 copies of gathered 16-bit weights inside, one layer at a time, without gradients.

    For comparisons that the rounding of 16-bit products would blur. Afterwards the root unit is gathered, and ``reshard``
    frees it. Does nothing for other modules.
    """
    if not is_sharded(root):
        yield
        return
    first, *others = parts = _started(root)
    innermost = {m: unit for unit in parts for m in unit.modules()}  # type: ignore[attr-defined]
    owned: dict[FSDPModule, list[nn.Module]] = {unit: [] for unit in parts}
    for module, unit in innermost.items():
        owned[unit].append(module)
    before: dict[FSDPModule, list[tuple[nn.Module, str, nn.Parameter]]] = {}

    def widen(unit: Any, *_: Any) -> None:
        found = [(m, n, p) for m in owned[unit] for n, p in m._parameters.items() if p is not None]
        before[unit] = [(m, n, p) for m, n, p in found if p.dtype in (torch.bfloat16, torch.float16)]
        # Tied weights stay one tensor.
        wide = {p: nn.Parameter(p.detach().float(), requires_grad=False) for _, _, p in before[unit]}
        for m, n, p in before[unit]:
            m._parameters[n] = wide[p]

    def narrow(unit: Any, *_: Any) -> None:
        for m, n, p in before.pop(unit):
            m._parameters[n] = p

    first.unshard()
    widen(first)
    layers: list[Any] = list(others)
    hooks = [layer.register_forward_pre_hook(widen) for layer in layers]
    hooks += [layer.register_forward_hook(narrow, prepend=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for unit in list(before):  # the root, and a layer that raised
            narrow(unit)


def rows(parameter: DTensor) -> range:
    """Return the rows of a sharded parameter that this process holds: equal parts, of which the last are smaller or empty."""
    size = -(-parameter.shape[0] // parameter.device_mesh.size())
    first = min(parameter.shape[0], size * parameter.device_mesh.get_local_rank())
    return range(first, first + parameter.to_local().shape[0])


def fill(root: nn.Module, pending: PendingWeights, device: torch.device) -> None:
    """Read the weights that are still on the meta device from the checkpoint, of sharded ones only this process's rows."""
    inside = set(root.modules())
    for path in pending.files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no dictionary)
                places = [(m, leaf) for m, leaf in pending.places.get(key, []) if m in inside]
                if not places:
                    continue
                module, leaf = places[0]
                tensor: Any = module._parameters.get(leaf)
                if tensor is None:
                    module._buffers[leaf] = file.get_tensor(key).to(device)
                    continue
                if not tensor.is_meta:
                    continue
                held = rows(tensor) if isinstance(tensor, DTensor) else None
                stored = file.get_slice(key)
                value = stored[held.start : held.stop] if held is not None else stored[...]
                value = value.to(device, tensor.dtype, copy=True)  # the file may be memory that is mapped
                if held is not None:
                    mesh, like = tensor.device_mesh, {"shape": tensor.shape, "stride": tensor.stride()}
                    value = DTensor.from_local(value, mesh, tensor.placements, run_check=False, **like)
                made = nn.Parameter(value, requires_grad=tensor.requires_grad)
                for module, leaf in places:
                    module._parameters[leaf] = made
    empty = [name for name, p in root.named_parameters() if p.is_meta]
    assert not empty, f"no file holds {empty[:3]}"


def share_vision(source: Any, target: Any) -> None:
    """Let a transformers model use another's frozen vision parameters where it has equal ones, so that one copy is held."""
    frozen = frozen_vision(source)
    kept = {name: p for name, p in source.named_parameters() if p in frozen}
    for name, p in list(target.named_parameters()):
        other = kept.get(name)
        if other is None or p.requires_grad or p.dtype != other.dtype or not torch.equal(p, other):
            continue
        path, _, leaf = name.rpartition(".")
        target.get_submodule(path)._parameters[leaf] = other


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's part of a whole tensor that belongs to a parameter, or the tensor if it is not sharded."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
