"""``python -m playground.demo``: RIL beside Dr.GRPO on the fourteen skills, with ready-made models.

It draws the world, collects both teachers' and the student's responses, pre-trains discriminators, trains three
contenders from one student, and scores them on questions none of them has seen. Every command is shown and can be given
by hand. Stop it whenever you like; the same command continues.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openril.errors import DataError, RecipeError
from openril.recipe.schema import Recipe
from openril.storage import atomic_path, write_json, write_text
from playground.commands import answer, run_queue
from playground.demo_jobs import Board, Clock, Job, plan
from playground.demo_report import (
    CURVES,
    NOTES,
    ShownGroup,
    group_text,
    groups_text,
    judge_lines,
    page,
    rich_tables,
    shown_groups,
    training_lines,
)
from playground.demo_results import CONTENDERS, draw_curves, read_agreement, read_world, summarise
from playground.models.shipped import StudentName, find_models
from playground.world import SKILLS

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
PLACE = "runs/demo"
"""Where the recipes put things; ``--out`` replaces it."""
SOURCES = {"ril": "demo/ril.yaml", "ril_one": "demo/ril_one.yaml", "dr_grpo": "baselines/dr_grpo.yaml"}
"""The recipe of each run."""


@dataclass
class Settings:
    """RIL with two teachers, RIL with one, and Dr.GRPO from the same student, in ten minutes on two CPU cores."""

    out: Path = Path(PLACE)
    """Folder for everything it makes."""
    student: StudentName = "qwen"
    """Architecture of the student."""
    models: Path | None = None
    """Folder of `make playground` to take the models from, instead of those that come with the package."""
    seed: int = 0
    """Everything follows from it."""
    num_train: int = 700
    """Training questions, the skills in turn."""
    num_validation: int = 140
    """Questions for the curve while training."""
    num_test: int = 280
    """Held-out questions that contenders are scored on: a multiple of 14."""
    difficulty: list[int] = field(default_factory=lambda: [1])
    """Of the questions, in turn; the ready-made models know 1."""
    width: int = 2
    """Commands at a time, of one thread each."""
    overrides: tuple[str, ...] = ()
    """Settings for every recipe, as KEY=VALUE, for instance train.max_steps=5."""


def say(line: str = "") -> None:
    print(line, flush=True)


# Preparing


def prepare(settings: Settings) -> dict[str, Recipe]:
    """World, models and recipes, as far as they are not there; returns the recipes by run.

    Raises RecipeError when the folder holds a demo of other settings.
    """
    if settings.num_test % len(SKILLS) or not settings.num_test:
        raise DataError(
            f"num_test is {settings.num_test}; a multiple of {len(SKILLS)} gives every skill equally many questions"
        )
    out = settings.out
    models = find_models(settings.student, settings.models)
    pin(settings, models)
    if not (out / "world" / "train.jsonl").is_file():
        from playground.world import write_skills_world

        numbers = (settings.num_train, settings.num_validation, settings.num_test)
        write_skills_world(out / "world", *numbers, settings.seed, settings.difficulty)
        say(f"  {numbers[0]} training, {numbers[1]} validation and {numbers[2]} test questions: {out / 'world'}")
    for name, folder in models.items():
        target = out / "models" / name
        if not (target / "config.json").is_file():
            with atomic_path(target) as temporary:
                shutil.copytree(folder, temporary)
            say(f"  {name}: {target} (from {folder})")
    return {run: write_recipe(run, settings) for run in SOURCES}


def pin(settings: Settings, models: dict[str, Path]) -> None:
    """Note what the demo in this folder is made of; refuse to go on with another one's files."""
    from openril.storage import weights_fingerprint

    now: dict[str, Any] = {
        "seed": settings.seed,
        "student": settings.student,
        "questions": [settings.num_train, settings.num_validation, settings.num_test],
        "difficulty": list(settings.difficulty),
        "overrides": list(settings.overrides),
        "weights": {name: weights_fingerprint(folder) for name, folder in models.items()},
    }
    path = settings.out / "demo.json"
    if not path.is_file():
        write_json(path, now)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if changed := [
        f"{key} was {before.get(key)}, now {value}" for key, value in now.items() if before.get(key) != value
    ]:
        raise RecipeError(
            f"{settings.out} holds a demo of other settings ({'; '.join(changed)}); name another folder with --out, or "
            "remove this one"
        )


