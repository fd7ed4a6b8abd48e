"""Trained models of the fourteen skills: those in playground/weights, or a folder of ``make playground``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from openril.errors import ModelError

StudentName = Literal["qwen", "internvl"]

WEIGHTS = Path(__file__).parents[1] / "weights"
"""Folder of the checkpoints in the repository, in the layout of `make playground`."""


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
        raise ModelError(
            f"models are missing: no {', no '.join(missing)}. Train them with `make playground` (half an hour to an hour) "
            f"and name its folder with --models."
        )
    return found
