"""``python -m playground.demo``: compare RIL, RIL+, rejection sampling and Dr.GRPO on fourteen skills, with ready-made models.

It is a small preset of the study (playground/study). It draws the world, collects both teachers' and the student's
responses, pre-trains a discriminator, trains one student by four methods, and scores the results on held-out questions.
Every command is shown and can be given by hand. The demo can be stopped at any time; the same command continues it.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openril.errors import DataError, OpenRILError, RecipeError
from openril.recipe.loading import load_saved_recipe, save_recipe
from openril.recipe.schema import Recipe
from openril.storage import atomic_path, read_jsonl, refuse_changed, weights_fingerprint, write_json
from playground.demo_report import METHODS, evaluation_file, read_evaluation, read_world, show, write_report
from playground.models.shipped import StudentName, find_models
from playground.runner import Clock, Job, Progress, Runner, exit_code
from playground.study.jobs import collected, stage_progress
from playground.study.metrics import cached_responses
from playground.study.recipes import shipped_recipe
from playground.world import SKILLS

OUT = "runs/demo"
"""Folder in the shipped recipes that ``--out`` replaces."""
RUNS = ("ril", "ril_plus", "rejection_sampling", "dr_grpo")
"""Runs, each with a recipe in recipes/demo."""


@dataclass
class Settings:
    """Train one student by Dr.GRPO, rejection sampling, RIL and RIL+: under ten minutes on two CPU cores."""

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
        print(f"  {numbers[0]} training, {numbers[1]} validation and {numbers[2]} test questions: {out / 'world'}")
    for name, folder in models.items():
        target = out / "models" / name
        if not (target / "config.json").is_file():
            with atomic_path(target) as temporary:
                shutil.copytree(folder, temporary)
            print(f"  {name}: {target} (from {folder})")
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

START_UP = 8.0
PER_UNIT = {"collect": 0.003, "verdicts": 0.006, "discriminator": 0.55, "train": 3.6, "eval": 0.02}
"""Seconds of a response, step or answer on one core of the machine where they were measured. Only their proportions
matter. A step of Dr.GRPO takes a third."""


@dataclass(kw_only=True)
class DemoJob(Job):
    """One ``ril`` command. The files that it leaves tell whether it is done."""

    out: Path
    recipe: Recipe
    method: str = ""
    """Method that an evaluation scores."""

    def progress(self) -> Progress:
        if self.kind == "verdicts":
            return 0, sum(collected(self.recipe.cache_path)) or 1, "verdicts"
        if self.kind != "eval":
            return stage_progress(self.kind, self.recipe)
        scores = [row["score"] for row in read_jsonl(evaluation_file(self.out, self.method)) if "question_id" in row]
        right = f"right {sum(s or 0 for s in scores) / len(scores):.0%}" if scores else ""
        return len(scores), len(read_world(self.out, "test")), right

    def seconds(self) -> float | None:
        run = self.recipe.run_path
        match self.kind:
            case "collect":
                done = collected(self.recipe.cache_path)[0] >= self.progress()[1]
            case "verdicts":
                done = not unjudged(self.recipe)
            case "discriminator":
                done = (self.recipe.discriminator_path / "config.json").is_file()
            case "train":
                done = (run / "student" / "config.json").is_file() and (run / "finished.json").is_file()
                done = done and json.loads((run / "finished.json").read_text())["step"] >= self.recipe.train.max_steps
            case _:
                done = read_evaluation(self.out, self.method, read_world(self.out, "test")) is not None
        return 0.0 if done else None


def unjudged(recipe: Recipe) -> int:
    """Return the number of cached teacher responses without a verdict."""
    try:
        cached = cached_responses(recipe, [t.name for t in recipe.teachers])
    except OpenRILError:  # nothing is collected yet
        return 1
    return sum(verdict is None for items in cached.values() for _, _, verdict in items)


def plan(out: Path, recipes: Mapping[str, Recipe]) -> list[DemoJob]:
    """Return all commands in order. Dr.GRPO needs no responses, so it trains while they are collected."""

    def job(name: str, run: str, *arguments: str, needs: Sequence[str] = (), method: str = "") -> DemoJob:
        stage = name.split()[-1]
        command = (
            "openril.cli",
            "collect" if stage == "verdicts" else stage,
            str(out / "recipes" / f"{run}.yaml"),
            *arguments,
        )
        made = DemoJob(
            name=name, arguments=command, needs=tuple(needs), kind=stage, out=out, recipe=recipes[run], method=method
        )
        made.expected = START_UP + PER_UNIT[stage] * made.progress()[1] / (3 if name == "dr_grpo train" else 1)
        return made

    def evaluation(name: str) -> DemoJob:
        run = METHODS[name].run
        checkpoint = out / "models" / "student" if name == "sft" else out / run / "student"
        score = ("--data.validation", str(out / "world" / "test.jsonl"), "--eval.limit", "0")
        # Two evaluations must not write the table of one folder at once.
        needs = {"sft": [], "ril": ["ril train", "sft eval"]}.get(name, [f"{run} train"])
        title = f"{'sft' if name == 'sft' else run} eval"
        return job(title, run, "--checkpoints", str(checkpoint), *score, needs=needs, method=name)

    return [
        job("collect", "ril"),
        job("dr_grpo train", "dr_grpo"),
        job("ril discriminator", "ril", needs=["collect"]),
        job("verdicts", "ril_plus", needs=["collect"]),
        job("ril_plus train", "ril_plus", needs=["verdicts"]),
        job("ril train", "ril", needs=["ril discriminator"]),
        job("rejection_sampling train", "rejection_sampling", needs=["verdicts"]),
        *map(evaluation, METHODS),
    ]


# The command


def run_demo(settings: Settings) -> dict[str, Any]:
    """Run the whole demo; returns the summary."""
    from rich.console import Console

    out, console = settings.out, Console()
    clock = Clock(out / "clock.json")
    print("1. world, models, recipes")
    runner = Runner(plan(out, prepare(settings)), out / "logs", console, width=settings.width, clock=clock)
    if left := len(runner.jobs) - len(runner.finished):
        clock.tick()
        print(f"2. {left} commands, {settings.width} at a time; their output is in {out / 'logs'}")
        runner.run()
    elif (out / "summary.json").is_file():
        print("  everything is already there")
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
