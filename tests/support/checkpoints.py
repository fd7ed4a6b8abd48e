"""Compare checkpoints of two runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

TIMES = ("time/", "memory/")


def files(folder: Path) -> dict[str, Any]:
    """Every tensor and every plain value a checkpoint holds."""
    out: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        out |= {f"{path.relative_to(folder)}:{k}": v for k, v in load_file(path).items()}
    for name in ("rng_0.json", "state.json"):
        out[name] = json.loads((folder / name).read_text())
    for name in ("replay.jsonl", "gate.json", "retry.jsonl"):
        if (folder / name).exists():
            out[name] = (folder / name).read_text()
    return out


def assert_same(a: Path, b: Path) -> None:
    left, right = files(a), files(b)
    assert left.keys() == right.keys()
    assert any("optimizer_student" in k for k in left) and any(k.startswith("discriminator/") for k in left)
    for key, value in left.items():
        same = torch.equal(value, right[key]) if isinstance(value, torch.Tensor) else value == right[key]
        assert same, key
