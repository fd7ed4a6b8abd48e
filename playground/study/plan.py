"""What the study runs: every cell, and the few settings in which it differs from recipes/study/base.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

STUDENTS = ("student_qwen", "student_internvl")
TEACHERS = ("teacher_a", "teacher_b")
REFERENCE = "ril_both"
"""The contender that ablations change, and whose training time the cheaper contenders get in the second table."""
BASELINE = "dr_grpo"
START = "sft"
SKILL = "arithmetic"
"""The multi-step arithmetic skill, which stands for MathVista."""

Group = Literal["contenders", "ablations", "compute"]
GROUPS: tuple[Group, ...] = ("contenders", "ablations", "compute")
How = Literal["as_is", "sft", "loop"]
Start = Literal["base", "sft"]


@dataclass(frozen=True)
class Cell:
    """title: in tables. how: measured as it is, trained by `ril sft` on cached text, or by `ril train`. overrides: dotted
    settings. start: the student's checkpoint it begins with. cost: time of a step, roughly, in steps of Dr.GRPO."""

    title: str
    how: How = "loop"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    start: Start = "sft"
    cost: float = 1.5


GAD = {
    "train.algorithm": "gail",
    "train.teacher_responses_in_update": False,
    "discriminator.loss": "bradley_terry",
    "discriminator.inputs": "question",
    "rewards.similarity.kind": "continuous",
}

CONTENDERS: dict[str, Cell] = {
    "base": Cell("base student", "as_is", start="base"),
    "sft": Cell("SFT student", "as_is"),
    "dr_grpo": Cell("Dr.GRPO", overrides={"train.algorithm": "dr_grpo"}, cost=1.0),
    "ril_both": Cell("RIL, both teachers"),
    "ril_a": Cell("RIL, teacher A", overrides={"train.teachers": ["teacher_a"]}),
    "ril_b": Cell("RIL, teacher B", overrides={"train.teachers": ["teacher_b"]}),
    "sft_teacher_text": Cell("SFT on teacher text", "sft", {"sft.targets": "teacher_responses"}, cost=0.5),
    "rejection_sampling": Cell("rejection sampling", "sft", {"sft.targets": "judged_responses"}, cost=0.5),
    "grpo": Cell("GRPO", overrides={"train.algorithm": "grpo"}, cost=1.0),
    "gail": Cell("GAIL", overrides={"train.algorithm": "gail"}),
    "gad_like": Cell("GAD-like", overrides=GAD),
}
"""In the order of the tables' rows: from the same SFT student, the same questions, the same number of optimizer steps."""

MAIN = ("sft", "dr_grpo", "ril_both", "ril_a", "ril_b", "sft_teacher_text", "rejection_sampling")
"""Run first, and drawn as curves."""

COMPUTE = ("sft_teacher_text", "rejection_sampling", "dr_grpo", "grpo")
"""Run again for as long as the reference trains."""


def _freeze(*groups: str) -> dict[str, Any]:
    return {"student.freeze": list(groups)}


def _each(number: int) -> dict[str, Any]:
    return {"train.per_teacher": True, "train.num_teacher_responses": number}


_NO_D = {"discriminator.mode": "none", "rewards.similarity.weight": 0.0}
_TEXT_OFF = {"train.teacher_responses_in_update": False}

ABLATIONS: dict[str, tuple[str, dict[str, Cell]]] = {
    "discriminator": ("Discriminator", {
        "d_none": Cell("none (teacher text in the update, answer reward alone)", overrides=_NO_D, cost=1.2),
        "d_fixed": Cell("fixed after pre-training", overrides={"discriminator.mode": "fixed"}, cost=1.3),
    }),
    "answer": ("Answer reward", {
        "answer_none": Cell("none", overrides={"rewards.answer.kind": "none"}, cost=1.3),
        "answer_rules": Cell("rules", overrides={"rewards.answer.kind": "rules"}, cost=1.3),
    }),
    "start": ("Warm start", {"no_sft": Cell("no SFT: from the base student", start="base")}),
    "beta": ("KL weight beta (0.01)", {
        "beta_0": Cell("0", overrides={"train.beta": 0.0}, cost=1.3),
        "beta_0.1": Cell("0.1", overrides={"train.beta": 0.1}),
        "beta_1": Cell("1", overrides={"train.beta": 1.0}),
    }),
    "mu": ("Updates a batch, mu (1)", {
        "mu_2": Cell("2", overrides={"train.num_iterations": 2}, cost=2.3),
        "mu_4": Cell("4", overrides={"train.num_iterations": 4}, cost=4.0),
    }),
    "similarity": ("Similarity reward (binary)", {
        "similarity_3": Cell("3 levels", overrides={"rewards.similarity": {"kind": "levels", "levels": 3}}),
        "similarity_11": Cell("11 levels", overrides={"rewards.similarity": {"kind": "levels", "levels": 11}}),
        "similarity_continuous": Cell("continuous", overrides={"rewards.similarity.kind": "continuous"}),
    }),
    "cached": ("Cached responses of each teacher that groups draw from (16)", {
        "cached_1": Cell("1 (and 1 in a group)", overrides={"collect.num_responses": 1, "train.num_teacher_responses": 2}),
        "cached_4": Cell("4", overrides={"collect.num_responses": 4}),
    }),
    "responses": ("Responses of each teacher in a group (2)", {
        "each_1": Cell("1", overrides=_each(1), cost=1.3),
        "each_4": Cell("4", overrides=_each(4), cost=2.0),
        "each_16": Cell("16", overrides=_each(16), cost=5.0),
    }),
    "freezing": ("Frozen besides the vision tower", {
        "freeze_word_embeddings": Cell("word embeddings", overrides=_freeze("vision_tower", "word_embeddings")),
        "freeze_attention": Cell("self-attention", overrides=_freeze("vision_tower", "attention")),
        "freeze_mlp_gate": Cell("FFN gate", overrides=_freeze("vision_tower", "mlp_gate")),
        "freeze_mlp_up": Cell("FFN up", overrides=_freeze("vision_tower", "mlp_up")),
        "freeze_mlp_down": Cell("FFN down", overrides=_freeze("vision_tower", "mlp_down")),
        "freeze_layer_norms": Cell("layer norms", overrides=_freeze("vision_tower", "layer_norms")),
        "freeze_lm_head": Cell("LM head", overrides=_freeze("vision_tower", "lm_head")),
    }),
    "text": ("Teacher text in the update (on)", {"text_off": Cell("off, D as before", overrides=_TEXT_OFF)}),
    "sees": ("What D sees (the response)", {
        "sees_question": Cell("question too", overrides={"discriminator.inputs": "question"}, cost=1.7),
        "sees_image": Cell("question and image too", overrides={"discriminator.inputs": "image"}, cost=2.0),
    }),
    "loss": ("D's loss (BCE)", {"bradley_terry": Cell("Bradley-Terry", overrides={"discriminator.loss": "bradley_terry"})}),
    "replay": ("Replay of older student responses to D (none)", {
        "replay": Cell("half of D's student responses", overrides={"discriminator.replay": 0.5}),
    }),
    "length": ("Lengths D learns from (as they come)", {
        "match_length": Cell("matched", overrides={"discriminator.match_length": True}),
    }),
}  # fmt: skip
"""Heading (with the reference's own value) and cells; each changes only what it names in the reference contender."""

CELLS: dict[Group, dict[str, Cell]] = {
    "contenders": CONTENDERS,
    "ablations": {name: cell for _, cells in ABLATIONS.values() for name, cell in cells.items()},
    "compute": {name: CONTENDERS[name] for name in COMPUTE},
}
