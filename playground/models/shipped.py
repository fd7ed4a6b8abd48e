"""Ready-made models of the fourteen skills: those that come with the package, or a folder of ``make playground``.

``python -m playground.models.shipped --take runs/playground`` makes that folder's models the ones that come with the
package.
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
"""Checkpoints that come with the package, as `make playground` lays them out."""
CHECKPOINTS = (
    "student_qwen/base", "student_qwen/sft", "student_internvl/base", "student_internvl/sft",
    "teacher_a", "teacher_b", "judge",
)  # fmt: skip
MOST_BYTES = 12_000_000
"""Of all of them."""
CURE = "train them with `make playground` (half an hour to an hour), then give its folder with --models"


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


@dataclass
class Settings:
    """Make the models of `make playground` the ones that come with the package."""

    take: Path
    """Folder of `make playground`."""


def take(folder: Path, target: Path = WEIGHTS) -> int:
    """Copy the checkpoints of ``folder`` to ``target``, in place of what is there; returns their bytes. Raises ModelError
    when one is missing, and DataError when together they are larger than MOST_BYTES."""
    if missing := [name for name in CHECKPOINTS if not (folder / name / "config.json").is_file()]:
        raise ModelError(f"{folder} holds no {', no '.join(missing)}; {CURE}")
    size = sum(f.stat().st_size for name in CHECKPOINTS for f in (folder / name).iterdir() if f.is_file())
    if size > MOST_BYTES:
        raise DataError(
            f"the models of {folder} have {size / 1e6:.1f} MB together; the package takes {MOST_BYTES / 1e6:.0f}"
        )
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
