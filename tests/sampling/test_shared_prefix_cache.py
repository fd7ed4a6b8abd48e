"""Attention over shared prompts and own tokens against one softmax over all of a row's keys."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from openril.models.group_attention import CannotPack
from openril.sampling.shared_prefix_cache import SharedPrefixCache

LAYER: Any = SimpleNamespace(layer_idx=0)
SCALE = 0.3


def states(heads: int, length: int, size: int, generator: torch.Generator) -> Tensor:
    """[1, heads, length, size] with the strides that models give: the tokens' dimension first in memory."""
    return torch.randn(1, length, heads, size, generator=generator).transpose(1, 2)


def full_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """query [H, D] over keys and values [K, T, D] -> [H, D]."""
    g = query.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(g, dim=0), values.repeat_interleave(g, dim=0)
    shares = (SCALE * (keys @ query[:, :, None])[..., 0]).softmax(-1)
    return (shares[:, None] @ values)[:, 0]


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (6, 1)])
@pytest.mark.parametrize("lengths", [[5], [5, 6], [3, 4, 20, 21, 60]])
def test_a_row_attends_to_its_prompt_and_itself(lengths: list[int], heads: int, kv_heads: int):
    """Rows leave at different times, questions empty one by one, and own tokens outgrow the first buffers."""
    generator = torch.Generator().manual_seed(0)
    count, limit, size = 3, 40, 8
    cache = SharedPrefixCache(lengths, count, limit)
    total = sum(lengths)
    q, k, v = (states(n, total, size, generator) for n in (heads, kv_heads, kv_heads))
    read = cache.read(lengths).attend(LAYER, q, k, v, SCALE)
    rows = []  # of every alive row: its keys and values so far
    at = 0
    for length in lengths:
        for i in range(at, at + length):
            expected = full_attention(q[0, :, i], k[0, :, at : i + 1], v[0, :, at : i + 1])
            assert torch.allclose(read[0, i], expected, atol=1e-5)
        rows += [(k[0, :, at : at + length], v[0, :, at : at + length])] * count
        at += length
    for step in range(limit - 1):
        if step % 4 == 3 and len(rows) > 1:
            # Now the last row, now the first, now one in the middle goes.
            gone = (len(rows) - 1, 0, len(rows) // 2)[step // 4 % 3]
            kept = [i for i in range(len(rows)) if i != gone]
            cache.keep(kept)
            rows = [rows[i] for i in kept]
        q, k, v = (states(n, len(rows), size, generator) for n in (heads, kv_heads, kv_heads))
        rows = [
            (torch.cat([keys, k[0, :, i : i + 1]], 1), torch.cat([values, v[0, :, i : i + 1]], 1))
            for i, (keys, values) in enumerate(rows)
        ]
        out = cache.decode().attend(LAYER, q, k, v, SCALE)
        assert out.shape == (1, len(rows), heads, size)
        for i, (keys, values) in enumerate(rows):
            assert torch.allclose(out[0, i], full_attention(q[0, :, i], keys, values), atol=1e-5)


def test_prompts_may_be_read_one_at_a_time():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (states(2, 9, 8, generator) for _ in range(3))
    whole, parts = SharedPrefixCache([4, 5], 2, 8), SharedPrefixCache([4, 5], 2, 8)
    whole.read([4, 5]).attend(LAYER, q, k, v, SCALE)
    for at, length in ((0, 4), (4, 5)):
        parts.read([length]).attend(LAYER, *(x[:, :, at : at + length] for x in (q, k, v)), SCALE)
    q, k, v = (states(2, 4, 8, generator) for _ in range(3))
    assert torch.equal(*(c.decode().attend(LAYER, q, k, v, SCALE) for c in (whole, parts)))


def test_16_bit_scores_are_not_rounded():
    """Scores near 100 that differ by 0.1: bfloat16 would call them equal, and share out half and half."""
    cache = SharedPrefixCache([2], 1, 4)
    dtype = torch.bfloat16
    # 64 * 1.5625 = 100; the first key's last entry adds 0.1015625.
    key = torch.ones(1, 1, 2, 65, dtype=dtype)
    key[..., -1] = 0
    key[0, 0, 0, -1] = 0.1015625
    query = torch.full((1, 1, 2, 65), 1.5625, dtype=dtype)
    query[..., -1] = 1
    value = torch.tensor([1.0, 0.0], dtype=dtype).view(1, 1, 2, 1).expand(1, 1, 2, 65)
    cache.read([2]).attend(LAYER, query, key, value, 1.0)
    far = torch.zeros(1, 1, 1, 65, dtype=dtype)
    out = cache.decode().attend(LAYER, query[:, :, :1], far, far, 1.0)
    assert float(out[0, 0, 0, 0]) == pytest.approx(float(torch.tensor(0.1015625).sigmoid()), abs=2e-3)


def test_a_layer_must_know_its_number():
    x = torch.zeros(1, 1, 1, 8)
    with pytest.raises(CannotPack, match="layer_idx"):
        SharedPrefixCache([1], 1, 1).read([1]).attend(torch.nn.Linear(1, 1), x, x, x, SCALE)


def test_values_of_another_size_are_refused():
    x = torch.zeros(1, 1, 1, 8)
    with pytest.raises(CannotPack, match="different sizes"):
        SharedPrefixCache([1], 1, 1).read([1]).attend(LAYER, x, x, torch.zeros(1, 1, 1, 4), SCALE)
