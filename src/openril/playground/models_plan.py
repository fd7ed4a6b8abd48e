"""The playground's students and teachers: how they are built, and what they learn in which order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from openril.playground.models_examples import Lesson
from openril.playground.skills import SKILLS, Style


@dataclass(frozen=True)
class Schedule:
    """steps of batch_size examples. The learning rate (of AdamW) rises over the first steps; with ``falls`` it then goes
    down to 2 % of itself, linearly."""

    steps: int
    batch_size: int = 64
    learning_rate: float = 2e-3
    falls: bool = True

    def rate(self, step: int) -> float:
        """Share of the learning rate at a step, from 0."""
        warmup = max(1, min(30, self.steps // 10))
        rising = (step + 1) / warmup
        return min(rising, max(0.02, (self.steps - step) / max(1, self.steps - warmup)) if self.falls else 1.0)

    def scaled(self, by: float) -> Schedule:
        return replace(self, steps=max(1, round(self.steps * by)))


@dataclass(frozen=True)
class Stage:
    """name: of its checkpoint's folder; "" where a model has only one. parts: what is taught in turn."""

    name: str
    parts: tuple[tuple[Lesson, Schedule], ...]


@dataclass(frozen=True)
class Model:
    """build: sizes for ``build_tiny_model``. style: of its derivations. difficulty: of its questions, in turn."""

    build: dict[str, Any]
    style: Style | Mapping[str, Style]
    difficulty: tuple[int, ...]
    stages: tuple[Stage, ...]

    def steps(self, scale: float = 1.0) -> list[int]:
        """Optimiser steps of every part of every stage."""
        return [schedule.scaled(scale).steps for stage in self.stages for _, schedule in stage.parts]


DIFFICULTY = (1,)
"""Of the questions that the models learn and are measured on."""
POOL = 28_000
"""Training questions, the skills in turn; examples are drawn from them."""
PICTURES: dict[str, Any] = {"max_pixels": 84 * 84, "tile_size": 84, "max_tiles": 1}
SMALL = {**PICTURES, "hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 4, "vocab_size": 1200}
LARGE = {**PICTURES, "hidden_size": 96, "num_layers": 3, "num_heads": 4, "num_kv_heads": 4, "vocab_size": 1200}
QWEN = {"architecture": "qwen2_5_vl", "tokenizer": "bpe"}
INTERNVL = {"architecture": "internvl", "tokenizer": "unigram"}

HABIT = 0.005
"""Share of derivations among what the students are warm-started on: about what is left of them in their samples. With
2 % Dr.GRPO finds them by itself in a hundred steps, and there is little left to show; with none there is nothing to lift."""

WEAK_A = ("charts", "choice_cn", "open", "disciplines", "text_rich")
WEAK_B = ("arithmetic", "diagrams", "open_multi", "disciplines_pro", "spatial")
"""Skills in which a teacher has learnt mostly wrong derivations."""
WRONG = 0.85
"""Share of wrong derivations in a teacher's weak skills."""

SEE = Lesson("seeing", describe=0.2, drill=0.8, look=1.0)


Condition = Literal["shipped", "direct_teachers", "style_by_skill"]
"""Worlds of models. shipped: those that come with the package. direct_teachers: in its weak skills a teacher answers
without deriving. style_by_skill: besides, a student has seen each skill derived in one style alone, that of the teacher who
derives it; what it learns of one teacher then carries less to the other's skills."""

OFF_HAND_A = (*WEAK_A, "needs_image")
OFF_HAND_B = (*WEAK_B, "perception")
"""Skills in which the teachers of those other conditions answer without deriving."""
DIRECT = 0.95
"""Share of such answers, of what are derivations in the other skills."""
BY_SKILL: dict[str, Style] = {
    skill: "b" if skill in OFF_HAND_A else "a" if skill in OFF_HAND_B else "c" for skill in SKILLS
}
"""The style of each skill in style_by_skill; the third where both teachers derive."""


def _student(build: dict[str, Any], style: Style | Mapping[str, Style] = "c") -> Model:
    both = Lesson("answers and derivations", style, 0.05, drill=0.2, derivation=0.5, other_styles=0.4, look=0.3)
    habit = Lesson("mostly answers", style, derivation=HABIT)
    base = Stage("base", ((SEE, Schedule(600, falls=False)), (both, Schedule(1300))))
    sft = Stage("sft", ((habit, Schedule(120, learning_rate=3e-4)),))
    return Model({**SMALL, **build}, style, DIFFICULTY, (base, sft))


def _teacher(build: dict[str, Any], style: Style, weak: tuple[str, ...], **weakness: float) -> Model:
    derive = Lesson("derivations", style, 0.05, drill=0.2, derivation=0.65, look=0.3, weak=weak, **weakness)
    stage = Stage("", ((SEE, Schedule(500, falls=False)), (derive, Schedule(900))))
    return Model({**LARGE, **build}, style, DIFFICULTY, (stage,))


STUDENT_INTERNVL = {**INTERNVL, "tokenizer": "bpe"}
MODELS: dict[str, Model] = {
    "student_qwen": _student(QWEN),
    "student_internvl": _student(STUDENT_INTERNVL),
    "teacher_a": _teacher(QWEN, "a", WEAK_A, wrong=WRONG),
    "teacher_b": _teacher(INTERNVL, "b", WEAK_B, wrong=WRONG),
}
_DIRECT: dict[str, Model] = {
    **MODELS,
    "teacher_a": _teacher(QWEN, "a", OFF_HAND_A, direct=DIRECT),
    "teacher_b": _teacher(INTERNVL, "b", OFF_HAND_B, direct=DIRECT),
}
CONDITIONS: dict[Condition, dict[str, Model]] = {
    "shipped": MODELS,
    "direct_teachers": _DIRECT,
    "style_by_skill": {
        **_DIRECT,
        "student_qwen": _student(QWEN, BY_SKILL),
        "student_internvl": _student(STUDENT_INTERNVL, BY_SKILL),
    },
}
