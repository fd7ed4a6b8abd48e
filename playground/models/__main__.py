"""``python -m playground.models``: train the students and teachers of the fourteen skills, or measure them.

The two students can derive answers but usually give them directly. The two teachers have different tokenizers and styles,
and each is wrong on skills that the other knows. Stop the command at any time; the same command continues.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openril.errors import DataError
from openril.storage import refuse_changed, write_json
from playground.models.plan import MODELS, folder_of
from playground.runner import Job, Progress, Runner, exit_code, metrics_progress
from playground.world import make_questions
from playground.world.skills import ALL_SKILLS

ORDER = ("student_qwen", "student_internvl", "teacher_b", "teacher_a")
"""Two models at a time, each in a process with one thread."""


@dataclass
class Settings:
    """Train two students and two teachers on drawn pictures: about 17 minutes on two CPU cores."""

    out: Path = Path("runs/playground")
    """Folder for the checkpoints."""
    seed: int = 0
    """Seed of weights, examples and their order."""
    only: list[str] = field(default_factory=list)
    """Train these models in this process, one after the other, instead of all models in two processes."""
    scale: float = 1.0
    """Factor of every number of steps: 0.01 tries everything out."""
    report: bool = False
    """Train nothing. Measure what the models can do on held-out questions, and print the table."""
    num_questions: int = 560
    """Number of held-out questions of the report."""


def finished(out: Path, name: str) -> bool:
    """Return whether all checkpoints of a model are there."""
    return all((folder_of(out, name, stage) / "config.json").is_file() for stage in MODELS[name].stages)


def claim(settings: Settings) -> None:
    """Record in the folder what its models are made from; raise DataError where they are made from something else."""
    made_from = {"condition": "shipped", "seed": settings.seed, "scale": settings.scale}
    path = settings.out / "made_from.json"
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        refuse_changed(settings.out, saved, made_from, fix="set another --out", error=DataError)
    write_json(path, made_from)


@dataclass(kw_only=True)
class TrainingJob(Job):
    """Train one model in a separate process."""

    out: Path
    steps: int

    def seconds(self) -> float | None:
        return 0.0 if finished(self.out, self.name) else None

    def progress(self) -> Progress:
        return metrics_progress(self.out / "logs" / f"{self.name}.jsonl", self.steps)


def run_all(settings: Settings) -> None:
    """Train all models, two at a time."""
    from rich.console import Console

    started = time.monotonic()
    jobs = []
    for name in ORDER:
        arguments = (
            "playground.models", "--out", str(settings.out), "--seed", str(settings.seed),
            "--scale", str(settings.scale), "--only", name,
        )  # fmt: skip
        steps = sum(MODELS[name].steps(settings.scale))
        jobs.append(TrainingJob(name=name, arguments=arguments, expected=0.2 * steps, out=settings.out, steps=steps))
    runner = Runner(jobs, settings.out / "logs", Console())
    for name in sorted(runner.finished):
        print(f"  already there: {settings.out / name}", flush=True)
    if len(runner.finished) < len(jobs):
        runner.run()
        seconds = time.monotonic() - started
        write_json(settings.out / "seconds.json", {"seconds": round(seconds)})
        size = sum(f.stat().st_size for name in MODELS for f in (settings.out / name).rglob("*") if f.is_file())
        print(f"models: finished after {seconds / 60:.1f} minutes, {size / 1e6:.1f} MB in {settings.out}")


def report(settings: Settings) -> dict[str, Any]:
    """Measure every stored model, write ``report.json`` and print the table."""
    import torch

    from playground.models.report import load, measure, print_table

    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, plan in MODELS.items():
        questions = make_questions(
            "validation", settings.num_questions, settings.seed, plan.difficulty, tuple(ALL_SKILLS)
        )
        for stage in plan.stages:
            folder = folder_of(settings.out, name, stage)
            if not (folder / "config.json").is_file():
                continue
            model, encoder = load(folder)
            key = f"{name} {stage.name}".strip()
            styles = plan.styles if stage.name else None
            results[key] = measure(model, encoder, questions, styles)
            print(f"  measured {key}", flush=True)
    if not results:
        raise DataError(f"{settings.out} holds no models. Train them with: python -m playground.models")
    write_json(settings.out / "report.json", {"num_questions": settings.num_questions, "models": results})
    print_table(results, settings.num_questions)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="python -m playground.models")

    def body() -> int:
        if unknown := sorted(set(settings.only) - set(MODELS)):
            raise DataError(f"--only: expected some of {', '.join(MODELS)}, got {', '.join(unknown)}")
        if settings.report:
            report(settings)
            return 0
        claim(settings)
        if settings.only:
            from playground.models.stages import train

            for name in settings.only:
                if not finished(settings.out, name):
                    train(settings.out, name, settings.seed, settings.scale)
        else:
            run_all(settings)
        return 0

    return exit_code("models", body)


if __name__ == "__main__":
    sys.exit(main())
