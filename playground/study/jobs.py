"""List the study's jobs in the order in which they are worth running, with what each needs first."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from openril.errors import CacheError, StateError
from openril.recipe.loading import load_saved_recipe, save_recipe
from openril.recipe.schema import Recipe
from openril.storage import changed_keys, read_jsonl, refuse_changed
from playground.runner import Job, Progress, metrics_progress
from playground.study.metrics import median, seconds_of
from playground.study.plan import CELLS, COMPUTE, MAIN, METHODS, REFERENCE, STUDENTS, TEACHERS, Settings, Start
from playground.study.recipes import Place, Recipes, Variant, result_name
from playground.study.work import DONE, Stage

START_UP = 20.0
"""Seconds of a job in addition to its steps: imports, loading, scoring."""
STEP = 0.8
"""Seconds of a step of Dr.GRPO, until some are measured."""


def stage_progress(stage: str, recipe: Recipe) -> Progress:
    """Return how far a stage of a recipe is."""
    match stage:
        case "collect":
            sources = len(recipe.teachers) + recipe.collect.student
            total = num_questions(*recipe.data.train, limit=recipe.data.limit) * recipe.collect.num_responses * sources
            return sum(collected(recipe.cache_path)), total, "responses"
        case "discriminator":
            settings = recipe.discriminator.pretraining
            trained = num_questions(*recipe.data.train, limit=recipe.data.limit) * (1 - settings.held_out_share)
            steps = max(1, math.ceil(settings.epochs * trained / settings.questions_per_step))
            return metrics_progress(recipe.run_path / "discriminator" / "metrics.jsonl", steps)
        case "sft":
            return metrics_progress(recipe.sft_student_path.parent / "metrics.jsonl", recipe.sft.max_steps)
        case "train":
            return metrics_progress(recipe.run_path / "metrics.jsonl", recipe.train.max_steps)
    return 0, 0, ""


@cache
def num_questions(*files: str, limit: int) -> int:
    number = sum(len(read_jsonl(Path(file))) for file in files)
    return min(number, limit or number)


def collected(folder: Path) -> tuple[int, int]:
    """Return the numbers of responses in a cache's shards and in its unfinished journals."""
    import pyarrow.parquet as pq

    try:
        lines = sum(max(0, len(p.read_bytes().splitlines()) - 1) for p in (folder / "journals").glob("*.jsonl"))
        return sum(pq.read_metadata(p).num_rows for p in (folder / "shards").glob("*.parquet")), lines
    except (FileNotFoundError, CacheError):
        return 0, 0  # A journal has just become a shard. The next look counts it.


