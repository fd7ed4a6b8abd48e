"""Attention over packed groups against plain attention under a dense mask that is written out here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openril.errors import ModelError
from openril.models.group_attention import AttentionInterface, CannotPack, GroupLayout, enable
from openril.models.loading import load_model
from openril.models.masked_attention import TokenOwners, call_compiled, dense, flex

Groups = list[tuple[int, list[int]]]

LAYOUTS: dict[str, Groups] = {
    "one group": [(5, [3, 3])],
    "responses of different lengths": [(5, [1, 4, 7, 2])],
    "prompts of about one length": [(10, [2, 3]), (12, [4]), (11, [1, 1])],
    "prompts of different lengths": [(30, [4, 4]), (3, [2]), (9, [1, 5]), (31, [2])],
    "no responses": [(6, [])],
    "responses to some prompts only": [(6, []), (7, [3]), (40, [])],
    "one token each": [(1, [1, 1]), (1, [1])],
}
LONG: Groups = [(530, [40, 3]), (515, [60])]  # the kernel goes through keys 512 at a time


def dense_mask(groups: Groups) -> Tensor:
    """bool [L, L]: row q sees column k."""
    owners: list[tuple[int, int]] = []  # group, and response in it (-1: prompt)
    for number, (prompt, lengths) in enumerate(groups):
        owners += [(number, -1)] * prompt
        for r, n in enumerate(lengths):
            owners += [(number, r)] * n
    group, response = torch.tensor(owners).unbind(1)
    same_group = group[:, None] == group[None]
    shown = (response[None] == -1) | (response[:, None] == response[None])
    return (same_group & shown).tril()


def reference(groups: Groups, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """[1, H, L, D] and twice [1, K, L, D] -> [1, L, H, D], every score computed."""
    times = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(times, dim=1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~dense_mask(groups).to(query.device), float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def states(groups: Groups, kv_heads: int, dtype: torch.dtype, heads: int = 4, size: int = 16) -> list[Tensor]:
    """Query, key, value laid out as models have them: heads after tokens, then transposed."""
    generator = torch.Generator().manual_seed(7)
    length = sum(p + sum(n) for p, n in groups)
    return [
        torch.randn(1, length, h, size, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        for h in (heads, kv_heads, kv_heads)
    ]


def attend(groups: Groups, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return GroupLayout.of(groups).to(query.device).attend(nn.Module(), query, key, value, scale)


def flex_of(groups: Groups, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The GPU's path; here it computes every score, under the same mask."""
    return flex(TokenOwners.of(groups), query, key, value, scale)


