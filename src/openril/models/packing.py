"""Compute log-probabilities of responses with one call of the wrapped module per micro-batch of whole groups.

Two layouts give the same numbers. ``pack`` puts everything into one row, each prompt once and then its responses
(models/group_attention.py). ``pad_rows`` repeats the prompt for every response; it is the reference, and the fallback for
architectures on which ``pack`` is not exact.

Shapes: R responses of the micro-batch, L tokens of a row, T tokens of the longest response, N response tokens in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from openril.models.adapters import base_model
from openril.models.group_attention import CannotPack, GroupLayout, enable, no_mask
from openril.models.prompts import Prompt
from openril.models.vision_features import FeatureCache, VisionFeatures

# Bytes of float32 logits that exist at a time, forward and backward.
LOGITS_BYTES = 64 * 2**20


@dataclass
class GroupTokens:
    """A group as tokens: its prompt, and the ids of each response, int64 [T_i]."""

    prompt: Prompt
    completions: list[Tensor]

    def packed_length(self) -> int:
        """Return the group's tokens in a packed row."""
        return self.prompt.length + sum(len(c) for c in self.completions)

    def plain_length(self) -> int:
        """Return the group's tokens in plain rows, without padding."""
        return sum(self.prompt.length + len(c) for c in self.completions)


@dataclass
class Batch:
    """A micro-batch of groups laid out for the model, in the order of groups and responses."""

    model_inputs: dict[str, Any]
    """Arguments of the transformers model."""
    targets: Tensor
    """int64 [R, T]: ids of the responses, padded."""
    mask: Tensor
    """bool [R, T]: which targets are not padding."""
    index: Tensor
    """int64 [R, T]: where each target's prediction is in the kept states of all rows, one row after the other."""
    keep: Tensor
    """int64 [K]: positions whose states are kept, the same in every row."""
    last: Tensor
    """int64 [R]: where each response's last token is in all rows, one after the other; -1 if it is not an input."""
    layout: GroupLayout | None = None
    """Set for a packed row."""
    prompts: tuple[Prompt, ...] = ()
    """Prompts of a packed row, for their images."""

    def to(self, device: torch.device) -> Batch:
        names = ("targets", "mask", "index", "keep", "last")
        return replace(
            self,
            model_inputs={k: v.to(device) for k, v in self.model_inputs.items()},
            layout=self.layout.to(device) if self.layout is not None else None,
            **{name: getattr(self, name).to(device) for name in names},
        )


def pack(groups: Sequence[GroupTokens], pad_token_id: int, *, whole: bool = False) -> Batch:
    """Lay groups out as one row ``[prompt][response 1][response 2]...``, group after group, without padding.

    Args:
        whole: Keep the last token of every response, which predicts nothing, but whose state the discriminator reads.
    """
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    layout: list[tuple[int, list[int]]] = []
    most = max(len(c) for g in groups for c in g.completions)
    count = sum(len(g.completions) for g in groups)
    targets = torch.full((count, most), pad_token_id)
    mask = torch.zeros(count, most, dtype=torch.bool)
    index = torch.zeros(count, most, dtype=torch.long)
    last = torch.full((count,), -1)
    at = r = 0
    for group in groups:
        prompt = group.prompt
        ids.append(prompt.input_ids)
        positions.append(prompt.position_ids)
        lengths = []
        behind_prompt = at + prompt.length - 1
        at += prompt.length
        for completion in group.completions:
            n = len(completion)
            inputs = n if whole else n - 1
            targets[r, :n], mask[r, :n] = completion, True
            index[r, 0] = behind_prompt
            index[r, 1:n] = torch.arange(at, at + n - 1)
            if inputs:
                ids.append(completion[:inputs])
                start = prompt.next_position
                positions.append(torch.arange(start, start + inputs).expand(len(prompt.position_ids), -1))
                lengths.append(inputs)
            at += inputs
            if whole:
                last[r] = at - 1
            r += 1
        layout.append((prompt.length, lengths))
    position_ids = torch.cat(positions, dim=1)[:, None]
    inputs_of_row = {
        "input_ids": torch.cat(ids)[None],
        "position_ids": position_ids if len(position_ids) > 1 else position_ids[0],
    }
    prompts = tuple(g.prompt for g in groups)
    read = last if whole else index[mask].unique()
    return Batch(inputs_of_row, targets, mask, index, torch.arange(at), last, GroupLayout.of(layout, read), prompts)


