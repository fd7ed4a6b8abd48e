"""Read the sizes of a checkpoint from its header, and estimate disk, steps and requests of a recipe from them.

The memory of its stages is in models/stage_memory.py, and the formulas are in docs/configuration.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openril.checkpoint_files import read_header, weight_files
from openril.models.adapters import base_model
from openril.models.freezing import module_group
from openril.recipe.checks import collects_all, filters_overlong
from openril.recipe.schema import ModuleGroup, Recipe
from openril.records import STUDENT

GIB = 2**30
ADAMW_BYTES = 8
"""State of a trainable value: two float32 moments, or with bfloat16 weights one of each type and what rounding took."""


@dataclass(frozen=True)
class Tower:
    """Sizes of a stack of transformer layers."""

    hidden: int
    intermediate: int
    layers: int
    query: int
    """Width of all query heads together."""
    key_value: int


@dataclass(frozen=True)
class Shape:
    """The student's size."""

    parameters: dict[str, int]
    """Number of parameters by module group ("other" for none)."""
    text: Tower
    vocabulary: int
    vision: Tower | None = None
    patches: int = 4
    """Patches of the vision tower for each image token."""
    stored: str = "float32"
    """Type of the checkpoint's weights."""

    @property
    def total(self) -> int:
        return sum(self.parameters.values())

    def frozen(self, groups: Sequence[str]) -> list[str]:
        """Return the groups that do not train if these are frozen. Tied weights are frozen if either of their groups is."""
        tied = "lm_head" not in self.parameters and "lm_head" in groups
        return [g for g in self.parameters if g in groups or (tied and g == "word_embeddings")]

    def trainable(self, frozen: list[ModuleGroup]) -> int:
        """Return the number of values that train if these groups are frozen."""
        return self.total - sum(self.parameters[g] for g in self.frozen(frozen))


@dataclass(frozen=True)
class Work:
    """Amounts of work of a run.

    sft_questions: of the warm start. provisional: those the student answers before the overlong filter. questions: those
    of the loop. collected: responses by source. requests: by server ("teacher NAME", "judge"), upper bounds.
    """

    sft_questions: int
    provisional: int
    questions: int
    steps: int
    student_samples: int
    collected: dict[str, int]
    requests: dict[str, int]

    @property
    def collected_responses(self) -> int:
        return sum(self.collected.values())


def checkpoint_parameters(folder: Path) -> dict[str, int]:
    """Count a checkpoint's parameters by module group. Raises ModelError if safetensors files are missing or damaged."""
    files = weight_files(folder)
    return by_group({name: math.prod(shape) for f in files for name, (_, shape) in read_header(f).items()})


def by_group(tensors: dict[str, int]) -> dict[str, int]:
    groups: dict[str, int] = {}
    for name, n in tensors.items():
        group = module_group(name) or "other"
        groups[group] = groups.get(group, 0) + n
    return groups


def shape_of(config: Any, parameters: dict[str, int]) -> Shape:
    text = config.get_text_config()
    vision = getattr(config, "vision_config", None)
    merged = getattr(vision, "spatial_merge_size", 0) or 1 / getattr(config, "downsample_ratio", 0.5)
    tower = _tower(vision) if hasattr(vision, "hidden_size") else None
    stored = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return Shape(parameters, _tower(text), int(text.vocab_size), tower, round(merged**2), stored)


def shape_of_model(model: Any) -> Shape:
    """Return the shape of a loaded model, without its adapters."""
    base = base_model(model)
    return shape_of(base.config, by_group({n: p.numel() for n, p in base.named_parameters() if ".lora_" not in n}))


def _tower(config: Any) -> Tower:
    def first(*names: str) -> Any:
        return next((value for name in names if (value := getattr(config, name, None))), 0)

    hidden = int(config.hidden_size)
    heads = int(first("num_attention_heads", "num_heads") or 1)
    head = first("head_dim") or hidden // heads
    key_value = int(first("num_key_value_heads") or heads) * head
    layers = int(first("num_hidden_layers", "depth") or 1)
    return Tower(hidden, int(first("intermediate_size") or 4 * hidden), layers, heads * head, key_value)


def checkpoint_bytes(recipe: Recipe, shape: Shape) -> int:
    """Estimate a checkpoint of the loop: both models in the training type and both optimizers' states."""
    master = 2 if recipe.train.precision == "pure_bf16" else 4
    trainable = 0 if recipe.student.lora.enabled else shape.trainable(recipe.student.freeze)
    total = shape.total * master + ADAMW_BYTES * trainable
    if recipe.uses_discriminator:
        total += shape.total * master
        if recipe.discriminator.mode == "updated":
            total += ADAMW_BYTES * shape.trainable(recipe.discriminator.freeze)
    return total


def work(recipe: Recipe, num_train: int, num_validation: int) -> Work:
    """Count steps, responses and requests of ``ril run``, without retries and work that is cached."""
    train, collect = recipe.train, recipe.collect
    questions = provisional = num_train
    selection = recipe.data.selection
    if selection.enabled:
        questions = provisional = min(num_train, selection.num_questions)
        if selection.drop_overlong:
            provisional = min(num_train, math.ceil(selection.provisional_share * selection.num_questions))
    steps = train.max_steps or math.ceil(train.epochs * questions / train.questions_per_step)
    groups = steps * train.questions_per_step
    sampled = groups + steps * train.retry.questions_per_step  # at most
    collected: dict[str, int] = {}
    if collects_all(recipe):
        collected = {t.name: questions * collect.num_responses for t in recipe.teachers}
    if collect.student and (collected or filters_overlong(recipe)):
        collected[STUDENT] = provisional * collect.num_responses
    requests = {f"teacher {t.name}": collected[t.name] for t in recipe.teachers if t.base_urls and t.name in collected}
    verdicts = 0
    if recipe.answer_kind in ("judge", "rules_then_judge"):
        verdicts += sampled * train.num_generations
        # A cached response is judged once, even if it is drawn several times.
        drawn = groups * recipe.teacher_responses_per_question
        verdicts += min(drawn, sum(collected[name] for name in recipe.teacher_names if name in collected))
        if collect.judge_responses:
            verdicts += sum(collected.values())
    if recipe.eval.score != "rules":
        verdicts += min(num_validation, recipe.eval.limit or num_validation)
    if verdicts and recipe.judge.base_urls:
        requests["judge"] = verdicts
    warm_start = num_train if recipe.sft.enabled and recipe.sft.targets == "answers" else 0
    samples = sampled * train.num_generations
    return Work(warm_start, provisional, questions, steps, samples, collected, requests)
