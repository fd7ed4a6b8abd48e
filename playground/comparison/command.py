"""The comparison's command."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from openril.errors import DataError, StateError
from openril.recipe.schema import Recipe
from openril.storage import Lock, read_jsonl, refuse_changed, weights_fingerprint, write_json, write_jsonl
from playground.comparison.archive import unpack
from playground.comparison.lanes import Work, run_lanes
from playground.comparison.plan import (
    CONTENDERS,
    CONTROLS,
    DISTILLATION,
    EVERYBODY,
    GOALS,
    LENGTHS,
    RATES,
    REGIMES,
    SAME_TOKENIZER,
    START,
    STUDENTS,
    TEACHERS,
    WITH_ONE_TEACHER,
    Cell,
    Rate,
    contenders,
    distillation,
    lengths,
    regimes,
    skill_of,
    tuning,
)  # fmt: skip
from playground.comparison.recipes import Recipes, Variant, parsed, read_tuned
from playground.models.shipped import WEIGHTS
from playground.runner import exit_code

Part = Literal["tuning", "contenders", "seconds", "steps", "controls", "regimes", "others", "distillation"]


@dataclass
class Settings:
    """Compare the recipes of recipes/methods: tune each, then score it on test questions; see docs/study_protocol.md.

    It can be stopped at any time; the same command continues it. Every cell is a folder with its own recipe.
    """

    out: Path = Path("runs/comparison")
    """Folder for everything it makes."""
    models: Path = WEIGHTS
    """Folder of the models, as `make playground` leaves them."""
    parts: tuple[Part, ...] = ("tuning",)
    """Which parts, in this order. `tuning` uses validation questions alone and writes tuned.json; all others score test
    questions and need it."""
    students: tuple[str, ...] = STUDENTS
    """Which students."""
    only: tuple[str, ...] = ()
    """Only these contenders, regimes or controls. A regime runs with those of its contenders that are among them, if any."""
    seeds: int = 5
    """Seeds of every cell, from 0."""
    world_seed: int = 19
    """Seed of the questions."""
    num_train: int = 900
    """Training questions, the eighteen skills in turn."""
    num_validation: int = 720
    """Validation questions, for tuning."""
    num_test: int = 1440
    """Test questions."""
    overrides: tuple[str, ...] = ()
    """Settings of every recipe, as KEY=JSON, for instance train.questions_per_step=4."""
    tuned: Path | None = None
    """Take the rates from this tuned.json of another comparison, for instance on another world; it is copied."""
    scores: Path | None = None
    """Take the finished cells of this file first, as --report writes it (scores.jsonl in its folder). Tables and pages then
    need no cell to be run again, and cells that it lacks, for instance of further seeds, can be added."""
    lengths: tuple[int, ...] = LENGTHS
    """Numbers of steps of the part `steps`."""
    steps: int = 0
    """Steps of every cell instead of those of its part; for trying."""
    lanes: int = 2
    """Cells at a time, each on one thread."""
    minutes: float = 0.0
    """Begin no cell after so many minutes; 0 is without a limit."""
    report: bool = False
    """Run nothing; write the tables, figures and pages from the finished cells."""


def say(line: str = "") -> None:
    print(line, flush=True)


class Comparison:
    """Everything that the command does in a folder."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.out = settings.out.absolute()
        self.world = self.out / "world"
        self.recipes = Recipes(self.out, settings.models.absolute(), self.world, settings.overrides)
        self.deadline = time.time() + 60 * settings.minutes if settings.minutes else None

    def run(self) -> int:
        self.check()
        self.prepare()
        failed: list[str] = []
        failed += self.collect()
        for part in self.settings.parts:
            cells = list(self.cells(part))
            say(f"{part}: {len(cells)} cells")
            if part != "tuning":
                failed += self.measure()
            failed += self.run_cells(cells)
            if part == "tuning" and not failed:
                self.write_tuned()
        return 1 if failed else 0

    # Shared parts

    def check(self) -> None:
        """Raise DataError for names that nothing has, parts without a cell, or rates that contradict the folder's,
        RecipeError for overrides that cannot be read, and StateError for cells whose rate is not tuned yet and will not be."""
        parsed(self.settings.overrides)
        if self.settings.tuned is not None:
            self.take_rates(self.settings.tuned)
        names = {*EVERYBODY, *REGIMES}
        for key, given, known in (
            ("--students", self.settings.students, set(STUDENTS)),
            ("--only", self.settings.only, names),
        ):
            if unknown := sorted(set(given) - known):
                raise DataError(f"{key}: expected names of {', '.join(sorted(known))}; got {', '.join(unknown)}")
        for part in (p for p in self.settings.parts if p != "seconds"):
            if next(self.cells(part), None) is None:
                chosen = f"--students {' '.join(self.settings.students)} --only {' '.join(self.settings.only) or 'all'}"
                raise DataError(
                    f"--parts {part}: expected a cell of {chosen}, found none. Name others, or leave the part out."
                    f" Logits are those of a teacher with the tokenizer of {', '.join(SAME_TOKENIZER)}."
                )
        if "tuning" not in self.settings.parts:
            for part in (p for p in self.settings.parts if p != "seconds"):  # whose cells follow from finished ones
                for cell in self.cells(part):
                    self.rate(cell)

    def take_rates(self, path: Path) -> None:
        """Copy the tuned rates of another comparison. Raises DataError if the folder has other ones."""
        if "tuning" in self.settings.parts:
            raise DataError(f"--tuned {path}: expected other parts than tuning, which would write its own rates")
        rates, own = read_tuned(path), self.out / "tuned.json"
        if own.is_file() and (has := read_tuned(own)) != rates:
            raise DataError(f"--tuned {path}: expected the rates of {own}, {has}; got {rates}. Name another --out.")
        write_json(own, rates)

    def prepare(self) -> None:
        """Draw the world, and note what all cells share. Raises StateError when the folder belongs to another comparison."""
        settings = self.settings
        names = [*(f"{s}/sft" for s in settings.students), *TEACHERS]
        missing = [n for n in names if not (settings.models / n / "config.json").is_file()]
        if missing:
            raise DataError(
                f"{settings.models} lacks {', '.join(missing)}. Name the folder of the models with --models."
            )
        keys = ("world_seed", "num_train", "num_validation", "num_test", "overrides", "steps")
        now: dict[str, Any] = {key: getattr(settings, key) for key in keys}
        now["overrides"] = list(settings.overrides)
        now["models"] = {name: weights_fingerprint(settings.models / name) for name in names}
        path = self.out / "comparison.json"
        if path.is_file():
            was = json.loads(path.read_text(encoding="utf-8"))
            now["models"] = {**was["models"], **now["models"]}  # A student may be added, but not exchanged.
            was["models"] = {**now["models"], **was["models"]}
            refuse_changed(self.out, was, now, fix="name another --out")
        if not (self.world / "train.jsonl").is_file():
            from playground.world import write_skills_world
            from playground.world.skills import ALL_SKILLS

            numbers = (settings.num_train, settings.num_validation, settings.num_test)
            write_skills_world(self.world, *numbers, settings.world_seed, 1, tuple(ALL_SKILLS))
        write_json(path, now)
        self.write_partly_known()

    def write_partly_known(self) -> None:
        """Write the training questions of the regimes in which only a share has ground truth."""
        rows = read_jsonl(self.world / "train.jsonl")
        order = [row["id"] for row in rows]
        random.Random(self.settings.world_seed).shuffle(order)
        for regime in (r for r in REGIMES if r.startswith("truth_")):
            share = int(regime.partition("_")[2]) / 100
            known = set(order[: round(share * len(order))])
            whole = [row if row["id"] in known else {**row, "answer": ""} for row in rows]
            for name, kept in ((regime, whole), (f"{regime}_known", [row for row in rows if row["id"] in known])):
                if not (path := self.world / name.replace("truth_", "train_")).with_suffix(".jsonl").is_file():
                    write_jsonl(path.with_suffix(".jsonl"), kept)

    def collect(self) -> list[str]:
        """Collect the responses of teachers and students."""
        any_student = self.settings.students[0]
        work = []
        for teacher in TEACHERS:
            folder = self.out / "teachers" / teacher
            run = partial(_collect, self.recipes.teacher_collection(any_student), (teacher,), folder / "done.json")
            work.append(Work(f"responses of {teacher}", folder / "done.json", run, folder / "log"))
        failed = run_lanes(work, 1, say)  # one at a time, because a collection locks its cache
        work = []
        for student in self.settings.students:
            folder = self.out / student / "collection"
            recipe = self.recipes.collection(student)
            run = partial(_collect, recipe, ("student",), folder / "done.json", self.recipes.teacher_cache)
            work.append(Work(f"responses of {student}", folder / "done.json", run, folder / "log"))
        return failed + run_lanes(work, self.settings.lanes, say)

    # Cells

    def measure(self) -> list[str]:
        """Score the teachers, and the students as they start."""
        from playground.comparison import cells as runner

        work = []
        for name in (*self.settings.students, *TEACHERS):
            folder = self.out / (Cell(name, START).path if name in STUDENTS else f"teachers/{name}/scored")
            student = name if name in STUDENTS else self.settings.students[0]
            recipe = self.recipes.cell(Cell(student, "rejection_sampling"), RATES[1])
            recipe.run_dir = str(folder / "run")
            if name not in STUDENTS:
                recipe.student.model = str(self.recipes.models / name)
            run = partial(runner.measure, recipe, self.world / "test.jsonl", folder / runner.DONE)
            work.append(Work(f"score of {name}", folder / runner.DONE, run, folder / "log"))
        return run_lanes(work, self.settings.lanes, say)

    def cells(self, part: Part) -> Iterator[Cell]:
        """Yield the cells of a part."""
        settings = self.settings
        students, seeds = settings.students, settings.seeds

        def chosen(names: Sequence[str]) -> list[str]:
            return [n for n in names if not settings.only or n in settings.only]

        others = [n for n in CONTENDERS if n not in GOALS]
        match part:
            case "tuning":
                yield from tuning(students, chosen([*GOALS, *others, *DISTILLATION]))
            case "contenders":
                yield from contenders(students, chosen(GOALS), seeds)
            case "others":
                yield from contenders(students, chosen(others), seeds)
            case "controls":
                yield from contenders(students, chosen(list(CONTROLS)), seeds)
            case "steps":
                yield from lengths(students, chosen(GOALS), seeds, settings.lengths)
            case "distillation":
                yield from distillation(students, chosen(WITH_ONE_TEACHER), seeds)
            case "regimes":
                these = [r for r in REGIMES if r in settings.only] or list(REGIMES)
                yield from regimes(students, seeds, these, settings.only)
            case "seconds":
                for cell in contenders(students, chosen([n for n in GOALS if n != "ril_plus"]), seeds):
                    if (steps := self.steps_of_equal_seconds(cell)) is not None:
                        yield Cell(cell.student, cell.name, cell.seed, steps, regime="seconds")

    def steps_of_equal_seconds(self, cell: Cell) -> int | None:
        """Return the steps after which a contender has cost as much in all as RIL+ with ``STEPS`` steps."""
        from playground.comparison.costs import steps_of_equal_seconds

        return steps_of_equal_seconds(self.out, self.recipes, cell)

    def rate(self, cell: Cell) -> Rate:
        if cell.split == "validation":
            return Rate.of(cell.rate)
        name = cell.contender.tuned_as or cell.name
        tuned = read_tuned(self.out / "tuned.json").get(cell.student, {})
        if name not in tuned:
            raise StateError(
                f"{self.out / 'tuned.json'}: expected a rate of {name} for {cell.student}, found {', '.join(tuned) or 'none'}. "
                f"Run --parts tuning --students {cell.student} --only {name} first."
            )
        return Rate.of(tuned[name])

    def run_cells(self, cells: Sequence[Cell]) -> list[str]:
        """Pre-train the discriminators that the cells need, then run the cells, those of all students side by side."""
        from playground.comparison.cells import DONE

        todo = [c for c in cells if not (self.out / c.path / DONE).exists()]
        failed: list[str] = []
        work: list[Work] = []
        for student in self.settings.students:
            mine = [c for c in todo if c.student == student]
            if not mine:
                continue
            failed += self.discriminators(student, {v for c in mine if (v := self.recipes.variant(c)) is not None})
            shared = self.encoded(student, {c.split for c in mine})
            for cell in mine:
                variant = self.recipes.variant(cell)
                if variant is not None and self._discriminator_name(student, variant) in failed:
                    failed.append(cell.path)
                    continue
                recipes = self.recipes.parts(cell, self.rate(cell), self.settings.steps)
                run = partial(self._train, cell, recipes, variant, shared)
                work.append(Work(cell.path, self.out / cell.path / DONE, run, self.out / cell.path / "log"))
        order = [cell.path for cell in todo]
        work.sort(key=lambda piece: order.index(piece.name))
        return failed + run_lanes(work, self.settings.lanes, say, self.deadline)

    def encoded(self, student: str, splits: set[str]) -> Any:
        """Return what the cells of a student share, with the pictures of the splits and of the training questions."""
        from playground.comparison import cells as runner

        shared = runner.Shared()
        say(f"{student}: encoding the pictures")
        recipe = self.recipes.cell(Cell(student, "rejection_sampling", split="validation"), RATES[1])
        recipe.run_dir = str(self.out / student / "warm")
        runner.warm(recipe, [self.world / f"{s}.jsonl" for s in ("train", *sorted(splits))], shared)
        return shared

    def _train(self, cell: Cell, recipes: list[Recipe], variant: Variant | None, shared: Any) -> None:
        from playground.comparison import cells as runner
        from playground.comparison.regimes import Regime
        from playground.study.work import link

        recipe = recipes[0]
        for child in (p for p in recipe.run_path.glob("*") if p.name != "log"):  # of a cell that was killed
            shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
        if variant is not None:
            link(
                recipe.discriminator_path.parent,
                self.recipes.discriminator(cell.student, variant).discriminator_path.parent,
            )
        questions = self.world / f"{cell.split}.jsonl"
        regime = Regime(cell.regime, cell.seed, self.world)
        runner.train(recipes, questions, shared, regime, cell.contender)

    @staticmethod
    def _discriminator_name(student: str, variant: Variant) -> str:
        return f"discriminator {student}/{variant.name}"

    def discriminators(self, student: str, variants: set[Variant]) -> list[str]:
        work = []
        for variant in sorted(variants, key=lambda v: v.name):
            recipe = self.recipes.discriminator(student, variant)
            run = partial(_pretrain, recipe, variant.labels)
            work.append(
                Work(
                    self._discriminator_name(student, variant),
                    recipe.run_path / "done.json",
                    run,
                    recipe.run_path / "log",
                )
            )
        return run_lanes(work, self.settings.lanes, say)

    # Tuning

    def write_tuned(self) -> None:
        """Write the rate of each contender's best validation run, and all scores, for the contenders that are tuned."""
        from playground.comparison.cells import DONE

        path, scores_path = self.out / "tuned.json", self.out / "tuning_scores.json"
        tuned = json.loads(path.read_text()) if path.is_file() else {}
        table = json.loads(scores_path.read_text()) if scores_path.is_file() else {}
        for cell in self.cells("tuning"):
            done = json.loads((self.out / cell.path / DONE).read_text(encoding="utf-8"))
            mean = mean_of_skills(done["scores"])
            table.setdefault(cell.student, {}).setdefault(cell.name, {})[cell.rate] = round(100 * mean, 2)
        for student, names in table.items():
            for name, by_rate in names.items():
                tuned.setdefault(student, {})[name] = max(by_rate, key=lambda r: by_rate[r])
        write_json(scores_path, table)
        write_json(path, tuned)
        say(f"tuned rates: {path}")


