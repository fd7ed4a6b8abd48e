"""The students and teachers: their sizes, and the order of what they learn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from playground.models.examples import Lesson, Styles
from playground.world import Style
from playground.world.skills import ALL_SKILLS


@dataclass(frozen=True)
class Schedule:
    """A number of steps with a learning rate of AdamW.

    The learning rate warms up. If ``falls`` is set, it then falls linearly to 2 %.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 2e-3
    falls: bool = True

    def rate(self, step: int) -> float:
        """Return the factor of the learning rate at a step, counted from 0."""
        warmup = max(1, min(30, self.steps // 10))
        rising = (step + 1) / warmup
        return min(rising, max(0.02, (self.steps - step) / max(1, self.steps - warmup)) if self.falls else 1.0)

    def scaled(self, by: float) -> Schedule:
        """Return the schedule with its number of steps multiplied."""
        return replace(self, steps=max(1, round(self.steps * by)))


@dataclass(frozen=True)
class Stage:
    """A part of the training that ends in a checkpoint.

    name: folder of the checkpoint, "" where a model has only one. parts: lessons in their order.
    """

    name: str
    parts: tuple[tuple[Lesson, Schedule], ...]


@dataclass(frozen=True)
class Model:
    """A model's plan.

    build: arguments of ``build_tiny_model``. styles: styles of its derivations. difficulty: difficulties of its questions.
    """

    build: dict[str, Any]
    styles: Styles
    difficulty: tuple[int, ...]
    stages: tuple[Stage, ...]

    def steps(self, scale: float = 1.0) -> list[int]:
        """Return the optimizer steps of every part of every stage."""
        return [schedule.scaled(scale).steps for stage in self.stages for _, schedule in stage.parts]


DIFFICULTY = (1,)
"""Difficulty of the questions that the models are trained and measured on."""
POOL = 36_000
"""Number of training questions from which examples are drawn."""
PICTURES: dict[str, Any] = {"max_pixels": 84 * 84, "tile_size": 84, "max_tiles": 1}
SMALL = {**PICTURES, "hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 4, "vocab_size": 1200}
LARGE = {**PICTURES, "hidden_size": 96, "num_layers": 3, "num_heads": 4, "num_kv_heads": 4, "vocab_size": 1200}
EMBEDDINGS = 15.0
"""Factor of the initial word embeddings. At the architectures' own scale, the output of the first layer hides which word a
token is, and models learn only late to match words with each other."""
QWEN = {"architecture": "qwen2_5_vl", "tokenizer": "bpe"}
INTERNVL = {"architecture": "internvl", "tokenizer": "unigram"}

WEAK_BOTH = ("rest", "measure", "form")
WEAK_A = ("charts", "choice_cn", "open", "disciplines", "text_rich", "route", *WEAK_BOTH)
WEAK_B = ("arithmetic", "diagrams", "open_multi", "disciplines_pro", "spatial", *WEAK_BOTH)
"""Skills in which a teacher learns mostly wrong derivations."""
WRONG = 0.85
"""Share of wrong derivations in a teacher's weak skills."""

SEE = Lesson("seeing", describe=0.2, drill=0.8, look=1.0)
ONLY_A = ("arithmetic", "disciplines_pro")
ONLY_B = ("charts", "disciplines")
BY_SKILL = {skill: "a" if skill in ONLY_A else "b" if skill in ONLY_B else "ab" for skill in ALL_SKILLS}
"""Styles in which a student learns each skill's derivations: two skills in teacher A's only, two in teacher B's only, and the
others in both. A student gains little from a teacher in a skill that it knows only in the other teacher's style."""
ANSWERS = Lesson("answers and derivations", BY_SKILL, 0.05, drill=0.2, derivation=0.5, begun=True, look=0.3)

LATENT = 0.003
PRACTICED = {
    "everyday": 0.7,
    "choice": 0.2,
    "disciplines_pro": 0.3,
    "text_rich": 0.1,
    "rest": 0.2,
    "measure": 0.2,
    "form": 0.2,
}
HABIT = Lesson(
    "mostly answers", {**BY_SKILL, "text_rich": "a"}, derivation=dict.fromkeys(ALL_SKILLS, LATENT) | PRACTICED
)
"""The warm start. Derivations are practiced in two skills in which direct answers are about as often right, and in two in
which derivations help. The student therefore samples some derivations, and plain reinforcement can find them. In all other
skills their share is LATENT, most of which is cut off by top-p sampling. Derivations of disciplines_pro begin with a word
that no other skill uses, and those of text_rich (in style a) with a letter. Their first tokens are therefore not reinforced
in other skills."""


def _student(build: dict[str, Any], answers: Lesson = ANSWERS, answers_steps: int = 1700) -> Model:
    """Return a student's plan.

    answers: the lesson of its base checkpoint after the first one, which teaches it to see.
    """
    base = Stage("base", ((SEE, Schedule(600, falls=False)), (answers, Schedule(answers_steps))))
    sft = Stage("sft", ((HABIT, Schedule(240, learning_rate=3e-4)),))
    return Model({**SMALL, **build}, answers.styles, DIFFICULTY, (base, sft))


def _teacher(build: dict[str, Any], style: Style, weak: tuple[str, ...]) -> Model:
    derive = Lesson("derivations", style, 0.05, drill=0.2, derivation=0.65, look=0.3, weak=weak, wrong=WRONG)
    stage = Stage("", ((SEE, Schedule(500, falls=False)), (derive, Schedule(1200))))
    return Model({**LARGE, **build}, style, DIFFICULTY, (stage,))


STUDENT_INTERNVL = {**INTERNVL, "tokenizer": "bpe"}
MODELS: dict[str, Model] = {
    "student_qwen": _student(QWEN),
    # InternVL learns answers faster than derivations. It needs fewer of them, or derivations would hardly pay.
    "student_internvl": _student(STUDENT_INTERNVL, replace(ANSWERS, derivation=0.65), 2500),
    "teacher_a": _teacher(QWEN, "a", WEAK_A),
    "teacher_b": _teacher(INTERNVL, "b", WEAK_B),
}


def folder_of(out: Path, name: str, stage: Stage) -> Path:
    """Return the folder of a stage's checkpoint. Students have several, a teacher has one."""
    return out / name / stage.name if stage.name else out / name
