"""A checkpoint is continued on another number of processes, sharded or not, also after a kill while the next was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from openril.storage import read_jsonl
from support.checkpoints import TIMES
from support.launch import launch

SCRIPT = Path(__file__).with_name("resumed.py")


@pytest.fixture(scope="module")
def runs(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two steps, in the order that continuing asks for; see resumed.py for what a job says."""
    folder = tmp_path_factory.mktemp("resumed")
    for processes, jobs in (
        (1, "mixed::one:0 lora::one:0"),
        (2, "mixed::two:1 mixed:two:two_two:1 mixed:one:one_two:1 lora::two:1 lora:two:two_two:1 mixed:two:two_ddp:0"
            " mixed:two:killed:1:kill"),
        (4, "mixed:two:two_four:1 lora:two:two_four:1 mixed:killed:killed:1"),
        (1, "mixed:two:two_one:0 lora:two:two_one:0"),
    ):  # fmt: skip
        done = launch(processes, SCRIPT, folder, tiny_qwen, *jobs.split())
        if jobs.endswith(":kill"):
            assert done.returncode != 0
            left = {path.name for path in (folder / "mixed-killed/checkpoints").iterdir()}
            assert left == {".step_000002.partial", "step_000001"}, done.stderr[-4000:]
        else:
            assert done.returncode == 0, done.stderr[-4000:]
    return folder


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the last checkpoint, with the rows of optimizer parts together."""
    parts: dict[str, list[torch.Tensor]] = {}
    for path in sorted((folder / "checkpoints/step_000002").rglob("*.safetensors")):
        if not path.name.startswith("rng_"):
            owner = (
                path.parent.name
                if "optimizer" not in path.name
                else path.name.split("-")[0].removesuffix(".safetensors")
            )
            for key, value in load_file(path).items():
                parts.setdefault(f"{owner}:{key}", []).append(value)
    return {key: torch.cat(values) if values[0].dim() else values[0] for key, values in parts.items()}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in read_jsonl(folder / "metrics.jsonl")]


@pytest.mark.parametrize("case", ["mixed", "lora"])
def test_as_many_processes_continue_bit_for_bit(case: str, runs: Path):
    whole, resumed = (runs / f"{case}-{name}" for name in ("two", "two_two"))
    a, b = contents(whole), contents(resumed)
    assert a.keys() == b.keys() and any("optimizer_student" in k for k in a) and any("discriminator:" in k for k in a)
    assert all(torch.equal(value, b[key]) for key, value in a.items())
    assert any(key.endswith(".average") for key in a) == (case == "lora")
    assert metrics(whole) == metrics(resumed)
    rollouts = [(folder / "rollouts/step_000002.jsonl").read_text() for folder in (whole, resumed)]
    assert rollouts[0] == rollouts[1]


@pytest.mark.parametrize(
    "name",
    [
        "mixed-two_ddp",
        "mixed-two_four",
        "mixed-two_one",
        "mixed-one_two",
        "mixed-killed",
        "lora-two_four",
        "lora-two_one",
    ],
)
def test_another_number_of_processes_continues_within_rounding(name: str, runs: Path):
    case, _, _ = name.partition("-")
    whole, resumed = contents(runs / f"{case}-one"), contents(runs / name)
    assert whole.keys() == resumed.keys()
    for key, value in whole.items():
        assert torch.allclose(value, resumed[key], rtol=0, atol=1e-6), f"{key}: {(value - resumed[key]).abs().max()}"
    for a, b in zip(metrics(runs / f"{case}-one"), metrics(runs / name), strict=True):
        assert all(b[k] == pytest.approx(v, abs=1e-6) for k, v in a.items() if k.startswith(("train/", "reward/")))
    parts = len(list((runs / name / "checkpoints/step_000002").glob("optimizer_student*")))
    assert parts == {"two": 2, "four": 4, "killed": 4}.get(name.split("_")[-1].split("-")[-1], 1)
    assert not list((runs / name / "checkpoints").glob(".step*"))
