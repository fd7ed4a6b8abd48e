"""Attention over rows that hold whole groups: ``[prompt][response 1][response 2]...``, group after group, no padding.

A token of a prompt attends to the prompt up to itself. A token of a response attends to its prompt, and to its own
response up to itself. Nothing is computed between responses, so the result is exactly the causal attention of every
``prompt + response``.

``enable`` adds this to transformers' attention interface. A call without the keyword ``group_layout`` is answered as
before, and every implementation keeps its name, because the library reads the name back.

Shapes: L tokens of the row, H query heads, K key-value heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton

from openril.hf import AttentionInterface, AttentionMaskInterface
from openril.models.masked_attention import TokenOwners, dense, flex

# Prompts whose lengths differ by less than this factor are padded to one length and attend in one call.
_UNLIKE = 1.3


class CannotPack(ValueError):
    """The attention of a model's layer cannot be computed exactly on a packed row."""


class Layout(Protocol):
    """What the keyword ``group_layout`` passes to every attention layer."""

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Map query [1, H, L, D], key and value [1, K, L, D] to [1, L, H, D]."""
        ...


def enable(model: Any) -> None:
    """Let every attention layer of the model's language part take ``group_layout``. A second call changes nothing.

    Raises:
        CannotPack: The model's attention cannot be replaced.
    """
    decoder = model.get_decoder()
    implementations = AttentionInterface._global_mapping
    for config in {id(m.config): m.config for m in decoder.modules() if hasattr(m, "config")}.values():
        name = config._attn_implementation or "eager"
        if name not in implementations or name not in AttentionMaskInterface._global_mapping:
            raise CannotPack(f"its attention implementation is {name!r}, which does not take groups")
        if getattr(config, "attention_dropout", 0):
            raise CannotPack("it has attention dropout")
    inside = {id(m) for m in decoder.modules()}
    for module in model.modules():  # keywords may reach the vision tower too, which attends as before
        if id(module) not in inside:
            module.ignores_group_layout = True
    for name, implementation in list(implementations.items()):  # all, because a model's may be exchanged later
        if implementation is not _registered.get(name):
            _registered[name] = _dispatch(implementation)
            AttentionInterface.register(name, _registered[name])
    _run_last_mlp_where_read(decoder)


_registered: dict[str, Any] = {}


def _run_last_mlp_where_read(decoder: Any) -> None:
    """Let the last layer's MLP skip the positions that nothing reads: after it, no token attends to another.

    The layer's attention gets the layout and runs just before the MLP, also when a checkpointed layer runs again. It
    notes which positions are read.
    """
    last = decoder.layers[-1] if len(getattr(decoder, "layers", ())) else None
    attention, mlp = getattr(last, "self_attn", None), getattr(last, "mlp", None)
    if attention is None or mlp is None or hasattr(attention, "group_rows_read"):
        return
    read: list[Tensor | None] = [None]
    attention.group_rows_read = read
    whole = mlp.forward

    def forward(states: Tensor) -> Tensor:
        rows, read[0] = read[0], None
        if rows is None:
            return whole(states)
        part = whole(states.index_select(1, rows))
        return part.new_zeros(states.shape).index_copy(1, rows, part)

    mlp.forward = forward


def _dispatch(before: Any) -> Any:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        group_layout: Layout | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if hasattr(module, "group_rows_read"):
            read: Any = module.group_rows_read
            read[0] = getattr(group_layout, "rows_read", None)
        if group_layout is None or hasattr(module, "ignores_group_layout"):
            return before(module, query, key, value, attention_mask, *args, **kwargs)
        for feature in ("sliding_window", "softcap", "s_aux", "position_bias"):
            if kwargs.get(feature) is not None:
                raise CannotPack(f"{type(module).__name__} uses {feature}")
        if not getattr(module, "is_causal", True):
            raise CannotPack(f"{type(module).__name__} is not causal")
        scale = kwargs.get("scaling")
        scale = float(scale) if scale is not None else query.shape[-1] ** -0.5
        kind = query.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)  # as the library's attention does
        return group_layout.attend(module, query, key, value, scale), None

    return attention


def no_mask(device: torch.device | None = None) -> Tensor:
    """Return a mask that transformers passes on as it is, because it has four dimensions, instead of making a dense one."""
    return torch.zeros(1, 1, 1, 1, device=device)


@dataclass
class _Bucket:
    """Groups with prompts of about the same length, padded to P tokens and S response tokens in all."""

    prompt: Tensor
    """int64 [G, P]: positions in the row; padding repeats the last."""
    prompt_valid: Tensor | None
    """bool [G, P], or None if nothing is padded."""
    asking: Tensor
    """int64 [G, S]: positions of the responses' tokens."""
    asking_valid: Tensor | None


