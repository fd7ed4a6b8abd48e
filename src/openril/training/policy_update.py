"""The student learns from groups: Eq. 2, in micro-batches of whole groups, one optimizer step an update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import astuple
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from openril.algorithm.objective import objective_stats, response_weights, token_loss
from openril.models.adapters import base_model, without_adapters
from openril.models.dummy_image import dummy_image_prompt, has_images
from openril.models.optimizer_step import take_step
from openril.models.packing import (
    Batch,
    GroupTokens,
    Policy,
    batch_by_tokens,
    pack,
    packing_difference,
    pad_rows,
    split_to,
)
from openril.models.packing_probe import PackingProbe, trial_group
from openril.models.prompts import PromptEncoder
from openril.recipe.schema import TrainConfig
from openril.records import Group, Rollout
from openril.storage import stable_hash


class PolicyUpdate:
    """pi_theta, pi_old and pi_ref of Algorithm 2.

    policy: the wrapped ``Policy``. reference: another ``Policy``; None at beta 0 and for LoRA, whose reference is the
    policy without its adapters. Every process passes the same number of groups, whole. warn: told when the packed pass
    cannot be used.
    """

    def __init__(
        self,
        policy: Any,
        reference: Any | None,
        optimizer: Any,
        encoder: PromptEncoder,
        accelerator: Accelerator,
        settings: TrainConfig,
        *,
        seed: int = 0,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.policy = policy
        self.reference = reference
        self.optimizer = optimizer
        self.encoder = encoder
        self.accelerator = accelerator
        self.settings = settings
        self.seed = seed
        self.unwrapped: Policy = accelerator.unwrap_model(policy)
        self.trainable = [p for p in self.unwrapped.parameters() if p.requires_grad]
        self.updates = 0  # optimizer steps taken by this object: tells samplers elsewhere that weights have changed
        self.warn = warn
        self._borrowed = dummy_image_prompt(encoder, self.unwrapped, accelerator.num_processes)
        self.packing = PackingProbe(
            settings.packed, "student", lambda message: self.warn(message), gather=gather_object
        )

    def members(self, group: Group) -> list[Rollout]:
        """The rollouts that are in Eq. 2: teacher responses too, unless they only train the discriminator."""
        return group.rollouts if self.settings.teacher_responses_in_update else group.students

    def update(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """mu optimizer steps on the groups of one batch, whose advantages are set; returns metrics.

        Raises StateError, with the weights as they were, when a gradient is not finite.

        pi_old is the policy as it is now. Its log-probabilities are the first pass's own, detached: with mu = 1 the
        ratio is 1 and no pass is spent on them; with mu > 1 they are kept for the passes that follow.
        """
        grouped = [self._tokens(g) for g in groups]
        if self.packing.due(has_images([t.prompt for t in grouped])):
            self._try_packing(grouped)
        batches = self._micro_batches(grouped)
        old: list[Tensor] = []
        reference: list[Tensor | None] = []
        metrics: dict[str, float] = {}
        for iteration in range(self.settings.num_iterations):
            self.policy.train()
            sums = torch.zeros(7, dtype=torch.float64)
            for number, batch in enumerate(batches):
                # Laid out when their turn comes: the pixels of a whole step would fill the device's memory.
                rows, advantages, weights = self._rows([groups[i] for i in batch], [grouped[i] for i in batch])
                rows = rows.to(self.accelerator.device)
                advantages, weights = advantages.to(rows.mask.device), weights.to(rows.mask.device)
                # Adapter dropout follows from the step, so that no generator's state has to survive a restart.
                torch.manual_seed(
                    stable_hash(self.seed, "dropout", step, iteration, number, self.accelerator.process_index)
                )
                if iteration == 0:
                    reference.append(self._reference_logprobs(rows))
                last = number == len(batches) - 1
                with nullcontext() if last else self.accelerator.no_sync(self.policy):
                    logprobs = self.policy(rows)
                    if iteration == 0:
                        old.append(logprobs.detach())
                    terms = token_loss(
                        logprobs,
                        old[number],
                        advantages,
                        epsilon=self.settings.epsilon,
                        ref_logprobs=reference[number],
                        beta=self.settings.beta,
                    )
                    loss = (weights * (terms * rows.mask).sum(-1)).sum() / len(groups)
                    self.accelerator.backward(loss)
                stats = objective_stats(
                    logprobs.detach(),
                    old[number],
                    advantages,
                    rows.mask & (weights > 0)[:, None],
                    epsilon=self.settings.epsilon,
                    ref_logprobs=reference[number],
                )
                sums += torch.tensor([float(loss.detach()), *astuple(stats)], dtype=torch.float64)
            limit = self.settings.optimizer.max_grad_norm
            norm = take_step(self.accelerator, self.optimizer, self.trainable, limit, f"student, step {step + 1}")
            self.updates += 1
            gathered = torch.tensor(gather_object([sums.tolist()]), dtype=torch.float64)
            loss_mean, totals = float(gathered[:, 0].mean()), gathered[:, 1:].sum(0)
            _, kl, low, high, ratio, logprob = (totals / totals[0].clamp(min=1)).tolist()
            metrics = {
                "loss": loss_mean,
                "grad_norm": norm,
                "clip_ratio/low_mean": low,
                "clip_ratio/high_mean": high,
                "clip_ratio/region_mean": low + high,
                "ratio": ratio,
                "response_logprob": logprob,
                "update_tokens": float(totals[0]),
            }
            if self.settings.beta:
                metrics["kl"] = kl
        return metrics | self._sampler_difference([[groups[i] for i in batch] for batch in batches], old)

    def _tokens(self, group: Group) -> GroupTokens:
        limit = self.settings.max_completion_length
        ids = [self.encoder.completion_ids(r.response, limit) for r in self.members(group)]
        return GroupTokens(self.encoder(group.question), ids)

    def _micro_batches(self, tokens: Sequence[GroupTokens]) -> list[range]:
        """Groups in a row within the budget of tokens, at least one a micro-batch; as many on every process."""
        lengths = [t.packed_length() if self.packing.on else t.plain_length() for t in tokens]
        batches = batch_by_tokens(lengths, self.settings.max_tokens_per_micro_batch)
        return split_to(batches, max(gather_object([len(batches)])))

    def _try_packing(self, tokens: Sequence[GroupTokens]) -> None:
        """Find out on one group whether packed rows give this model's own log-probabilities, on all processes alike."""
        group = next((t for t in tokens if t.prompt.vision), tokens[0])
        trial = self._with_images([trial_group(group)])

        def compare() -> float:
            for policy in [self.unwrapped] if self.reference is None else [self.unwrapped, self.reference]:
                policy.enable_packing()
            return packing_difference(self.unwrapped, trial, self.encoder.pad_token_id, self.accelerator.device)

        self.packing.run(base_model(self.unwrapped.model), compare, images=has_images([t.prompt for t in trial]))

    def _with_images(self, tokens: Sequence[GroupTokens]) -> list[GroupTokens]:
        """The groups, and behind them the borrowed image where other processes may have images and these have none."""
        if self._borrowed is None or has_images([t.prompt for t in tokens]):
            return list(tokens)
        return [*tokens, GroupTokens(self._borrowed, [torch.tensor([self.encoder.eos_token_ids[0]])])]

    def _rows(self, groups: Sequence[Group], tokens: Sequence[GroupTokens]) -> tuple[Batch, Tensor, Tensor]:
        """A micro-batch: its rows, advantages [R] and weights [R] of the responses in the loss (0 for a borrowed row)."""
        advantages = [r.advantage for g in groups for r in self.members(g)]
        sizes = [len(self.members(g)) for g in groups for _ in self.members(g)]
        extended = self._with_images(tokens)
        if len(extended) > len(tokens):
            advantages.append(0.0)
            sizes.append(0)
        tokens = extended
        rows = (pack if self.packing.on else pad_rows)(tokens, self.encoder.pad_token_id)
        group_sizes = torch.tensor(sizes)
        weights = response_weights(
            rows.mask,
            group_sizes.clamp(min=1),
            per_length=self.settings.algorithm == "grpo",
            max_completion_length=self.settings.max_completion_length,
        )
        return rows, torch.tensor(advantages), torch.where(group_sizes > 0, weights, 0.0)

    @torch.no_grad()
    def _reference_logprobs(self, rows: Batch) -> Tensor | None:
        if not self.settings.beta:
            return None
        with self.accelerator.autocast():
            if self.reference is not None:
                return self.reference(rows)
            self.policy.eval()
            with without_adapters(self.unwrapped.model):
                logprobs = self.policy(rows)
            self.policy.train()
            return logprobs

    def _sampler_difference(self, batches: Sequence[Sequence[Group]], old: list[Tensor]) -> dict[str, float]:
        """How far the sampler's log-probabilities of its own samples are from the trainer's, in nats per token."""
        differences: list[float] = []
        for groups, logprobs in zip(batches, old, strict=True):
            responses = [r.response for g in groups for r in self.members(g)]
            for row, response in zip(logprobs, responses, strict=False):  # a borrowed row has no response
                if response.logprobs is not None:
                    sampled = torch.tensor(response.logprobs, device=row.device)
                    differences += (row[: len(sampled)] - sampled).abs().tolist()
        everyone = [d for part in gather_object([differences]) for d in part]
        if not everyone:
            return {}
        return {
            "sampling/sampling_logp_difference/mean": sum(everyone) / len(everyone),
            "sampling/sampling_logp_difference/max": max(everyone),
        }