def mean_of_skills(scores: dict[str, float]) -> float:
    """Return the mean over the skills of the mean scores, by question id (``test-00001-charts``)."""
    skills: dict[str, list[float]] = {}
    for question, value in scores.items():
        skills.setdefault(skill_of(question), []).append(value)
    return sum(sum(v) / len(v) for v in skills.values()) / len(skills)


def _collect(recipe: Any, sources: Sequence[str], done: Path, copy_from: Path | None = None) -> None:
    from rich.console import Console

    from openril.stages.collect import run_collect
    from openril.storage import atomic_path

    began = time.process_time()
    if copy_from is not None and not recipe.cache_path.exists():
        with atomic_path(recipe.cache_path) as temporary:
            shutil.copytree(copy_from, temporary)
    run_collect(recipe, Console(width=100), list(sources))
    write_json(done, {"cpu_seconds": time.process_time() - began})


def _pretrain(recipe: Any, labels: str) -> None:
    from contextlib import ExitStack

    from rich.console import Console

    from openril.stages.discriminator import run_discriminator
    from playground.comparison.regimes import Regime

    began = time.process_time()
    with ExitStack() as stack:
        for context in Regime("", 0).contexts(labels):
            stack.enter_context(context)
        run_discriminator(recipe, Console(width=100))
    write_json(recipe.run_path / "done.json", {"cpu_seconds": time.process_time() - began})


def main(arguments: Sequence[str] | None = None) -> int:
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="python -m playground.comparison")

    def body() -> int:
        if settings.scores is not None:
            say(f"{settings.scores}: {unpack(settings.scores, settings.out.absolute())} scored cells")
        if settings.report:
            from playground.comparison.page import write_report

            write_report(settings.out.absolute(), say)
            return 0
        lock = Lock(settings.out / ".lock")
        if not lock.acquire(wait=False):
            raise StateError(f"a comparison is running in {settings.out}. Wait for it, or name another --out.")
        try:
            return Comparison(settings).run()
        finally:
            lock.release()

    return exit_code("comparison", body)
