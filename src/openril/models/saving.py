"""Write models as ordinary Hugging Face folders in a stream of weights, also where these are sharded over processes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from openril.hf import submodule
from openril.models.adapters import base_model, is_adapted
from openril.storage import atomic_path, write_json

MAX_FILE_BYTES = 5 * 10**9
"""Bytes of the tensors in one file. The writing process holds at most these and one more tensor in host memory."""

_WEIGHTS = "model.safetensors"


def full_tensor(value: Tensor) -> Tensor:
    """Return a sharded tensor whole, and any other as it is. Every process must call this for a sharded one."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def full_weights(model: Any, *, widen: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of each weight with adapters merged, whole and on its device; tied weights once.

    Names are those of the model without its adapters. The model does not change. Sharded weights are gathered one at a
    time, so every process must iterate to the end.

    Args:
        widen: Convert bfloat16 weights to float32 before anything is added to them.
    """
    layers: dict[str, Any] = {}
    if is_adapted(model):
        from peft.tuners.lora import LoraLayer

        layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    seen: set[int] = set()
    with torch.no_grad():
        for key, value in model.state_dict(keep_vars=True).items():
            if id(value) in seen or (layers and "lora_" in key):
                continue
            seen.add(id(value))
            name = key.removeprefix("base_model.model.") if is_adapted(model) else key
            weight = full_tensor(value.detach())
            weight = weight.float() if widen and weight.dtype == torch.bfloat16 else weight
            if (layer := layers.get(key.removesuffix(".base_layer.weight"))) is not None and key.endswith(".weight"):
                weight = weight + _update(layer).to(weight)
            yield name.replace(".base_layer.", ".") if layers else name, weight


def checkpoint_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield what ``full_weights`` does under the names, and in the shapes, of the model's checkpoint."""
    base, weights = base_model(model), full_weights(model)
    convert = submodule("transformers.core_model_loading").revert_weight_conversion
    for part in ({name: value} for name, value in weights) if converts_one_by_one(base) else [dict(weights)]:
        yield from convert(base, part).items()


def _update(layer: Any) -> Tensor:
    """Return what the adapter adds to a linear layer's weight, like peft's ``get_delta_weight`` but from sharded parts."""
    [adapter] = layer.active_adapters
    a, b = (full_tensor(part[adapter].weight.detach()) for part in (layer.lora_A, layer.lora_B))
    if a.device.type == "cpu" and a.dtype in (torch.bfloat16, torch.float16):
        return ((b.float() @ a.float()) * layer.scaling[adapter]).to(a.dtype)
    return (b @ a) * layer.scaling[adapter]


def write_model(
    model: Any,
    folder: Path,
    processor: Any,
    *,
    dtype: torch.dtype | None = None,
    widen: bool = False,
    main: bool = True,
    extra: Mapping[str, dict[str, Tensor]] | None = None,
    max_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write a model, adapters merged, and its processor to ``folder``, atomically.

    Weights are gathered one at a time and written in files of up to ``max_bytes``, or in one file for a model whose
    checkpoint format joins several weights into one. Every process must call this for a sharded model.

    Args:
        dtype: The type that floating weights are converted to, in the files and in the configuration.
        widen: See ``full_weights``; the type is then float32 unless ``dtype`` says otherwise.
        main: Whether this process writes.
        extra: Further safetensors files of the folder, as their names and tensors.
    """
    base = base_model(model)
    dtype = torch.float32 if widen and dtype is None else dtype
    with atomic_path(folder) if main else nullcontext() as temporary:
        held: dict[str, Tensor] = {}
        splits: bool | None = None
        files, size, values = 0, 0, 0
        for name, value in full_weights(model, widen=widen):
            if temporary is None:
                continue
            value = value.to("cpu", dtype if dtype is not None and value.is_floating_point() else value.dtype)
            if held and sum(v.nbytes for v in held.values()) + value.nbytes > max_bytes:
                splits = converts_one_by_one(base) if splits is None else splits
                if splits:
                    files += 1
                    _write_part(base, temporary, files, held)
            held[name] = value
            size, values = size + value.nbytes, values + value.numel()
        if temporary is None:
            return
        _write_part(base, temporary, files + 1, held)
        name_parts(temporary, files + 1, {"total_parameters": values, "total_size": size})
        for file, tensors in (extra or {}).items():
            save_file(tensors, temporary / file)
        if dtype is not None:
            _set_dtype(temporary / "config.json", str(dtype).removeprefix("torch."))
        processor.save_pretrained(temporary)


def converts_one_by_one(base: Any) -> bool:
    """Return whether each weight alone becomes the same tensors of the checkpoint as all of them together.

    It does not where the checkpoint's format splits what the model holds in one tensor, or the reverse.
    """
    convert = submodule("transformers.core_model_loading").revert_weight_conversion
    weights = {name: torch.empty(value.shape, device="meta") for name, value in base.state_dict().items()}

    def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in convert(base, state).items()}

    try:
        alone = [item for name, value in weights.items() for item in shapes({name: value}).items()]
    except Exception:  # the conversion lacks the other tensors that it joins
        return False
    return len(dict(alone)) == len(alone) and dict(alone) == shapes(weights)


def _write_part(base: Any, folder: Path, number: int, held: dict[str, Tensor]) -> None:
    """Write the held tensors and the configuration, and let go of the tensors."""
    base.save_pretrained(folder, state_dict=dict(held), max_shard_size="1000GB")
    # Not the final name, because ``save_pretrained`` removes files that seem to be of an earlier checkpoint.
    os.replace(folder / _WEIGHTS, folder / f"part{number}")
    held.clear()


def name_parts(folder: Path, count: int, totals: dict[str, int]) -> None:
    """Give the written parts the names that ``from_pretrained`` expects, and write the index of several last."""
    if count == 1:
        os.replace(folder / "part1", folder / _WEIGHTS)
        return
    places: dict[str, str] = {}
    for number in range(1, count + 1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        os.replace(folder / f"part{number}", folder / name)
        with safe_open(folder / name, framework="pt") as f:
            places |= dict.fromkeys(f.keys(), name)
    write_json(folder / f"{_WEIGHTS}.index.json", {"metadata": totals, "weight_map": places})


def _set_dtype(path: Path, name: str) -> None:
    """Write the weights' type to a configuration, because ``save_pretrained`` writes that of the weights in memory."""

    def put(node: dict[str, Any]) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                put(value)
            elif key in ("dtype", "torch_dtype"):
                node[key] = name

    config = json.loads(path.read_text())
    put(config)
    write_json(path, config)
