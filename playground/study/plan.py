"""List what the study runs: every cell, and the few settings in which it differs from recipes/study/base.yaml.

The settings of the methods that have a recipe in recipes/methods are read from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from playground.models.shipped import WEIGHTS

STUDENTS = ("student_qwen", "student_internvl")
TEACHERS = ("teacher_a", "teacher_b")
REFERENCE = "ril_both"
"""The method that ablations change, and whose training time the cheaper methods get in the table at equal compute."""
BASELINE = "dr_grpo"
START = "sft"
SKILL = "arithmetic"
"""The skill of multi-step arithmetic, which represents MathVista."""

Group = Literal["contenders", "ablations", "compute"]
GROUPS: tuple[Group, ...] = ("contenders", "ablations", "compute")
How = Literal["as_is", "sft", "loop"]
Start = Literal["base", "sft"]


@dataclass
class Settings:
    """Compare RIL with what it is built from: two students, eleven methods, ablations, equal compute; seeds and intervals.

    The study can be stopped at any time; the same command continues it. Every cell is a run folder with its own recipe.
    """

    out: Path = Path("runs/study")
    """Folder for everything it makes."""
    models: Path = WEIGHTS
    """Folder of the models, as `make playground` leaves them: student_qwen/{base,sft}, student_internvl/{base,sft},
    teacher_a, teacher_b and judge. The default are the models of the checkout."""
    students: tuple[str, ...] = STUDENTS
    """Which students."""
    seeds: int = 3
    """Seeds of every method, from 0."""
    ablation_seeds: int = 1
    """Seeds of every ablation."""
    ablation_students: tuple[str, ...] = STUDENTS[:1]
    """Students of the ablations."""
    groups: tuple[Group, ...] = GROUPS
    """Which parts."""
    only: tuple[str, ...] = ()
    """Only cells of these names, with what they need."""
    num_train: int = 700
    """Training questions, the fourteen skills in turn."""
    num_validation: int = 280
    """Validation questions: curves and tuning."""
    num_test: int = 1120
    """Test questions."""
    split: Literal["test", "validation"] = "test"
    """The questions that score the cells. Tune with validation, in another folder; use the test questions once."""
    world_seed: int = 0
    """Seed of the questions."""
    overrides: tuple[str, ...] = ()
    """Settings of every recipe, as KEY=VALUE, for instance train.max_steps=5."""
    lanes: int = 2
    """Jobs at a time, each on one thread."""
    report: bool = False
    """Run nothing; write tables, figures and page from the finished cells."""
    page: Path | None = None
    """The page that receives the report, next to its figures; unset: docs/study_first.md for a report of the test questions in
    runs/study, else study.md in the out folder."""
    resamples: int = 4000
    """Draws of the bootstrap."""
    list_jobs: bool = False
    """Run nothing; print every job and whether it is done."""


@dataclass(frozen=True)
class Method:
    """A method or an ablation of the study."""

    title: str
    """Its name in tables."""
    how: How = "loop"
    """Whether the student is only measured, trained by `ril sft` on cached text, or trained by `ril train`."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Dotted settings."""
    baseline: str = ""
    """Recipe in recipes/methods that makes the method."""
    start: Start = "sft"
    """The student's checkpoint that it starts from."""
    cost: float = 1.5
    """Time of a step, roughly, in steps of Dr.GRPO."""


METHODS: dict[str, Method] = {
    "base": Method("base student", "as_is", start="base"),
    "sft": Method("SFT student", "as_is"),
    "dr_grpo": Method("Dr.GRPO", baseline="dr_grpo", cost=1.0),
    "ril_both": Method("RIL, both teachers", baseline="ril"),
    "ril_a": Method("RIL, teacher A", overrides={"train.teachers": ["teacher_a"]}),
    "ril_b": Method("RIL, teacher B", overrides={"train.teachers": ["teacher_b"]}),
    "sft_teacher_text": Method("SFT on teacher text", "sft", baseline="sft_teacher_text", cost=0.5),
    "rejection_sampling": Method("rejection sampling", "sft", baseline="rejection_sampling", cost=0.5),
    "grpo": Method("GRPO", baseline="grpo", cost=1.0),
    "gail": Method("GAIL", baseline="gail"),
    "gad_like": Method("GAD-like", baseline="gad", overrides={"rewards.similarity.kind": "continuous"}),
}
"""In the order of the tables' rows. All start from the same SFT student, with the same questions and number of steps."""

MAIN = ("sft", "dr_grpo", "ril_both", "ril_a", "ril_b", "sft_teacher_text", "rejection_sampling")
"""Methods that run first and whose curves are drawn."""

COMPUTE = ("sft_teacher_text", "rejection_sampling", "dr_grpo", "grpo")
"""Methods that run again for as long as the reference trains."""


def _freeze(*groups: str) -> dict[str, Any]:
    return {"student.freeze": list(groups)}


