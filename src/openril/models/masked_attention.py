"""Attention over a row of groups as one call over a mask: what devices other than CPUs run.

Shapes: L tokens of the row, H query heads, K key-value heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from openril.errors import ModelError

# Tokens on each side of FlexAttention's blocks.
_BLOCK = 128


@dataclass
class TokenOwners:
    """The group and the response of every token of a row. All layers of a pass share the masks."""

    groups: Sequence[tuple[int, Sequence[int]]]
    """(Prompt length, lengths of its responses) in the order of the row."""
    group: Tensor
    """int32 [L]: number of the token's group."""
    response: Tensor
    """int32 [L]: number of the token's response within the row; -1 for a prompt."""

    @classmethod
    def of(cls, groups: Sequence[tuple[int, Sequence[int]]]) -> TokenOwners:
        counter = count()
        parts = [[(-1, prompt), *((next(counter), n) for n in lengths)] for prompt, lengths in groups]
        group_ids = [number for number, group in enumerate(parts) for _, n in group for _ in range(n)]
        response_ids = [response for group in parts for response, n in group for _ in range(n)]
        return cls(groups, torch.tensor(group_ids, dtype=torch.int32), torch.tensor(response_ids, dtype=torch.int32))

    def to(self, device: torch.device) -> TokenOwners:
        return replace(self, group=self.group.to(device), response=self.response.to(device))

    def visible(self, q: Tensor, k: Tensor) -> Tensor:
        """Return whether the token at position ``q`` of the row attends to the one at ``k`` (int64, of one shape)."""
        group, response = self.group, self.response
        return (group[q] == group[k]) & (k <= q) & ((response[k] < 0) | (response[k] == response[q]))

    @cached_property
    def dense_mask(self) -> Tensor:
        """bool [L, L]."""
        positions = torch.arange(len(self.group), device=self.group.device)
        return self.visible(positions[:, None], positions[None])

    @cached_property
    def block_mask(self) -> Any:
        """FlexAttention's mask."""
        from torch.nn.attention.flex_attention import BlockMask

        some, whole = self.blocks()
        device, length = self.group.device, len(self.group)
        lists = [
            (mask.sum(-1), mask.int().argsort(dim=-1, descending=True, stable=True)) for mask in (some & ~whole, whole)
        ]
        partial, full = ([x[None, None].to(device, torch.int32) for x in parts] for parts in lists)
        return BlockMask.from_kv_blocks(
            partial[0],
            partial[1],
            full[0],
            full[1],
            BLOCK_SIZE=_BLOCK,
            mask_mod=lambda b, h, q, k: self.visible(q, k),
            seq_lengths=(length, length),
        )

    def blocks(self) -> tuple[Tensor, Tensor]:
        """Return two masks over pairs of blocks, bool [N, N]: some tokens attend to each other, and all do.

        They follow from the lengths of the groups, so that the mask over pairs of tokens, L x L values, is never made.
        """
        number = -(-len(self.group) // _BLOCK)
        causal = torch.ones(number, number, dtype=torch.bool).tril()
        some, whole = torch.zeros_like(causal), torch.zeros_like(causal)

        def mark(queries: range, keys: range) -> None:
            """Let the queries attend to the keys that are not after them."""
            touched = tuple(slice(r.start // _BLOCK, -(-r.stop // _BLOCK)) for r in (queries, keys))
            some[touched] |= causal[touched]
            covered = tuple(slice(-(-r.start // _BLOCK), r.stop // _BLOCK) for r in (queries, keys))
            whole[covered] |= causal[covered]

        at = 0
        for prompt, lengths in self.groups:
            mark(range(at, at + prompt + sum(lengths)), range(at, at + prompt))
            at += prompt
            for n in lengths:
                mark(range(at, at + n), range(at, at + n))
                at += n
        return some, whole.tril(-1)  # on the diagonal, a block's first token does not attend to its second


_compiled: dict[str, Any] = {}


def flex(owners: TokenOwners, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """FlexAttention, which skips blocks in which nothing is visible. Compiled on CUDA devices."""
    from torch.nn.attention.flex_attention import flex_attention

    if query.is_cuda and "flex" not in _compiled:
        _compiled["flex"] = torch.compile(flex_attention, dynamic=True)
    grouped = query.shape[1] != key.shape[1]
    options: dict[str, Any] = {"block_mask": owners.block_mask, "scale": scale, "enable_gqa": grouped}
    if query.is_cuda:
        return call_compiled(_compiled["flex"], query, key, value, **options).transpose(1, 2)
    out: Any = flex_attention(query, key, value, **options)
    return out.transpose(1, 2)


def call_compiled(compiled: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a compiled function; raise ModelError where torch would run it uncompiled after too many compilations.

    Uncompiled FlexAttention computes all L x L scores, which is slow and fills the memory without a message.
    """
    from torch._dynamo import config, exc

    try:
        with config.patch(fail_on_recompile_limit_hit=True):
            return compiled(*args, **kwargs)
    except exc.FailOnRecompileLimitHit as e:
        raise ModelError(
            "FlexAttention was compiled more often than torch allows (torch._dynamo.config.recompile_limit:"
            f" {config.recompile_limit}). Set train.packed to false. {e}"
        ) from e


def dense(owners: TokenOwners, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """torch's fused attention over a dense mask, [L, L] values."""
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=owners.dense_mask, scale=scale)
    return out.transpose(1, 2)
