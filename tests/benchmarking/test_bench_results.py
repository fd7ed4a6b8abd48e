"""Aggregation of rounds: what was not measured stays missing."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from openril.benchmarking.plan import DEFAULT_PRECISION, Cell, make_plan
from openril.benchmarking.results import cell_figures, linear_fit, matmul_share, part_figures, ratio, summary
from openril.benchmarking.session import CellResult, Failure
from openril.benchmarking.shapes import Shape, parse_shape
from openril.benchmarking.table import print_cell
from openril.benchmarking.worker import Measurement, exactly
from openril.errors import OpenRILError
from openril.recipe.schema import TrainConfig


def seconds(*values: float | None) -> list[Measurement | None]:
    return [None if v is None else Measurement(v, tokens=10) for v in values]


def test_a_ratio_is_the_median_of_the_rounds_own_ratios():
    # 10/2 = 5, 30/3 = 10, 8/4 = 2: the median is 5, whereas the ratio of the medians is 10/3.
    got = ratio("update", seconds(10, 30, 8), seconds(2, 3, 4))
    assert got == {"median": 5, "min": 2, "max": 10, "rounds": 3}


def test_rounds_that_are_missing_on_one_side_are_left_out():
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
    assert [c.shape.name for c in plan.cells] == [plan.short, plan.long, plan.wide, f"{plan.short}-bfloat16"]
    result = CellResult(plan.cells[1], about={"ours": {"prompt_tokens": 1000}})
    for value in (1.0, 2.0):
        result.add("ours", "update", Measurement(value, tokens=1))
        result.add("trl", "update", None)
    result.failures = [Failure("trl", plan.long, "trl ran out of memory")]
    result.limits = [{"matmul_flops": 1e9, "bandwidth": 1e9}] * 2
    figures = summary(plan, [result], {"versions": {}, "machine": {}}, {})
    assert figures["ratios"] == dict.fromkeys(["update", "update_long", "sampling", "step", "memory_long"])
    assert figures["matmul_share"] is None
    assert figures["failures"] == [{"contender": "trl", "shape": plan.long, "cause": "trl ran out of memory"}]
    assert cell_figures(result)["contenders"]["trl"]["measured"]["update"] == {"seconds": None}


def test_contenders_with_different_prompts_are_refused():
    result = CellResult(
        Cell(Shape("micro", 16, 4, 4)), about={"ours": {"prompt_tokens": 20}, "trl": {"prompt_tokens": 21}}
    )
    with pytest.raises(RuntimeError, match=r"\[20, 21\]"):
        cell_figures(result)


def test_responses_of_another_length_are_refused():
    exactly([4, 4], 4, "ours")
    with pytest.raises(RuntimeError, match=r"^ours.*exactly 4 .*\[3, 4\]"):
        exactly([3, 4], 4, "ours")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinny-200-32-8", "'tinny'.*tiny"),
        ("tiny-200-32", "MODEL.*'tiny-200-32'"),
        ("tiny-200-32-7", "7"),
        ("tiny-2-32-8", "'tiny-2-32-8'"),
        ("tiny-200-32-8-fp8", "'fp8'"),
    ],
)
def test_bad_shapes_name_the_value(name: str, message: str):
    with pytest.raises(OpenRILError, match=message):
        parse_shape(name)


def test_a_model_alone_is_its_whole_grid():
    assert len(parse_shape("tiny")) == 12
    assert parse_shape("tiny-1000-32-16") == [Shape("tiny", 1000, 32, 16)]
    assert parse_shape("tiny-1000-32-16-bfloat16")[0].name == "tiny-1000-32-16-bfloat16"
    assert Shape("tiny", 1000, 32, 16).grid == (27, 37)


def test_the_loops_default_precision_is_one_of_the_shapes():
    for quick in (True, False):
        plan = make_plan(quick=quick, device="cpu", shapes=[])
        assert [c.shape.precision for c in plan.cells].count("bfloat16") == 1
        same = make_plan(quick=quick, device="cpu", shapes=[], precision="bfloat16")
        assert all(c.shape.precision is None for c in same.cells)
    assert TrainConfig().precision == DEFAULT_PRECISION


def test_limits_of_another_precision_stay_out_of_the_summary():
    own, other = CellResult(Cell(Shape("micro", 16, 4, 4))), CellResult(Cell(Shape("micro", 16, 4, 4, "bfloat16")))
    own.limits, other.limits = [{"matmul_flops": 1.0, "bandwidth": 2.0}], [{"matmul_flops": 9.0, "bandwidth": 9.0}]
    plan = make_plan(quick=True, device="cpu", shapes=[])
    figures = summary(plan, [own, other], {"versions": {}, "machine": {}}, {})
    assert figures["limits"]["matmul_flops"]["max"] == 1.0


def test_a_contender_without_its_fast_path_is_marked_in_table_and_json():
    result = CellResult(Cell(Shape("micro", 16, 4, 4), contenders=("plain", "ours")))
    for name in ("plain", "ours"):
        result.add(name, "update", Measurement(1.0, tokens=10))
    result.fast_path_off = {"ours": ["X cannot share a prompt [sliding window]"], "plain": []}
    figures = cell_figures(result)
    assert figures["contenders"]["ours"]["fast_path_off"] == ["X cannot share a prompt [sliding window]"]
    console = Console(file=io.StringIO(), width=200)
    print_cell(console, figures)
    lines = [line.strip() for line in console.file.getvalue().splitlines()]
    assert any(line.startswith("ours*") for line in lines) and any(line.startswith("plain ") for line in lines)
    assert any("ours" in line and "[sliding window]" in line for line in lines)
