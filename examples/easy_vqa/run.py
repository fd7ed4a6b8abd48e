"""``python -m examples.easy_vqa.run``: the whole example in one command, which continues where it stopped.

It prepares the data and the models, and runs `ril sft`, `ril collect`, `ril run` and `ril eval` with the recipes of this
folder, two at a time. Every command is shown and can be given by hand. At the end it prints the table of
docs/easy_vqa.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.easy_vqa.prepare import Row, Settings, prepare
from openril.errors import RecipeError
from openril.recipe.loading import load_saved_recipe, save_recipe
from openril.recipe.schema import Recipe
from openril.report.progress import duration
from openril.storage import Lock, read_jsonl, refuse_changed, write_json, write_text
from playground.runner import Clock, Job, Progress, Runner, exit_code
from playground.study.bootstrap import Array, Estimate, Resampling
from playground.study.jobs import collected, stage_progress
from playground.study.recipes import shipped_recipe

HERE = Path(__file__).parent
OUT = "runs/easy_vqa"
"""Folder in the recipes that ``--out`` replaces."""
START, BASELINE = "warm_start", "dr_grpo"
METHODS = {
    START: "warm-started student",
    BASELINE: "Dr.GRPO",
    "rejection_sampling": "rejection sampling",
    "ril": "RIL",
    "ril_plus": "RIL+",
}
"""Titles of the rows, by recipe."""
EXPECTED = {"sft": 120.0, "collect": 60.0, "run": 80.0, "eval": 40.0}
"""Seconds of a command on one core, roughly. Only their proportions matter."""


@dataclass
class RunSettings(Settings):
    """Compare RIL+, RIL, rejection sampling and Dr.GRPO on easy-VQA."""

    seeds: int = 1
    """Number of seeds of every method. All start from one student and share the teachers' responses."""
    width: int = 2
    """Commands at a time, of one thread each."""
    overrides: tuple[str, ...] = ()
    """Settings for every recipe, as KEY=VALUE, for instance train.max_steps=5."""


def written_recipe(settings: RunSettings, name: str, seed: int = 0) -> Path:
    """Write a recipe of this folder, complete and for ``settings.out``, to ``out/recipes``. An existing file stays."""
    path = settings.out / "recipes" / f"{_named(name, seed)}.yaml"
    if not path.is_file():
        recipe = shipped_recipe(str(HERE / f"{name}.yaml"), settings.overrides, {OUT: settings.out})
        recipe.seed, recipe.run_dir = seed, str(settings.out / _named(name, seed))
        save_recipe(recipe, path)
    return path


def _named(name: str, seed: int) -> str:
    return f"{name}_{seed}" if seed else name


@dataclass(kw_only=True)
class RilJob(Job):
    """One ``ril`` command. folder: where `ril eval` writes, which is not the run's folder."""

    recipe: Recipe
    folder: Path | None = None

    def progress(self) -> Progress:
        return stage_progress("train" if self.kind == "run" else self.kind, self.recipe)

    def seconds(self) -> float | None:
        match self.kind:
            case "sft":
                done = self.recipe.sft_student_path.is_dir()
            case "collect":
                done = collected(self.recipe.cache_path)[0] >= self.progress()[1]
            case _:
                done = ((self.folder or self.recipe.run_path) / "eval" / "table.json").is_file()
        return 0.0 if done else None


def jobs(settings: RunSettings) -> list[RilJob]:
    """Return all commands in their order."""

    def job(kind: str, recipe: str, name: str, needs: Sequence[str] = (), seed: int = 0, *more: str) -> RilJob:
        path = written_recipe(settings, recipe, seed)
        return RilJob(
            name=name,
            arguments=("openril.cli", kind, str(path), *more),
            needs=tuple(needs),
            kind=kind,
            expected=EXPECTED[kind],
            recipe=load_saved_recipe(path),
        )

    teachers = ("teacher_shape", "teacher_color")
    found = [job("sft", name, name) for name in ("captions", *teachers)]
    found.append(job("sft", START, START, ["captions"]))
    found.append(job("collect", "ril_plus", "collect", [*teachers, START]))
    for seed in range(settings.seeds):
        for method in METHODS:
            name = _named(method, seed)
            if method != START:
                kind, needs = ("sft" if method == "rejection_sampling" else "run"), ["collect"]
                found.append(job(kind, method, name, needs, seed))
            elif seed:
                continue  # It has no seed.
            recipe, folder = found[-1].recipe, settings.out / "test" / name
            trained = recipe.run_path / "student" if found[-1].kind == "run" else recipe.sft_student_path
            if method == START:
                trained = settings.out / START / "sft" / "student"
            score = (f"--run_dir={folder}", f"--data.validation={settings.out / 'data' / 'test.jsonl'}")
            test = job("eval", method, f"{name} test", [name], seed, *score, "--checkpoints", str(trained))
            test.folder = folder
            found.append(test)
    return found


