"""Trained models of the fourteen skills: those in playground/weights, or a folder of ``make playground``.

``python -m playground.models.shipped --take runs/playground`` copies the models of a folder to playground/weights.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from openril.errors import DataError, ModelError, OpenRILError
from openril.storage import atomic_path

StudentName = Literal["qwen", "internvl"]

WEIGHTS = Path(__file__).parents[1] / "weights"
"""Folder of the checkpoints in the repository, in the layout of `make playground`."""
CHECKPOINTS = (
    "student_qwen/base", "student_qwen/sft", "student_internvl/base", "student_internvl/sft",
    "teacher_a", "teacher_b", "judge",
)  # fmt: skip
MOST_BYTES = 12_000_000
"""Largest size of all checkpoints together."""
FIX = "Train them with `make playground` (half an hour to an hour) and name its folder with --models."


def find_models(student: StudentName = "qwen", folder: Path | None = None) -> dict[str, Path]:
    """Return the checkpoint folders of "student", "teacher_a", "teacher_b" and "judge".

    Args:
        student: Which of the two students.
        folder: A folder in the layout of `make playground` instead of playground/weights. The student may also be in
            ``student_qwen`` itself instead of ``student_qwen/sft``.

    Raises:
        ModelError: With the checkpoints that are missing.
    """
    root = WEIGHTS if folder is None else folder.expanduser()
    warm = root / f"student_{student}" / "sft"
    found = {
        "student": warm if (warm / "config.json").is_file() else warm.parent,
        **{name: root / name for name in ("teacher_a", "teacher_b", "judge")},
    }
    missing = [str(path) for path in found.values() if not (path / "config.json").is_file()]
    if not (found["judge"] / "agreement.json").is_file() and str(found["judge"]) not in missing:
        missing.append(str(found["judge"] / "agreement.json"))
    if missing:
        raise ModelError(f"models are missing: no {', no '.join(missing)}. {FIX}")
    return found


@dataclass
class Settings:
    """Copy the models of `make playground` to playground/weights."""

    take: Path
    """Folder of `make playground`."""


def take(folder: Path, target: Path = WEIGHTS) -> int:
    """Replace the checkpoints in ``target`` by those of ``folder``, and return their size in bytes.

    Raises:
        ModelError: If a checkpoint is missing.
        DataError: If the checkpoints together are larger than MOST_BYTES.
    """
    if missing := [name for name in CHECKPOINTS if not (folder / name / "config.json").is_file()]:
        raise ModelError(f"{folder} holds no {', no '.join(missing)}. {FIX}")
    size = sum(f.stat().st_size for name in CHECKPOINTS for f in (folder / name).iterdir() if f.is_file())
    if size > MOST_BYTES:
        raise DataError(f"{folder}: expected at most {MOST_BYTES / 1e6:.0f} MB of checkpoints, got {size / 1e6:.1f} MB")
    for name in CHECKPOINTS:
        with atomic_path(target / name) as temporary:
            shutil.copytree(folder / name, temporary)
    return size


def main(arguments: Sequence[str] | None = None) -> int:
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="python -m playground.models.shipped")
    try:
        size = take(settings.take)
    except OpenRILError as e:
        print(f"shipped: {e}", file=sys.stderr)
        return 2
    print(f"{WEIGHTS}: {len(CHECKPOINTS)} checkpoints, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