@dataclass
class GroupLayout:
    """Where the groups are in a row of L tokens."""

    buckets: list[_Bucket]
    own: Tensor
    """int64 [R, T]: positions of each response's tokens, padded by its last."""
    own_valid: Tensor | None
    """bool [R, T], or None if nothing is padded."""
    owners: TokenOwners
    """The group and the response of every token, for attention over a mask."""
    rows_read: Tensor | None = None
    """int64 [N]: positions whose last hidden states are read, or None for all."""

    @classmethod
    def of(cls, groups: Sequence[tuple[int, Sequence[int]]], rows_read: Tensor | None = None) -> GroupLayout:
        """Lay out groups, given as (prompt length, lengths of its responses). Every length is at least 1."""
        prompts: list[tuple[range, range]] = []
        responses: list[range] = []
        at = 0
        for prompt, lengths in groups:
            end = at + prompt + sum(lengths)
            prompts.append((range(at, at + prompt), range(at + prompt, end)))
            at += prompt
            for n in lengths:
                responses.append(range(at, at + n))
                at += n
        buckets: list[list[tuple[range, range]]] = []
        for pair in sorted(prompts, key=lambda p: len(p[0])):
            if not buckets or len(pair[0]) > _UNLIKE * len(buckets[-1][0][0]):
                buckets.append([])
            buckets[-1].append(pair)
        return cls(
            [_Bucket(*_padded([p for p, _ in b]), *_padded([a for _, a in b])) for b in buckets],
            *_padded(responses),
            TokenOwners.of(groups),
            rows_read,
        )

    def to(self, device: torch.device) -> GroupLayout:
        moved = {f.name: _moved(getattr(self, f.name), device) for f in fields(self)}
        return replace(self, **moved)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if query.device.type == "cpu":
            return _SegmentAttention.apply(query[0].transpose(0, 1), key[0], value[0], self, scale)[None]
        if query.is_cuda and has_triton():
            return flex(self.owners, query, key, value, scale)
        return dense(self.owners, query, key, value, scale)


def _padded(ranges: Sequence[range]) -> tuple[Tensor, Tensor | None]:
    """Return positions as rows of one length, and which of them are not padding."""
    longest = max((len(r) for r in ranges), default=0)
    rows = [[*r, *[r[-1] if len(r) else 0] * (longest - len(r))] for r in ranges]
    index = torch.tensor(rows, dtype=torch.long).view(len(ranges), longest)
    if all(len(r) == longest for r in ranges):
        return index, None
    return index, torch.arange(longest)[None] < torch.tensor([len(r) for r in ranges])[:, None]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor | TokenOwners):
        return value.to(device)
    if isinstance(value, list):
        return [replace(b, **{f.name: _moved(getattr(b, f.name), device) for f in fields(b)}) for b in value]
    return value