# The table


def scores(out: Path, method: str, ids: Sequence[str], seeds: int) -> Array:
    """Return the scores of a method on the test questions, [S, Q]."""
    rows = []
    for seed in range(1 if method == START else seeds):
        (path,) = (out / "test" / _named(method, seed) / "eval").glob("*.jsonl")
        by_id = {row["question_id"]: float(row["score"] or 0) for row in read_jsonl(path) if "question_id" in row}
        rows.append([by_id[i] for i in ids])
    return np.array(rows)


def table(out: Path, seeds: int) -> tuple[str, dict[str, dict[str, object]]]:
    """Return the table of the page as Markdown, and its numbers.

    The intervals are over seeds and questions (playground/study/bootstrap.py); differences are paired by question.
    """
    test = [Row(row["id"], row["question"], row["answer"], "") for row in read_jsonl(out / "data" / "test.jsonl")]
    kinds = sorted({row.kind for row in test})
    overall = Resampling(["all"] * len(test))
    measured = {method: scores(out, method, [row.id for row in test], seeds) for method in METHODS}
    lines = [
        f"| | correct, per cent | over the warm start | over {METHODS[BASELINE]} | {' | '.join(kinds)} |",
        "|---|---:|---:|---:|" + "---:|" * len(kinds),
    ]
    numbers: dict[str, dict[str, object]] = {}
    for method, title in METHODS.items():
        own = measured[method]
        gains = {other: overall.mean(own - measured[other]) for other in (START, BASELINE)}
        by_kind = {kind: float(own[:, [row.kind == kind for row in test]].mean()) for kind in kinds}
        numbers[method] = {
            "correct": overall.mean(own).as_dict(),
            **{f"over_{other}": gain.as_dict() for other, gain in gains.items()},
            "by_kind": by_kind,
        }
        over_start = "" if method == START else _show(gains[START], "+")
        over_baseline = "" if method in (START, BASELINE) else _show(gains[BASELINE], "+")
        shares = " | ".join(f"{100 * value:.0f}" for value in by_kind.values())
        lines.append(f"| {title} | {_show(overall.mean(own))} | {over_start} | {over_baseline} | {shares} |")
    return "\n".join(lines), numbers


def _show(estimate: Estimate, sign: str = "") -> str:
    """Write an estimate in per cent with its interval."""
    return "{:{s}.1f} [{:{s}.1f}, {:{s}.1f}]".format(
        *(100 * x for x in (estimate.value, estimate.low, estimate.high)), s=sign
    )


def run(settings: RunSettings) -> int:
    from rich.console import Console

    out = settings.out
    with Lock(out / ".lock"):
        now = {"overrides": list(settings.overrides)}
        now |= {key: getattr(settings, key) for key in ("num_train", "num_validation", "num_test")}
        pinned = out / "example.json"
        if pinned.is_file():
            was = json.loads(pinned.read_text(encoding="utf-8"))
            refuse_changed(out, was, now, fix="name another folder with --out", error=RecipeError)
        else:
            prepare(settings)
            write_json(pinned, now)
        clock = Clock(out / "clock.json")
        runner = Runner(jobs(settings), out / "logs", Console(), width=settings.width, clock=clock)
        runner.run()
        text, numbers = table(out, settings.seeds)
        write_json(out / "summary.json", {"seeds": settings.seeds, "minutes": clock.minutes, **numbers})
        write_text(out / "table.md", text + "\n")
        print(f"\n{text}\n\n{settings.seeds} seeds, {duration(clock.seconds)} in all; also in {out / 'table.md'}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    import tyro

    settings = tyro.cli(RunSettings, args=arguments, prog="python -m examples.easy_vqa.run")
    return exit_code("easy_vqa", lambda: run(settings))


if __name__ == "__main__":
    sys.exit(main())
