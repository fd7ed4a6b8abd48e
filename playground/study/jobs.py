"""The study's jobs in the order in which they are worth doing, and what each needs first."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from openril.errors import StateError
from openril.recipe.loading import load_recipe, load_saved_recipe, save_recipe
from openril.recipe.schema import Recipe
from openril.storage import changed_keys
from playground.study.cells import Place, Recipes, Variant, result_name
from playground.study.measures import median, seconds_of
from playground.study.plan import (
    ABLATIONS,
    COMPUTE,
    CONTENDERS,
    GROUPS,
    MAIN,
    REFERENCE,
    STUDENTS,
    TEACHERS,
    Group,
    Start,
)
from playground.study.work import DONE, Stage

START_UP = 20.0
"""Seconds of a job besides its steps: imports, loading, scoring."""
STEP = 0.8
"""Seconds of a step of Dr.GRPO, until there are measured ones."""


@dataclass
class Job:
    """name: its folder in ``out``. recipe: makes its recipe, when it starts. stage, arguments: of work.py. needs: names of
    jobs. expected: seconds, roughly. kind: jobs whose expected seconds are wrong by the same factor."""

    name: str
    folder: Path
    recipe: Callable[[], Recipe]
    stage: Stage
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()
    expected: float = START_UP
    kind: str = "other"

    @property
    def done(self) -> dict[str, Any] | None:
        """What it left, if it is done."""
        return read_done(self.folder)

    @property
    def recipe_path(self) -> Path:
        return self.folder / "recipe.yaml"

    def write_recipe(self) -> None:
        """Raises StateError when the folder was begun with another recipe."""
        recipe = self.recipe()
        if changed := self.changed(recipe):
            raise StateError(
                f"{self.folder} was made with other values of {', '.join(changed[:6])}; restore them, remove the folder to"
                " make it again, or name another --out"
            )
        if not self.recipe_path.is_file():
            save_recipe(recipe, self.recipe_path)

    def changed(self, recipe: Recipe) -> list[str]:
        """Settings in which the folder's recipe is another."""
        if not self.recipe_path.is_file():
            return []
        was = load_saved_recipe(self.recipe_path)
        return list(changed_keys(was.model_dump(mode="json"), recipe.model_dump(mode="json")))


