"""Log-probabilities of a group's responses: one call of the wrapped module per micro-batch of whole groups.

Shapes: R responses (rows) of the micro-batch, L tokens of the longest row, T tokens of the longest response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
        inputs["mm_token_type_ids"] = token_types
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
    """float32 [R, T] from logits [R, K, V], row by row so that no second tensor of the logits' size is alive."""
    out: list[Tensor] = []
    for row, targets, index, mask in zip(logits, rows.targets, rows.index, rows.mask, strict=True):
        picked = row[index].float() / temperature
        logprobs = picked.gather(-1, targets[:, None])[:, 0] - picked.logsumexp(-1)
        out.append(logprobs.masked_fill(~mask, 0.0))
    return torch.stack(out)


def model_pad_token_id(model: Any, default: int) -> int:
    """The padding id the model's own configuration names, or ``default``."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    pad = getattr(text, "pad_token_id", None)
    return int(pad) if isinstance(pad, int) and pad >= 0 else default
