"""``python -m playground.demo``: compare RIL with Dr.GRPO on the fourteen skills, with ready-made models.

It is a small preset of the study (playground/study). It draws the world, collects both teachers' and the student's
responses, pre-trains discriminators, trains one student by three methods, and scores the results on held-out questions.
Every command is shown and can be given by hand. The demo can be stopped at any time; the same command continues it.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from openril.errors import DataError, RecipeError
from openril.recipe.loading import load_saved_recipe, save_recipe
from openril.recipe.schema import Recipe
from openril.records import Question
from openril.storage import atomic_path, read_jsonl, refuse_changed, weights_fingerprint, write_json
from playground.demo_report import METHODS, evaluation_file, read_evaluation, read_world, show, write_report
from playground.models.shipped import StudentName, find_models
from playground.runner import Clock, Job, Progress, Runner, exit_code
from playground.study.jobs import collected, stage_progress
from playground.study.recipes import shipped_recipe
from playground.world import SKILLS

OUT = "runs/demo"
"""Folder in the shipped recipes that ``--out`` replaces."""
RUNS = ("ril", "ril_one", "dr_grpo")
"""Runs, each with a recipe in recipes/demo."""


@dataclass
class Settings:
    """Train one student by RIL with two teachers, RIL with one, and Dr.GRPO: four minutes on two CPU cores."""

    out: Path = Path(OUT)
    """Folder for everything it makes."""
    student: StudentName = "qwen"
    """Architecture of the student."""
    models: Path | None = None
    """Folder of `make playground` to take the models from, instead of those of the checkout."""
    seed: int = 0
    """Everything random follows from it."""
    num_train: int = 700
    """Training questions, the skills in turn."""
    num_validation: int = 140
    """Questions for the curve during training."""
    num_test: int = 280
    """Held-out questions that score the methods: a multiple of 14."""
    difficulty: list[int] = field(default_factory=lambda: [1])
    """Difficulties of the questions, in turn; the ready-made models know 1."""
    width: int = 2
    """Commands at a time, of one thread each."""
    overrides: tuple[str, ...] = ()
    """Settings for every recipe, as KEY=VALUE, for instance train.max_steps=5."""


def say(line: str = "") -> None:
    print(line, flush=True)


def prepare(settings: Settings) -> dict[str, Recipe]:
    """Make the world, the models and the recipes that are missing; returns the recipes by run.

    Raises:
        RecipeError: If the folder holds a demo with other settings.
    """
    if settings.num_test % len(SKILLS) or not settings.num_test:
        raise DataError(
            f"--num-test: expected a multiple of {len(SKILLS)} (equally many a skill), got {settings.num_test}"
        )
    out = settings.out
    models = find_models(settings.student, settings.models)
    numbers = (settings.num_train, settings.num_validation, settings.num_test)
    now: dict[str, Any] = {
        "seed": settings.seed,
        "student": settings.student,
        "questions": list(numbers),
        "difficulty": list(settings.difficulty),
        "overrides": list(settings.overrides),
        "weights": {name: weights_fingerprint(folder) for name, folder in models.items()},
    }
    pinned = out / "demo.json"
    if pinned.is_file():
        was = json.loads(pinned.read_text(encoding="utf-8"))
        refuse_changed(out, was, now, fix="name another folder with --out", error=RecipeError)
    else:
        write_json(pinned, now)
    if not (out / "world" / "train.jsonl").is_file():
        from playground.world import write_skills_world

        write_skills_world(out / "world", *numbers, settings.seed, settings.difficulty)
        say(f"  {numbers[0]} training, {numbers[1]} validation and {numbers[2]} test questions: {out / 'world'}")
    for name, folder in models.items():
        target = out / "models" / name
        if not (target / "config.json").is_file():
            with atomic_path(target) as temporary:
                shutil.copytree(folder, temporary)
            say(f"  {name}: {target} (from {folder})")
    return {run: write_recipe(run, settings) for run in RUNS}


def demo_recipe(run: str, settings: Settings) -> Recipe:
    recipe = shipped_recipe(f"demo/{run}.yaml", settings.overrides, {OUT: settings.out})
    recipe.seed = settings.seed
    return recipe


def write_recipe(run: str, settings: Settings) -> Recipe:
    """Write the recipe of a run to ``out/recipes``, to run, read and change. An existing file stays."""
    path = settings.out / "recipes" / f"{run}.yaml"
    if not path.is_file():
        save_recipe(demo_recipe(run, settings), path)
    return load_saved_recipe(path)


# Jobs


@dataclass(kw_only=True)
class DemoJob(Job):
    """One ``ril`` command. What is done is recognized by the files that it leaves."""

    done: Callable[[], bool]
    look: Callable[[], Progress]

    def seconds(self) -> float | None:
        return 0.0 if self.done() else None

    def progress(self) -> Progress:
        return self.look()


START_UP = 8.0
PER_COLLECTED_RESPONSE, PER_DISCRIMINATOR_STEP, PER_ANSWER = 0.003, 0.55, 0.02
PER_TRAINING_STEP = {"dr_grpo": 1.2, "ril_one": 3.6, "ril": 3.6}
"""Seconds on one core of the machine where they were measured. Only their proportions matter."""


def plan(out: Path, recipes: Mapping[str, Recipe]) -> list[DemoJob]:
    """Return all commands in order. Dr.GRPO needs no responses, so it trains while they are collected."""
    jobs: list[DemoJob] = []

    def add(
        name: str, run: str, stage: Any, done: Callable[[], bool], each: float, needs: Sequence[str] = (),
        arguments: Sequence[str] = (), look: Callable[[], Progress] | None = None,
    ) -> None:  # fmt: skip
        look = look or partial(stage_progress, stage, recipes[run])
        command = ("openril.cli", stage, str(out / "recipes" / f"{run}.yaml"), *arguments)
        expected = START_UP + each * look()[1]
        jobs.append(
            DemoJob(
                name=name, arguments=command, needs=tuple(needs), expected=expected, kind=stage, done=done, look=look
            )
        )

    def train(run: str) -> None:
        needs = [f"{run} discriminator"] if recipes[run].uses_discriminator else []
        add(f"{run} train", run, "train", partial(trained, recipes[run]), PER_TRAINING_STEP[run], needs)

    ril = recipes["ril"]
    responses = stage_progress("collect", ril)[1]
    add("collect", "ril", "collect", lambda: collected(ril.cache_path)[0] >= responses, PER_COLLECTED_RESPONSE)
    train("dr_grpo")
    for run in ("ril", "ril_one"):
        trained_discriminator = recipes[run].discriminator_path / "config.json"
        add(
            f"{run} discriminator",
            run,
            "discriminator",
            trained_discriminator.is_file,
            PER_DISCRIMINATOR_STEP,
            ["collect"],
        )
    train("ril")
    train("ril_one")
    test = read_world(out, "test")
    for name, method in METHODS.items():
        checkpoint = out / "models" / "student" if name == "sft" else out / method.run / "student"
        arguments = ["--checkpoints", str(checkpoint), "--data.validation", str(out / "world" / "test.jsonl")]
        # Two evaluations must not write the table of one folder at once.
        needs = {"sft": [], "ril_both": ["ril train", "sft eval"]}.get(name, [f"{method.run} train"])
        add(
            f"{'sft' if name == 'sft' else method.run} eval", method.run, "eval", partial(scored, out, name, test), PER_ANSWER,
            needs, [*arguments, "--eval.limit", "0"], partial(scoring_progress, evaluation_file(out, name), len(test)),
        )  # fmt: skip
    return jobs


def scored(out: Path, name: str, test: Mapping[str, Question]) -> bool:
    return read_evaluation(out, name, test) is not None


def scoring_progress(journal: Path, total: int) -> Progress:
    scores = [row["score"] for row in read_jsonl(journal) if "question_id" in row]
    return len(scores), total, f"right {sum(s or 0 for s in scores) / len(scores):.0%}" if scores else ""


def trained(recipe: Recipe) -> bool:
    try:
        finished = json.loads((recipe.run_path / "finished.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    return int(finished["step"]) >= recipe.train.max_steps and (recipe.run_path / "student" / "config.json").is_file()


# The command


def run_demo(settings: Settings) -> dict[str, Any]:
    """Run the whole demo; returns the summary."""
    from rich.console import Console

    out, console = settings.out, Console()
    clock = Clock(out / "clock.json")
    say("1. world, models, recipes")
    runner = Runner(plan(out, prepare(settings)), out / "logs", console, width=settings.width, clock=clock)
    if left := len(runner.jobs) - len(runner.finished):
        clock.tick()
        say(f"2. {left} commands, {settings.width} at a time; their output is in {out / 'logs'}")
        runner.run()
    elif (out / "summary.json").is_file():
        say("  everything is already there")
        clock.stop()  # Looking at the results does not count.
    summary, groups = write_report(out, settings.seed, settings.student, clock)
    show(console, out, summary, groups)
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="python -m playground.demo")

    def body() -> int:
        run_demo(settings)
        return 0

    return exit_code("demo", body)


if __name__ == "__main__":
    sys.exit(main())
