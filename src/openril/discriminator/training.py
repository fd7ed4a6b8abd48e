"""The discriminator at work: it scores the responses of groups, and learns from them by Eq. 1."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from openril.algorithm.discrimination import bce_loss, bradley_terry_loss
from openril.discriminator.head import DiscriminatorModel, lay_out_prompts
from openril.discriminator.health import Scored, health
from openril.discriminator.prompt import encode_discriminator_prompt
from openril.models.prompts import Prompt, PromptEncoder
from openril.models.vision_balance import borrowed_prompt, has_images
from openril.recipe.schema import Discriminator as Settings
from openril.records import Group


class Discriminator:
    """D of Algorithm 2. Groups come in whole; every process holds its own and the same number of them.

    network: the (possibly wrapped) ``DiscriminatorModel``. optimiser: None for a fixed discriminator.
    """

    def __init__(
        self,
        network: Any,
        encoder: PromptEncoder,
        accelerator: Accelerator,
        settings: Settings,
        *,
        optimiser: Any = None,
    ) -> None:
        self.network = network
        self.encoder = encoder
        self.accelerator = accelerator
        self.settings = settings
        self.optimiser = optimiser
        unwrapped: DiscriminatorModel = accelerator.unwrap_model(network)
        self.trainable = [p for p in unwrapped.parameters() if p.requires_grad]
        self._borrowed = (
            borrowed_prompt(encoder, unwrapped, accelerator.num_processes) if settings.sees == "image" else None
        )

    @torch.no_grad()
    def score(self, groups: Sequence[Group]) -> None:
        """Set ``student_prob`` of every rollout."""
        self.network.eval()
        prompts = [self._encode(g) for g in groups]
        for batch in self._micro_batches(groups):
            logits = self._logits([prompts[i] for i in batch])
            for i, group_logits in zip(batch, logits, strict=True):
                for rollout, p in zip(groups[i].rollouts, group_logits.sigmoid().tolist(), strict=True):
                    rollout.student_prob = p

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """One optimiser step on these groups (of all processes); returns loss, gradient norm and health.

        Health is measured on the predictions the gradient was taken at, that is, before the step.
        """
        assert self.optimiser is not None
        self.network.train()
        prompts = [self._encode(g) for g in groups]
        loss_of = bce_loss if self.settings.loss == "bce" else bradley_terry_loss
        scored: list[Scored] = []
        total = 0.0
        batches = self._micro_batches(groups)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.network):
                logits = self._logits([prompts[i] for i in batch])
                loss = torch.zeros((), device=self.accelerator.device)
                for i, group_logits in zip(batch, logits, strict=True):
                    is_student = torch.tensor([r.response.from_student for r in groups[i].rollouts])
                    is_student = is_student.to(group_logits.device)
                    loss = loss + loss_of(group_logits[is_student], group_logits[~is_student]) / len(groups)
                    scored += [
                        Scored(r.response.source, z, len(r.response.text))
                        for r, z in zip(groups[i].rollouts, group_logits.tolist(), strict=True)
                    ]
                self.accelerator.backward(loss)
                total += float(loss.detach())
        for p in self.trainable:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        norm = self.accelerator.clip_grad_norm_(self.trainable, self.settings.optimiser.max_grad_norm or float("inf"))
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        losses = gather_object([total])
        return {
            "loss": sum(losses) / len(losses),
            "grad_norm": float(norm if norm is not None else float("nan")),
            **health(gather_object(scored)),
        }

    def measure(self, groups: Sequence[Group]) -> dict[str, float]:
        """Health on groups without learning from them; the groups must be scored already."""
        logit = torch.special.logit
        scored = [
            Scored(
                r.response.source,
                float(logit(torch.tensor(r.student_prob, dtype=torch.float64), eps=1e-12)),
                len(r.response.text),
            )
            for g in groups
            for r in g.rollouts
            if r.student_prob is not None
        ]
        return health(gather_object(scored))

    def _encode(self, group: Group) -> list[Prompt]:
        return [
            encode_discriminator_prompt(
                self.encoder,
                group.question,
                r.response.text,
                sees=self.settings.sees,
                max_response_tokens=self.settings.max_response_tokens,
            )
            for r in group.rollouts
        ]

    def _micro_batches(self, groups: Sequence[Group]) -> list[list[int]]:
        """Indices of groups, whole, with at most response_batch_size responses each (at least one group).

        Groups of a step are of one size, so that every process makes the same number of micro-batches.
        """
        largest = max(len(g.rollouts) for g in groups)
        size = max(1, self.settings.response_batch_size // largest)
        return [list(range(i, min(i + size, len(groups)))) for i in range(0, len(groups), size)]

    def _logits(self, prompts: list[list[Prompt]]) -> list[Tensor]:
        """Logits of student_prob, one float32 vector a group."""
        flat = [p for group in prompts for p in group]
        count = len(flat)
        if self._borrowed is not None and not has_images(flat):
            flat = [*flat, self._borrowed]
        inputs, last = lay_out_prompts(flat, self.encoder.pad_token_id)
        device = self.accelerator.device
        with self.accelerator.autocast():
            logits = self.network({k: v.to(device) for k, v in inputs.items()}, last.to(device))
        return list(logits[:count].split([len(group) for group in prompts]))
