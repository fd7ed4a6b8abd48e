"""Keep the keys and values of sampling: each prompt's once, each row's own tokens, and attention over both.

The object is a ``group_layout`` of models/group_attention.py. In prefill the model reads one row ``[1, L]`` of prompts.
Each attends causally to itself, and its keys and values are kept here. In decoding the model reads one row ``[1, N]``, the
newest token of every running row, question after question. Each attends to its question's prompt, in one matrix product
for all rows of the question, and to its own tokens. One softmax in float32 runs over both, so the result is exact.

Shapes: N running rows, B questions of a bucket, n rows of its fullest question, P tokens of its longest prompt, t own tokens
of every row; H query heads, K key-value heads, g = H / K, D size of a head.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from openril.models.group_attention import CannotPack

# Prompts whose lengths differ by less than this factor are padded to one length and attend in one call.
_UNLIKE = 1.3
# Own tokens in the first buffers, which grow by doubling.
_FIRST_CAPACITY = 32
# Whether a batched product of 16-bit numbers can return float32 on a GPU.
_WIDE_BMM = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 8)


class SharedPrefixCache:
    """Keys and values for prompts of these lengths, num_generations rows of each, and at most limit own tokens a row."""

    def __init__(self, lengths: Sequence[int], num_generations: int, limit: int) -> None:
        self.lengths = list(lengths)
        self.layers: set[int] = set()  # those whose keys and values are kept
        self._limit = limit
        self._buckets = [_Bucket(self.lengths[r.start : r.stop], num_generations) for r in _alike(self.lengths)]
        self._reading: list[int] | None = None
        self._read_so_far: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._own_tokens = 0

    def read(self, lengths: Sequence[int]) -> SharedPrefixCache:
        """Return the ``group_layout`` of a prefill call over the next prompts, which have these lengths."""
        self._reading = list(lengths)
        return self

    def decode(self) -> SharedPrefixCache:
        """Return the ``group_layout`` of a call with one new token per row."""
        self._reading = None
        self._own_tokens += 1
        return self

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with only these of the running rows (ascending)."""
        at = 0
        for bucket in self._buckets:
            size = bucket.size
            kept = [r - at for r in rows if at <= r < at + size]
            if len(kept) < size:
                bucket.keep(kept)
            at += size
        self._buckets = [b for b in self._buckets if b.size]

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Map query [1, H, L, D], key and value [1, K, L, D] to [1, L, H, D]; see ``group_attention.Layout``."""
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise CannotPack(f"{type(module).__name__} has no layer_idx")
        if self._reading is not None:
            return self._read(layer, query, key, value, scale)
        states = [x[0].transpose(0, 1) for x in (query, key, value)]
        if len(self._buckets) == 1:
            q, k, v = states
            return self._buckets[0].attend(layer, q, k, v, scale, self._own_tokens, self._limit)[None]
        sizes = [b.size for b in self._buckets]
        parts = zip(*(x.split(sizes) for x in states), strict=True)
        outputs = [
            b.attend(layer, q, k, v, scale, self._own_tokens, self._limit)
            for b, (q, k, v) in zip(self._buckets, parts, strict=True)
        ]
        return torch.cat(outputs)[None]

    def _read(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        assert self._reading is not None
        if sum(self._reading) != query.shape[2]:
            raise CannotPack("its language part reads other tokens than the prompt's")
        if key.shape[-1] != value.shape[-1]:
            raise CannotPack("its keys and values have heads of different sizes")
        self.layers.add(layer)
        prompts = self._read_so_far.setdefault(layer, [])
        outputs = []
        parts = (x.split(self._reading, dim=2) for x in (query, key, value))
        for q, k, v in zip(*parts, strict=True):
            out = nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            outputs.append(out.transpose(1, 2))
            prompts.append((k[0], v[0]))
        if len(prompts) == len(self.lengths):
            del self._read_so_far[layer]
            at = 0
            for bucket in self._buckets:
                bucket.take(layer, prompts[at : at + len(bucket.lengths)])
                at += len(bucket.lengths)
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]


def _alike(lengths: Sequence[int]) -> list[range]:
    """Split into consecutive prompts of about the same length."""
    runs: list[range] = []
    for i, length in enumerate(lengths):
        run = [length, *(lengths[j] for j in runs[-1])] if runs else []
        if not run or max(run) > _UNLIKE * min(run):
            runs.append(range(i, i))
        runs[-1] = range(runs[-1].start, i + 1)
    return runs


@dataclass
class _Layer:
    """One layer's keys and values. own_keys [N * K, D, capacity] and own_values [N * K, capacity, D] are views of own."""

    prompt_keys: Tensor
    """[B * K, D, P]."""
    prompt_values: Tensor
    """[B * K, P, D]."""
    own: Tensor
    """[2, N, K, capacity, D]: keys and values of the rows' own tokens."""

    def __post_init__(self) -> None:
        self.hold(self.own)

    def hold(self, own: Tensor) -> None:
        self.own = own
        self.own_keys = own[0].flatten(0, 1).transpose(1, 2)
        self.own_values = own[1].flatten(0, 1)

    def append(self, key: Tensor, value: Tensor, own_tokens: int, limit: int) -> None:
        """Write the newest keys and values, both [N, K, D]."""
        capacity = self.own.shape[3]
        if capacity < own_tokens:
            more = max(own_tokens, min(limit, max(_FIRST_CAPACITY, 2 * capacity)))
            grown = key.new_empty(2, *key.shape[:2], more, key.shape[2])
            grown[:, :, :, :capacity] = self.own
            self.hold(grown)
        newest = self.own.select(3, own_tokens - 1)
        newest[0].copy_(key)
        newest[1].copy_(value)


