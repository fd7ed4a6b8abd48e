"""Estimate memory, disk, steps and requests of a recipe from the recipe and the checkpoint's header.

The formulas are in docs/configuration.md. They leave out allocator overhead, the framework itself and communication
buffers.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openril.errors import ModelError
from openril.models.freezing import module_group
from openril.models.packing import LOGITS_BYTES
from openril.recipe.checks import collects_all, filters_overlong
from openril.recipe.schema import ModuleGroup, Recipe
from openril.records import STUDENT

GIB = 2**30
ADAMW_BYTES = 8
"""State of a trainable value: two float32 moments, or with bfloat16 weights one of each type and what rounding took."""


@dataclass(frozen=True)
class Shape:
    """The student's size. parameters: number of parameters by module group ("other" for none)."""

    parameters: dict[str, int]
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int

    @property
    def total(self) -> int:
        return sum(self.parameters.values())

    def trainable(self, frozen: list[ModuleGroup]) -> int:
        return sum(n for group, n in self.parameters.items() if group not in frozen)


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one process, with unsharded weights, by name."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def shardable(self) -> int:
        """Bytes that sharding (FSDP, ZeRO) would divide by the number of processes."""
        return sum(n for name, n in self.parts.items() if not name.startswith("loop:"))


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


def read_header(path: Path) -> dict[str, int]:
    """Read the number of values of each tensor from a safetensors file's header. Raises ModelError if it is damaged."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ModelError(
                    f"{path}: damaged or cut off (its header claims {length} bytes of {size}). Download it again."
                )
            header = json.loads(f.read(length))
        end = max((t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"), default=0)
        counts = {n: math.prod(t["shape"]) for n, t in header.items() if n != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        if isinstance(e, ModelError):
            raise
        raise ModelError(f"{path}: not a safetensors file ({e})") from e
    if size != 8 + length + end:
        raise ModelError(
            f"{path}: damaged or cut off: expected {8 + length + end} bytes, got {size}. Download it again."
        )
    return counts


def checkpoint_parameters(folder: Path) -> dict[str, int]:
    """Count a checkpoint's parameters by module group. Raises ModelError if safetensors files are missing or damaged."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = [p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        found = f", only {', '.join(others[:3])}, which can run code when loaded; convert it" if others else ""
        raise ModelError(f"{folder} holds no weights as .safetensors{found}")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text())["weight_map"].values())
        if absent := sorted(named - {f.name for f in files}):
            raise ModelError(
                f"{folder}: {len(absent)} of {len(named)} weight files are missing: {', '.join(absent[:3])}"
            )
        files = [f for f in files if f.name in named]
    return by_group({name: n for f in files for name, n in read_header(f).items()})


def by_group(tensors: dict[str, int]) -> dict[str, int]:
    groups: dict[str, int] = {}
    for name, n in tensors.items():
        group = module_group(name) or "other"
        groups[group] = groups.get(group, 0) + n
    return groups


def shape_of(config: Any, parameters: dict[str, int]) -> Shape:
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    intermediate = int(getattr(text, "intermediate_size", 0) or 4 * hidden)
    return Shape(parameters, hidden, intermediate, int(text.num_hidden_layers), int(text.vocab_size))


def loop_memory(recipe: Recipe, shape: Shape, prompt_tokens: float) -> Memory:
    """Estimate the memory of the loop. prompt_tokens: of a long question (95%), including image tokens."""
    train, student = recipe.train, recipe.student
    master = 2 if train.precision == "pure_bf16" else 4
    compute = 4 if train.precision == "float32" else 2
    parts: dict[str, int] = {}

    def trained(name: str, total: int, trainable: int) -> None:
        parts[f"{name}: weights"] = total * master
        parts[f"{name}: gradients"] = trainable * master
        parts[f"{name}: AdamW states"] = ADAMW_BYTES * trainable

    if student.lora.enabled:
        # r x (in + out) for each adapted layer; at most all of attention and MLP.
        layer = 4 * 2 * shape.hidden + 3 * (shape.hidden + shape.intermediate)
        trainable = student.lora.r * layer * shape.layers
        trained("student", shape.total + trainable, trainable)
    else:
        trainable = shape.trainable(student.freeze)
        trained("student", shape.total, trainable)
        if train.beta:
            # Autocast's reference stores linear layers of the language model in bfloat16.
            rounded = (
                {"attention", "mlp_gate", "mlp_up", "mlp_down", "lm_head"} if train.precision == "bfloat16" else set()
            )
            sizes = (n * (2 if group in rounded else master) for group, n in shape.parameters.items())
            parts["reference: weights"] = sum(sizes)
    if recipe.uses_discriminator:
        body = shape.total - shape.parameters.get("lm_head", 0)
        d = recipe.discriminator
        if d.mode == "updated":
            trained("discriminator", body, max(0, shape.trainable(d.freeze) - shape.parameters.get("lm_head", 0)))
        else:
            parts["discriminator: weights"] = body * master
    if train.precision == "bfloat16":
        # Autocast keeps a bfloat16 copy of the trained weights during a pass.
        parts["loop: bfloat16 copy of the weights"] = trainable * 2

    teachers = recipe.teacher_responses_per_question if train.teacher_responses_in_update else 0
    members = train.num_generations + teachers
    responses = members * train.max_completion_length
    group = (prompt_tokens if train.packed else members * prompt_tokens) + responses
    # A micro-batch holds whole groups within the budget, but at least one.
    groups = max(1, min(train.questions_per_step, int(train.max_tokens_per_micro_batch // group)))
    tokens = groups * group
    one_layer = tokens * (8 * shape.hidden + 4 * shape.intermediate) * compute
    if student.gradient_checkpointing:
        activations = tokens * shape.hidden * shape.layers * compute + one_layer
    else:
        activations = one_layer * shape.layers
    parts["loop: activations"] = int(activations)
    if train.packed:  # in parts, each with its gradient
        parts["loop: logits"] = 3 * min(groups * responses * shape.vocabulary * 4, LOGITS_BYTES)
    else:  # of all rows in the compute type with their gradient, and one part in float32
        logits = groups * responses * shape.vocabulary
        parts["loop: logits"] = int(logits * 2 * compute + 2 * LOGITS_BYTES)
    return Memory(parts)


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
    collected: dict[str, int] = {}
    if collects_all(recipe):
        collected = {t.name: questions * collect.num_responses for t in recipe.teachers}
    if collect.student and (collected or filters_overlong(recipe)):
        collected[STUDENT] = provisional * collect.num_responses
    requests = {f"teacher {t.name}": collected[t.name] for t in recipe.teachers if t.base_urls and t.name in collected}
    verdicts = 0
    if recipe.answer_kind in ("judge", "rules_then_judge"):
        verdicts += groups * train.num_generations
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
    samples = groups * train.num_generations
    return Work(warm_start, provisional, questions, steps, samples, collected, requests)
