"""From the plan to recipes: a whole recipe for every cell, response cache and discriminator, each with its own folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from openril.errors import RecipeError
from openril.recipe.loading import load_recipe
from openril.recipe.schema import Recipe
from playground.study.plan import CELLS, STUDENTS, Cell, Group, Start

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "study"
OUT, MODELS = "runs/study", "runs/playground"
"""What the shipped recipes say for ``--out`` and ``--models``."""


@dataclass(frozen=True)
class Place:
    """Where a cell lies: ``out / student / group / name / seed_N``; measured as it is, a cell has no seed."""

    student: str
    group: Group
    name: str
    seed: int | None

    @property
    def cell(self) -> Cell:
        return CELLS[self.group][self.name]

    @property
    def path(self) -> str:
        return "/".join([self.student, self.group, self.name] + ([] if self.seed is None else [f"seed_{self.seed}"]))


@dataclass(frozen=True)
class Variant:
    """A pre-trained discriminator. start: the student it is made from, and whose responses it has seen."""

    start: Start
    sees: str
    loss: str
    teachers: tuple[str, ...]
    match_length: bool = False

    @property
    def name(self) -> str:
        teachers = "both" if len(self.teachers) > 1 else "".join(self.teachers)
        matched = ["matched"] if self.match_length else []
        return "-".join([self.start, self.sees, self.loss, teachers, *matched])


@dataclass
class Recipes:
    """Recipes of a study. out, models: its folders. overrides: ``KEY=VALUE`` settings of every recipe."""

    out: Path
    models: Path
    overrides: Sequence[str] = ()
    _bases: dict[str, dict[str, Any]] = field(default_factory=dict)

    def base(self, student: str) -> Recipe:
        """The shipped recipe of a student, with this study's folders and overrides.

        Raises RecipeError when the recipes are not beside this package, and for overrides that are no settings.
        """
        if student not in self._bases:
            source = RECIPES / f"{student}.yaml"
            if not source.is_file():
                raise RecipeError(f"{source} is not there; run the study from a checkout of the repository")
            text = load_recipe(source, [f"--{o}" for o in self.overrides]).model_dump_json()
            for was, now in ((OUT, self.out), (MODELS, self.models)):
                text = text.replace(f'"{was}/', f'"{now}/')
            self._bases[student] = json.loads(text)
        return Recipe.model_validate(self._bases[student])

    def cache(self, student: str, start: Start) -> Path:
        """The response cache of both teachers and of the student at ``start``."""
        return self.out / student / "caches" / start

    def _made(self, student: str, start: Start, folder: Path, overrides: Mapping[str, Any]) -> Recipe:
        values = self.base(student).model_dump()
        values["run_dir"] = str(folder)
        values["cache_dir"] = str(self.cache(student, start) / "responses")
        values["student"]["model"] = str(self.models / student / start)
        for key, value in overrides.items():
            put(values, key, value)
        return Recipe.model_validate(values)

    def collection(self, student: str, start: Start) -> Recipe:
        """Collects the responses."""
        return self._made(student, start, self.cache(student, start), {})

    def _any_student(self) -> str:
        """A recipe names a student, even one for the teachers alone: whichever students a command asks for, the same."""
        return next((s for s in STUDENTS if (self.models / s / "sft").is_dir()), STUDENTS[0])

    def teacher_collection(self) -> Recipe:
        """Collects the teachers' responses, which all students share."""
        folder = self.out / "teachers" / "cache"
        recipe = self._made(self._any_student(), "sft", folder, {"collect.student": False})
        recipe.cache_dir = str(folder / "responses")
        return recipe

    def teacher(self, teacher: str) -> Recipe:
        """Scores a teacher as if it were a student."""
        student = self._any_student()
        recipe = self._made(student, "sft", self.out / "teachers" / teacher, {"teachers": []})
        recipe.student.model = next(t.model_path for t in self.base(student).teachers if t.name == teacher)
        return recipe

    def cell(self, place: Place, max_steps: int = 0) -> Recipe:
        """The recipe of a cell. max_steps: instead of the recipe's own number."""
        cell = place.cell
        overrides = {**cell.overrides, "seed": place.seed or 0}
        if max_steps:
            overrides["train.max_steps"] = max_steps
        recipe = self._made(place.student, cell.start, self.out / place.path, overrides)
        if cell.how == "sft":
            recipe.sft.enabled = True
            recipe.sft.max_steps = recipe.train.max_steps
            recipe.sft.batch_size = recipe.train.questions_per_step * recipe.teacher_responses_per_question
        return recipe

    def variant(self, place: Place) -> Variant | None:
        """The pre-trained discriminator that a cell begins with."""
        recipe = self.cell(place)
        if place.cell.how != "loop" or not recipe.uses_discriminator:
            return None
        d = recipe.discriminator
        return Variant(place.cell.start, d.inputs, d.loss, tuple(recipe.teacher_names), d.match_length)

    def discriminator_folder(self, student: str, variant: Variant) -> Path:
        return self.out / student / "discriminators" / variant.name

    def discriminator(self, student: str, variant: Variant) -> Recipe:
        """Pre-trains a discriminator, for every cell and seed that begins with it."""
        teachers = list(variant.teachers) if len(variant.teachers) < len(self.base(student).teachers) else []
        overrides = {
            "discriminator.inputs": variant.sees,
            "discriminator.loss": variant.loss,
            "discriminator.match_length": variant.match_length,
            "train.teachers": teachers,
        }
        return self._made(student, variant.start, self.discriminator_folder(student, variant), overrides)


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; raises RecipeError for one that is no setting."""
    *sections, last = key.split(".")
    for section in sections:
        values = values[section]
    if last not in values:
        raise RecipeError(f"{key} is no setting of a recipe")
    values[last] = {**values[last], **value} if isinstance(value, dict) else value


ResultName = Literal["base", "sft", "final"]


def result_name(cell: Cell) -> ResultName:
    """What `ril eval` calls the checkpoint that is the cell's result."""
    names: dict[str, ResultName] = {"as_is": "base", "sft": "sft", "loop": "final"}
    return names[cell.how]


def result_checkpoint(cell: Cell, recipe: Recipe) -> str:
    match cell.how:
        case "as_is":
            return recipe.student.model
        case "sft":
            return str(recipe.sft_student_path)
    return str(recipe.run_path / "student")
