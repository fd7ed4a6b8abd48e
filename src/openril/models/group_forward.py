"""Log-probabilities of a group's responses: one call of the wrapped module per micro-batch of whole groups.

Shapes: R responses (rows) of the micro-batch, L tokens of the longest row, T tokens of the longest response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openril.models.prompts import Prompt


@dataclass
class GroupTokens:
    """A group as tokens: its prompt once, and int64 [T_i] ids of each of its responses."""

    prompt: Prompt
    completions: list[Tensor]


@dataclass
class Rows:
    """A micro-batch of groups laid out for the model. Group order and response order are kept.

    model_inputs: what the transformers model is called with. targets: int64 [R, T], padded. mask: bool [R, T].
    index: int64 [R, T], where in the kept logits the prediction of each target is. keep: int64 [K], the positions of
    the row at which logits are computed at all.
    """

    model_inputs: dict[str, Tensor]
    targets: Tensor
    mask: Tensor
    index: Tensor
    keep: Tensor

    def to(self, device: torch.device) -> Rows:
        move = {k: v.to(device) for k, v in self.model_inputs.items()}
        return Rows(move, *(x.to(device) for x in (self.targets, self.mask, self.index, self.keep)))


def lay_out(groups: Sequence[GroupTokens], pad_token_id: int) -> Rows:
    """Rows ``prompt + response`` for every response, padded on the right (causal attention never sees the padding)."""
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
        index[r, :n] = torch.arange(p - 1, p - 1 + n) - keep[0]
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids if channels > 1 else position_ids[0],
        **repeat_vision([p for p, _ in pairs]),
    }
    if any(p.token_types is not None for p, _ in pairs):
        inputs[pairs[0][0].token_type_key] = token_types
    return Rows(inputs, targets, mask, index, keep)


def repeat_vision(prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Image tensors of the rows, one after the other."""
    keys = dict.fromkeys(key for p in prompts for key in p.vision)
    return {key: torch.cat([p.vision[key] for p in prompts if key in p.vision]) for key in keys}


class Policy(nn.Module):
    """The student (or the reference) as the loop sees it: groups in, log-probabilities out.

    This is the module that accelerate wraps, so that DDP, FSDP2 and ZeRO-3 see one forward per micro-batch.
    """

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.model = model
        # A sample drawn at temperature t comes from softmax(logits / t): that is the policy being improved.
        self.temperature = temperature if temperature > 0 else 1.0

    def forward(self, rows: Rows) -> Tensor:
        """float32 [R, T]: log-probability in nats of every response token; 0 where mask is False."""
        logits = self.model(**rows.model_inputs, logits_to_keep=rows.keep, use_cache=False).logits
        return token_logprobs(logits, rows, self.temperature)


def token_logprobs(logits: Tensor, rows: Rows, temperature: float) -> Tensor:
    """float32 [R, T] from logits [R, K, V].

    Row by row, and computed again in the backward pass: of float32 copies of the logits one row's is alive at a time.
    """

    def row_logprobs(row: Tensor, targets: Tensor, index: Tensor, mask: Tensor) -> Tensor:
        picked = row[index].float() / temperature
        logprobs = picked.gather(-1, targets[:, None])[:, 0] - picked.logsumexp(-1)
        return logprobs.masked_fill(~mask, 0.0)

    out: list[Tensor] = []
    for each in zip(logits, rows.targets, rows.index, rows.mask, strict=True):
        if logits.requires_grad and torch.is_grad_enabled():
            out.append(checkpoint(row_logprobs, *each, use_reentrant=False, preserve_rng_state=False))
        else:
            out.append(row_logprobs(*each))
    return torch.stack(out)
