"""The study's command: settings, what must stay the same over its runs, and the report at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from openril.errors import DataError, StateError
from openril.report.progress import duration
from openril.responses.files import Lock
from openril.storage import weights_fingerprint, write_json
from playground.commands import answer
from playground.models.shipped import WEIGHTS
from playground.study.cells import Recipes
from playground.study.jobs import Plan
from playground.study.lanes import Lanes
from playground.study.plan import CELLS, GROUPS, STUDENTS, TEACHERS, Group


@dataclass
class Settings:
    """RIL against what it is built from: two students, eleven contenders, ablations, equal compute; seeds and intervals.

    Stop it whenever you like; the same command goes on. Every cell is a run folder with a recipe of its own.
    """

    out: Path = Path("runs/study")
    """Folder for everything it makes."""
    models: Path = WEIGHTS
    """Folder of the models, as `make playground` leaves them: student_qwen/{base,sft}, student_internvl/{base,sft},
    teacher_a, teacher_b and judge. The default are those that come with the package."""
    students: tuple[str, ...] = STUDENTS
    """Which students."""
    seeds: int = 3
    """Seeds of every contender, from 0."""
    ablation_seeds: int = 1
    """Seeds of every ablation."""
    ablation_students: tuple[str, ...] = STUDENTS[:1]
    """Students that the ablations are made on."""
    groups: tuple[Group, ...] = GROUPS
    """Which parts."""
    only: tuple[str, ...] = ()
    """Only cells of these names, with what they need."""
    num_train: int = 700
    """Training questions, the fourteen skills in turn."""
    num_validation: int = 280
    """Validation questions: curves and tuning."""
    num_test: int = 1120
    """Test questions."""
    split: Literal["test", "validation"] = "test"
    """On which the cells are scored. Tune with validation, into another folder; the test questions are used once."""
    world_seed: int = 0
    """Of the questions."""
    overrides: tuple[str, ...] = ()
    """Settings of every recipe, as KEY=VALUE, for instance train.max_steps=5."""
    lanes: int = 2
    """Jobs at a time, each on one thread."""
    report: bool = False
    """Run nothing; make tables, figures and page from what is finished."""
    page: Path | None = None
    """The page that is given the report, and beside it its figures; unset: docs/study.md for a report of the test
    questions in runs/study, else study.md in the out folder."""
    resamples: int = 4000
    """Of the bootstrap."""
    list_jobs: bool = field(default=False)
    """Run nothing; print every job and whether it is done."""


def say(line: str = "") -> None:
    print(line, flush=True)


def check(settings: Settings) -> None:
    """Raises DataError for names that do not exist, and for models that are not there."""
    names = {name for cells in CELLS.values() for name in cells}
    for what, wanted, known in (
        ("student", settings.students, set(STUDENTS)),
        ("student", settings.ablation_students, set(STUDENTS)),
        ("cell", settings.only, names),
    ):
        if unknown := sorted(set(wanted) - known):
            raise DataError(f"no {what} {', '.join(unknown)}; choose from {', '.join(sorted(known))}")
    wanted_models = [f"{s}/{start}" for s in settings.students for start in ("base", "sft")]
    missing = [m for m in (*wanted_models, *TEACHERS, "judge") if not (settings.models / m / "config.json").is_file()]
    if missing:
        raise DataError(
            f"{settings.models} lacks {', '.join(missing)}; name the folder of the models with --models, or make them with"
            " `make playground`"
        )


def identity(settings: Settings) -> dict[str, Any]:
    """What every cell of a study shares, and must go on sharing, besides the recipes."""
    folders = [f"{s}/{start}" for s in STUDENTS for start in ("base", "sft")] + [*TEACHERS, "judge"]
    return {
        "num_train": settings.num_train,
        "num_validation": settings.num_validation,
        "num_test": settings.num_test,
        "world_seed": settings.world_seed,
        "split": settings.split,
        "models": {name: found for name in folders if (found := weights_fingerprint(settings.models / name))},
    }


def prepare(settings: Settings) -> None:
    """The world, and what must stay the same. Raises StateError when the folder belongs to another study."""
    path, now = settings.out / "study.json", identity(settings)
    if path.is_file():
        was = json.loads(path.read_text(encoding="utf-8"))
        # A student that was not there before may come; one that was there must be the same.
        now["models"] = {**was["models"], **now["models"]}
        changed = [key for key in now if key != "models" and was.get(key) != now[key]]
        changed += [f"models: {name}" for name, old in was["models"].items() if now["models"][name] != old]
        if changed:
            raise StateError(
                f"{settings.out} was begun with other {', '.join(changed)}; restore them, or name another --out"
            )
    settings.out.mkdir(parents=True, exist_ok=True)
    write_json(path, now)
    if not (settings.out / "world" / "train.jsonl").is_file():
        from playground.world import write_skills_world

        started = time.monotonic()
        numbers = (settings.num_train, settings.num_validation, settings.num_test)
        write_skills_world(settings.out / "world", *numbers, settings.world_seed, difficulty=1)
        say(f"world: {sum(numbers)} questions drawn in {duration(time.monotonic() - started)}")


def make_plan(settings: Settings) -> Plan:
    recipes = Recipes(settings.out, settings.models, settings.overrides)
    return Plan(
        recipes,
        settings.out / "world" / f"{settings.split}.jsonl",
        settings.students,
        settings.seeds,
        settings.ablation_seeds,
        settings.ablation_students,
        settings.groups,
        settings.only,
    )


def run(settings: Settings) -> int:
    """The study; returns the exit code: 1 when a job failed (the same command tries it again)."""
    check(settings)
    prepare(settings)
    jobs = make_plan(settings).jobs()
    lanes = Lanes(jobs, settings.out / "logs", say, settings.lanes)
    if settings.list_jobs:
        for job in jobs:
            say(f"{'done' if job.name in lanes.finished else '    '}  {job.name}")
        return 0
    changed = {job.name: keys for job in jobs if job.recipe_path.is_file() and (keys := job.changed(job.recipe()))}
    if changed:
        lines = [f"  {name}: {', '.join(keys[:6])}" for name, keys in list(changed.items())[:8]]
        raise StateError(
            f"{len(changed)} folders of {settings.out} were made with other settings:\n"
            + "\n".join(lines)
            + "\nrestore"
            " them, remove those folders to make them again, or name another --out"
        )
    started = time.monotonic()
    say(f"study: {len(jobs)} jobs, {len(lanes.finished)} of them done; {lanes.left()}")
    say(
        f"by hand, for instance: ril train {settings.out}/{settings.students[0]}/contenders/ril_both/seed_0/recipe.yaml"
    )
    failed = lanes.run()
    say(f"study: {len(lanes.finished)} of {len(jobs)} jobs done, {duration(time.monotonic() - started)} this time")
    for name, why in failed.items():
        say(f"  failed: {name}: {why.splitlines()[0]}")
    return 1 if failed else 0


def make_report(settings: Settings) -> None:
    from playground.study.page import default_page, write_report

    write_report(settings.out, settings.page or default_page(settings.out, settings.split), settings.resamples, say)


def main(arguments: Sequence[str] | None = None) -> int:
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="python -m playground.study")

    def body() -> int:
        if settings.report:
            make_report(settings)
            return 0
        # Two studies in one folder would make the same cells.
        with StudyLock(settings.out):
            code = run(settings)
        if not settings.list_jobs:
            make_report(settings)
        return code

    return answer("study", body)


class StudyLock:
    """Held while a study runs in ``out``. Raises StateError when another does."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.lock = Lock(out / ".lock")

    def __enter__(self) -> None:
        if not self.lock.acquire(wait=False):
            raise StateError(f"a study is running in {self.out}; wait for it, or name another --out")

    def __exit__(self, *_: object) -> None:
        self.lock.release()
