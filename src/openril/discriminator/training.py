"""The discriminator at work: it scores the responses of groups, and learns from them by Eq. 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from openril.algorithm.discrimination import bce_terms, bradley_terry_loss, centred
from openril.discriminator.head import DiscriminatorModel, lay_out_prompts
from openril.discriminator.health import Scored, health
from openril.discriminator.prompt import encode_discriminator_prompt, load_question_images
from openril.models.optimiser_step import take_step
from openril.models.prompts import Prompt, PromptEncoder
from openril.models.vision_balance import borrowed_prompt, has_images
from openril.recipe.schema import Discriminator as Settings
from openril.records import Group


class Discriminator:
    """D of Algorithm 2. Groups come in whole; every process holds its own and the same number of them.

    network: the (possibly wrapped) ``DiscriminatorModel``. optimiser: None for a fixed discriminator.
    max_grad_norm: 0 does not clip.
    """

    def __init__(
        self,
        network: Any,
        encoder: PromptEncoder,
        accelerator: Accelerator,
        settings: Settings,
        *,
        optimiser: Any = None,
        max_grad_norm: float = 0.0,
    ) -> None:
        self.network = network
        self.encoder = encoder
        self.accelerator = accelerator
        self.settings = settings
        self.optimiser = optimiser
        self.max_grad_norm = max_grad_norm
        unwrapped: DiscriminatorModel = accelerator.unwrap_model(network)
        self.trainable = [p for p in unwrapped.parameters() if p.requires_grad]
        self._borrowed = (
            borrowed_prompt(encoder, unwrapped, accelerator.num_processes) if settings.sees == "image" else None
        )

    @torch.no_grad()
    def score(self, groups: Sequence[Group]) -> None:
        """Set ``student_prob`` of every rollout (under Bradley-Terry, of logits ``centred`` in their group)."""
        self.network.eval()
        logits: list[list[Tensor]] = [[] for _ in groups]
        for batch in self._micro_batches(groups, whole=False):
            for (g, _), part in zip(batch, self._logits(groups, batch), strict=True):
                logits[g].append(part)
        for group, parts in zip(groups, logits, strict=True):
            for rollout, z in zip(group.rollouts, self._placed(torch.cat(parts), group).tolist(), strict=True):
                rollout.student_prob = 1 / (1 + math.exp(-z)) if z > -700 else 0.0

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """One optimiser step on these groups (of all processes); returns loss, gradient norm and health.

        Health is measured on the predictions the gradient was taken at, that is, before the step. Raises StateError,
        with the weights as they were, when the gradient is not finite.
        """
        assert self.optimiser is not None
        self.network.train()
        pairwise = self.settings.loss == "bradley_terry"
        scored: list[Scored] = []
        total = 0.0
        batches = self._micro_batches(groups, whole=pairwise)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.network):
                loss = torch.zeros((), device=self.accelerator.device)
                for (g, members), z in zip(batch, self._logits(groups, batch), strict=True):
                    sides = self._sides(groups[g], z.device)
                    part = sides[members.start : members.stop]
                    if pairwise:
                        loss = loss + bradley_terry_loss(z[part], z[~part]) / len(groups)
                    else:
                        # Eq. 1's means over each side, as weights, so that a group may be split.
                        weights = torch.where(part, 1 / sides.sum().clamp(min=1), 1 / (~sides).sum().clamp(min=1))
                        loss = loss + (weights * bce_terms(z, part)).sum() / len(groups)
                    placed = self._placed(z.detach(), groups[g])
                    rollouts = groups[g].rollouts[members.start : members.stop]
                    scored += [
                        Scored(r.response.source, value, len(r.response.text))
                        for r, value in zip(rollouts, placed.tolist(), strict=True)
                    ]
                self.accelerator.backward(loss)
                total += float(loss.detach())
        norm = take_step(self.accelerator, self.optimiser, self.trainable, self.max_grad_norm, "discriminator")
        losses = gather_object([total])
        return {"loss": sum(losses) / len(losses), "grad_norm": norm, **health(gather_object(scored))}

    def measure(self, groups: Sequence[Group]) -> dict[str, float]:
        """Health on groups of all processes without learning from them; the groups must be scored already."""
        return health(gather_object(self.scored(groups)))

    def scored(self, groups: Sequence[Group]) -> list[Scored]:
        """What health is computed from, of groups that are scored."""
        out = []
        for rollout in (r for g in groups for r in g.rollouts):
            assert rollout.student_prob is not None
            p = torch.tensor(rollout.student_prob, dtype=torch.float64)
            z = float(torch.special.logit(p, eps=1e-12))
            out.append(Scored(rollout.response.source, z, len(rollout.response.text)))
        return out

    def _sides(self, group: Group, device: torch.device) -> Tensor:
        """bool [members]: whether the student wrote it."""
        return torch.tensor([r.response.from_student for r in group.rollouts], device=device)

    def _placed(self, logits: Tensor, group: Group) -> Tensor:
        """Logits of a whole group with a meaningful zero."""
        if self.settings.loss == "bce" or len(logits) != len(group.rollouts):
            return logits
        return centred(logits, self._sides(group, logits.device))

    def _micro_batches(self, groups: Sequence[Group], *, whole: bool) -> list[list[tuple[int, range]]]:
        """(group, members) pieces with at most response_batch_size responses in all a micro-batch.

        whole: never split a group (pairs need both sides); a larger group is then a micro-batch of its own. Groups of a
        step are of one size, so that every process makes the same number of micro-batches.
        """
        limit = self.settings.response_batch_size
        pieces = []
        for g, group in enumerate(groups):
            size = len(group.rollouts)
            step = size if whole else min(size, limit)
            pieces += [(g, range(i, min(i + step, size))) for i in range(0, size, step)]
        batches: list[list[tuple[int, range]]] = []
        filled = limit
        for piece in pieces:
            if filled + len(piece[1]) > limit or not batches:
                batches.append([])
                filled = 0
            batches[-1].append(piece)
            filled += len(piece[1])
        return batches

    def _logits(self, groups: Sequence[Group], batch: list[tuple[int, range]]) -> list[Tensor]:
        """Logits of student_prob, one float32 vector a piece. Images of a group are loaded once."""
        prompts: list[list[Prompt]] = []
        for g, members in batch:
            question = groups[g].question
            images = load_question_images(self.encoder, question) if self.settings.sees == "image" else None
            prompts.append(
                [
                    encode_discriminator_prompt(
                        self.encoder,
                        question,
                        groups[g].rollouts[i].response.text,
                        sees=self.settings.sees,
                        images=images,
                        max_response_tokens=self.settings.max_response_tokens,
                    )
                    for i in members
                ]
            )
        flat = [p for piece in prompts for p in piece]
        count = len(flat)
        if self._borrowed is not None and not has_images(flat):
            flat = [*flat, self._borrowed]
        inputs, last = lay_out_prompts(flat, self.encoder.pad_token_id)
        device = self.accelerator.device
        with self.accelerator.autocast():
            logits = self.network({k: v.to(device) for k, v in inputs.items()}, last.to(device))
        return list(logits[:count].split([len(piece) for piece in prompts]))