def pad_rows(groups: Sequence[GroupTokens], pad_token_id: int) -> Batch:
    """Lay groups out as one row ``prompt + response`` for every response, padded on the right."""
    pairs = [(g.prompt, c) for g in groups for c in g.completions]
    rows = len(pairs)
    longest = max(p.length + len(c) for p, c in pairs)
    most = max(len(c) for _, c in pairs)
    keep = torch.arange(min(p.length for p, _ in pairs) - 1, longest - 1)
    channels = pairs[0][0].position_ids.shape[0]
    input_ids = torch.full((rows, longest), pad_token_id)
    attention_mask = torch.zeros(rows, longest, dtype=torch.long)
    position_ids = torch.zeros(channels, rows, longest, dtype=torch.long)
    token_types = torch.zeros(rows, longest, dtype=torch.long)
    targets = torch.full((rows, most), pad_token_id)
    mask = torch.zeros(rows, most, dtype=torch.bool)
    index = torch.zeros(rows, most, dtype=torch.long)
    last = torch.zeros(rows, dtype=torch.long)
    for r, (prompt, ids) in enumerate(pairs):
        p, n = prompt.length, len(ids)
        input_ids[r, :p] = prompt.input_ids
        input_ids[r, p : p + n] = ids
        attention_mask[r, : p + n] = 1
        position_ids[:, r, :p] = prompt.position_ids
        position_ids[:, r, p : p + n] = torch.arange(prompt.next_position, prompt.next_position + n)
        if prompt.token_types is not None:
            token_types[r, :p] = prompt.token_types
        targets[r, :n] = ids
        mask[r, :n] = True
        index[r, :n] = torch.arange(p - 1, p - 1 + n) - keep[0] + r * len(keep)
        last[r] = r * longest + p + n - 1
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids if channels > 1 else position_ids[0],
        **collate_vision_inputs([p for p, _ in pairs]),
    }
    if key := next((p.token_type_key for p, _ in pairs if p.token_types is not None), None):
        inputs[key] = token_types
    return Batch(inputs, targets, mask, index, keep, last)


