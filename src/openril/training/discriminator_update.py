"""Score the responses of groups with the discriminator, and update it on them by Eq. 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from openril.discriminator.gradient_penalty import logits_and_slopes
from openril.discriminator.health import Scored, health
from openril.discriminator.losses import bce_terms, bradley_terry_loss, centered, chance_loss
from openril.discriminator.matching import matched_pairs, shown_tokens
from openril.discriminator.network import DiscriminatorModel
from openril.discriminator.prompt import DiscriminatorPrompts
from openril.discriminator.replay import ReplayMemory
from openril.errors import StateError
from openril.models.dummy_image import dummy_image_prompt, has_images
from openril.models.optimizer_step import take_step
from openril.models.packing import GroupTokens, batch_by_tokens, own_forward, pack, pad_rows
from openril.models.packing_probe import PackingProbe, trial_group
from openril.models.prompts import PromptEncoder
from openril.models.vision_features import FeatureCache
from openril.recipe.schema import DiscriminatorConfig
from openril.records import STUDENT, Group
from openril.training.sharding import in_float32, is_sharded, reshard


@dataclass(eq=False, repr=False)
class Discriminator:
    """The discriminator D of Algorithm 2. Every process passes the same number of groups, whole.

    ``replay`` holds the student's responses of earlier steps; the loop fills it and draws from it.

    network: The ``DiscriminatorModel``, possibly wrapped. optimizer: None for a fixed discriminator. max_grad_norm: 0
    does not clip. packed: Run the part of the prompt that responses share once; not with a gradient penalty. store: Keeps
    the outputs of the frozen vision side. ema_decay: See the recipe; the averages are in the optimizer's state, whose
    checkpoints and sharding they share. states: A context in which that state is on the device (``Offload.states``).
    warn: Receives a message if the packed pass cannot be used.
    """

    network: Any
    encoder: PromptEncoder
    accelerator: Accelerator
    settings: DiscriminatorConfig
    _: KW_ONLY
    optimizer: Any = None
    max_grad_norm: float = 0.0
    packed: bool = True
    store: FeatureCache | None = None
    ema_decay: float = 0.0
    states: Callable[[], AbstractContextManager[object]] = nullcontext
    warn: Callable[[str], None] = lambda message: None

    def __post_init__(self) -> None:
        encoder, accelerator, settings = self.encoder, self.accelerator, self.settings
        self.prompts = DiscriminatorPrompts(
            encoder, inputs=settings.inputs, max_response_tokens=settings.max_response_tokens
        )
        self.replay = ReplayMemory(settings.replay, settings.replay_steps)
        self.packing = PackingProbe(
            self.packed and not settings.gradient_penalty,
            "discriminator",
            lambda message: self.warn(message),
            gather=gather_object,
            unit="of the logits' size",
            widen=lambda: in_float32(self.network),
        )
        unwrapped: DiscriminatorModel = accelerator.unwrap_model(self.network)
        self.trainable = [p for p in unwrapped.parameters() if p.requires_grad]
        self._dummy = (
            dummy_image_prompt(encoder, unwrapped, accelerator.num_processes) if settings.inputs == "image" else None
        )

    @torch.no_grad()
    def score(self, groups: Sequence[Group], when: str = "scoring") -> None:
        """Set ``student_prob`` of every rollout; under Bradley-Terry the logits are ``centered`` in their group first.

        With ``match_length``, beginnings of the lengths that it learns from are scored (discriminator/matching.py).
        Raises StateError, naming ``when``, if a logit is not finite.
        """
        self.network.eval()
        views = [self._views(g) for g in groups]
        logits: list[list[Tensor]] = [[] for _ in groups]
        with self._averaged():
            for batch in self._micro_batches(groups, views, whole=False):
                for piece, part in zip(batch, self._logits(batch)[0], strict=True):
                    if not piece.idle:
                        logits[piece.group].append(part)
            reshard(self.network)
        self._refuse_not_finite(groups, logits, when)
        for group, parts, shown in zip(groups, logits, views, strict=True):
            for rollout, z in zip(
                group.rollouts, self._of_members(torch.cat(parts), group, shown).tolist(), strict=True
            ):
                rollout.student_prob = 1 / (1 + math.exp(-z)) if z > -700 else 0.0

    def update(self, groups: Sequence[Group], replayed: Sequence[Group] = (), when: str = "update") -> dict[str, float]:
        """Take one optimizer step on the groups of all processes; return loss, gradient norm and health.

        Health is that of the predictions on the new groups before the step: those the gradient is computed from. The
        ``replayed`` groups of all processes together have ``settings.replay`` of the loss, each the same weight, and the
        new groups have the rest. Raises StateError, naming ``when``, if a logit or the gradient is not finite; the
        weights are as they were.
        """
        assert self.optimizer is not None
        assert self.settings.replay or not replayed
        self.network.train()
        everything = [*groups, *replayed]
        views = [self._views(g) for g in everything]
        count = sum(gather_object([len(replayed)])) if self.settings.replay else 0
        share = self.settings.replay if count else 0.0
        # Gradients are averaged over the processes, which may hold different numbers of replayed groups.
        old = count / (share * self.accelerator.num_processes) if count else 1.0
        divisors = [len(groups) / (1 - share)] * len(groups) + [old] * len(replayed)
        logits: list[list[Tensor]] = [[] for _ in everything]
        total, slope = 0.0, 0.0
        of_new = torch.zeros((), device=self.accelerator.device)
        batches = self._micro_batches(everything, views, whole=self.settings.loss == "bradley_terry")
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last or is_sharded(self.network) else self.accelerator.no_sync(self.network):
                loss = torch.zeros((), device=self.accelerator.device)
                parts, slopes = self._logits(batch)
                for place, (piece, z) in enumerate(zip(batch, parts, strict=True)):
                    if piece.idle:
                        loss = loss + 0.0 * z.sum()
                        continue
                    shown = views[piece.group][piece.part.start : piece.part.stop]
                    if slopes is not None:
                        weights = torch.tensor([v.weight for v in shown], device=z.device)
                        of_slopes = (weights * slopes[place]).sum() / divisors[piece.group]
                        loss = loss + self.settings.gradient_penalty / 2 * of_slopes
                        slope += float(of_slopes.detach())
                    of_group = self._loss(z, everything[piece.group], shown)
                    loss = loss + of_group / divisors[piece.group]
                    of_new += of_group.detach() if piece.group < len(groups) else 0.0
                    logits[piece.group].append(z.detach())
                self.accelerator.backward(loss)
                total += float(loss.detach())
        self._refuse_not_finite(everything, logits, when)
        norm = self._take_step(when)
        scored = [
            [
                Scored(r.response.source, z, len(r.response.text))
                for r, z in zip(g.rollouts, self._of_members(torch.cat(parts), g, shown).tolist(), strict=True)
            ]
            for g, parts, shown in zip(everything, logits, views, strict=True)
        ]
        chance = sum(chance_loss(self.settings.loss, bool(g.students), bool(g.teachers)) for g in groups)
        sums = gather_object([(total, (float(of_new) - chance) / len(groups), slope)])
        loss_mean, over_chance, slope = (sum(values) / len(sums) for values in zip(*sums, strict=True))
        out = {"loss": loss_mean, "loss_minus_chance": over_chance, "grad_norm": norm}
        if self.settings.gradient_penalty:
            out["embedding_gradient"] = slope
        if count:
            old_ones = [s for part in scored[len(groups) :] for s in part if s.source == STUDENT]
            right = gather_object([s.logit >= 0 for s in old_ones])
            out |= {"replayed_groups": float(count), "replayed_accuracy": sum(right) / len(right)}
        return out | health(gather_object([s for part in scored[: len(groups)] for s in part]))

    def _loss(self, z: Tensor, group: Group, shown: Sequence[_View]) -> Tensor:
        """Return what these views add to their group's loss; Bradley-Terry needs all views of the group."""
        students = self._sides(group, z.device)[[v.member for v in shown]]
        weights = torch.tensor([v.weight for v in shown], device=z.device)
        smoothing = self.settings.label_smoothing
        if self.settings.loss == "bce":  # the means of Eq. 1 over each side as weights, so that a group can be split
            return (weights * bce_terms(z, students, smoothing)).sum()
        pairs = torch.diag(weights[students]) if self.settings.match_length else None
        return bradley_terry_loss(z[students], z[~students], pairs, smoothing)

    def _averages(self) -> dict[nn.Parameter, Tensor]:
        """Return the averaged weights of the parameters that were updated before; the others are their own average."""
        if not self.ema_decay or self.optimizer is None:
            return {}
        states = {p: self.optimizer.state.get(p, {}) for p in self.trainable}
        return {p: state["average"] for p, state in states.items() if "average" in state}

    @torch.no_grad()
    def _take_step(self, when: str) -> float:
        """Take an optimizer step, move the averages to the new weights, and return the norm of the gradient."""
        known = self._averages()
        before = {p: p.detach().clone() for p in self.trainable if self.ema_decay and p not in known}
        norm = take_step(self.accelerator, self.optimizer, self.trainable, self.max_grad_norm, f"discriminator, {when}")
        for p, value in before.items():
            if state := self.optimizer.state.get(p):  # it had a gradient
                wide = torch.promote_types(value.dtype, torch.float32)  # bfloat16 would lose most of an update
                state["average"] = value.to(wide)
        with self.states():
            for p, average in self._averages().items():
                average.mul_(self.ema_decay).add_(p.to(average), alpha=1 - self.ema_decay)
        return norm

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Hold the averaged weights in the network inside."""
        averages = self._averages()
        live = {p: p.detach().clone() for p in averages}
        if averages:
            with self.states():
                for p, average in averages.items():
                    p.copy_(average)
        try:
            yield
        finally:
            for p, value in live.items():
                p.copy_(value)

    def measure(self, groups: Sequence[Group]) -> dict[str, float]:
        """Return the health on the groups of all processes, which must be scored already, without an update."""
        return health(gather_object(self.scored(groups)))

    def scored(self, groups: Sequence[Group]) -> list[Scored]:
        """Return what health is computed from, for groups that are scored already."""
        out = []
        for rollout in (r for g in groups for r in g.rollouts):
            assert rollout.student_prob is not None
            p = torch.tensor(rollout.student_prob, dtype=torch.float64)
            z = float(torch.special.logit(p, eps=1e-12))
            out.append(Scored(rollout.response.source, z, len(rollout.response.text)))
        return out

    def _sides(self, group: Group, device: torch.device) -> Tensor:
        """Return bool [members]: whether the student wrote the response."""
        return torch.tensor([r.response.from_student for r in group.rollouts], device=device)

    def _refuse_not_finite(self, groups: Sequence[Group], logits: Sequence[Sequence[Tensor]], when: str) -> None:
        """Raise StateError in all processes if a logit of any of them is NaN or infinite, and drop the gradients.

        The similarity reward only compares student_prob with 0.5, so such a logit would earn or cost it by accident.
        """
        bad = [
            f"{float(z[~z.isfinite()][0])} for question {group.question.id!r}"
            for group, parts in zip(groups, logits, strict=True)
            if not (z := torch.cat(list(parts))).isfinite().all()
        ]
        if found := gather_object(bad):
            if self.optimizer is not None:
                self.optimizer.zero_grad(set_to_none=True)
            raise StateError(
                f"discriminator, {when}: expected finite logits, got {found[0]}. Nothing of this step is"
                " saved. Lower the discriminator's learning rate or set train.precision to float32, then run the same"
                " command: it continues from the last checkpoint."
            )

    def _of_members(self, logits: Tensor, group: Group, shown: Sequence[_View]) -> Tensor:
        """Return the logits of the group's members from those of its views, with a zero that separates the sides."""
        if self.settings.match_length:  # the logit of a member is the mean over its views
            member = torch.tensor([v.member for v in shown], device=logits.device)
            weights = torch.tensor([v.weight for v in shown], device=logits.device)
            sums = logits.new_zeros(2, len(group.rollouts))
            sums.index_add_(1, member, torch.stack([weights * logits, weights.to(logits)]))
            logits = sums[0] / sums[1]
        return logits if self.settings.loss == "bce" else centered(logits, self._sides(group, logits.device))

    def _views(self, group: Group) -> list[_View]:
        """Return what the network reads of a group.

        These are the whole responses or, with ``match_length``, both beginnings of every pair: the students' in the
        order of the pairs, then the teachers'. Without responses of one side there are no pairs, and the others are
        shown without their ends.
        """
        texts = [r.response.text for r in group.rollouts]
        students = [i for i, r in enumerate(group.rollouts) if r.response.from_student]
        teachers = [i for i, r in enumerate(group.rollouts) if not r.response.from_student]
        _, after = self.prompts.head(group.question)
        if not self.settings.match_length:
            return [
                _View(i, self.prompts.tail(texts[i], after), 1 / len(students if i in students else teachers))
                for i in range(len(texts))
            ]
        lengths, limit = [self.prompts.length(text) for text in texts], self.settings.max_response_tokens
        if not (students and teachers):
            shown = [shown_tokens(n, n, limit) for n in lengths]
            return [_View(i, self.prompts.tail(texts[i], after, shown[i]), 1 / len(texts)) for i in range(len(texts))]
        pairs = matched_pairs([lengths[i] for i in students], [lengths[i] for i in teachers], limit)
        sides = [[(students[p.student], p) for p in pairs], [(teachers[p.teacher], p) for p in pairs]]
        return [_View(i, self.prompts.tail(texts[i], after, p.tokens), p.weight) for side in sides for i, p in side]

    def _pieces(self, groups: Sequence[Group], views: Sequence[Sequence[_View]], *, whole: bool) -> list[_Piece]:
        """Return the groups, or consecutive parts of those that do not fit a micro-batch unless ``whole`` is set."""
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
        # Every pass of a sharded network gathers its weights, so all processes must run equally many.
        missing = max(gather_object([len(batches)])) - len(batches) if is_sharded(self.network) else 0
        idle = replace(min(pieces, key=lambda p: p.tokens), idle=True)
        return [[idle]] * missing + [[pieces[i] for i in batch] for batch in batches]

    def _logits(self, batch: list[_Piece]) -> tuple[list[Tensor], list[Tensor] | None]:
        """Return the logits of student_prob, one float32 vector for each piece.

        With a gradient penalty, a pass that learns also returns the squared norms of their gradients by the embeddings.
        """
        groups = _joined([p.members for p in batch]) if self.packing.on else [p.members for p in batch]
        logits, slopes = self._run(self._with_images(groups), packed=bool(self.packing.on))
        sizes = [len(p.part) for p in batch]
        of_slopes = None if slopes is None else list(slopes[: sum(sizes)].split(sizes))
        return list(logits[: sum(sizes)].split(sizes)), of_slopes

    def _with_images(self, groups: Sequence[GroupTokens]) -> Sequence[GroupTokens]:
        """Return the groups and, if they have no image but those of another process may, the dummy image after them."""
        if self._dummy is None or has_images([g.prompt for g in groups]):
            return groups
        return [*groups, GroupTokens(self._dummy, [torch.tensor([self.encoder.eos_token_ids[0]])])]

    def _run(self, groups: Sequence[GroupTokens], *, packed: bool) -> tuple[Tensor, Tensor | None]:
        pad = self.encoder.pad_token_id
        rows = pack(groups, pad, whole=True) if packed else pad_rows(groups, pad)
        rows = rows.to(self.accelerator.device)
        with self.accelerator.autocast():
            if self.settings.gradient_penalty and torch.is_grad_enabled():
                return logits_and_slopes(self.network, self.accelerator.unwrap_model(self.network).backbone, rows)
            return self.network(rows), None

    def _try_packing(self, groups: Sequence[Group]) -> None:
        """Find out on one group whether packed rows give this network's own logits, on all processes alike."""
        unwrapped: DiscriminatorModel = self.accelerator.unwrap_model(self.network)
        group = next((g for g in groups if g.question.images), groups[0])
        head, after = self.prompts.head(group.question)
        tails = [self.prompts.tail(r.response.text, after) for r in group.rollouts[:3]]
        trial = self._with_images([trial_group(GroupTokens(head, tails))])

        def compare() -> float:
            unwrapped.enable_packing(self.store or FeatureCache(0))
            pad, device, forward = self.encoder.pad_token_id, self.accelerator.device, own_forward(unwrapped)
            packed = forward(pack(trial, pad, whole=True).to(device))
            plain = forward(pad_rows(trial, pad).to(device))
            return float((packed - plain).abs().mean() / plain.abs().mean().clamp(min=1))

        self.packing.run(unwrapped.backbone, compare, images=has_images([g.prompt for g in trial]))
        reshard(self.network)


@dataclass
class _View:
    """A member of a group as the network reads it: the ids after the prompt's head, and its weight within its side."""

    member: int
    tokens: Tensor
    weight: float


@dataclass
class _Piece:
    """The views ``part`` of group number ``group`` as tokens, and the number of tokens."""

    group: int
    part: range
    members: GroupTokens
    tokens: int
    idle: bool = False
    """Run only because another process has more passes."""


def _joined(groups: Sequence[GroupTokens]) -> list[GroupTokens]:
    """Join neighbors that have the same prompt object into one group."""
    out: list[GroupTokens] = []
    for group in groups:
        if out and out[-1].prompt is group.prompt:
            out[-1] = GroupTokens(group.prompt, [*out[-1].completions, *group.completions])
        else:
            out.append(group)
    return out