def write_recipe(run: str, settings: Settings) -> Recipe:
    """The shipped recipe with ``out`` for runs/demo, in ``out/recipes``: a file to run, read and change. One that is there
    stays. Raises RecipeError when the recipes are not beside this package."""
    from openril.recipe.loading import load_recipe, save_recipe

    target = settings.out / "recipes" / f"{run}.yaml"
    if target.is_file():
        return load_recipe(target)
    source = RECIPES / SOURCES[run]
    if not source.is_file():
        raise RecipeError(f"{source} is not there; run the demo from a checkout of the repository")
    recipe = load_recipe(source, [f"--{override}" for override in settings.overrides])
    place = json.dumps(str(settings.out))[1:-1]
    values = json.loads(recipe.model_dump_json().replace(f'"{PLACE}/', f'"{place}/'))
    recipe = Recipe.model_validate({**values, "seed": settings.seed})
    save_recipe(recipe, target)
    return recipe


# Results


def conclude(settings: Settings, clock: Clock) -> dict[str, Any]:
    """Write summary.json, the curves, report.html and groups.txt; show them, and return the summary."""
    out = settings.out
    summary = summarise(out, settings.seed, read_agreement(out / "models"))
    sections = shown_groups(out, out / CONTENDERS["ril_both"].run, read_world(out, "train"))
    draw_curves(out, out / CURVES)
    write_text(out / "groups.txt", groups_text(sections))
    clock.tick()
    summary |= {"minutes": clock.minutes, "student": settings.student}
    write_text(out / "report.html", page(summary, sections))
    write_json(out / "summary.json", summary)
    show(out, summary, sections[-1][1])
    return summary


def show(out: Path, summary: dict[str, Any], last: Sequence[ShownGroup]) -> None:
    """The summary on the screen. last: groups of the last step."""
    from rich.console import Console

    console = Console()
    console.print("\na group of the last step of RIL with both teachers:")
    for group in last[:1]:
        console.print(group_text(group) + "\n", markup=False, highlight=False, soft_wrap=True)
    for table in rich_tables(summary):
        console.print(table)
    console.print(NOTES.format(n=summary["test_questions"]), markup=False, highlight=False)
    for line in [*judge_lines(summary), "student samples, first five steps to last five:", *training_lines(summary)]:
        console.print(line, markup=False, highlight=False)
    for what, path in (
        ("everything on one page: table, curves, groups", out / "report.html"),
        ("groups to read here", out / "groups.txt"),
        ("curves", out / CURVES),
        ("these numbers", out / "summary.json"),
        ("recipes, to change and run", out / "recipes"),
        ("every response of every step", out / "ril" / "rollouts"),
        ("the judge's explanations", out / "ril" / "verdicts"),
        ("the student", out / "ril" / "student"),
    ):
        console.print(f"  {what}: {path}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{summary['minutes']} minutes", highlight=False)


def run_demo(settings: Settings) -> dict[str, Any]:
    """The whole demo; returns the summary."""
    from rich.console import Console

    out = settings.out
    clock = Clock(out / "clock.json")
    say("1. world, models, recipes")
    recipes = prepare(settings)
    jobs: list[Job] = plan(out, recipes)
    if jobs:
        clock.tick()
        say(f"2. {len(jobs)} commands, {settings.width} at a time; their output is in {out / 'logs'}")
        board = Board(jobs, clock, Console(), settings.width)
        with board:
            run_queue([job.command for job in jobs], out / "logs", board.say, width=settings.width, watch=board.watch)
    elif (out / "summary.json").is_file():
        say("  everything is there already")
        clock.stop()  # looking at results is not making them
    return conclude(settings, clock)


def main(arguments: Sequence[str] | None = None) -> int:
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="python -m playground.demo")

    def body() -> int:
        run_demo(settings)
        return 0

    return answer("demo", body)


if __name__ == "__main__":
    sys.exit(main())