# ---- CPU: by segments ------------------------------------------------------------------------------------------------
#
# Attention over two sets of keys is the mean of the two attentions, weighted by their sums of exponentials. So all
# responses of a group attend to the prompt in one call, and every response attends to itself, with torch's fused kernel.
# The kernel's backward gets the *merged* output and log-sum-exp, and yields each part's exact share of the gradient.

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _SegmentAttention(torch.autograd.Function):
    """query [L, H, D], key and value [K, L, D] -> [L, H, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout, scale: float) -> Tensor:
        length, heads, size = query.shape
        out = query.new_empty(length, heads, size)
        lse = query.new_empty(length, heads, dtype=torch.promote_types(query.dtype, torch.float32))
        keys, values = key.transpose(0, 1), value.transpose(0, 1)
        for bucket in layout.buckets:
            k, v = _kv(keys, bucket.prompt), _kv(values, bucket.prompt)
            q = _q(query, bucket.prompt, k)
            part = _forward(q, _shared(k, q), _shared(v, q), 0.0, True, scale=scale)
            _put(out, part[0], bucket.prompt, bucket.prompt_valid)
            _put(lse[..., None], part[1][..., None], bucket.prompt, bucket.prompt_valid)
            if bucket.asking.shape[1]:
                q = _q(query, bucket.asking, k).flatten(1, 2)[:, None]
                part = _forward(q, k, v, 0.0, False, attn_mask=_key_mask(bucket, q, k), scale=scale)
                shape = (k.shape[0], heads // key.shape[0], bucket.asking.shape[1])
                _put(out, part[0].view(*shape, size), bucket.asking, bucket.asking_valid)
                _put(lse[..., None], part[1].view(*shape, 1), bucket.asking, bucket.asking_valid)
        if layout.own.numel():
            k, v = _kv(keys, layout.own), _kv(values, layout.own)
            q = _q(query, layout.own, k)
            part = _forward(q, _shared(k, q), _shared(v, q), 0.0, True, scale=scale)
            own_lse = part[1][..., None]
            prompt_lse = _q(lse[..., None], layout.own, k)
            merged = torch.logaddexp(own_lse, prompt_lse)
            mixed = (own_lse - merged).exp().to(out.dtype) * part[0]
            mixed += (prompt_lse - merged).exp().to(out.dtype) * _q(out, layout.own, k)
            _put(out, mixed, layout.own, layout.own_valid)
            _put(lse[..., None], merged, layout.own, layout.own_valid)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, out, lse = ctx.saved_tensors
        layout, scale, grad_out = ctx.layout, ctx.scale, grads[0]
        grad_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
        keys, values = key.transpose(0, 1), value.transpose(0, 1)
        grad_keys = keys.new_zeros(keys.shape)
        grad_values = values.new_zeros(values.shape)
        for bucket in layout.buckets:
            k, v = _kv(keys, bucket.prompt), _kv(values, bucket.prompt)
            grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
            parts = [(bucket.prompt, bucket.prompt_valid, True)]
            if bucket.asking.shape[1]:
                parts.append((bucket.asking, bucket.asking_valid, False))
            for index, valid, causal in parts:
                q, o = _q(query, index, k), _q(out, index, k)
                g, s = _q(grad_out, index, k, valid), _q(lse[..., None], index, k)[..., 0]
                shape = q.shape
                if causal:
                    kk, vv, mask = _shared(k, q), _shared(v, q), None
                else:
                    q, o, g, s = (x.flatten(1, 2)[:, None] for x in (q, o, g, s))
                    kk, vv, mask = k, v, _key_mask(bucket, q, k)
                dq, dk, dv = _backward(g, q, kk, vv, o, s, 0.0, causal, attn_mask=mask, scale=scale)
                _put(grad_query, dq.view(shape), index, valid)
                grad_k += dk.sum(1, keepdim=True)
                grad_v += dv.sum(1, keepdim=True)
            _add_kv(grad_keys, grad_k, bucket.prompt, bucket.prompt_valid)
            _add_kv(grad_values, grad_v, bucket.prompt, bucket.prompt_valid)
        if layout.own.numel():
            k, v = _kv(keys, layout.own), _kv(values, layout.own)
            q, o = _q(query, layout.own, k), _q(out, layout.own, k)
            g, s = _q(grad_out, layout.own, k, layout.own_valid), _q(lse[..., None], layout.own, k)[..., 0]
            dq, dk, dv = _backward(g, q, _shared(k, q), _shared(v, q), o, s, 0.0, True, scale=scale)
            _put(grad_query, dq, layout.own, layout.own_valid, add=True)
            _add_kv(grad_keys, dk.sum(1, keepdim=True), layout.own, layout.own_valid)
            _add_kv(grad_values, dv.sum(1, keepdim=True), layout.own, layout.own_valid)
        return grad_query, grad_keys.transpose(0, 1), grad_values.transpose(0, 1), None, None


def _kv(states: Tensor, index: Tensor) -> Tensor:
    """[L, K, D] at int64 [G, P] -> [G * K, 1, P, D]."""
    picked = states.index_select(0, index.flatten()).view(*index.shape, *states.shape[1:])
    return picked.transpose(1, 2).reshape(-1, 1, index.shape[1], states.shape[2])


def _q(states: Tensor, index: Tensor, keys: Tensor, valid: Tensor | None = None) -> Tensor:
    """[L, H, D] at int64 [G, P] -> [G * K, H / K, P, D]: queries that share a key-value head are adjacent.

    Zero where valid is False.
    """
    picked = states.index_select(0, index.flatten())
    if valid is not None:
        picked = picked.masked_fill(~valid.flatten()[:, None, None], 0)
    heads, size = states.shape[1:]
    picked = picked.view(*index.shape, heads, size).transpose(1, 2)
    return picked.reshape(keys.shape[0], -1, index.shape[1], size)


def _shared(keys: Tensor, query: Tensor) -> Tensor:
    return keys.expand(-1, query.shape[1], -1, -1)


def _rows(states: Tensor, groups: int) -> Tensor:
    """[G * K, n, P, D] -> [G * P, K * n, D]."""
    length, size = states.shape[2:]
    return states.reshape(groups, -1, length, size).transpose(1, 2).reshape(groups * length, -1, size)


def _put(target: Tensor, states: Tensor, index: Tensor, valid: Tensor | None, *, add: bool = False) -> None:
    """Write or add [G * K, n, P, D] to the rows ``index`` [G, P] of target [L, H, D]."""
    rows, flat = _rows(states, len(index)), index.flatten()
    if valid is not None:
        real = valid.flatten()
        rows, flat = rows[real], flat[real]
    if add:
        target.index_add_(0, flat, rows.to(target.dtype))
    else:
        target.index_copy_(0, flat, rows.to(target.dtype))


def _add_kv(target: Tensor, states: Tensor, index: Tensor, valid: Tensor | None) -> None:
    _put(target, states, index, valid, add=True)


def _key_mask(bucket: _Bucket, query: Tensor, keys: Tensor) -> Tensor | None:
    """Return the additive mask [G * K, 1, S, P] that hides the padding of shorter prompts."""
    if bucket.prompt_valid is None:
        return None
    mask = torch.zeros(bucket.prompt_valid.shape, dtype=query.dtype, device=query.device)
    mask.masked_fill_(~bucket.prompt_valid, float("-inf"))
    heads = len(keys) // len(mask)
    mask = mask[:, None].expand(-1, heads, -1).reshape(len(keys), 1, 1, -1)
    return mask.expand(-1, -1, query.shape[2], -1)
