"""The command `ril bench` on a very small model with all contenders."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from openril.benchmarking.plan import Cell
from openril.benchmarking.session import CellResult
from openril.cli import main
from openril.stages import bench


def test_a_whole_run_of_all_contenders(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "figures.json"
    arguments = ["bench", "--shape", "micro-16-4-4-bfloat16", "--repeats", "1", "--threads", "1", "--device", "cpu"]
    assert main([*arguments, "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert set(figures["ratios"]) == {"update", "update_long", "sampling", "step", "memory_long"}
    assert {"matmul_share", "shapes", "versions", "limits", "machine", "models"} <= set(figures)
    assert figures["versions"]["trl"] and figures["failures"] == []
    (cell,) = figures["shapes"]
    assert cell["precision"] == "bfloat16"
    contenders = cell["contenders"]
    assert list(contenders) == ["trl", "plain", "ours"]
    # All do the same work: equal prompts and trained weights; `exactly` checks the responses of every measurement.
    assert len({c["prompt_tokens"] for c in contenders.values()}) == 1
    assert len({c["trainable_parameters"] for c in contenders.values()}) == 1
    assert all(c["settings"]["precision"] == "bfloat16" and c["fast_path_off"] == [] for c in contenders.values())
    assert contenders["ours"]["settings"]["packed"] and not contenders["plain"]["settings"]["packed"]
    for name, contender in contenders.items():
        measured = contender["measured"]
        parts = {"update", "step", "memory"} | ({"sampling"} if name != "plain" else set())
        assert parts <= set(measured)
        assert all(measured[p]["seconds"]["median"] > 0 for p in parts)
        update = measured["update"]
        assert {"reference", "optimizer", "forward_backward"} <= set(update["parts"])
        assert sum(update["parts"].values()) == pytest.approx(update["seconds"]["median"])
        assert measured["step"]["parts"]["sampling"] > 0
    assert contenders["ours"]["measured"]["step"]["parts"]["discriminator"] > 0
    assert set(cell["ratios"]["trl"]) == {"update", "sampling", "step", "memory"}
    for part in ("update", "sampling", "step"):
        theirs = contenders["trl"]["measured"][part]["seconds"]["median"]
        ours = contenders["ours"]["measured"][part]["seconds"]["median"]
        assert cell["ratios"]["trl"][part]["median"] == pytest.approx(theirs / ours)
    out = capsys.readouterr().out
    assert "trl / ours" in out and "micro" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "nothing"], "nothing"),
        (["--json", "/no/such/folder/x.json"], "/no/such/folder/x.json"),
        (["--contenders", "verl"], "verl"),
        (["--repeats", "0"], "--repeats"),
        (["recipe.yaml"], "recipe.yaml"),
        (["--quik"], "--quik"),
    ],
)
def test_bad_flags_are_refused_with_their_name(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


class StoppedSession:
    """A session that measures one shape at once and is interrupted in the second."""

    machine = SimpleNamespace(about={"versions": {}, "machine": {}})

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.calls = 0

    def run(self, cell: Cell) -> CellResult:
        self.calls += 1
        if self.calls == 2:
            raise KeyboardInterrupt
        return CellResult(cell)

    def close(self) -> None:
        pass


def test_an_interrupted_run_keeps_the_shapes_that_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(bench, "Session", StoppedSession)
    path = tmp_path / "figures.json"
    assert main(["bench", "--device", "cpu", "--shape", "micro", "--json", str(path)]) == 130
    figures = json.loads(path.read_text())
    assert [shape["name"] for shape in figures["shapes"]] == ["micro-200-32-8"]
    assert (figures["settings"]["shapes_measured"], figures["settings"]["shapes_planned"]) == (1, 12)
    error = capsys.readouterr().err
    assert "1 of 12" in error and str(path) in error
    assert main(["bench", "--device", "cpu", "--shape", "micro"]) == 130
    assert "nothing was written" in capsys.readouterr().err


def test_help_names_models_and_shapes(capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    assert "qwen2_5_vl_3b" in out and "--quick" in out and "tiny-1000-32-16" in out
