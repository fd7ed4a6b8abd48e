"""Checkpoints: everything a run needs to go on bit for bit, in files other tools read. No pickle anywhere.

A checkpoint folder holds ``student/`` and ``discriminator/`` (Hugging Face form), ``optimiser_<name>.safetensors``,
``rng_<process>.safetensors`` with ``rng_<process>.json``, ``state.json`` and ``recipe.yaml``, and ``replay.jsonl`` where
earlier responses are replayed. It is written beside its place and renamed, so a killed run leaves the one before it.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from openril.errors import StateError
from openril.storage import remove, write_json

_NAME = re.compile(r"^step_(\d{6,})$")


class Checkpoints:
    """The ``checkpoints/`` folder of a run."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps with a whole checkpoint, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [m and int(m[1]) for m in map(_NAME.match, os.listdir(self.folder))]
        return sorted(step for step in found if step is not None)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def latest(self) -> Path | None:
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def begin(self, step: int) -> Path:
        """An empty folder beside the checkpoint's place, for all processes to write into."""
        partial = self.folder / f".step_{step:06d}.partial"
        remove(partial)
        partial.mkdir(parents=True)
        return partial

    def partial(self, step: int) -> Path:
        return self.folder / f".step_{step:06d}.partial"

    def finish(self, step: int) -> Path:
        """Put the written folder in its place, and remove what is older than the last ``keep``."""
        place = self.path(step)
        remove(place)  # the same step again: the recipe was continued after its end
        os.replace(self.partial(step), place)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old))
        return place

    def sweep(self) -> None:
        """Remove what a killed writer left."""
        for path in self.folder.glob(".step_*.partial"):
            shutil.rmtree(path)


def save_optimiser(path: Path, optimiser: Any) -> None:
    """State of a torch optimiser as safetensors: tensors ``<parameter number>.<key>``, groups in the metadata."""
    state = optimiser.state_dict()
    tensors: dict[str, Tensor] = {}
    for number, entries in state["state"].items():
        for key, value in entries.items():
            tensors[f"{number}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    groups = [{k: v for k, v in g.items() if _plain(v)} for g in state["param_groups"]]
    save_file(tensors, path, metadata={"param_groups": json.dumps(groups)})


def load_optimiser(path: Path, optimiser: Any) -> None:
    """Inverse of ``save_optimiser``. Raises StateError when the optimiser has other parameters."""
    with safe_open(path, framework="pt") as f:
        saved_groups = json.loads((f.metadata() or {})["param_groups"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load_file(path).items():
        number, key = name.split(".", 1)
        state.setdefault(int(number), {})[key] = tensor
    groups = optimiser.state_dict()["param_groups"]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved_groups]:
        raise StateError(
            f"{path} belongs to a model with other trainable parameters; continue with the recipe it began with"
        )
    merged = [{**now, **saved} for now, saved in zip(groups, saved_groups, strict=True)]
    optimiser.load_state_dict({"state": state, "param_groups": merged})


def _plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def save_rng(folder: Path, process: int) -> None:
    """Random states of this process: Python, numpy, torch (CPU and every GPU)."""
    kind, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(numpy.asarray(keys).astype("int64"))}
    if torch.cuda.is_available():
        tensors |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    save_file(tensors, folder / f"rng_{process}.safetensors")
    python = random.getstate()
    write_json(
        folder / f"rng_{process}.json",
        {"python": [python[0], list(python[1]), python[2]], "numpy": [kind, position, has_gauss, gauss]},
    )


def load_rng(folder: Path, process: int) -> None:
    """Inverse of ``save_rng``. A process the checkpoint does not know (more processes than before) keeps its own."""
    path = folder / f"rng_{process}.safetensors"
    if not path.exists():
        return
    tensors = load_file(path)
    plain = json.loads((folder / f"rng_{process}.json").read_text())
    version, state, gauss = plain["python"]
    random.setstate((version, tuple(state), gauss))
    kind, position, has_gauss, cached = plain["numpy"]
    numpy.random.set_state((kind, tensors["numpy"].numpy().astype("uint32"), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda{i}"], i)


def write_progress(folder: Path, progress: dict[str, Any]) -> None:
    write_json(folder / "state.json", progress)


def read_progress(folder: Path) -> dict[str, Any]:
    """Raises StateError when the file is not there or not readable."""
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as e:
        raise StateError(f"{folder} is not a checkpoint of ours ({e}); remove it to go on from the one before") from e


def recipe_differences(saved: dict[str, Any], now: dict[str, Any], ignored: Callable[[str], bool]) -> list[str]:
    """Dotted keys whose values differ between two recipes (as plain data), apart from those ``ignored`` says yes to."""

    def walk(a: Any, b: Any, prefix: str) -> list[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            keys = dict.fromkeys([*a, *b])
            return [d for k in keys for d in walk(a.get(k), b.get(k), f"{prefix}.{k}" if prefix else str(k))]
        return [prefix] if a != b and not ignored(prefix) else []

    return walk(saved, now, "")
