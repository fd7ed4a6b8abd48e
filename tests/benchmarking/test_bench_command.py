"""`ril bench` as it is given: a very small model, all contenders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openril.cli import main


def test_a_whole_run_of_all_contenders(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "figures.json"
    arguments = ["bench", "--shape", "micro-16-4-4", "--repeats", "1", "--threads", "1", "--device", "cpu"]
    assert main([*arguments, "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert set(figures["ratios"]) == {"update", "update_long", "sampling", "step", "memory_long"}
    assert {"matmul_share", "shapes", "versions", "limits", "machine", "models"} <= set(figures)
    assert figures["versions"]["trl"] and figures["failures"] == []
    (cell,) = figures["shapes"]
    contenders = cell["contenders"]
    assert list(contenders) == ["trl", "plain", "ours"]
    # The same work: prompts, trained weights, and in `exactly` of every measurement the lengths of the responses.
    assert len({c["prompt_tokens"] for c in contenders.values()}) == 1
    assert len({c["trainable_parameters"] for c in contenders.values()}) == 1
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
        (["--shape", "nothing"], "there is no model 'nothing'"),
        (["--json", "/no/such/folder/x.json"], "a folder that exists"),
        (["--contenders", "verl"], "invalid choice: 'verl'"),
        (["--repeats", "0"], "--repeats"),
        (["recipe.yaml"], "unrecognized arguments"),
        (["--quik"], "unrecognized arguments"),
    ],
)
def test_bad_flags_are_refused_with_their_name(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_names_models_and_shapes(capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    assert "qwen2_5_vl_3b" in out and "--quick" in out and "tiny-1000-32-16" in out
