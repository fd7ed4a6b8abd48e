"""Train one model through all stages of its plan. A run that is stopped continues with the same numbers."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from openril.discriminator import prompt
from openril.models.loading import load_model, load_processor
from openril.storage import append_jsonl, atomic_path, remove, stable_hash, write_json
from openril.testing.tiny_models import build_tiny_model
from playground.models.examples import ExampleEncoder, Lesson, draw_batch
from playground.models.plan import EMBEDDINGS, MODELS, POOL, Model, Schedule, folder_of
from playground.models.training import Training
from playground.world import SkillQuestion, corpus, make_questions
from playground.world.skills import ALL_SKILLS

TEXTS = 2000
"""Number of training questions whose words the tokenizers learn."""
SAVE_EVERY = 200
"""Number of steps between two saved states."""


def train(out: Path, name: str, seed: int, scale: float) -> None:
    """Train all stages of one model that are not done yet, and write their checkpoints to ``out``."""
    plan = MODELS[name]
    torch.set_num_threads(1)
    torch.manual_seed(stable_hash("playground", name, seed))
    work = out / f".{name}"
    blank = work / "blank"
    if not (blank / "config.json").is_file():
        build_blank(plan, blank, seed)
    model, processor = load_model(str(blank), what=name), load_processor(str(blank), what=name)
    pool = make_questions("train", POOL, seed, plan.difficulty, tuple(ALL_SKILLS))
    progress = Progress(name, out / "logs" / f"{name}.jsonl", sum(plan.steps(scale)))
    done = 0
    for stage in plan.stages:
        folder = folder_of(out, name, stage)
        stored = (folder / "config.json").is_file()
        for number, (lesson, schedule) in enumerate(stage.parts):
            scaled = schedule.scaled(scale)
            if not stored:
                part = f"{stage.name or 'teacher'}-{number}"
                progress.begin(done, lesson.title)
                fit_part(model, processor, pool, lesson, scaled, work, part, (name, seed), progress)
            done += scaled.steps
        if not stored:
            save(model, processor, folder)
            write_json(folder / "playground.json", {"name": name, "stage": stage.name, "seed": seed})
        # The next stage starts from the stored weights, so that an interrupted run gives the same model.
        model.load_state_dict(load_model(str(folder), what=name).state_dict())
    remove(work)


def build_blank(plan: Model, folder: Path, seed: int) -> None:
    """Write a random checkpoint whose tokenizer knows the words of all skills and styles, and of the discriminator."""
    texts = [*corpus(TEXTS, seed), *[prompt.SYSTEM, prompt.USER] * 50]
    # One token each for the words of every prompt, for all numbers, and for the words of the drills.
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
    """Train one part of a stage in place, starting from the state that was saved last."""
    state = work / "state.pt"
    finished_part = work / f"{part}.pt"
    if finished_part.is_file():
        model.load_state_dict(torch.load(finished_part))
        return
    encoder = ExampleEncoder(model, processor)
    training = Training(model, schedule, lesson.look)
    if state.is_file():
        saved = torch.load(state)
        if saved["part"] == part:
            training.load_state_dict(saved)

    def examples() -> Iterator[Any]:
        while True:
            rng = random.Random(stable_hash(*seed, part, training.step))
            yield draw_batch(encoder, lesson, pool, rng, schedule.batch_size)

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
    """Write an ordinary checkpoint in float16: half the size, and three binary digits more precise than bfloat16."""
    with atomic_path(folder) as temporary:
        copy.deepcopy(model).to(torch.float16).save_pretrained(temporary)
        processor.save_pretrained(temporary)


class Progress:
    """Write the step and the mean loss to a file and to the terminal, at most every ten seconds."""

    def __init__(self, name: str, path: Path, total: int) -> None:
        self.name, self.path, self.total = name, path, total
        self.offset, self.title = 0, ""
        self.reported = time.monotonic()
        self.losses: list[float] = []

    def begin(self, offset: int, title: str) -> None:
        """Start a part after ``offset`` steps of the parts before it."""
        self.offset, self.title = offset, title

    def report(self, step: int, loss: float) -> None:
        at = self.offset + step
        self.losses.append(loss)
        if time.monotonic() - self.reported < 10 and at < self.total:
            return
        self.reported = time.monotonic()
        mean = sum(self.losses) / len(self.losses)
        self.losses = []
        append_jsonl(self.path, {"step": at, "of": self.total, "part": self.title, "loss": round(mean, 4)})
        print(f"{self.name}: {self.title}: step {at}/{self.total}, loss {mean:.3f}", flush=True)