def read_done(folder: Path) -> dict[str, Any] | None:
    try:
        done = json.loads((folder / DONE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return done if isinstance(done, dict) else None


@dataclass
class Plan:
    """Which cells of the study are wanted. seeds: of the contenders and the compute table. ablation_seeds: of the
    ablations of ``ablation_students``. only: names of cells; empty for all."""

    recipes: Recipes
    score: Path
    students: Sequence[str] = STUDENTS
    seeds: int = 3
    ablation_seeds: int = 1
    ablation_students: Sequence[str] = STUDENTS[:1]
    groups: Sequence[Group] = GROUPS
    only: Sequence[str] = ()
    _jobs: dict[str, Job] = field(default_factory=dict)

    def places(self) -> Iterator[Place]:
        """Every wanted cell, the most telling ones first: a study that is cut short is still one."""
        for place in self._all_places():
            if place.group in self.groups and (not self.only or place.name in self.only):
                yield place

    def _all_places(self) -> Iterator[Place]:
        def contenders(student: str, names: Sequence[str]) -> Iterator[Place]:
            for seed in range(self.seeds):
                for name in names:
                    if CONTENDERS[name].how != "as_is":
                        yield Place(student, "contenders", name, seed)
                    elif seed == 0:
                        yield Place(student, "contenders", name, None)

        others = [name for name in CONTENDERS if name not in MAIN]
        if self.students:
            yield from contenders(self.students[0], list(CONTENDERS))
        for student in self.students[1:]:
            yield from contenders(student, MAIN)
        for student in self.students[1:]:
            yield from contenders(student, others)
        for student in (s for s in self.students if s in self.ablation_students):
            for seed in range(self.ablation_seeds):
                for _, cells in ABLATIONS.values():
                    yield from (Place(student, "ablations", name, seed) for name in cells)
        for student in self.students:
            for seed in range(self.seeds):
                yield from (Place(student, "compute", name, seed) for name in COMPUTE)

    def jobs(self) -> list[Job]:
        """Every wanted cell's job, each behind those it needs."""
        self._jobs = {}
        if not self.only and "contenders" in self.groups and self.students:
            for teacher in TEACHERS:
                self._teacher(teacher)
        for place in self.places():
            self._cell(place)
        return list(self._jobs.values())

    def _add(self, job: Job) -> str:
        self._jobs.setdefault(job.name, job)
        return job.name

    def _teacher(self, teacher: str) -> str:
        folder = self.recipes.out / "teachers" / teacher
        arguments = ("--name", "base", "--score", str(self.score))
        return self._add(
            Job(
                f"teachers/{teacher}",
                folder,
                partial(self.recipes.teacher, teacher),
                "none",
                arguments,
                kind="score",
            )
        )

    def _teacher_cache(self) -> str:
        folder = self.recipes.out / "teachers" / "cache"
        arguments, make = ("--sources", *TEACHERS), self.recipes.teacher_collection
        return self._add(Job("teachers/cache", folder, make, "collect", arguments, expected=300, kind="collect"))

    def _cache(self, student: str, start: Start) -> str:
        teachers = self._teacher_cache()
        source = self._jobs[teachers].folder / "responses"
        arguments = ("--copy-from", str(source), "--sources", "student")
        make = partial(self.recipes.collection, student, start)
        folder = self.recipes.cache(student, start)
        name = f"{student}/caches/{start}"
        return self._add(Job(name, folder, make, "collect", arguments, (teachers,), expected=100, kind="collect"))

    def _discriminator(self, student: str, variant: Variant) -> str:
        cache = self._cache(student, variant.start)
        make = partial(self.recipes.discriminator, student, variant)
        folder = self.recipes.discriminator_folder(student, variant)
        name = f"{student}/discriminators/{variant.name}"
        return self._add(Job(name, folder, make, "discriminator", (), (cache,), expected=60, kind="discriminator"))

    def _cell(self, place: Place) -> str:
        recipes, cell = self.recipes, place.cell
        folder = recipes.out / place.path
        stages: dict[str, Stage] = {"as_is": "none", "sft": "sft", "loop": "train"}
        arguments = ["--name", result_name(cell), "--score", str(self.score)]
        needs: list[str] = []
        recipe = recipes.cell(place)
        if cell.how == "sft" or (cell.how == "loop" and recipe.teacher_responses_per_question):
            needs.append(self._cache(place.student, cell.start))
        variant = recipes.variant(place)
        if variant is not None:
            needs.append(self._discriminator(place.student, variant))
            target = recipes.discriminator_folder(place.student, variant) / "discriminator"
            arguments += ["--discriminator", str(target)]
        make: Callable[[], Recipe] = partial(recipes.cell, place)
        steps = recipe.train.max_steps if cell.how != "as_is" else 0
        expected = START_UP + STEP * cell.cost * steps
        if place.group == "compute":
            needs += self._measured_first(place)
            make = partial(self._compute_recipe, place)  # when the steps it needs are measured
            expected = START_UP + STEP * CONTENDERS[REFERENCE].cost * steps
        kind = cell.how if place.group != "compute" else f"{cell.how} {REFERENCE}"
        return self._add(
            Job(place.path, folder, make, stages[cell.how], tuple(arguments), tuple(needs), expected, kind)
        )

    def _measured_first(self, place: Place) -> list[str]:
        """The jobs whose steps are timed to know how many a compute cell takes."""
        names = (REFERENCE, place.name)
        return [
            self._cell(Place(place.student, "contenders", name, seed)) for name in names for seed in range(self.seeds)
        ]

    def _compute_recipe(self, place: Place) -> Recipe:
        return self.recipes.cell(place, self.compute_steps(place))

    def compute_steps(self, place: Place) -> int:
        """As many steps as fill the reference's training seconds. Once a cell has begun, its number stands."""
        begun = self.recipes.out / place.path / "recipe.yaml"
        if begun.is_file():
            return load_recipe(begun).train.max_steps

        def timings(name: str) -> list[dict[str, Any]]:
            places = [Place(place.student, "contenders", name, seed) for seed in range(self.seeds)]
            return [done for p in places if (done := read_done(self.recipes.out / p.path)) is not None]

        reference = median([s for done in timings(REFERENCE) if (s := seconds_of(done)) is not None])
        step = median([done["seconds_per_step"] for done in timings(place.name) if done["seconds_per_step"]])
        if reference is None or step is None:
            raise StateError(f"{place.path}: no measured seconds of {REFERENCE} and {place.name} to compare")
        return max(1, round(reference / step))
