"""Distillation by logits, to compare the methods of this package with: the student learns a teacher's distribution over the
next token, in the loop and with the sampler, the packed pass and the optimizer of all others.

It needs a teacher with the student's tokenizer. The package itself has no such method, because its teachers give text alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
from torch import Tensor

import openril.training.setup as setup
from openril.errors import ModelError
from openril.models.adapters import base_model
from openril.models.loading import load_student
from openril.models.optimizer_step import take_step
from openril.models.packing import Batch, Policy, batch_by_tokens, pack, pad_rows
from openril.models.vision_features import FeatureCache, VisionFeatures
from openril.recipe.schema import Recipe
from openril.records import Group
from openril.training.policy_update import PolicyUpdate

Divergence = Literal["forward", "reverse"]


def divergence(student: Tensor, teacher: Tensor, direction: Divergence) -> Tensor:
    """Return the KL divergence [N] in nats between next-token distributions, from logits [N, V].

    ``forward`` is KL(teacher || student), which a student learns on the teacher's text (Hinton et al., arXiv 1503.02531).
    ``reverse`` is KL(student || teacher), which it learns on its own samples (MiniLLM, arXiv 2306.08543; GKD, 2306.13649).
    """
    ours, theirs = student.log_softmax(-1), teacher.log_softmax(-1)
    first, second = (theirs, ours) if direction == "forward" else (ours, theirs)
    return (first.exp() * (first - second)).sum(-1)


@dataclass(eq=False, repr=False)
class DistillationUpdate(PolicyUpdate):
    """The update of the loop with a teacher's logits in the place of rewards: one optimizer step, on the mean over tokens."""

    teacher: Policy = field(kw_only=True)
    direction: Divergence = field(kw_only=True)

    def update(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        grouped = [self._tokens(group) for group in groups]
        for group, tokens in zip(groups, grouped, strict=True):
            for rollout in group.rollouts:
                rollout.learned = 0
            for rollout, ids in zip(self.members(group), tokens.completions, strict=False):
                rollout.learned = len(ids)
        if self.packing.due(images=True):
            self._try_packing(grouped)
            if self.packing.on:
                self.teacher.enable_packing()
        lengths = [g.packed_length() if self.packing.on else g.plain_length() for g in grouped]
        count = sum(len(ids) for g in grouped for ids in g.completions)
        self.policy.train()
        total = 0.0
        for batch in batch_by_tokens(lengths, self.settings.max_tokens_per_micro_batch):
            rows = (pack if self.packing.on else pad_rows)([grouped[i] for i in batch], self.encoder.pad_token_id)
            with torch.no_grad():
                theirs = response_logits(self.teacher, rows)
            loss = divergence(response_logits(self.unwrapped, rows), theirs, self.direction).sum() / count
            self.accelerator.backward(loss)
            total += float(loss.detach())
        limit = self.settings.optimizer.max_grad_norm
        norm = take_step(self.accelerator, self.optimizer, self.trainable, limit, f"student, step {step + 1}")
        self.updates += 1
        return {"loss": total, "grad_norm": norm, "update_tokens": float(count)}


def response_logits(policy: Policy, rows: Batch) -> Tensor:
    """Return the logits [N, V] at the temperature of the policy that predict every response token of the rows."""
    states, head = policy.states(rows)
    picked = states[rows.index[rows.mask]]
    return (head(picked) if head is not None else picked).float() / policy.temperature


@contextmanager
def by_logits(recipe: Recipe, direction: Divergence) -> Iterator[None]:
    """Let trainers that are opened inside learn the logits of the recipe's one teacher.

    Raises ModelError if its tokenizer is not the student's.
    """
    (teacher,) = recipe.teachers
    folder = Path(teacher.model_path or "")
    if (folder / "tokenizer.json").read_bytes() != (Path(recipe.start_student) / "tokenizer.json").read_bytes():
        raise ModelError(f"{folder}: expected the tokenizer of {recipe.start_student}, whose tokens the logits are of")
    model, _ = load_student(recipe.student, str(folder))
    model.requires_grad_(False)
    model.eval()
    vision = VisionFeatures(base_model(model), FeatureCache(2**30))
    policy = Policy(model, recipe.train.sampling.temperature, vision)
    update = partial(DistillationUpdate, teacher=policy, direction=direction)
    with patch.object(setup, "PolicyUpdate", update):
        yield
