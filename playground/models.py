"""``python -m playground.models``: the students and teachers of the fourteen skills, trained from nothing.

Two students, which can derive answers but by habit give them directly, and two teachers of other tokenizers and styles,
each wrong on skills that the other knows. Stop it whenever you like; the same command goes on. ``--report`` measures them.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openril.errors import DataError
from openril.report.progress import duration
from openril.storage import append_jsonl, atomic_path, remove, stable_hash, write_json
from playground.commands import Command, answer, run_lanes
from playground.models_plan import CONDITIONS, MODELS, POOL, Condition, Lesson, Model, Schedule, Stage
from playground.skills import SkillQuestion, make_questions

LANES = (("student_qwen", "teacher_b"), ("student_internvl", "teacher_a"))
"""Two processes of one thread each, of about the same length."""
TEXTS = 2000
"""Training questions whose words the tokenizers learn."""
EMBEDDINGS = 15.0
"""Word embeddings start this many times as large as the architectures make them. Otherwise what the first layer adds
drowns which word a token is, and words are matched with each other only late."""
SAVE_EVERY = 200
"""Steps after which training is saved, to go on from."""
REPORT_QUESTIONS = 560


@dataclass
class Settings:
    """Train two students and two teachers on drawn pictures: about 17 minutes on two CPU cores."""

    out: Path = Path("runs/playground")
    """Folder for the checkpoints."""
    seed: int = 0
    """Of weights, examples and their order."""
    only: list[str] = field(default_factory=list)
    """Train these models in this process, one after the other, instead of all in two lanes."""
    scale: float = 1.0
    """Multiplies every number of steps: 0.01 tries everything out."""
    condition: Condition = "shipped"
    """Which models: those that come with the package, or, for docs/study.md's question of two teachers over one, students that
    know every skill in every style of deriving."""
    report: bool = False
    """Train nothing; measure on held-out questions what the models can do, and print the table."""
    num_questions: int = REPORT_QUESTIONS
    """Held-out questions of the report, the skills in turn."""


def folder_of(out: Path, name: str, stage: Stage) -> Path:
    """Where a stage's checkpoint goes: students keep several, a teacher one."""
    return out / name / stage.name if stage.name else out / name


def finished(out: Path, name: str) -> bool:
    return all((folder_of(out, name, stage) / "config.json").is_file() for stage in MODELS[name].stages)


def claim(settings: Settings) -> None:
    """Note in the folder what its models are made from; raises DataError where it holds others."""
    wanted = {"condition": settings.condition, "seed": settings.seed, "scale": settings.scale}
    path = settings.out / "made_from.json"
    if path.is_file() and (found := json.loads(path.read_text(encoding="utf-8"))) != wanted:
        changed = ", ".join(f"{key} {found.get(key)}" for key in wanted if found.get(key) != wanted[key])
        raise DataError(f"{settings.out} holds models of {changed}; name another --out")
    write_json(path, wanted)


def train(settings: Settings, name: str) -> None:
    """All stages of one model that are not done yet."""

    # isort: split
    import torch

    from openril.models.loading import load_model, load_processor

    plan = CONDITIONS[settings.condition][name]
    torch.set_num_threads(1)
    torch.manual_seed(stable_hash("playground", name, settings.seed))
    work = settings.out / f".{name}"
    blank = work / "blank"
    if not (blank / "config.json").is_file():
        build_blank(plan, blank, settings.seed)
    model, processor = load_model(str(blank), what=name), load_processor(str(blank), what=name)
    pool = make_questions("train", POOL, settings.seed, plan.difficulty)
    done = 0
    total = sum(plan.steps(settings.scale))
    for stage in plan.stages:
        folder = folder_of(settings.out, name, stage)
        progress = Progress(name, settings.out / "logs" / f"{name}.jsonl", total)
        if not (folder / "config.json").is_file():
            for number, (lesson, schedule) in enumerate(stage.parts):
                part = f"{stage.name or 'teacher'}-{number}"
                progress.begin(done, lesson.title)
                scaled = schedule.scaled(settings.scale)
                fit_part(model, processor, pool, lesson, scaled, work, part, (name, settings.seed), progress)
                done += scaled.steps
            save(model, processor, folder)
            write_json(folder / "playground.json", {"name": name, "stage": stage.name, "seed": settings.seed})
        else:
            done += sum(schedule.scaled(settings.scale).steps for _, schedule in stage.parts)
        # The next stage starts from what was stored, so that going on later gives the same model.
        stored = load_model(str(folder), what=name)
        model.load_state_dict(stored.state_dict())
    remove(work)


def build_blank(plan: Model, folder: Path, seed: int) -> None:
    """The random checkpoint; its tokenizer knows the words of the skills, of all styles, and of the discriminator."""
    import torch

    from openril.discriminator import prompt
    from openril.models.loading import load_model
    from openril.testing.tiny_models import build_tiny_model
    from playground.skills import corpus

    texts = [*corpus(TEXTS, seed), *[prompt.SYSTEM, prompt.USER] * 50]
    # Single tokens for what every prompt has, for all numbers, and for what the drills ask.
    texts += [
        "user\nassistant\nsystem\n",
        " ".join(map(str, range(100))),
        "what is at, where is, plus minus times",
    ] * 200
    with atomic_path(folder) as temporary:
        build_tiny_model(temporary, texts=texts, seed=seed, **plan.build)
        model: Any = load_model(str(temporary), what="blank")
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(EMBEDDINGS)
        model.save_pretrained(temporary)


