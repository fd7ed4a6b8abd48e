"""``python -m openril.playground.demo``: every stage of RIL on pictures this command draws, with tiny models.

It draws a world, trains a student, two teachers (another architecture and tokenizer each) and a judge, and then runs
``ril run recipes/demo/ril.yaml``: warm start, collection, discriminator, the RIL loop, evaluation. Every command is
shown and can be given by hand. Stop it whenever you like; the same command continues.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openril.errors import OpenRILError, RecipeError
from openril.playground.commands import Command, judge_server, run_lanes, run_shown
from openril.recipe.schema import Recipe
from openril.storage import read_jsonl, write_text

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
PLACE = "runs/demo"
"""Where the recipes put things; ``--out`` replaces it."""

MODELS: dict[str, dict[str, Any]] = {
    "teacher_a": {"architecture": "qwen2_5_vl", "hidden_size": 96, "num_layers": 4},
    "teacher_b": {"architecture": "internvl", "tokenizer": "unigram", "hidden_size": 96, "num_layers": 4},
    "student": {"architecture": "qwen2_5_vl", "hidden_size": 64, "num_layers": 3},
}
"""The random models that training starts from."""


@dataclass
class Settings:
    """Every stage of RIL on pictures drawn here, with tiny models, in a few minutes on two CPU cores."""

    out: Path = Path(PLACE)
    """Folder for everything it makes."""
    seed: int = 0
    """Everything follows from it."""
    num_train: int = 2400
    """Training questions to draw."""
    num_validation: int = 160
    """Held-out questions to draw."""
    judge_steps: int = 400
    """Training steps of the judge."""
    judge_port: int = 8131
    """Port of the judge's server on 127.0.0.1."""
    overrides: tuple[str, ...] = ()
    """Settings for every recipe, as KEY=VALUE, for instance train.max_steps=5."""


def say(line: str = "") -> None:
    print(line, flush=True)


def recipe_copy(name: str, settings: Settings) -> Path:
    """The shipped recipe with ``out`` for runs/demo, written to ``out/recipes``: a file to run, read and change.

    Raises RecipeError when the recipes are not beside this package.
    """
    source = RECIPES / "demo" / f"{name}.yaml"
    if not source.is_file():
        raise RecipeError(f"{source} is not there; run the demo from a checkout of the repository")
    from openril.recipe.loading import load_recipe, save_recipe

    target = settings.out / "recipes" / f"{name}.yaml"
    values = json.loads(load_recipe(source).model_dump_json().replace(f'"{PLACE}/', f'"{settings.out}/'))
    recipe = Recipe.model_validate({**values, "seed": settings.seed})
    save_recipe(recipe, target)
    flags = [f"--{o}" for o in settings.overrides]
    if flags:
        save_recipe(load_recipe(target, flags), target)
    return target


def prepare(settings: Settings) -> dict[str, Path]:
    """World and recipes; returns the recipes by name."""
    from openril.playground.world import write_world

    out = settings.out
    if not (out / "world" / "train.jsonl").is_file():
        started = time.perf_counter()
        write_world(out / "world", settings.num_train, settings.num_validation, settings.seed)
        say(
            f"  {settings.num_train} training and {settings.num_validation} held-out questions drawn in "
            f"{time.perf_counter() - started:.0f} s: {out / 'world'}"
        )
    else:
        say(f"  already there: {out / 'world'}")
    return {name: recipe_copy(name, settings) for name in ("teacher_a", "teacher_b", "student", "ril")}


def build_models(settings: Settings) -> None:
    """The random checkpoints, as ``python -m openril.playground.build`` writes them."""
    for name, sizes in MODELS.items():
        folder = settings.out / "models" / name
        if (folder / "config.json").is_file():
            continue
        from openril.playground import build

        texts = [settings.out / "world" / "train.jsonl"]
        build.build(build.Settings(folder, texts=texts, seed=settings.seed, **sizes))
        say(f"  built {folder}")


def model_lanes(settings: Settings, recipes: dict[str, Path]) -> list[list[Command]]:
    """Two lanes of about the same length: the judge and the student; the two teachers."""
    out = settings.out
    texts = str(out / "world" / "train.jsonl")

    def trained(name: str) -> list[Command]:
        if (out / name / "sft" / "student" / "config.json").is_file():
            return []
        metrics = out / name / "sft" / "metrics.jsonl"
        return [Command(f"train {name}", ("openril.cli", "sft", str(recipes[name])), metrics)]

    judge = Command(
        "train judge",
        (
            "openril.playground.judge", "--out", str(out / "models" / "judge"), "--train", texts,
            "--validation", str(out / "world" / "validation.jsonl"), "--steps", str(settings.judge_steps),
            "--seed", str(settings.seed),
        ),
    )  # fmt: skip
    judge_lane = [] if (out / "models" / "judge" / "agreement.json").is_file() else [judge]
    return [
        [*judge_lane, *trained("student")],
        [*trained("teacher_a"), *trained("teacher_b")],
    ]


