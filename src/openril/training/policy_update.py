"""Update the student on groups by Eq. 2: micro-batches of whole groups, one optimizer step for each of mu iterations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass, field
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
from openril.records import Group, Response, Rollout
from openril.training.sharding import in_float32, is_sharded, reshard


@dataclass(eq=False, repr=False)
class PolicyUpdate:
    """pi_theta, pi_old and pi_ref of Algorithm 2. Every process passes the same number of groups, whole.

    policy: The wrapped ``Policy``. reference: Another ``Policy``; None at beta 0 and for LoRA, whose reference is the
    policy without its adapters. warn: Receives a message if the packed pass cannot be used.
    """

    policy: Any
    reference: Any | None
    optimizer: Any
    encoder: PromptEncoder
    accelerator: Accelerator
    settings: TrainConfig
    warn: Callable[[str], None] = field(default=lambda message: None, kw_only=True)

    def __post_init__(self) -> None:
        self.unwrapped: Policy = self.accelerator.unwrap_model(self.policy)
        self.trainable = [p for p in self.unwrapped.parameters() if p.requires_grad]
        self.updates = 0  # optimizer steps of this object, which tell samplers elsewhere that the weights have changed
        self.too_long = Counter[str]()  # teacher responses that did not fit, by source, since the loop last cleared it
        self._dummy = dummy_image_prompt(self.encoder, self.unwrapped, self.accelerator.num_processes)
        self.packing = PackingProbe(
            self.settings.packed,
            "student",
            lambda message: self.warn(message),
            gather=gather_object,
            widen=lambda: in_float32(self.policy),
        )

    def members(self, group: Group) -> list[Rollout]:
        """Return the rollouts that are in Eq. 2: all, or the student's samples alone where the recipe says so."""
        with_teachers = self.settings.teacher_responses_in_update and not group.without_teachers
        return group.rollouts if with_teachers else group.students

    def _teaches(self, group: Group) -> bool:
        """Return whether a group has a gradient. Without a KL term, one whose advantages are all 0 has none."""
        return self.settings.beta > 0 or any(r.advantage for r in self.members(group))

    def fits(self, response: Response) -> bool:
        """Return whether a teacher response is learned whole, and count it in ``too_long`` if it would be cut."""
        if not self.settings.teacher_responses_in_update:
            return True
        limit = self.settings.max_completion_length
        fits = len(self.encoder.completion_ids(response, limit + 1)) <= limit
        self.too_long[response.source] += not fits
        return fits

    def update(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """Take mu optimizer steps on the groups of one batch, whose advantages are set; return the metrics of the last.

        pi_old is the policy before the first step. Its log-probabilities are those of the first pass, detached: with
        mu = 1 the ratio is 1 and pi_old costs no pass; with mu > 1 they are kept for the passes that follow.

        Raises StateError, naming ``step``, if a gradient is not finite; the weights are as before that optimizer step.
        """
        grouped = [self._tokens(g) for g in groups]
        for group, tokens in zip(groups, grouped, strict=True):
            for rollout in group.rollouts:
                rollout.learned = 0
            for rollout, ids in zip(
                self.members(group), tokens.completions, strict=False
            ):  # an empty group has a dummy
                rollout.learned = len(ids)
        if self.packing.due(has_images([t.prompt for t in grouped])):
            self._try_packing(grouped)
        batches = self._micro_batches(groups, grouped)
        old: list[Tensor] = []
        reference: list[Tensor | None] = []
        metrics: dict[str, float] = {}
        for iteration in range(self.settings.num_iterations):
            self.policy.train()
            sums = torch.zeros(10, dtype=torch.float64)
            for number, batch in enumerate(batches):
                # Rows are built one micro-batch at a time: the pixels of a whole step would fill the device's memory.
                part = self._rows([groups[i] for i in batch], [grouped[i] for i in batch])
                part = part.to(self.accelerator.device)
                if iteration == 0:
                    reference.append(self._reference_logprobs(part.rows))
                last = number == len(batches) - 1
                shared: dict[str, Any] = {
                    "epsilon": self.settings.epsilon,
                    "ref_logprobs": reference[number],
                    "unclipped_above": None if self.settings.clip_teacher_upper else ~part.from_student,
                    "shaped": ~part.from_student if self.settings.teacher_weight == "shaped" else None,
                }
                # Sharded gradients are reduced in every pass: kept whole until the last, they would take 4 bytes a weight.
                keep = last or is_sharded(self.policy)
                with nullcontext() if keep else self.accelerator.no_sync(self.policy):
                    with self.accelerator.autocast():
                        logprobs, entropies = self.policy(part.rows, with_entropy=True)
                    if iteration == 0:
                        old.append(logprobs.detach())
                    kl_rows = part.from_student if self.settings.kl_rows == "student" else None
                    kl: dict[str, Any] = {"beta": self.settings.beta, "kl_rows": kl_rows}
                    terms = token_loss(logprobs, old[number], part.advantages, **kl, **shared)
                    loss = (part.weights * (terms * part.rows.mask).sum(-1)).sum() / len(groups)
                    self.accelerator.backward(loss)
                counted = part.rows.mask & (part.weights > 0)[:, None]
                now = logprobs.detach()
                stats = objective_stats(now, old[number], part.advantages, counted, part.from_student, **shared)
                entropy = float(entropies[counted & part.from_student[:, None]].sum())
                sums += torch.tensor([float(loss.detach()), entropy, *astuple(stats)], dtype=torch.float64)
            limit = self.settings.optimizer.max_grad_norm
            norm = take_step(self.accelerator, self.optimizer, self.trainable, limit, f"student, step {step + 1}")
            self.updates += 1
            gathered = torch.tensor(gather_object([sums.tolist()]), dtype=torch.float64)
            loss_mean, totals = float(gathered[:, 0].mean()), gathered[:, 2:].sum(0)
            tokens, of_teachers, kl_student, kl_teacher = totals[:4].tolist()
            low, high, ratio, logprob = (totals[4:] / max(1, tokens)).tolist()
            metrics = {"loss": loss_mean, "grad_norm": norm, "update_tokens": tokens}
            if tokens:
                metrics |= {
                    "clip_ratio/low_mean": low,
                    "clip_ratio/high_mean": high,
                    "clip_ratio/region_mean": low + high,
                    "ratio": ratio,
                    "response_logprob": logprob,
                }
            if tokens > of_teachers:
                metrics["entropy"] = float(gathered[:, 1].sum()) / (tokens - of_teachers)
            if self.settings.beta:  # k3 estimates the KL divergence on the student's own tokens only
                if tokens > of_teachers:
                    metrics["kl"] = kl_student / (tokens - of_teachers)
                if of_teachers:
                    metrics["kl_teacher"] = kl_teacher / of_teachers
        return metrics | self._sampler_difference([[groups[i] for i in batch] for batch in batches], old)

    def _tokens(self, group: Group) -> GroupTokens:
        limit = self.settings.max_completion_length
        ids = [self.encoder.completion_ids(r.response, limit) for r in self.members(group)]
        # Without the student's samples, and with teacher responses that are all too long, a group has no row. A dummy row,
        # whose weight is 0, takes their place, so that every pass has rows.
        return GroupTokens(self.encoder(group.question), ids or [self._dummy_row()])

    def _dummy_row(self) -> Tensor:
        return torch.tensor([self.encoder.eos_token_ids[0]])

    def _micro_batches(self, groups: Sequence[Group], tokens: Sequence[GroupTokens]) -> list[list[int]]:
        """Return the groups of each pass, within the budget of tokens, at least one in each; every process gets as many.

        Groups that teach nothing are left out, unless another process has more passes than this one has groups.
        """
        chosen = [i for i, group in enumerate(groups) if self._teaches(group)]

        def batched() -> list[range]:
            lengths = [tokens[i].packed_length() if self.packing.on else tokens[i].plain_length() for i in chosen]
            return batch_by_tokens(lengths, self.settings.max_tokens_per_micro_batch)

        count = max(1, *gather_object([len(batched())]))
        if (missing := count - len(chosen)) > 0:  # every process has as many groups as the others
            idle = [i for i in range(len(groups)) if i not in chosen]
            chosen = sorted([*chosen, *idle[:missing]])
        return [[chosen[i] for i in batch] for batch in split_to(batched(), count)]

    def _try_packing(self, tokens: Sequence[GroupTokens]) -> None:
        """Find out on one group whether packed rows give this model's own log-probabilities, on all processes alike."""
        group = next((t for t in tokens if t.prompt.vision), tokens[0])
        trial = self._with_images([trial_group(group)])

        def compare() -> float:
            for policy in [self.unwrapped] if self.reference is None else [self.unwrapped, self.reference]:
                policy.enable_packing()
            return packing_difference(self.unwrapped, trial, self.encoder.pad_token_id, self.accelerator.device)

        self.packing.run(base_model(self.unwrapped.model), compare, images=has_images([t.prompt for t in trial]))
        reshard(self.policy)

    def _with_images(self, tokens: Sequence[GroupTokens]) -> list[GroupTokens]:
        """Return the groups and, if they have no image but those of another process may, the dummy image after them."""
        if self._dummy is None or has_images([t.prompt for t in tokens]):
            return list(tokens)
        return [*tokens, GroupTokens(self._dummy, [self._dummy_row()])]

    def _rows(self, groups: Sequence[Group], tokens: Sequence[GroupTokens]) -> _MicroBatch:
        advantages: list[float] = []
        from_student: list[bool] = []
        sizes: list[int] = []
        for group in groups:
            members = self.members(group)
            advantages += [r.advantage for r in members] or [0.0]
            from_student += [r.response.from_student for r in members] or [True]
            # A group that teaches nothing is in no metric, so that these do not depend on the number of processes.
            sizes += [len(members) if self._teaches(group) else 0] * max(1, len(members))
        extended = self._with_images(tokens)
        if len(extended) > len(tokens):
            advantages.append(0.0)
            from_student.append(True)
            sizes.append(0)
        rows = (pack if self.packing.on else pad_rows)(extended, self.encoder.pad_token_id)
        group_sizes = torch.tensor(sizes)
        weights = response_weights(
            rows.mask,
            group_sizes.clamp(min=1),
            per_length=self.settings.algorithm == "grpo",
            max_completion_length=self.settings.max_completion_length,
        )
        weights = torch.where(group_sizes > 0, weights, 0.0)
        return _MicroBatch(rows, torch.tensor(advantages), weights, torch.tensor(from_student))

    @torch.no_grad()
    def _reference_logprobs(self, rows: Batch) -> Tensor | None:
        if not self.settings.beta:
            return None
        with self.accelerator.autocast():
            if self.reference is not None:
                logprobs = self.reference(rows)
                reshard(self.reference)
                return logprobs
            self.policy.eval()
            with without_adapters(self.unwrapped.model):
                logprobs = self.policy(rows)
            self.policy.train()
            return logprobs

    def _sampler_difference(self, batches: Sequence[Sequence[Group]], old: list[Tensor]) -> dict[str, float]:
        """Return how far the sampler's log-probabilities of its samples are from the trainer's, in nats per token."""
        differences: list[float] = []
        for groups, logprobs in zip(batches, old, strict=True):
            responses = [(r.response, self._teaches(g)) for g in groups for r in self.members(g)]
            for row, (response, teaches) in zip(logprobs, responses, strict=False):  # a dummy row has no response
                if teaches and response.logprobs is not None:
                    sampled = torch.tensor(response.logprobs, device=row.device)
                    differences += (row[: len(sampled)] - sampled).abs().tolist()
        everyone = [d for part in gather_object([differences]) for d in part]
        if not everyone:
            return {}
        return {
            "sampling/sampling_logp_difference/mean": sum(everyone) / len(everyone),
            "sampling/sampling_logp_difference/max": max(everyone),
        }


@dataclass
class _MicroBatch:
    """Some groups as rows for the model, and what the loss needs of each response; [R] each."""

    rows: Batch
    advantages: Tensor
    weights: Tensor
    """Weight of a response's tokens in the loss; 0 for a dummy row."""
    from_student: Tensor

    def to(self, device: torch.device) -> _MicroBatch:
        others = (self.advantages, self.weights, self.from_student)
        return _MicroBatch(self.rows.to(device), *(t.to(device) for t in others))