def fit_part(
    model: Any,
    processor: Any,
    pool: Sequence[SkillQuestion],
    lesson: Lesson,
    schedule: Schedule,
    work: Path,
    part: str,
    seed: tuple[Any, ...],
    progress: Progress,
) -> None:
    """One part of a stage, from where it was saved last."""
    import torch

    from playground.models_examples import Desk, draw_batch
    from playground.models_training import Training

    state = work / "state.pt"
    finished_part = work / f"{part}.pt"
    if finished_part.is_file():
        model.load_state_dict(torch.load(finished_part))
        return
    desk = Desk(model, processor)
    training = Training(model, schedule, lesson.look)
    if state.is_file():
        saved = torch.load(state)
        if saved["part"] == part:
            training.load_state_dict(saved)

    def examples() -> Iterator[Any]:
        while True:
            rng = random.Random(stable_hash(*seed, part, training.step))
            yield draw_batch(desk, lesson, pool, rng, schedule.batch_size)

    def after(loss: float) -> None:
        progress.report(training.step, loss)
        if training.step % SAVE_EVERY == 0:
            with atomic_path(state) as temporary:
                torch.save({"part": part, **training.state_dict()}, temporary)

    training.run(examples(), after)
    with atomic_path(finished_part) as temporary:
        torch.save(model.state_dict(), temporary)
    remove(state)


def save(model: Any, processor: Any, folder: Path) -> None:
    """An ordinary checkpoint in float16: half the size, and three digits more than bfloat16 keeps."""
    import copy

    import torch

    with atomic_path(folder) as temporary:
        copy.deepcopy(model).to(torch.float16).save_pretrained(temporary)
        processor.save_pretrained(temporary)


class Progress:
    """A line of metrics now and then, with the time left for this model."""

    def __init__(self, name: str, path: Path, total: int) -> None:
        self.name, self.path, self.total = name, path, total
        self.offset, self.title = 0, ""
        self.started = self.said = time.monotonic()
        self.first: int | None = None
        self.losses: list[float] = []

    def begin(self, offset: int, title: str) -> None:
        self.offset, self.title = offset, title

    def report(self, step: int, loss: float) -> None:
        at = self.offset + step
        if self.first is None:
            self.first, self.started = at, time.monotonic()
        self.losses.append(loss)
        now = time.monotonic()
        if now - self.said < 10 and at < self.total:
            return
        self.said = now
        row: dict[str, Any] = {"step": at, "of": self.total, "part": self.title}
        row["loss"] = round(sum(self.losses) / len(self.losses), 4)
        if at > self.first:
            row["seconds_left"] = round((self.total - at) * (now - self.started) / (at - self.first))
        self.losses = []
        append_jsonl(self.path, row)
        left = f", {duration(row['seconds_left'])} left" if "seconds_left" in row else ""
        print(f"{self.name}: {self.title}: step {at}/{self.total}, loss {row['loss']:.3f}{left}", flush=True)


def run_all(settings: Settings) -> None:
    """Both lanes, each model in a process of its own."""
    started = time.monotonic()
    lanes = []
    for names in LANES:
        lane = []
        for name in names:
            if finished(settings.out, name):
                print(f"  already there: {settings.out / name}", flush=True)
                continue
            arguments = (
                "playground.models", "--out", str(settings.out), "--seed", str(settings.seed),
                "--scale", str(settings.scale), "--condition", settings.condition, "--only", name,
            )  # fmt: skip
            lane.append(Command(name, arguments, settings.out / "logs" / f"{name}.jsonl"))
        lanes.append(lane)
    if any(lanes):
        run_lanes(lanes, settings.out / "logs", lambda line: print(line, flush=True))
        seconds = time.monotonic() - started
        write_json(settings.out / "seconds.json", {"seconds": round(seconds)})
        print(f"models: all there after {seconds / 60:.1f} minutes, {megabytes(settings.out):.1f} MB in {settings.out}")


def megabytes(out: Path) -> float:
    """Size of the checkpoints."""
    return sum(f.stat().st_size for name in MODELS for f in (out / name).rglob("*") if f.is_file()) / 1e6


def report(settings: Settings) -> dict[str, Any]:
    """Measure every stored model, write ``report.json`` and print the table."""
    import torch

    from playground.models_report import load, measure_student, measure_teacher, print_table

    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, plan in CONDITIONS[settings.condition].items():
        questions = make_questions("validation", settings.num_questions, settings.seed, plan.difficulty)
        for stage in plan.stages:
            folder = folder_of(settings.out, name, stage)
            if not (folder / "config.json").is_file():
                continue
            model, desk = load(folder)
            key = f"{name} {stage.name}".strip()
            if stage.name:
                results[key] = measure_student(model, desk, questions, plan.styles)
            else:
                results[key] = measure_teacher(model, desk, questions)
            print(f"  measured {key}", flush=True)
    if not results:
        raise DataError(f"{settings.out} holds no models; make them with: python -m playground.models")
    write_json(settings.out / "report.json", {"num_questions": settings.num_questions, "models": results})
    print_table(results, settings.num_questions)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="python -m playground.models")

    def body() -> int:
        if unknown := sorted(set(settings.only) - set(MODELS)):
            raise DataError(f"no model {', '.join(unknown)}; choose from {', '.join(MODELS)}")
        if settings.report:
            report(settings)
        elif settings.only:
            claim(settings)
            for name in settings.only:
                if not finished(settings.out, name):
                    train(settings, name)
        else:
            claim(settings)
            run_all(settings)
        return 0

    return answer("models", body)


if __name__ == "__main__":
    sys.exit(main())
