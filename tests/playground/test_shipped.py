"""All checkpoints of a folder of `make playground` are copied to playground/weights, or none."""

from pathlib import Path

import pytest

from openril.errors import DataError, ModelError
from playground.models import shipped
from playground.models.shipped import CHECKPOINTS, WEIGHTS, take


def made(folder: Path, text: str) -> Path:
    for name in CHECKPOINTS:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
        (folder / name / "model.safetensors").write_text(text)
    return folder


def test_checkpoints_are_replaced(tmp_path: Path) -> None:
    take(made(tmp_path / "old", "old"), tmp_path / "weights")
    (tmp_path / "weights" / "judge" / "left.txt").write_text("old")
    size = take(made(tmp_path / "new", "newer"), tmp_path / "weights")
    assert size == len(CHECKPOINTS) * len("{}newer")
    assert {(tmp_path / "weights" / n / "model.safetensors").read_text() for n in CHECKPOINTS} == {"newer"}
    assert not (tmp_path / "weights" / "judge" / "left.txt").exists()


def test_a_missing_checkpoint_is_named_and_nothing_is_copied(tmp_path: Path) -> None:
    folder = made(tmp_path / "models", "x")
    (folder / "teacher_b" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"\bteacher_b\b.*make playground"):
        take(folder, tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_models_that_are_too_large_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "MOST_BYTES", 20)
    with pytest.raises(DataError, match=r"\bMB\b"):
        take(made(tmp_path / "models", "x" * 10), tmp_path / "weights")


def test_the_weights_have_every_checkpoint_and_are_small() -> None:
    assert all((WEIGHTS / name / "config.json").is_file() for name in CHECKPOINTS)
    assert sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file()) < 12e6
    assert not [f for f in WEIGHTS.rglob("*") if f.suffix in (".bin", ".pt", ".pkl")]
