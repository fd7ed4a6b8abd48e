"""What a contender costs in all, in CPU seconds of one thread: collection, pre-training and training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from openril.errors import StateError
from playground.comparison.archive import RESTORED
from playground.comparison.cells import DONE
from playground.comparison.plan import STEPS, Cell, Rate
from playground.comparison.recipes import Recipes

REFERENCE = "ril_plus"
"""The contender whose cost the others may spend."""


def preparation(out: Path, recipes: Recipes, cell: Cell) -> dict[str, float]:
    """Return the CPU seconds that a cell needs before its training, by what they are spent on."""
    recipe = recipes.cell(cell, Rate(1.0))
    found: dict[str, float] = {}
    uses_teachers = recipe.teacher_responses_per_question > 0 or recipe.train.retry.questions_per_step > 0
    if uses_teachers:
        found["teachers' responses"] = sum(_seconds(out, f"teachers/{t}") for t in cell.teachers)
    if (variant := recipes.variant(cell)) is not None:
        found["student's responses"] = _seconds(out, f"{cell.student}/collection")
        folder = recipes.discriminator(cell.student, variant).run_path.relative_to(out)
        found["discriminator's pre-training"] = _seconds(out, folder.as_posix())
    return found


def seconds_per_step(out: Path, cell: Cell) -> float:
    """Return the mean CPU seconds of a step over the finished cells of all seeds. Raises StateError if there is none."""
    folder = (out / cell.path).parent
    done = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"seed_*/{DONE}"))]
    if not done:
        raise StateError(
            f"{folder}: expected a finished cell whose steps are measured. Run the part `contenders` first."
        )
    return mean(d["cpu_seconds"] / d["steps"] for d in done)


def total(out: Path, recipes: Recipes, cell: Cell) -> float:
    """Return the CPU seconds of a cell in all."""
    return sum(preparation(out, recipes, cell).values()) + seconds_per_step(out, cell) * cell.steps


def steps_of_equal_seconds(out: Path, recipes: Recipes, cell: Cell) -> int | None:
    """Return the steps after which a contender has cost what the reference costs with ``STEPS``, or None if it has cost more
    before its first.

    Costs are means over the finished cells. Once a run with such a number of steps has begun, the number stays, so that
    seeds that are added later have as many.
    """
    begun = sorted((out / cell.student / "seconds" / cell.name).glob("steps_*"))
    if begun:
        return int(begun[0].name.removeprefix("steps_"))
    plain = replace(cell, regime="", steps=STEPS)
    budget = total(out, recipes, replace(plain, name=REFERENCE))
    steps = (budget - sum(preparation(out, recipes, plain).values())) / seconds_per_step(out, plain)
    return int(steps) if steps >= 1 else None


def _seconds(out: Path, folder: str) -> float:
    """Return the CPU seconds of a piece of shared work, as it was done here or as it was restored."""
    path = out / folder / DONE
    for place in (path, out / RESTORED / folder / DONE):
        if place.is_file():
            found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
            return float(found["cpu_seconds"])
    raise StateError(f"{path}: expected what this cost. Run the comparison again.")