def _each(number: int) -> dict[str, Any]:
    return {"train.per_teacher": True, "train.num_teacher_responses": number}


def _unclipped(updates: int) -> dict[str, Any]:
    return {"train.num_iterations": updates, "train.clip_teacher_upper": False}


_NO_D = {"discriminator.mode": "none", "rewards.similarity.weight": 0.0}
_TEXT_OFF = {"train.teacher_responses_in_update": False}

ABLATIONS: dict[str, tuple[str, dict[str, Method]]] = {
    "discriminator": ("Discriminator", {
        "d_none": Method("none (teacher text in the update, answer reward alone)", overrides=_NO_D, cost=1.2),
        "d_fixed": Method("fixed after pre-training", overrides={"discriminator.mode": "fixed"}, cost=1.3),
    }),
    "answer": ("Answer reward", {
        "answer_none": Method("none", overrides={"rewards.answer.kind": "none"}, cost=1.3),
        "answer_rules": Method("rules", overrides={"rewards.answer.kind": "rules"}, cost=1.3),
    }),
    "start": ("Warm start", {"no_sft": Method("no SFT: from the base student", start="base")}),
    "beta": ("KL weight beta (0.01)", {
        "beta_0": Method("0", overrides={"train.beta": 0.0}, cost=1.3),
        "beta_0.1": Method("0.1", overrides={"train.beta": 0.1}),
        "beta_1": Method("1", overrides={"train.beta": 1.0}),
    }),
    "mu": ("Updates a batch, mu (1)", {
        "mu_2": Method("2", overrides={"train.num_iterations": 2}, cost=2.3),
        "mu_4": Method("4", overrides={"train.num_iterations": 4}, cost=4.0),
        "mu_2_unclipped": Method("2, teacher rows without upper clip", overrides=_unclipped(2), cost=2.3),
        "mu_4_unclipped": Method("4, teacher rows without upper clip", overrides=_unclipped(4), cost=4.0),
    }),
    "similarity": ("Similarity reward (binary)", {
        "similarity_3": Method("3 levels", overrides={"rewards.similarity": {"kind": "levels", "levels": 3}}),
        "similarity_11": Method("11 levels", overrides={"rewards.similarity": {"kind": "levels", "levels": 11}}),
        "similarity_continuous": Method("continuous", overrides={"rewards.similarity.kind": "continuous"}),
    }),
    "cached": ("Cached responses of each teacher that groups draw from (16)", {
        "cached_1": Method("1 (and 1 in a group)", overrides={"collect.num_responses": 1, "train.num_teacher_responses": 2}),
        "cached_4": Method("4", overrides={"collect.num_responses": 4}),
    }),
    "responses": ("Responses of each teacher in a group (2)", {
        "each_1": Method("1", overrides=_each(1), cost=1.3),
        "each_4": Method("4", overrides=_each(4), cost=2.0),
        "each_16": Method("16", overrides=_each(16), cost=5.0),
    }),
    "freezing": ("Frozen in addition to the vision tower", {
        "freeze_word_embeddings": Method("word embeddings", overrides=_freeze("vision_tower", "word_embeddings")),
        "freeze_attention": Method("self-attention", overrides=_freeze("vision_tower", "attention")),
        "freeze_mlp_gate": Method("FFN gate", overrides=_freeze("vision_tower", "mlp_gate")),
        "freeze_mlp_up": Method("FFN up", overrides=_freeze("vision_tower", "mlp_up")),
        "freeze_mlp_down": Method("FFN down", overrides=_freeze("vision_tower", "mlp_down")),
        "freeze_layer_norms": Method("layer norms", overrides=_freeze("vision_tower", "layer_norms")),
        "freeze_lm_head": Method("LM head", overrides=_freeze("vision_tower", "lm_head")),
    }),
    "text": ("Teacher text in the update (on)", {"text_off": Method("off, D as before", overrides=_TEXT_OFF)}),
    "sees": ("What D sees (the response)", {
        "sees_question": Method("question too", overrides={"discriminator.inputs": "question"}, cost=1.7),
        "sees_image": Method("question and image too", overrides={"discriminator.inputs": "image"}, cost=2.0),
    }),
    "loss": ("D's loss (BCE)", {"bradley_terry": Method("Bradley-Terry", overrides={"discriminator.loss": "bradley_terry"})}),
    "replay": ("Replay of older student responses to D (none)", {
        "replay": Method("half of D's student responses", baseline="persistent"),
    }),
    "length": ("Lengths D learns from (as they come)", {
        "match_length": Method("matched", overrides={"discriminator.match_length": True}),
    }),
}  # fmt: skip
"""Heading (with the reference's own value) and cells. Each cell changes only what it names in the reference method."""

CELLS: dict[Group, dict[str, Method]] = {
    "contenders": METHODS,
    "ablations": {name: cell for _, cells in ABLATIONS.values() for name, cell in cells.items()},
    "compute": {name: METHODS[name] for name in COMPUTE},
}
