"""Operations and bytes of a small model, computed by hand."""

from __future__ import annotations

from openril.benchmarking.flops import attended_pairs, decode_bytes, unique_work, update_flops, window_pairs
from openril.benchmarking.shapes import MODELS, ModelSize

SMALL = ModelSize(
    hidden=4,
    layers=1,
    heads=2,
    kv_heads=1,
    intermediate=8,
    vocab=10,
    vision_hidden=2,
    vision_layers=1,
    vision_heads=1,
    vision_intermediate=3,
    vision_full=(0,),
)


def test_weights_of_a_layer():
    assert SMALL.layer_weights == 2 * 16 + 2 * 4 * 2 + 3 * 4 * 8 == 144  # q and o, k and v (one head of 2), the MLP
    assert SMALL.vision_layer_weights == 4 * 4 + 3 * 2 * 3 == 34
    assert SMALL.merger_weights == (8 * 8, 8 * 4)


def test_pairs_of_a_group():
    # Prompt 1 + 2 + 3; each of two responses: its two tokens see 3 prompt tokens, and 1 and 2 tokens of the response.
    assert attended_pairs(prompt=3, response=2, group_size=2) == 6 + 2 * (2 * 3 + 3)


def test_windows_at_the_edge_are_smaller():
    assert window_pairs(10, 8) == (8 * 8) ** 2 + (2 * 8) ** 2


def test_work_of_one_question():
    work = unique_work(SMALL, prompt=5, grid=(1, 2), response=2, group_size=2)
    # 8 patches of 2 x 3 x 14 x 14 numbers; attention 4 x hidden 2 x 8 x 8 pairs.
    assert work.vision_tower == 2 * 8 * (1176 * 2 + 34) + 4 * 2 * 64
    assert work.merger == 2 * 2 * 64 + 2 * 2 * 32
    assert work.language == 2 * 9 * 144  # 5 prompt tokens and 2 x 2 of responses
    assert work.attention == 4 * 4 * (15 + 2 * (2 * 5 + 3))
    assert work.lm_head == 2 * 4 * 4 * 10
    # Twice forward, but the merger's first layer (256) needs no gradient of its input.
    assert work.backward == 2 * (2592 + 656 + 320) + 256 + 2 * 128


def test_the_frozen_tower_counts_once_for_policy_and_reference():
    # Policy forward 38688 + 384 + 2592 + 656 + 320, reference the same without the tower, backward 7648; two questions.
    assert update_flops(SMALL, 5, (1, 2), 2, 2, 2) == 2 * (42640 + 3952 + 7648)


def test_bytes_of_a_decoding_step():
    # 144 + 4 x 10 weights; a token's keys and values are 4 numbers; 5 prompt tokens and (2 - 1) / 2 of each of two rows.
    assert decode_bytes(SMALL, 5, 2, 2, 2, bytes_per_number=4) == (4 * 184, 4 * 2 * 4 * (5 + 1))


def test_benchmark_models_keep_the_real_proportions():
    real = MODELS["qwen2_5_vl_3b"]
    for name in ("tiny", "wide"):
        size = MODELS[name]
        assert size.intermediate / size.hidden == real.intermediate / real.hidden
        assert abs(size.vision_share / real.vision_share - 1) < 0.1
