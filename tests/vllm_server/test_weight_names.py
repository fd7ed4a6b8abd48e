"""A sync needs all tensors, but they may be renamed or tied."""

from openril.sampling.weight_sync import shape_differences

OLD = {"model.norm.weight": (8,), "model.up.weight": (16, 8), "lm_head.weight": (100, 8)}


def test_equal_checkpoints_do_not_differ():
    assert shape_differences(OLD, dict(OLD)) == ([], [])


def test_a_missing_and_an_added_tensor_are_named():
    new = {"model.norm.weight": (8,), "lm_head.weight": (100, 8), "adapter.a": (2, 8)}
    assert shape_differences(OLD, new) == (["model.up.weight"], ["adapter.a"])


def test_a_tensor_of_another_shape_is_missing_and_added():
    assert shape_differences(OLD, {**OLD, "model.up.weight": (8, 16)}) == (["model.up.weight"], ["model.up.weight"])


def test_a_renamed_tensor_counts_as_there():
    new = {"model.norm.weight": (8,), "model.language_model.up.weight": (16, 8), "lm_head.weight": (100, 8)}
    assert shape_differences(OLD, new) == ([], [])


def test_a_tied_head_may_be_left_out():
    assert shape_differences(OLD, {k: v for k, v in OLD.items() if k != "lm_head.weight"}) == ([], [])
