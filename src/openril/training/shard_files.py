"""Optimizer states as safetensors files, without pickle: one file, or one of each process where weights are sharded.

Tensors are named ``<parameter number>.<key>``, and the metadata holds the parameter groups. A sharded run writes
``optimizer_<name>-00001-of-00002.safetensors`` and so on. Each part holds the rows of its process, and its metadata the
number of the first row of each tensor. Any number of processes reads the rows it needs from either layout.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from openril.errors import StateError
from openril.training.sharding import rows


def save_optimizer(folder: Path, name: str, optimizer: Any, process: int = 0, processes: int = 1) -> None:
    """Write an optimizer's state to ``folder``. Every process must call this; of a whole state the first one writes."""
    state = optimizer.state_dict()
    parameters = _parameters(optimizer)
    sharded = any(isinstance(p, DTensor) for p in parameters)
    if process and not sharded:
        return
    tensors: dict[str, Tensor] = {}
    first_rows: dict[str, int] = {}
    for number, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, DTensor):
                first_rows[f"{number}.{key}"] = rows(value).start
                value = value.to_local()
            elif process:
                continue
            tensors[f"{number}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    groups = [{k: v for k, v in g.items() if not isinstance(v, Tensor)} for g in state["param_groups"]]
    metadata = {"param_groups": json.dumps(groups), "first_rows": json.dumps(first_rows)}
    part = f"-{process + 1:05d}-of-{processes:05d}" if sharded else ""
    save_file(tensors, folder / f"optimizer_{name}{part}.safetensors", metadata=metadata)


def load_optimizer(folder: Path, name: str, optimizer: Any) -> None:
    """Restore what ``save_optimizer`` wrote, on any number of processes; each reads its own rows only.

    Raises:
        StateError: Files or rows are missing, or the optimizer has other parameters.
    """
    paths = optimizer_files(folder, name)
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        saved_groups = json.loads(files[0].metadata()["param_groups"])
        groups = optimizer.state_dict()["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved_groups]:
            raise StateError(
                f"{paths[0]}: the model has other trainable parameters. Continue with the recipe that the run began with."
            )
        parts: dict[str, list[tuple[int, Any]]] = {}
        for file in files:
            first_rows = json.loads(file.metadata().get("first_rows", "{}"))
            for key in file.keys():  # noqa: SIM118 (it is no dictionary)
                parts.setdefault(key, []).append((first_rows.get(key, 0), file.get_slice(key)))
        parameters = _parameters(optimizer)
        state: dict[int, dict[str, Tensor]] = {}
        for key, slices in parts.items():
            number, _, entry = key.partition(".")
            parameter = parameters[int(number)]
            state.setdefault(int(number), {})[entry] = _read(f"{paths[0]}, {key}", slices, parameter)
    merged = [{**now, **saved} for now, saved in zip(groups, saved_groups, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": merged})


def optimizer_files(folder: Path, name: str) -> list[Path]:
    """Return an optimizer's files in the order of their rows; checkpoints of earlier versions spell its name differently.

    Raises:
        StateError: There are none, or a part is missing.
    """
    whole = [folder / f"{word}_{name}.safetensors" for word in ("optimizer", "optimiser")]
    if found := [path for path in whole if path.exists()]:
        return found[:1]
    parts = sorted(folder.glob(f"optimizer_{name}-*-of-*.safetensors"))
    count = int(parts[0].stem.rpartition("-")[2]) if parts else 1
    if len(parts) != count:
        raise StateError(
            f"{folder}: expected {count} files of the {name}'s optimizer, got {len(parts)}. Restore them, or remove the"
            " folder to continue from the checkpoint before it."
        )
    return parts


def _read(what: str, slices: Sequence[tuple[int, Any]], parameter: Tensor) -> Tensor:
    """Read this process's rows of a parameter's state from (first row, rows of a file), or a number such as the step."""
    if not slices[0][1].get_shape():
        return slices[0][1][...]
    held = rows(parameter) if isinstance(parameter, DTensor) else range(parameter.shape[0])
    shapes = [(first, file.get_shape()) for first, file in slices]
    if sum(shape[0] for _, shape in shapes) != parameter.shape[0] or shapes[0][1][1:] != list(parameter.shape[1:]):
        found = " + ".join(str(tuple(shape)) for _, shape in shapes)
        raise StateError(
            f"{what}: expected rows of {tuple(parameter.shape)}, got {found}. Continue with the same recipe."
        )
    overlaps = [
        (file, max(held.start, first) - first, min(held.stop, first + shape[0]) - first)
        for (first, shape), (_, file) in zip(shapes, slices, strict=True)
    ]
    pieces = [file[start:stop] for file, start, stop in overlaps if start < stop]
    local = torch.cat(pieces) if pieces else slices[0][1][:1][:0]
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _parameters(optimizer: Any) -> list[Tensor]:
    """Return the parameters in the order of their numbers in a state."""
    return [p for group in optimizer.param_groups for p in group["params"]]