def read_done(folder: Path) -> dict[str, Any] | None:
    """Return what a finished job left in its folder."""
    try:
        done = json.loads((folder / DONE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return done if isinstance(done, dict) else None


@dataclass(kw_only=True)
class StudyJob(Job):
    """One run of work.py in the folder of its recipe."""

    folder: Path
    recipe: Callable[[], Recipe]
    """Makes the recipe when the job starts."""
    stage: Stage
    _written: Recipe | None = None

    def seconds(self) -> float | None:
        done = read_done(self.folder)
        return None if done is None else float(done["seconds"])

    @property
    def recipe_path(self) -> Path:
        return self.folder / "recipe.yaml"

    def prepare(self) -> None:
        """Write the recipe. Raises StateError when the folder was begun with another one."""
        recipe = self.recipe()
        if self.recipe_path.is_file():
            was, fix = load_saved_recipe(self.recipe_path), "remove the folder to make it again, or name another --out"
            refuse_changed(self.folder, _plain(was), _plain(recipe), fix=fix)
        save_recipe(recipe, self.recipe_path)
        self._written = recipe

    def changed(self) -> list[str]:
        """Return the settings in which the folder's recipe differs."""
        if not self.recipe_path.is_file():
            return []
        return list(changed_keys(_plain(load_saved_recipe(self.recipe_path)), _plain(self.recipe())))

    def progress(self) -> Progress:
        return (0, 0, "") if self._written is None else stage_progress(self.stage, self._written)


def _plain(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain data in which the study's models have no folder.

    ``study.json`` pins their weights, so a study continues after its models were moved.
    """
    values = recipe.model_dump(mode="json")
    named = [
        (values["student"], "model"),
        (values["judge"], "model_path"),
        *((t, "model_path") for t in values["teachers"]),
    ]
    for section, key in named:
        section[key] = next((name for name in MODEL_NAMES if section[key].endswith(f"/{name}")), section[key])
    return values


MODEL_NAMES = (*(f"{student}/{start}" for student in STUDENTS for start in ("base", "sft")), *TEACHERS, "judge")
"""Checkpoints in the folder of the models."""


class Plan:
    """The selected cells of the study as jobs, with everything that they need."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.recipes = Recipes(settings.out, settings.models, settings.overrides)
        self.score = str(settings.out / "world" / f"{settings.split}.jsonl")
        self._jobs: dict[str, StudyJob] = {}

    def places(self) -> Iterator[Place]:
        """Yield every selected cell, the most informative ones first, because a study may be cut short."""
        for place in self._all_places():
            if place.group in self.settings.groups and (not self.settings.only or place.name in self.settings.only):
                yield place

    def _all_places(self) -> Iterator[Place]:
        settings, seeds = self.settings, range(self.settings.seeds)

        def methods(student: str, names: Sequence[str]) -> Iterator[Place]:
            for seed in seeds:
                for name in names:
                    if METHODS[name].how != "as_is":
                        yield Place(student, "contenders", name, seed)
                    elif seed == 0:
                        yield Place(student, "contenders", name, None)

        if settings.students:
            yield from methods(settings.students[0], list(METHODS))
        for names in (MAIN, [name for name in METHODS if name not in MAIN]):
            for student in settings.students[1:]:
                yield from methods(student, names)
        for student in (s for s in settings.students if s in settings.ablation_students):
            for seed in range(settings.ablation_seeds):
                yield from (Place(student, "ablations", name, seed) for name in CELLS["ablations"])
        for student in settings.students:
            yield from (Place(student, "compute", name, seed) for seed in seeds for name in COMPUTE)

    def jobs(self) -> list[StudyJob]:
        """Return the job of every selected cell, each after the jobs it needs."""
        self._jobs = {}
        if not self.settings.only and "contenders" in self.settings.groups and self.settings.students:
            for teacher in TEACHERS:
                make = partial(self.recipes.teacher, teacher)
                self._add(f"teachers/{teacher}", make, "none", ("--name", "base", "--score", self.score), kind="score")
        for place in self.places():
            self._cell(place)
        return list(self._jobs.values())

    def _add(
        self,
        name: str,
        recipe: Callable[[], Recipe],
        stage: Stage,
        arguments: Sequence[str] = (),
        needs: Sequence[str] = (),
        expected: float = START_UP,
        kind: str = "",
    ) -> str:
        folder = self.recipes.out / name
        command = ("playground.study.work", "--recipe", str(folder / "recipe.yaml"), "--stage", stage, *arguments)
        job = StudyJob(
            name=name, arguments=command, needs=tuple(needs), expected=expected, kind=kind or stage,
            folder=folder, recipe=recipe, stage=stage,
        )  # fmt: skip
        self._jobs.setdefault(name, job)
        return name

    def _teacher_cache(self) -> str:
        arguments = ("--sources", *TEACHERS)
        return self._add("teachers/cache", self.recipes.teacher_collection, "collect", arguments, expected=300)

    def _cache(self, student: str, start: Start) -> str:
        teachers = self._teacher_cache()
        source = self._jobs[teachers].folder / "responses"
        arguments = ("--copy-from", str(source), "--sources", "student")
        make = partial(self.recipes.collection, student, start)
        return self._add(f"{student}/caches/{start}", make, "collect", arguments, [teachers], expected=100)

    def _discriminator(self, student: str, variant: Variant) -> str:
        cache = self._cache(student, variant.start)
        make = partial(self.recipes.discriminator, student, variant)
        return self._add(f"{student}/discriminators/{variant.name}", make, "discriminator", (), [cache], expected=60)

    def _cell(self, place: Place) -> str:
        recipes, cell = self.recipes, place.cell
        stages: dict[str, Stage] = {"as_is": "none", "sft": "sft", "loop": "train"}
        arguments = ["--name", result_name(cell), "--score", self.score]
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
        kind: str = cell.how
        cost = cell.cost
        if place.group == "compute":
            needs += self._measured_first(place)
            make = partial(self._compute_recipe, place)  # Its number of steps is measured first.
            kind, cost = f"{cell.how} {REFERENCE}", METHODS[REFERENCE].cost
        expected = START_UP + STEP * cost * (recipe.train.max_steps if cell.how != "as_is" else 0)
        return self._add(place.path, make, stages[cell.how], arguments, needs, expected, kind)

    def _measured_first(self, place: Place) -> list[str]:
        """Add the jobs whose steps are timed to know how many a cell at equal compute takes."""
        names = (REFERENCE, place.name)
        return [
            self._cell(Place(place.student, "contenders", name, seed))
            for name in names
            for seed in range(self.settings.seeds)
        ]

    def _compute_recipe(self, place: Place) -> Recipe:
        return self.recipes.cell(place, self.compute_steps(place))

    def compute_steps(self, place: Place) -> int:
        """Return as many steps as fill the reference's training seconds. A cell that has begun keeps its number."""
        begun = self.recipes.out / place.path / "recipe.yaml"
        if begun.is_file():
            return load_saved_recipe(begun).train.max_steps

        def timings(name: str) -> list[dict[str, Any]]:
            places = [Place(place.student, "contenders", name, seed) for seed in range(self.settings.seeds)]
            return [done for p in places if (done := read_done(self.recipes.out / p.path)) is not None]

        reference = median([s for done in timings(REFERENCE) if (s := seconds_of(done)) is not None])
        step = median([done["seconds_per_step"] for done in timings(place.name) if done["seconds_per_step"]])
        if reference is None or step is None:
            raise StateError(f"{place.path}: no measured seconds of {REFERENCE} and {place.name} to compare")
        return max(1, round(reference / step))