def dense_of(groups: Groups, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return dense(TokenOwners.of(groups), query, key, value, scale)


def with_gradients(call: Any, groups: Groups, inputs: Sequence[Tensor], scale: float = 0.3) -> list[Tensor]:
    """Output, and gradients of query, key and value for one fixed gradient of the output."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = call(groups, *leaves, scale)
    generator = torch.Generator().manual_seed(8)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def assert_close(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("output", "query", "key", "value"), ours, theirs, strict=True):
        assert a.shape == b.shape, name
        assert float((a.double() - b.double()).abs().max()) < tolerance, name


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("groups", LAYOUTS.values(), ids=LAYOUTS)
def test_equals_dense_attention_in_double(groups: Groups, kv_heads: int):
    inputs = states(groups, kv_heads, torch.float64)
    assert_close(with_gradients(attend, groups, inputs), with_gradients(reference, groups, inputs), 1e-12)


@pytest.mark.parametrize("groups", [*LAYOUTS.values(), LONG], ids=[*LAYOUTS, "long"])
def test_equals_dense_attention_in_single(groups: Groups):
    inputs = states(groups, 2, torch.float32)
    assert_close(with_gradients(attend, groups, inputs), with_gradients(reference, groups, inputs), 1e-5)


@pytest.mark.parametrize("name", ["responses of different lengths", "prompts of different lengths"])
def test_bfloat16_is_as_good_as_bfloat16_is(name: str):
    groups = LAYOUTS[name]
    inputs = states(groups, 2, torch.bfloat16)
    exact = with_gradients(reference, groups, [x.double() for x in inputs])
    ours = with_gradients(attend, groups, inputs)
    assert ours[0].dtype == torch.bfloat16
    for a, b in zip(ours, exact, strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 0.01


def test_sharp_attention_keeps_its_digits():
    """Scores in the hundreds: the two parts of a response's attention differ by far more than a float holds."""
    groups = LAYOUTS["prompts of different lengths"]
    query, key, value = states(groups, 2, torch.float64)
    inputs = [100 * query, key, value]
    ours, theirs = with_gradients(attend, groups, inputs), with_gradients(reference, groups, inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-11


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
@pytest.mark.parametrize("path", ["segments", "flex", "dense"])
def test_who_sees_whom(path: str):
    """Prompt 0 1, response A 2 3, response B 4, then another group: prompt 5, response 6.

    All scores are equal and value k is the k-th unit vector, so an output is the mean over what its token sees.
    """
    groups: Groups = [(2, [2, 1]), (1, [1])]
    sees = {0: [0], 1: [0, 1], 2: [0, 1, 2], 3: [0, 1, 2, 3], 4: [0, 1, 4], 5: [5], 6: [5, 6]}
    query = key = torch.zeros(1, 1, 7, 8)
    value = torch.eye(7, 8)[None, None]
    out = {"segments": attend, "flex": flex_of, "dense": dense_of}[path](groups, query, key, value, 1.0)
    for token, seen in sees.items():
        expected = [1 / len(seen) if k in seen else 0.0 for k in range(8)]
        assert out[0, token, 0].tolist() == pytest.approx(expected, abs=1e-6), token


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
@pytest.mark.parametrize(
    "name", ["responses of different lengths", "prompts of different lengths", "responses to some prompts only"]
)
def test_flex_mask_is_the_same(name: str):
    groups = LAYOUTS[name]
    query, key, value = states(groups, 2, torch.float32)
    ours = flex_of(groups, query, key, value, 0.3)
    assert float((ours - reference(groups, query, key, value, 0.3)).abs().max()) < 1e-5


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_dense_mask_is_the_same(kv_heads: int):
    """What a device without a compiler runs."""
    for name in ("responses of different lengths", "prompts of different lengths", "responses to some prompts only"):
        groups = LAYOUTS[name]
        inputs = states(groups, kv_heads, torch.float64)
        assert_close(with_gradients(dense_of, groups, inputs), with_gradients(reference, groups, inputs), 1e-12)


BLOCKS: dict[str, Groups] = {
    **LAYOUTS,
    "long": LONG,
    "ends of blocks": [(256, [128, 128]), (128, [256])],
    "one token off the ends": [(257, [127, 129]), (128, [1, 300, 255])],
    "one long response": [(100, [1000, 20]), (700, [])],
}


@pytest.mark.parametrize("groups", BLOCKS.values(), ids=BLOCKS)
def test_blocks_are_those_of_the_mask_over_tokens(groups: Groups):
    """A block that is skipped holds no visible pair, and one whose mask is not asked for holds no hidden pair."""
    mask, size = dense_mask(groups), 128
    count = -(-len(mask) // size)
    padded = torch.zeros(count * size, count * size, dtype=torch.bool)
    padded[: len(mask), : len(mask)] = mask
    tokens = padded.view(count, size, count, size).transpose(1, 2).flatten(2)
    some, whole = TokenOwners.of(groups).blocks()
    assert torch.equal(some, tokens.any(-1))
    assert not (whole & ~tokens.all(-1)).any()
    if len(groups) == 1 or groups in (BLOCKS["long"], BLOCKS["ends of blocks"]):
        assert torch.equal(whole, tokens.all(-1))


@pytest.mark.parametrize("groups", BLOCKS.values(), ids=BLOCKS)
def test_the_block_mask_lists_these_blocks(groups: Groups):
    owners = TokenOwners.of(groups)
    some, whole = owners.blocks()
    made = owners.block_mask
    assert made.seq_lengths == (len(owners.group), len(owners.group))
    for expected, numbers, indices in (
        (some & ~whole, made.kv_num_blocks, made.kv_indices),
        (whole, made.full_kv_num_blocks, made.full_kv_indices),
    ):
        for row, number, columns in zip(expected, numbers[0, 0].tolist(), indices[0, 0].tolist(), strict=True):
            assert columns[:number] == row.nonzero()[:, 0].tolist()


def test_too_many_compilations_are_an_error():
    """By default torch would go on without its compiled function, and make every score of a row."""
    from torch._dynamo import config

    compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    with config.patch(recompile_limit=2):
        for n in (1, 2):
            assert call_compiled(compiled, torch.zeros(n)).tolist() == [1] * n
        with pytest.raises(ModelError, match="recompile_limit"):
            call_compiled(compiled, torch.zeros(3))
    assert not config.fail_on_recompile_limit_hit


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 0.02)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_flex_on_a_gpu_gives_the_same_gradients(kv_heads: int, dtype: torch.dtype, tolerance: float):
    for groups in [*LAYOUTS.values(), LONG]:
        inputs = [x.cuda() for x in states(groups, kv_heads, dtype, size=32)]
        exact = with_gradients(reference, groups, [x.double() for x in inputs])
        ours = with_gradients(attend, groups, inputs)
        for a, b in zip(ours, exact, strict=True):
            assert float((a.double() - b).norm() / b.norm()) < tolerance, groups


# ---- through transformers' attention interface -------------------------------------------------------------------------


def test_without_a_layout_models_compute_what_they_did(tiny_family: Path):
    model: Any = load_model(str(tiny_family))
    ids = torch.arange(50, 75)[None].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        before = model(**inputs).logits
        enable(model)
        once = AttentionInterface._global_mapping["sdpa"]
        enable(model)
        after = model(**inputs).logits
    assert AttentionInterface._global_mapping["sdpa"] is once
    assert model.config.get_text_config()._attn_implementation == "sdpa"  # transformers reads it back
    real = mask.bool()
    assert torch.equal(before[real], after[real])


@pytest.mark.parametrize("feature", ["sliding_window", "softcap", "s_aux", "position_bias"])
def test_attention_of_another_kind_is_refused(feature: str, tiny_qwen: Path):
    model: Any = load_model(str(tiny_qwen))
    enable(model)
    attention = AttentionInterface._global_mapping[model.config.get_text_config()._attn_implementation]
    query, key, value = states([(3, [2])], 2, torch.float32)
    layout = GroupLayout.of([(3, [2])])
    module = SimpleNamespace(is_causal=True)
    attention(module, query, key, value, None, group_layout=layout)
    with pytest.raises(CannotPack, match=feature):
        attention(module, query, key, value, None, group_layout=layout, **{feature: 4})
    with pytest.raises(CannotPack, match="not causal"):
        attention(SimpleNamespace(is_causal=False), query, key, value, None, group_layout=layout)


def test_dropout_in_attention_is_refused(tiny_qwen: Path):
    model: Any = load_model(str(tiny_qwen))
    model.config.get_text_config().attention_dropout = 0.1
    with pytest.raises(CannotPack, match="dropout"):
        enable(model)


def test_scores_are_scaled_by_the_heads_size_where_the_model_says_nothing(tiny_qwen: Path):
    model: Any = load_model(str(tiny_qwen))
    enable(model)
    attention = AttentionInterface._global_mapping[model.config.get_text_config()._attn_implementation]
    groups = LAYOUTS["responses of different lengths"]
    query, key, value = states(groups, 2, torch.float64)
    out, _ = attention(SimpleNamespace(), query, key, value, None, group_layout=GroupLayout.of(groups))
    assert torch.allclose(out, reference(groups, query, key, value, 0.25), atol=1e-12)
