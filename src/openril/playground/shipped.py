"""Ready-made models of the fourteen skills: those that come with the package, or a folder of ``make playground``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from openril.errors import ModelError

StudentName = Literal["qwen", "internvl"]

WEIGHTS = Path(__file__).parent / "weights"
"""Checkpoints that come with the package: student_qwen, student_internvl (both warm-started), teacher_a, teacher_b, judge."""
CURE = "train them with `make playground` (which says how long that takes), then give its folder with --models"


def find_models(student: StudentName = "qwen", folder: Path | None = None) -> dict[str, Path]:
    """Checkpoint folders of "student", "teacher_a", "teacher_b" and "judge".

    student: which of the two. folder: where to look instead of the package, laid out as `make playground` leaves it
    (student_qwen/sft) or as the package has it (student_qwen). Raises ModelError that names what is missing.
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
        where = "the package came without its ready-made models" if folder is None else "models are missing"
        raise ModelError(f"{where}: no {', no '.join(missing)}; {CURE}")
    return found
