"""What a check of a recipe finds, and the questions that several checks ask. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from openril.recipe.schema import Recipe


@dataclass(frozen=True)
class Problem:
    """A setting that does not work. An error stops the stage; a warning is only printed.

    key: dotted name of the setting. fix: what to change, as a sentence without a full stop.
    """

    key: str
    reason: str
    fix: str
    level: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}. {self.fix}."


def in_loop(stage: str) -> bool:
    """Return whether the stage runs the loop."""
    return stage in ("train", "run")


def has_responses(recipe: Recipe) -> bool:
    """Return whether the response cache holds anything."""
    return next(recipe.cache_path.rglob("*.parquet"), None) is not None if recipe.cache_path.is_dir() else False
