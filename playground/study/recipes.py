"""Make whole recipes from the shipped ones: for the demo's runs and for every cell, cache and discriminator of the study."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from openril.errors import RecipeError
from openril.recipe.loading import load_recipe
from openril.recipe.schema import Recipe
from openril.storage import changed_keys
from playground.study.plan import CELLS, STUDENTS, Group, Method, Start

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
OUT, MODELS = "runs/study", "runs/playground"
"""Folders in the study's shipped recipes that ``--out`` and ``--models`` replace."""


def shipped_recipe(name: str, overrides: Sequence[str] = (), folders: Mapping[str, Path] | None = None) -> Recipe:
    """Load a recipe of ``recipes/``.

    Args:
        overrides: Settings as ``KEY=VALUE``.
        folders: Replacements for the first part of every path in the recipe.

    Raises:
        RecipeError: For overrides that are not settings.
    """
    text = load_recipe(RECIPES / name, [f"--{override}" for override in overrides]).model_dump_json()
    for old, new in (folders or {}).items():
        text = text.replace(f'"{old}/', f'"{json.dumps(str(new))[1:-1]}/')
    return Recipe.model_validate_json(text)


@cache
def baseline_settings(name: str) -> dict[str, Any]:
    """Return the dotted settings in which ``recipes/methods/NAME.yaml`` differs from the recipe it is based on."""
    base, method = (shipped_recipe(n).model_dump() for n in ("paper/base.yaml", f"methods/{name}.yaml"))
    return {key: new for key, (_, new) in changed_keys(base, method).items() if key != "run_dir"}


def method_settings(method: Method) -> dict[str, Any]:
    """Return the dotted settings that make a method: those of its baseline recipe, and its own."""
    return {**(baseline_settings(method.baseline) if method.baseline else {}), **method.overrides}


@dataclass(frozen=True)
class Place:
    """The folder of a cell: ``student / group / name / seed_N``. A cell that is only measured has no seed."""

    student: str
    group: Group
    name: str
    seed: int | None

    @property
    def cell(self) -> Method:
        return CELLS[self.group][self.name]

    @property
    def path(self) -> str:
        return "/".join([self.student, self.group, self.name] + ([] if self.seed is None else [f"seed_{self.seed}"]))


@dataclass(frozen=True)
class Variant:
    """A pre-trained discriminator, made from the student ``start`` and trained on its responses."""

    start: Start
    inputs: str
    loss: str
    teachers: tuple[str, ...]
    match_length: bool = False

    @property
    def name(self) -> str:
        teachers = "both" if len(self.teachers) > 1 else "".join(self.teachers)
        matched = ["matched"] if self.match_length else []
        return "-".join([self.start, self.inputs, self.loss, teachers, *matched])


@dataclass
class Recipes:
    """Recipes of a study in the folder ``out`` with the models in ``models``."""

    out: Path
    models: Path
    overrides: Sequence[str] = ()
    """Settings of every recipe, as ``KEY=VALUE``."""
    _bases: dict[str, Recipe] = field(default_factory=dict)

    def base(self, student: str) -> Recipe:
        """Return the shipped recipe of a student, with this study's folders and overrides."""
        if student not in self._bases:
            folders = {OUT: self.out, MODELS: self.models}
            self._bases[student] = shipped_recipe(f"study/{student}.yaml", self.overrides, folders)
        return self._bases[student].model_copy(deep=True)

    def cache(self, student: str, start: Start) -> Path:
        """Return the folder of the response cache of both teachers and of the student at ``start``."""
        return self.out / student / "caches" / start

    def _make(self, student: str, start: Start, folder: Path, overrides: Mapping[str, Any]) -> Recipe:
        values = self.base(student).model_dump()
        values["run_dir"] = str(folder)
        values["cache_dir"] = str(self.cache(student, start) / "responses")
        values["student"]["model"] = str(self.models / student / start)
        for key, value in overrides.items():
            put(values, key, value)
        return Recipe.model_validate(values)

    def collection(self, student: str, start: Start) -> Recipe:
        """Return the recipe that collects the responses."""
        return self._make(student, start, self.cache(student, start), {})

    def _any_student(self) -> str:
        """Return the student that the teachers' recipes name: the same one, whichever students a command asks for."""
        return next((s for s in STUDENTS if (self.models / s / "sft").is_dir()), STUDENTS[0])

    def teacher_collection(self) -> Recipe:
        """Return the recipe that collects the teachers' responses, which all students share."""
        folder = self.out / "teachers" / "cache"
        recipe = self._make(self._any_student(), "sft", folder, {"collect.student": False})
        recipe.cache_dir = str(folder / "responses")
        return recipe

    def teacher(self, teacher: str) -> Recipe:
        """Return the recipe that scores a teacher as if it were a student."""
        student = self._any_student()
        recipe = self._make(student, "sft", self.out / "teachers" / teacher, {"teachers": []})
        recipe.student.model = next(t.model_path for t in self.base(student).teachers if t.name == teacher)
        return recipe

    def cell(self, place: Place, max_steps: int = 0) -> Recipe:
        """Return the recipe of a cell, with ``max_steps`` in place of the recipe's own number if it is given."""
        cell = place.cell
        overrides = {**method_settings(cell), "seed": place.seed or 0}
        if max_steps:
            overrides["train.max_steps"] = max_steps
        recipe = self._make(place.student, cell.start, self.out / place.path, overrides)
        if cell.how == "sft":
            recipe.sft.enabled = True
            recipe.sft.max_steps = recipe.train.max_steps
            recipe.sft.batch_size = recipe.train.questions_per_step * recipe.teacher_responses_per_question
        return recipe

    def variant(self, place: Place) -> Variant | None:
        """Return the pre-trained discriminator that a cell begins with."""
        recipe = self.cell(place)
        if place.cell.how != "loop" or not recipe.uses_discriminator:
            return None
        d = recipe.discriminator
        return Variant(place.cell.start, d.inputs, d.loss, tuple(recipe.teacher_names), d.match_length)

    def discriminator_folder(self, student: str, variant: Variant) -> Path:
        return self.out / student / "discriminators" / variant.name

    def discriminator(self, student: str, variant: Variant) -> Recipe:
        """Return the recipe that pre-trains a discriminator for every cell and seed that begins with it."""
        teachers = list(variant.teachers) if len(variant.teachers) < len(self.base(student).teachers) else []
        overrides = {
            "discriminator.inputs": variant.inputs,
            "discriminator.loss": variant.loss,
            "discriminator.match_length": variant.match_length,
            "train.teachers": teachers,
        }
        return self._make(student, variant.start, self.discriminator_folder(student, variant), overrides)


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key. Raises RecipeError for a key that is not a setting."""
    *sections, last = key.split(".")
    for section in sections:
        values = values[section]
    if last not in values:
        raise RecipeError(f"{key}: expected the name of a setting")
    values[last] = {**values[last], **value} if isinstance(value, dict) else value


ResultName = Literal["base", "sft", "final"]


def result_name(cell: Method) -> ResultName:
    """Return what `ril eval` calls the checkpoint that is the cell's result."""
    names: dict[str, ResultName] = {"as_is": "base", "sft": "sft", "loop": "final"}
    return names[cell.how]
