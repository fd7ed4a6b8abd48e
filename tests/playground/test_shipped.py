"""The models that come with the package are taken from a folder of `make playground`, all of them or none."""

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


def test_checkpoints_take_the_place_of_those_that_were_there(tmp_path: Path) -> None:
    take(made(tmp_path / "old", "old"), tmp_path / "package")
    (tmp_path / "package" / "judge" / "left.txt").write_text("of the old one")
    size = take(made(tmp_path / "new", "newer"), tmp_path / "package")
    assert size == len(CHECKPOINTS) * len("{}newer")
    assert {(tmp_path / "package" / n / "model.safetensors").read_text() for n in CHECKPOINTS} == {"newer"}
    assert not (tmp_path / "package" / "judge" / "left.txt").exists()


def test_a_missing_checkpoint_is_named_and_nothing_is_copied(tmp_path: Path) -> None:
    folder = made(tmp_path / "models", "x")
    (folder / "teacher_b" / "config.json").unlink()
    with pytest.raises(ModelError, match="holds no teacher_b; train them with `make playground`"):
        take(folder, tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_models_too_large_for_a_package_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "MOST_BYTES", 20)
    with pytest.raises(DataError, match="MB together"):
        take(made(tmp_path / "models", "x" * 10), tmp_path / "package")


def test_the_package_has_every_checkpoint_and_is_small() -> None:
    assert all((WEIGHTS / name / "config.json").is_file() for name in CHECKPOINTS)
    assert sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file()) < 12e6
    assert not [f for f in WEIGHTS.rglob("*") if f.suffix in (".bin", ".pt", ".pkl")]
