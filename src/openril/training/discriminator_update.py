"""The discriminator at work: it scores the responses of groups, and learns from them by Eq. 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from openril.discriminator.health import Scored, health
from openril.discriminator.losses import bce_terms, bradley_terry_loss, centred
from openril.discriminator.matching import matched_pairs
from openril.discriminator.network import DiscriminatorModel
from openril.discriminator.prompt import DiscriminatorPrompts
from openril.discriminator.replay import ReplayMemory
from openril.models.dummy_image import dummy_image_prompt, has_images
from openril.models.optimizer_step import take_step
from openril.models.packing import GroupTokens, batch_by_tokens, pack, pad_rows
from openril.models.packing_probe import PackingProbe, trial_group
from openril.models.prompts import PromptEncoder
from openril.models.vision_features import FeatureCache
from openril.recipe.schema import DiscriminatorConfig
from openril.records import STUDENT, Group


class Discriminator:
    """D of Algorithm 2. Groups come in whole; every process holds its own and the same number of them.

    ``replay`` remembers the student's responses of earlier steps; the loop keeps and draws them.

    network: the (possibly wrapped) ``DiscriminatorModel``. optimizer: None for a fixed discriminator.
    max_grad_norm: 0 does not clip. packed: run what responses share once. store: where outputs of the frozen vision side
    are kept. warn: told when the packed pass cannot be used.
    """

    def __init__(
        self,
        network: Any,
        encoder: PromptEncoder,
        accelerator: Accelerator,
        settings: DiscriminatorConfig,
        *,
        optimizer: Any = None,
        max_grad_norm: float = 0.0,
        packed: bool = True,
        store: FeatureCache | None = None,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.network = network
        self.encoder = encoder
        self.accelerator = accelerator
        self.settings = settings
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.warn = warn
        self.store = store if store is not None else FeatureCache(0)
        self.prompts = DiscriminatorPrompts(
            encoder, inputs=settings.inputs, max_response_tokens=settings.max_response_tokens
        )
        self.replay = ReplayMemory(settings.replay, settings.replay_steps)
        self.packing = PackingProbe(
            packed,
            "discriminator",
            lambda message: self.warn(message),
            gather=gather_object,
            unit="of the logits' size",
        )
        unwrapped: DiscriminatorModel = accelerator.unwrap_model(network)
        self.trainable = [p for p in unwrapped.parameters() if p.requires_grad]
        self._borrowed = (
            dummy_image_prompt(encoder, unwrapped, accelerator.num_processes) if settings.inputs == "image" else None
        )

    @torch.no_grad()
    def score(self, groups: Sequence[Group]) -> None:
        """Set ``student_prob`` of every rollout (under Bradley-Terry, of logits ``centred`` in their group).

        With ``match_length`` of beginnings as long as those it learns from (discriminator/matching.py).
        """
        self.network.eval()
        views = [self._views(g) for g in groups]
        logits: list[list[Tensor]] = [[] for _ in groups]
        for batch in self._micro_batches(groups, views, whole=False):
            for piece, part in zip(batch, self._logits(batch), strict=True):
                logits[piece.group].append(part)
        for group, parts, shown in zip(groups, logits, views, strict=True):
            for rollout, z in zip(group.rollouts, self._placed(torch.cat(parts), group, shown).tolist(), strict=True):
                rollout.student_prob = 1 / (1 + math.exp(-z)) if z > -700 else 0.0

    def update(self, groups: Sequence[Group], replayed: Sequence[Group] = ()) -> dict[str, float]:
        """One optimizer step on these groups (of all processes); returns loss, gradient norm and health.

        replayed: groups of earlier steps, as many as this process has of them. Those of all processes have
        ``settings.replay`` of the loss, the new groups have the rest; all new groups weigh the same, and so do all
        replayed ones. Health is measured on the new groups' predictions the gradient was taken at, that is, before the
        step. Raises StateError, with the weights as they were, when the gradient is not finite.
        """
        assert self.optimizer is not None
        assert self.settings.replay or not replayed
        self.network.train()
        everything = [*groups, *replayed]
        views = [self._views(g) for g in everything]
        count = sum(gather_object([len(replayed)])) if self.settings.replay else 0
        share = self.settings.replay if count else 0.0
        # Gradients are averaged over the processes, which may hold unlike numbers of replayed groups.
        old = count / (share * self.accelerator.num_processes) if count else 1.0
        divisors = [len(groups) / (1 - share)] * len(groups) + [old] * len(replayed)
        logits: list[list[Tensor]] = [[] for _ in everything]
        total = 0.0
        batches = self._micro_batches(everything, views, whole=self.settings.loss == "bradley_terry")
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.network):
                loss = torch.zeros((), device=self.accelerator.device)
                for piece, z in zip(batch, self._logits(batch), strict=True):
                    shown = views[piece.group][piece.part.start : piece.part.stop]
                    loss = loss + self._loss(z, everything[piece.group], shown) / divisors[piece.group]
                    logits[piece.group].append(z.detach())
                self.accelerator.backward(loss)
                total += float(loss.detach())
        norm = take_step(self.accelerator, self.optimizer, self.trainable, self.max_grad_norm, "discriminator")
        scored = [
            [
                Scored(r.response.source, z, len(r.response.text))
                for r, z in zip(g.rollouts, self._placed(torch.cat(parts), g, shown).tolist(), strict=True)
            ]
            for g, parts, shown in zip(everything, logits, views, strict=True)
        ]
        losses = gather_object([total])
        out = {"loss": sum(losses) / len(losses), "grad_norm": norm}
        if count:
            of_students = [s.logit >= 0 for part in scored[len(groups) :] for s in part if s.source == STUDENT]
            right = gather_object(of_students)
            out |= {"replayed_groups": float(count), "replayed_accuracy": sum(right) / len(right)}
        return out | health(gather_object([s for part in scored[: len(groups)] for s in part]))

    def _loss(self, z: Tensor, group: Group, shown: Sequence[_View]) -> Tensor:
        """What these views add to their group's loss: with BCE any of them, with Bradley-Terry all."""
        students = self._sides(group, z.device)[[v.member for v in shown]]
        weights = torch.tensor([v.weight for v in shown], device=z.device)
        if self.settings.loss == "bce":  # Eq. 1's means over each side, as weights, so that a group may be split
            return (weights * bce_terms(z, students)).sum()
        pairs = torch.diag(weights[students]) if self.settings.match_length else None
        return bradley_terry_loss(z[students], z[~students], pairs)

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

    def _placed(self, logits: Tensor, group: Group, shown: Sequence[_View]) -> Tensor:
        """Logits of a whole group's members, from those of its views, with a meaningful zero."""
        if self.settings.match_length:  # a member's is the mean over its views
            member = torch.tensor([v.member for v in shown], device=logits.device)
            weights = torch.tensor([v.weight for v in shown], device=logits.device)
            sums = logits.new_zeros(2, len(group.rollouts))
            sums.index_add_(1, member, torch.stack([weights * logits, weights.to(logits)]))
            logits = sums[0] / sums[1]
        return logits if self.settings.loss == "bce" else centred(logits, self._sides(group, logits.device))

    def _views(self, group: Group) -> list[_View]:
        """What the network is shown of a group: every response as it is or, with ``match_length``, both of every pair
        cut alike, students in the pairs' order and then teachers."""
        texts = [r.response.text for r in group.rollouts]
        students = [i for i, r in enumerate(group.rollouts) if r.response.from_student]
        teachers = [i for i, r in enumerate(group.rollouts) if not r.response.from_student]
        _, after = self.prompts.head(group.question)
        if not self.settings.match_length:
            return [
                _View(i, self.prompts.tail(texts[i], after), 1 / len(students if i in students else teachers))
                for i in range(len(texts))
            ]
        assert students and teachers, "a length is matched with one of the other side"
        lengths = [self.prompts.length(text) for text in texts]
        pairs = matched_pairs(
            [lengths[i] for i in students], [lengths[i] for i in teachers], self.settings.max_response_tokens
        )
        sides = [[(students[p.student], p) for p in pairs], [(teachers[p.teacher], p) for p in pairs]]
        return [_View(i, self.prompts.tail(texts[i], after, p.tokens), p.weight) for side in sides for i, p in side]

    def _pieces(self, groups: Sequence[Group], views: Sequence[Sequence[_View]], *, whole: bool) -> list[_Piece]:
        """Groups, or consecutive parts of those that do not fit a micro-batch. whole: never parts."""
        limit = self.settings.max_tokens_per_micro_batch
        pieces = []
        for g, group in enumerate(groups):
            head, _ = self.prompts.head(group.question)
            tails = [v.tokens for v in views[g]]
            lengths = [len(t) if self.packing.on else head.length + len(t) for t in tails]
            once = head.length if self.packing.on else 0
            parts = [range(len(tails))] if whole else batch_by_tokens(lengths, max(1, limit - once))
            for part in parts:
                members = GroupTokens(head, [tails[i] for i in part])
                pieces.append(_Piece(g, part, members, once + sum(lengths[i] for i in part)))
        return pieces

    def _micro_batches(
        self, groups: Sequence[Group], views: Sequence[Sequence[_View]], *, whole: bool
    ) -> list[list[_Piece]]:
        if self.packing.due(self.settings.inputs == "image" and any(g.question.images for g in groups)):
            self._try_packing(groups)
        pieces = self._pieces(groups, views, whole=whole)
        batches = batch_by_tokens([p.tokens for p in pieces], self.settings.max_tokens_per_micro_batch)
        return [[pieces[i] for i in batch] for batch in batches]

    def _logits(self, batch: list[_Piece]) -> list[Tensor]:
        """Logits of student_prob, one float32 vector a piece."""
        groups = _joined([p.members for p in batch]) if self.packing.on else [p.members for p in batch]
        logits = self._run(self._with_images(groups), packed=bool(self.packing.on))
        sizes = [len(p.part) for p in batch]
        return list(logits[: sum(sizes)].split(sizes))

    def _with_images(self, groups: Sequence[GroupTokens]) -> Sequence[GroupTokens]:
        """The groups, and behind them the borrowed image where other processes may have images and these have none."""
        if self._borrowed is None or has_images([g.prompt for g in groups]):
            return groups
        return [*groups, GroupTokens(self._borrowed, [torch.tensor([self.encoder.eos_token_ids[0]])])]

    def _run(self, groups: Sequence[GroupTokens], *, packed: bool) -> Tensor:
        pad = self.encoder.pad_token_id
        rows = pack(groups, pad, whole=True) if packed else pad_rows(groups, pad)
        with self.accelerator.autocast():
            return self.network(rows.to(self.accelerator.device))

    def _try_packing(self, groups: Sequence[Group]) -> None:
        """Find out on one group whether packed rows give this network's own logits, on all processes alike."""
        unwrapped: DiscriminatorModel = self.accelerator.unwrap_model(self.network)
        group = next((g for g in groups if g.question.images), groups[0])
        head, after = self.prompts.head(group.question)
        tails = [self.prompts.tail(r.response.text, after) for r in group.rollouts[:3]]
        trial = self._with_images([trial_group(GroupTokens(head, tails))])

        def compare() -> float:
            unwrapped.enable_packing(self.store)
            # The class's own forward, because a wrapper would turn autocast on again.
            pad, device = self.encoder.pad_token_id, self.accelerator.device
            packed = DiscriminatorModel.forward(unwrapped, pack(trial, pad, whole=True).to(device))
            plain = DiscriminatorModel.forward(unwrapped, pad_rows(trial, pad).to(device))
            return float((packed - plain).abs().mean() / plain.abs().mean().clamp(min=1))

        self.packing.run(unwrapped.backbone, compare, images=has_images([g.prompt for g in trial]))


@dataclass
class _View:
    """A group's member as the network sees it: ids behind the prompt's head, and its share of its side."""

    member: int
    tokens: Tensor
    weight: float


@dataclass
class _Piece:
    """Views ``part`` of group number ``group`` as tokens, and how many of them."""

    group: int
    part: range
    members: GroupTokens
    tokens: int


def _joined(groups: Sequence[GroupTokens]) -> list[GroupTokens]:
    """Neighbours with one and the same prompt as one group."""
    out: list[GroupTokens] = []
    for group in groups:
        if out and out[-1].prompt is group.prompt:
            out[-1] = GroupTokens(group.prompt, [*out[-1].completions, *group.completions])
        else:
            out.append(group)
    return out