class _Bucket:
    """Questions whose prompts have about the same length, and their rows."""

    def __init__(self, lengths: list[int], num_generations: int) -> None:
        self.lengths = lengths
        self.counts = [num_generations] * len(lengths)  # running rows of each question
        self._layers: dict[int, _Layer] = {}
        self._padding: Tensor | None = None  # [B * K, 1, P]: -inf at the padding of shorter prompts
        # If questions have different numbers of rows: the row in each of B x n places, and each row's place.
        self._places: Tensor | None = None
        self._place_of_row: Tensor | None = None

    @property
    def size(self) -> int:
        return sum(self.counts)

    def take(self, layer: int, prompts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Keep the keys and values of a layer for every question, each [K, length, D]."""
        longest = max(self.lengths)
        like = prompts[0][0]
        heads, _, size = like.shape
        keys = like.new_zeros(len(prompts), heads, size, longest)
        values = like.new_zeros(len(prompts), heads, longest, size)
        for i, (k, v) in enumerate(prompts):
            keys[i, :, :, : k.shape[1]] = k.transpose(1, 2)
            values[i, :, : v.shape[1]] = v
        self._layers[layer] = _Layer(
            keys.flatten(0, 1), values.flatten(0, 1), like.new_empty(2, self.size, heads, 0, size)
        )
        if self._padding is None and min(self.lengths) < longest:
            lengths = torch.tensor(self.lengths, device=like.device)
            dtype = torch.promote_types(like.dtype, torch.float32)
            padding = torch.zeros(len(prompts), 1, longest, dtype=dtype, device=like.device)
            padding.masked_fill_(torch.arange(longest, device=like.device) >= lengths[:, None, None], float("-inf"))
            self._padding = padding.repeat_interleave(heads, dim=0)

    def keep(self, rows: list[int]) -> None:
        """Continue with these rows. Prompts move only when the last row of a question ends."""
        if not rows:
            self.counts = []
            return
        ends = [bisect_left(rows, start) for start in (0, *accumulate(self.counts))]
        counts = [b - a for a, b in pairwise(ends)]
        device = next(iter(self._layers.values())).own.device
        index = torch.tensor(rows, device=device)
        for layer in self._layers.values():
            layer.hold(layer.own.index_select(1, index))
        if not all(counts):
            self._keep_questions([i for i, c in enumerate(counts) if c])
        self.counts = [c for c in counts if c]
        self._place(device)

    def _keep_questions(self, kept: list[int]) -> None:
        questions = len(self.lengths)
        self.lengths = [self.lengths[i] for i in kept]
        longest = max(self.lengths)

        def pick(states: Tensor) -> Tensor:
            index = torch.tensor(kept, device=states.device)
            return states.unflatten(0, (questions, -1)).index_select(0, index).flatten(0, 1)

        for layer in self._layers.values():
            layer.prompt_keys = pick(layer.prompt_keys[..., :longest])
            layer.prompt_values = pick(layer.prompt_values[:, :longest])
        if self._padding is not None:
            self._padding = pick(self._padding[..., :longest]) if min(self.lengths) < longest else None

    def _place(self, device: torch.device) -> None:
        n = max(self.counts)
        if min(self.counts) == n:
            self._places = self._place_of_row = None
            return
        starts = [0, *accumulate(self.counts)]
        places = [starts[q] + min(i, c - 1) for q, c in enumerate(self.counts) for i in range(n)]
        place_of_row = [q * n + i for q, c in enumerate(self.counts) for i in range(c)]
        self._places = torch.tensor(places, device=device)
        self._place_of_row = torch.tensor(place_of_row, device=device)

    def attend(
        self, number: int, query: Tensor, key: Tensor, value: Tensor, scale: float, own_tokens: int, limit: int
    ) -> Tensor:
        """Map one new token per row, query [N, H, D], key and value [N, K, D], to [N, H, D] in the layer ``number``."""
        layer = self._layers[number]
        layer.append(key, value, own_tokens, limit)
        questions, n = len(self.counts), max(self.counts)
        rows, heads, size = query.shape
        kv_heads = key.shape[1]
        g = heads // kv_heads
        longest = layer.prompt_values.shape[1]

        q = query.reshape(rows * kv_heads, g, size)
        own_scores = _scores(q, layer.own_keys.narrow(2, 0, own_tokens), scale)
        if self._places is not None:
            q = q.view(rows, -1).index_select(0, self._places)
            own_scores = own_scores.view(rows, -1).index_select(0, self._places)
        q = q.view(questions, n, kv_heads, g, size).transpose(1, 2).reshape(questions * kv_heads, n * g, size)
        prompt_scores = _scores(q, layer.prompt_keys, scale, self._padding)
        scores = torch.cat(
            [
                prompt_scores.view(questions, kv_heads, n, g, longest),
                own_scores.view(questions, n, kv_heads, g, own_tokens).transpose(1, 2),
            ],
            dim=-1,
        )
        to_prompt, to_own = scores.softmax(-1).split([longest, own_tokens], dim=-1)
        out = _bmm(to_prompt.reshape(questions * kv_heads, n * g, longest), layer.prompt_values)
        out = out.view(questions, kv_heads, n, g, size).transpose(1, 2).reshape(questions * n, heads, size)
        to_own = to_own.transpose(1, 2).reshape(questions * n, -1)
        if self._place_of_row is not None:
            out = out.index_select(0, self._place_of_row)
            to_own = to_own.index_select(0, self._place_of_row)
        to_own = to_own.reshape(rows * kv_heads, g, own_tokens)
        out = out + _bmm(to_own, layer.own_values.narrow(1, 0, own_tokens)).view(out.shape)
        return out.to(value.dtype)


def _scores(query: Tensor, keys: Tensor, scale: float, padding: Tensor | None = None) -> Tensor:
    """Return scale * query [X, A, D] @ keys [X, D, C] + padding [X, 1, C], in float32 (float64 stays)."""
    if query.dtype in (torch.float32, torch.float64):
        start = query.new_empty(1, 1, 1) if padding is None else padding
        return torch.baddbmm(start, query, keys, beta=0 if padding is None else 1, alpha=scale)
    scores = _bmm(query, keys) * scale
    return scores if padding is None else scores + padding


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """Multiply a and b, in float32 for 16-bit b, because rounded scores would change the weights by percents."""
    if b.dtype in (torch.float32, torch.float64):
        return torch.bmm(a, b)
    if b.is_cuda and _WIDE_BMM:
        return torch.bmm(a.to(b.dtype), b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())