def teacher_accuracy(recipe: Recipe) -> dict[str, float]:
    """Share of each teacher's cached responses that the exact rules call right."""
    from openril.data.reading import read_questions
    from openril.responses.cache import ResponseCache
    from openril.rewards import rules

    questions = read_questions(recipe.data, "train")
    cache = ResponseCache.open(recipe.cache_path).load(questions, recipe.teacher_names, recipe.collect.num_responses)
    out = {}
    for name in recipe.teacher_names:
        scores = [
            rules.score(q.rule or "auto", q, r.text) == 1.0 for q in questions for r in cache.responses_for(q.id, name)
        ]
        out[name] = sum(scores) / len(scores)
    return out


def summary(settings: Settings, recipe: Recipe, minutes: float) -> dict[str, Any]:
    """What was measured, from the files of the run."""
    run = recipe.run_path
    rows = read_jsonl(run / "metrics.jsonl")
    agreement = json.loads((settings.out / "models" / "judge" / "agreement.json").read_text())
    return {
        "seed": settings.seed,
        "minutes_of_this_call": round(minutes, 1),
        "judge_agreement": agreement["agreement"],
        "teachers_right": teacher_accuracy(recipe),
        "evaluation": read_evaluations(run),
        "steps": len(rows),
        "first_steps": mean_of(rows[:5]),
        "last_steps": mean_of(rows[-5:]),
    }


SHOWN = ("reward/student_similarity", "reward/student_answer", "discriminator/accuracy", "train/kl")


def mean_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means of a few metrics over rows, as far as the rows hold them."""
    out = {}
    for key in SHOWN:
        values = [row[key] for row in rows if isinstance(row.get(key), (int, float))]
        if values:
            out[key] = sum(values) / len(values)
    return out


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """What `ril eval` left in the run folder, one row a checkpoint: base, SFT student, steps, final."""
    try:
        table = json.loads((run / "eval" / "table.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    return list(table["evaluations"])


def show(settings: Settings, recipe: Recipe, result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="measured in this run")
    table.add_column("what")
    table.add_column("value", justify="right")
    for row in result["evaluation"]:
        error = row.get("standard_error")
        shown = f"{row['score']:.1%}" + (f" ± {error:.1%}" if error is not None else "")
        table.add_row(f"held-out questions, exact rules: {row['name']}", shown)
    for name, share in result["teachers_right"].items():
        table.add_row(f"teacher {name}: cached responses that are right", f"{share:.1%}")
    table.add_row("judge: agreement with the exact rule, held out", f"{result['judge_agreement']:.1%}")
    for key, value in result["first_steps"].items():
        last = result["last_steps"].get(key)
        if last is not None:
            table.add_row(f"{key}: first five steps, last five", f"{value:.3f}, {last:.3f}")
    console.print(table)
    console.print("One seed, tiny models: it shows that the parts work together, not how good the method is.")
    run, out = recipe.run_path, settings.out
    for what, path in (
        ("pictures and questions", out / "world"),
        ("recipes, to change and run", out / "recipes"),
        ("metrics, one row a step", run / "metrics.jsonl"),
        ("every response of every step", run / "rollouts"),
        ("the judge's explanations", run / "verdicts"),
        ("the student", run / "student"),
        ("these numbers", out / "summary.json"),
    ):
        console.print(f"  {what}: {path}", highlight=False)


def run_demo(settings: Settings) -> int:
    """The whole demo; returns the exit code."""
    from openril.recipe.loading import load_recipe

    started = time.monotonic()
    threads = min(4, os.cpu_count() or 1)
    say("1. a world of pictures and questions")
    recipes = prepare(settings)
    say("2. models: two teachers, a student, a judge (two commands at a time)")
    logs = settings.out / "logs"
    build_models(settings)
    lanes = model_lanes(settings, recipes)
    if any(lanes):
        run_lanes(lanes, logs, say)
    else:
        say("  already there")
    say(f"3. RIL ({(time.monotonic() - started) / 60:.1f} minutes so far)")
    with judge_server(settings.out / "models" / "judge", settings.judge_port, logs) as address:
        command = Command("ril", ("openril.cli", "run", str(recipes["ril"]), "--judge.base_urls", address))
        code = run_shown(command, say, threads)
    if code:
        return code
    recipe = load_recipe(recipes["ril"])
    minutes = (time.monotonic() - started) / 60
    result = summary(settings, recipe, minutes)
    write_text(settings.out / "summary.json", json.dumps(result, indent=2) + "\n")
    say()
    show(settings, recipe, result)
    say(f"{minutes:.1f} minutes")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="python -m openril.playground.demo")
    try:
        return run_demo(settings)
    except OpenRILError as e:
        print(f"demo: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