def collate_vision_inputs(prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Return what the model's processor would return for the images of all prompts in order; {} without images.

    Tensors are concatenated along dim 0. Other dimensions of different size are padded with zeros at the end, as the
    processors do: LLaVA-OneVision's tiles are [image, tile, 3, H, W], and its model cuts the padding off by image size;
    SmolVLM's and Idefics3's are [prompt, tile, 3, H, W], and their models drop tiles that are all zero.
    """
    keys = dict.fromkeys(key for p in prompts for key in p.vision)
    return {key: _concatenate([p.vision[key] for p in prompts if key in p.vision]) for key in keys}


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    common = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
    padded = []
    for t in tensors:
        # pad() takes the last dimension first
        missing = [n for most, size in zip(common[::-1], t.shape[:0:-1], strict=True) for n in (0, most - size)]
        padded.append(nn.functional.pad(t, missing) if any(missing) else t)
    return torch.cat(padded)


def run_packed(model: Any, rows: Batch, vision: VisionFeatures) -> Tensor:
    """Return the last hidden states [1, L, D] of a packed row. The model is one without LM head."""
    inputs = dict(rows.model_inputs)
    inputs["attention_mask"] = no_mask(inputs["input_ids"].device)
    features = vision(rows.prompts)
    if features is not None:
        inputs["mm_encoder_outputs"] = features
    return model(**inputs, use_cache=False, group_layout=rows.layout).last_hidden_state


class Policy(nn.Module):
    """Map groups to log-probabilities under the student or the reference.

    accelerate wraps this module, so that its wrappers see one forward pass per micro-batch.
    """

    def __init__(self, model: nn.Module, temperature: float = 1.0, vision: VisionFeatures | None = None) -> None:
        super().__init__()
        self.model = model
        # A sample at temperature t comes from softmax(logits / t), which is the policy that the loop improves.
        self.temperature = temperature if temperature > 0 else 1.0
        self.vision = vision if vision is not None else VisionFeatures(base_model(model), FeatureCache(0))

    def enable_packing(self) -> None:
        """Let the model take packed rows, or raise CannotPack."""
        if not self.vision.available:
            raise CannotPack("it takes no ready image features")
        enable(base_model(self.model))

    def forward(self, rows: Batch, with_entropy: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return the log-probability of every response token in nats, float32 [R, T]; 0 where the mask is False.

        Args:
            with_entropy: Return the entropy of the distribution that each token was predicted with too, float32 [R, T],
                in nats and without gradient.
        """
        states, head = self.states(rows)
        index, targets = rows.index[rows.mask], rows.targets[rows.mask]
        found = token_logprobs(states, index, targets, head, self.temperature, with_entropy=with_entropy)
        empty = torch.zeros_like(rows.mask, dtype=torch.float32)
        if isinstance(found, tuple):
            return empty.masked_scatter(rows.mask, found[0]), empty.masked_scatter(rows.mask, found[1])
        return empty.masked_scatter(rows.mask, found)

    def states(self, rows: Batch) -> tuple[Tensor, nn.Module | None]:
        """Return the states [K, D] that ``rows.index`` counts, and the head that maps them to logits.

        Without a head the states are the logits.
        """
        if rows.layout is None:
            logits = self.model(**rows.model_inputs, logits_to_keep=rows.keep, use_cache=False).logits
            return logits.flatten(0, 1), None
        model = base_model(self.model)
        return run_packed(model.model, rows, self.vision).flatten(0, 1), model.get_output_embeddings()


def token_logprobs(
    states: Tensor,
    index: Tensor,
    targets: Tensor,
    head: nn.Module | None,
    temperature: float,
    *,
    with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return log-probabilities, float32 [N], of targets, int64 [N], predicted by the states [K, D] at index, int64 [N].

    At most LOGITS_BYTES of float32 logits exist at a time. If that takes several parts, the backward pass computes each
    again.

    Args:
        head: Maps states to logits [V]; None if the states are logits.
        with_entropy: Return the entropies in nats too, float32 [N], from the same logits and without gradient.
    """

    weight: Any = getattr(head, "weight", None)
    device, product = states.device.type, head
    if type(head) is nn.Linear and head.bias is None and weight.requires_grad and torch.is_autocast_enabled(device):
        # Autocast would cast the matrix again for each part, because the backward pass enters it again each time.
        cast = weight.detach().to(torch.get_autocast_dtype(device))

        def product(picked: Tensor) -> Tensor:
            return _ProductWithCast.apply(picked.to(cast.dtype), weight, cast)

    def part(index: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        picked = states[index]
        logits = (product(picked) if product is not None else picked).float() / temperature
        total = logits.logsumexp(-1)
        found = logits.gather(-1, targets[:, None])[:, 0] - total
        return (found, _entropy(logits.detach(), total.detach())) if with_entropy else (found,)

    vocabulary = states.shape[-1] if head is None else weight.shape[0] if weight is not None else 2**18
    size = max(1, LOGITS_BYTES // (4 * vocabulary))
    pieces = list(zip(index.split(size), targets.split(size), strict=True))
    again = len(pieces) > 1 and torch.is_grad_enabled() and states.requires_grad
    if again:
        parts = [checkpoint(part, *p, use_reentrant=False, preserve_rng_state=False) for p in pieces]
    else:
        parts = [part(*p) for p in pieces]
    logprobs, *entropies = (torch.cat(values) for values in zip(*parts, strict=True))
    return (logprobs, entropies[0]) if entropies else logprobs


def _entropy(logits: Tensor, total: Tensor) -> Tensor:
    """Return the entropy [N] in nats of softmax(logits [N, V]), of which total [N] is the logsumexp."""
    p = (logits - total[:, None]).exp_()
    return total - torch.bmm(p[:, None], logits[:, :, None])[:, 0, 0]


class _ProductWithCast(torch.autograd.Function):
    """states @ weight.T with a cast of the weight that is made once. The gradient reaches the weight in its own type."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, cast: Tensor) -> Tensor:
        ctx.save_for_backward(states, cast)
        ctx.dtype = weight.dtype
        return nn.functional.linear(states, cast)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        states, cast = ctx.saved_tensors
        return gradient @ cast, (states.T @ gradient).T.to(ctx.dtype), None  # in autograd's order


def own_forward(module: nn.Module) -> Callable[[Batch], Tensor]:
    """Return the module's forward pass without accelerate's, which would turn autocast on again."""
    # A sharded module is not prepared by accelerate, and its hooks gather the weights.
    return module if isinstance(module, FSDPModule) else partial(type(module).forward, module)


@torch.no_grad()
def packing_difference(policy: Policy, groups: Sequence[GroupTokens], pad_token_id: int, device: torch.device) -> float:
    """Return the mean difference between the packed and the plain pass, in nats a token."""
    forward, plain_rows = own_forward(policy), pad_rows(groups, pad_token_id).to(device)
    packed, plain = forward(pack(groups, pad_token_id).to(device)), forward(plain_rows)
    return float((packed - plain).abs().sum() / plain_rows.mask.sum())


def batch_by_tokens(lengths: Sequence[int], budget: int) -> list[range]:
    """Split into consecutive batches whose lengths sum to at most ``budget``, or that hold a single longer item."""
    batches: list[range] = []
    filled = 0
    for i, length in enumerate(lengths):
        if not batches or filled + length > budget:
            batches.append(range(i, i))
            filled = 0
        batches[-1] = range(batches[-1].start, i + 1)
        filled += length
    return batches


def split_to(batches: list[range], count: int) -> list[range]:
    """Halve the longest batch until there are ``count``, because all processes must run equally many passes."""
    batches = list(batches)
    while len(batches) < count:
        i = max(range(len(batches)), key=lambda n: len(batches[n]))
        whole = batches[i]
        assert len(whole) > 1, "every process has as many groups as the others"
        middle = (whole.start + whole.stop) // 2
        batches[i : i + 1] = [range(whole.start, middle), range(middle, whole.stop)]
    return batches
