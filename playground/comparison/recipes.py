"""Make the whole recipe of every cell, of the response caches and of the pre-trained discriminators."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openril.errors import RecipeError, StateError
from openril.recipe.schema import Recipe
from playground.comparison.plan import TEACHERS, Cell, Contender, Rate
from playground.study.recipes import MODELS, OUT, baseline_settings, put, shipped_recipe

SETTINGS: dict[str, Any] = {
    # The exact rule replaces the judge, so that the judge's errors are what a regime says and not an unknown.
    "rewards.answer.kind": "rules",
    "collect.num_responses": 8,
    "collect.judge_responses": False,
    "train.eval_every": 0,
    "train.report_every": 0,
    "train.log_rollouts_every": 1000,
    "train.save_every": 0,
    "eval.questions_per_batch": 120,
}
"""What all cells change in recipes/study/base.yaml."""


@dataclass(frozen=True)
class Variant:
    """What a pre-trained discriminator depends on, besides the student."""

    inputs: str
    loss: str
    labels: str

    @property
    def name(self) -> str:
        return "-".join(filter(None, [self.inputs, self.loss, self.labels]))


@dataclass
class Recipes:
    """Recipes of a comparison in the folder ``out`` with the models in ``models``."""

    out: Path
    models: Path
    world: Path
    overrides: tuple[str, ...] = ()

    def _make(
        self, student: str, folder: Path, settings: Mapping[str, Any], teachers: Sequence[str] = TEACHERS
    ) -> Recipe:
        recipe = shipped_recipe(f"study/{student}.yaml", (), {OUT: self.out, MODELS: self.models})
        values = recipe.model_dump()
        values["run_dir"], values["cache_dir"] = str(folder), str(self.cache(student))
        values["data"]["train"] = [str(self.world / "train.jsonl")]
        values["data"]["validation"] = [str(self.world / "validation.jsonl")]
        values["teachers"] = [t for t in values["teachers"] if t["name"] in teachers]
        for key, value in {**SETTINGS, **settings, **parsed(self.overrides)}.items():
            put(values, key, value)
        return Recipe.model_validate(values)

    def cache(self, student: str) -> Path:
        """Return the folder of the responses of both teachers and of the student."""
        return self.out / student / "responses"

    def collection(self, student: str) -> Recipe:
        """Return the recipe that collects the student's responses, next to those of the teachers."""
        return self._make(student, self.out / student / "collection", {})

    def teacher_collection(self, student: str) -> Recipe:
        """Return the recipe that collects the teachers' responses, which the students share."""
        recipe = self._make(student, self.out / "teachers" / "collection", {"collect.student": False})
        recipe.cache_dir = str(self.teacher_cache)
        return recipe

    @property
    def teacher_cache(self) -> Path:
        return self.out / "teachers" / "responses"

    def variant(self, cell: Cell) -> Variant | None:
        """Return the pre-trained discriminator that a cell begins with, or None if it has none."""
        recipe = self.cell(cell, Rate(1.0))
        if not recipe.uses_discriminator:
            return None
        return Variant(recipe.discriminator.inputs, recipe.discriminator.loss, cell.contender.labels)

    def discriminator(self, student: str, variant: Variant) -> Recipe:
        """Return the recipe that pre-trains a discriminator for every cell and seed that begins with it."""
        settings = {"discriminator.inputs": variant.inputs, "discriminator.loss": variant.loss}
        return self._make(student, self.out / student / "discriminators" / variant.name, settings)

    def cell(self, cell: Cell, rate: Rate, steps: int = 0, contender: Contender | None = None) -> Recipe:
        """Return the recipe of a cell at a rate.

        Args:
            steps: Instead of the number of the cell, if it is given.
            contender: Instead of that of the cell, if it is given.
        """
        settings = {**rate.settings(), "seed": cell.seed, "train.max_steps": steps or cell.steps}
        chosen = contender_settings(contender or cell.contender)
        settings = {**chosen, **settings, **self.regime(cell, chosen)}
        return self._make(cell.student, self.out / cell.path, settings, cell.teachers)

    def parts(self, cell: Cell, rate: Rate, steps: int = 0) -> list[Recipe]:
        """Return the recipes that a cell runs one after the other: one, or two with half of the steps each."""
        contender = cell.contender
        if not contender.second:
            return [self.cell(cell, rate, steps)]
        whole = steps or cell.steps
        first = self.cell(cell, rate, max(1, whole // 2))
        other = None
        if contender.second_recipe:
            other = replace(contender, recipe=contender.second_recipe, settings={})
        values = self.cell(cell, rate, max(1, whole - whole // 2), other).model_dump()
        values["run_dir"] = str(first.run_path / "second")
        for key, value in {"student.model": str(first.run_path / "student"), **contender.second}.items():
            put(values, key, value)
        return [first, Recipe.model_validate(values)]

    def regime(self, cell: Cell, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of a regime in which teacher responses have no verdicts, or a part of the questions no truth.

        Without a discriminator those questions teach nothing and are left out of the data. With one, their groups are
        rewarded by it alone.
        """
        kind, _, share = cell.regime.partition("_")
        if kind == "unjudged":
            return {"train.teacher_draw": "any"}
        if kind != "truth":
            return {}
        if chosen.get("discriminator.mode") == "none":
            whole = chosen.get("rewards.answer.weight") == 0.0
            return {"data.train": [str(self.world / ("train.jsonl" if whole else f"train_{share}_known.jsonl"))]}
        return {
            "data.train": [str(self.world / f"train_{share}.jsonl")],
            "rewards.answer.without_truth": "leave_out",
        }


def contender_settings(contender: Contender) -> dict[str, Any]:
    """Return the dotted settings of a contender: those of its recipe, and its own. Its learning rate comes later."""
    settings = {**baseline_settings(contender.recipe), **contender.settings}
    return {key: value for key, value in settings.items() if not key.startswith("train.optimizer.")}


def parsed(overrides: Sequence[str]) -> dict[str, Any]:
    """Return overrides as values by key. Raises RecipeError for one that is not KEY=JSON."""
    found: dict[str, Any] = {}
    for text in overrides:
        key, _, value = text.partition("=")
        try:
            found[key] = json.loads(value)
        except ValueError as e:
            raise RecipeError(f"--overrides: expected KEY=JSON, got {text!r} ({e})") from None
    return found


def read_tuned(path: Path) -> dict[str, dict[str, str]]:
    """Return the name of the tuned rate by student and contender. Raises StateError before the tuning is done."""
    if not path.is_file():
        raise StateError(f"{path}: expected the tuned rates. Run the part `tuning` first.")
    found: dict[str, dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))
    return found
