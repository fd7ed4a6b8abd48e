"""Aggregation of rounds: nothing is made up where something is missing."""

from __future__ import annotations

import pytest

from openril.benchmarking.contender import Measurement, exactly
from openril.benchmarking.plan import Cell, make_plan
from openril.benchmarking.results import cell_figures, linear_fit, matmul_share, part_figures, ratio, summary
from openril.benchmarking.session import CellResult, Failure
from openril.benchmarking.shapes import Shape, parse_shape
from openril.errors import OpenRILError


def seconds(*values: float | None) -> list[Measurement | None]:
    return [None if v is None else Measurement(v, tokens=10) for v in values]


def test_a_ratio_is_the_median_of_the_rounds_own_ratios():
    # 10/2 = 5, 30/3 = 10, 8/4 = 2: the median is 5, whereas the ratio of the medians were 10/3.
    got = ratio("update", seconds(10, 30, 8), seconds(2, 3, 4))
    assert got == {"median": 5, "min": 2, "max": 10, "rounds": 3}


def test_rounds_that_one_side_lacks_are_left_out():
    got = ratio("update", seconds(10, None, 8), seconds(2, 3, None))
    assert got is not None and got["median"] == 5 and got["rounds"] == 1
    assert ratio("update", seconds(None), seconds(1)) is None


def test_memory_is_compared_in_bytes_and_unknown_stays_unknown():
    peer, ours = [Measurement(1, peak_memory=80)], [Measurement(9, peak_memory=20)]
    assert (got := ratio("memory", peer, ours)) is not None and got["median"] == 4
    assert ratio("memory", [Measurement(1)], ours) is None
    assert "peak_memory_bytes" not in part_figures([Measurement(1)], 5)


def test_throughput_of_a_part():
    figures = part_figures(seconds(2, 4, None), unique_tokens=30)
    assert figures["response_tokens_per_second"] == 10 / 3 and figures["unique_tokens_per_second"] == 10
    assert figures["rounds"] == [2, 4, None]
    assert part_figures([None], 30) == {"seconds": None}


def test_a_line_through_points():
    fit = linear_fit([1, 2, 3], [5, 7, 9])
    assert fit == {"intercept": 3, "slope": 2, "r_squared": 1}
    # Means 2 and 2; sxy 1, sxx 2, syy 2: slope 1/2, R^2 1/4.
    assert linear_fit([1, 2, 3], [2, 1, 3]) == {"intercept": 1, "slope": 0.5, "r_squared": 0.25}
    assert linear_fit([1, 2], [5, 7]) is None


def test_the_share_of_the_peak_leaves_the_optimizer_out():
    shape = Shape("micro", 16, 4, 4)
    result = CellResult(Cell(shape), about={"ours": {"prompt_tokens": 20}})
    result.add("ours", "update", Measurement(3.0, {"optimizer": 1.0}))
    # The second round's peak was measured while the machine was busy.
    result.limits = [{"matmul_flops": 1e6, "bandwidth": 1.0}, {"matmul_flops": 1e3, "bandwidth": 1.0}]
    got = matmul_share(result)
    assert got is not None and got["share"]["median"] == pytest.approx(got["unique_flops"] / 2e6)
    assert got["share_of_cpu_time"] is None


def test_headlines_that_were_not_measured_are_null():
    plan = make_plan(quick=True, device="cpu", shapes=[])
    assert [c.shape.name for c in plan.cells] == [plan.short, plan.long, plan.wide]
    result = CellResult(plan.cells[1], about={"ours": {"prompt_tokens": 1000}})
    for value in (1.0, 2.0):
        result.add("ours", "update", Measurement(value, tokens=1))
        result.add("trl", "update", None)
    result.failures = [Failure("trl", plan.long, "trl ran out of memory")]
    result.limits = [{"matmul_flops": 1e9, "bandwidth": 1e9}] * 2
    figures = summary(plan, [result], {"versions": {}, "machine": {}}, 4, {})
    assert figures["ratios"] == dict.fromkeys(["update", "update_long", "sampling", "step", "memory_long"])
    assert figures["matmul_share"] is None
    assert figures["failures"] == [{"contender": "trl", "shape": plan.long, "cause": "trl ran out of memory"}]
    assert cell_figures(result, 4)["contenders"]["trl"]["measured"]["update"] == {"seconds": None}


def test_contenders_with_unlike_prompts_are_refused():
    result = CellResult(
        Cell(Shape("micro", 16, 4, 4)), about={"ours": {"prompt_tokens": 20}, "trl": {"prompt_tokens": 21}}
    )
    with pytest.raises(RuntimeError, match=r"\[20, 21\]"):
        cell_figures(result, 4)


def test_responses_of_another_length_are_refused():
    exactly([4, 4], 4, "ours")
    with pytest.raises(RuntimeError, match=r"ours drew responses of \[3, 4\]"):
        exactly([3, 4], 4, "ours")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinny-200-32-8", "did you mean tiny"),
        ("tiny-200-32", "write MODEL"),
        ("tiny-200-32-7", "even"),
        ("tiny-2-32-8", "image tokens"),
    ],
)
def test_bad_shapes_say_what_is_wrong(name: str, message: str):
    with pytest.raises(OpenRILError, match=message):
        parse_shape(name)


def test_a_model_alone_is_its_whole_grid():
    assert len(parse_shape("tiny")) == 12
    assert parse_shape("tiny-1000-32-16") == [Shape("tiny", 1000, 32, 16)]
    assert Shape("tiny", 1000, 32, 16).grid == (27, 37)
