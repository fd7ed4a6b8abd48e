"""The figures of `ril eval --suite`, worked by hand. lmms-eval is not needed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest

from openril.errors import DataError, RecipeError
from openril.evaluation.suite.benchmarks import PAPER, PAPER_MEANS, PAPER_SCORES, suite
from openril.evaluation.suite.loading import strip_thinking
from openril.evaluation.suite.results import (
    Scored,
    mean_difference,
    mean_score,
    paired_difference,
    stratified,
    summarize,
)
from openril.evaluation.suite.table import Checkpoint, markdown, paper_rows, rich_table, suite_data
from openril.evaluation.suite.vlmevalkit import read_vlmevalkit
from openril.recipe.loop_checks import JUDGED_BENCHMARKS
from openril.recipe.schema import BenchmarkName, Recipe
from openril.stages.suite import find_benchmarks, other_rows, run_suite
from openril.storage import write_json


def units(*scores: float | None, stratum: str = "") -> list[Scored]:
    return [
        Scored(f"q{i}", s, s or 0.0, stratum=stratum, cause="down" if s is None else "") for i, s in enumerate(scores)
    ]


def test_a_mean_over_strata_weighs_each_stratum_alike() -> None:
    # a: 1, 0 -> 0.5, error sqrt(0.5 / 2) = 0.5; b: 1, 1, 1, 0 -> 0.75, error sqrt(0.25 / 4) = 0.25
    values = [("a", 1.0), ("a", 0.0), ("b", 1.0), ("b", 1.0), ("b", 1.0), ("b", 0.0)]
    mean, error = stratified(values)
    assert mean == 0.625
    assert error == pytest.approx(math.sqrt(0.25 + 0.0625) / 2)
    assert stratified([]) == (None, None)
    assert stratified([("a", 1.0)]) == (1.0, None)


def test_unknown_scores_are_left_out_and_counted_and_too_many_leave_no_score() -> None:
    some = summarize("ai2d", "AI2D", units(1.0, 0.0, None, 1.0), 50.0, max_unknown_share=0.25)
    assert (some.n, some.unknown, some.failed) == (4, 1, "")
    assert some.score == pytest.approx(200 / 3)
    many = summarize("ai2d", "AI2D", units(1.0, None, None, 1.0), 50.0, max_unknown_share=0.25)
    assert many.score is None and many.standard_error is None
    assert "2 of 4" in many.failed and "down" in many.failed
    none = summarize("ai2d", "AI2D", units(None, None), 0.0, max_unknown_share=1.0)
    assert none.score is None and "2 of 2" in none.failed


def test_a_difference_is_taken_on_the_units_known_in_both() -> None:
    # pairs: 0 -> 1, 1 -> 1, 1 -> 0 would be unknown: differences 1, 0; mean 0.5, error sqrt(0.5 / 2) = 0.5
    found = paired_difference(units(0.0, 1.0, 1.0, None), units(1.0, 1.0, None, 1.0))
    assert (found["n"], found["difference"], found["standard_error"]) == (2, 50.0, 50.0)
    assert found["interval"] == pytest.approx([50 - 98, 50 + 98])
    mean = mean_difference({"a": found, "b": {**found, "difference": 0.0}}, ["a", "b"])
    assert mean is not None and mean["difference"] == 25.0
    assert mean["standard_error"] == pytest.approx(math.sqrt(2 * 50**2) / 2)
    assert mean_difference({"a": found}, ["a", "b"]) is None


def test_there_is_no_mean_when_a_benchmark_is_missing_or_failed() -> None:
    good = summarize("a", "A", units(1.0, 0.0), 50.0)
    bad = summarize("b", "B", units(None, None), 0.0)
    assert mean_score({"a": good, "b": summarize("b", "B", units(1.0, 1.0), 100.0)}, ["a", "b"]) == 75.0
    assert mean_score({"a": good}, ["a", "b"]) is None
    assert mean_score({"a": good, "b": bad}, ["a", "b"]) is None


def test_the_table_shows_failed_benchmarks_no_mean_and_the_papers_rows_with_their_source() -> None:
    pair = [b for b in PAPER if b.task in ("ai2d", "chartqa")]
    first = {"ai2d": units(0.0, 1.0), "chartqa": units(1.0, 1.0)}
    second = {"ai2d": units(1.0, 1.0), "chartqa": units(None, 1.0)}
    checkpoints = [
        Checkpoint(name, name, {b.task: summarize(b.task, b.column, u[b.task], 50.0) for b in pair}, u)
        for name, u in (("base", first), ("final", second))
    ]
    data = {"settings": {"max_pixels": 7}, **suite_data(checkpoints, pair, paper_rows())}
    assert [row["mean"] for row in data["checkpoints"]] == [75.0, None]
    assert data["checkpoints"][1]["difference"]["ai2d"]["difference"] == 50.0
    assert "chartqa" not in data["checkpoints"][1]["difference"]
    text = markdown(data, checkpoints, pair)
    assert "| base | 50.0 ± 50.0 | 100.0 ± 0.0 | 75.0 |" in text
    assert "| final | 100.0 ± 0.0 | failed | - |" in text
    assert "max_pixels 7" in text
    assert "measured elsewhere: arXiv 2510.19307" in text
    row = next(line for line in text.splitlines() if line.startswith("| Qwen2.5-VL-7B, RIL"))
    assert "95.6" in row and "76.2" in row
    base = next(line for line in text.splitlines() if line.startswith("| Qwen2.5-VL-7B, base"))
    assert base.split("|")[2].strip() == "n/a" and "n/a: this project has no record of the figure." in text


@pytest.mark.parametrize(("width", "cell"), [(80, "50.0 ± 50.0 (1 unparsed)"), (50, "50.0 ± 50.0"), (38, "50.0")])
def test_a_narrow_terminal_shows_every_score(width: int, cell: str) -> None:
    from rich.console import Console

    scored = [Scored("q0", 0.0, 0.0, parsed=False), Scored("q1", 1.0, 1.0)]
    pair = [b for b in PAPER if b.task in ("ai2d", "chartqa")]
    results = {b.task: summarize(b.task, b.column, scored, 50.0) for b in pair}
    checkpoints = [Checkpoint(name, name, results) for name in ("base", "step_000100")]
    console = Console(width=width, record=True, quiet=True)
    console.quiet = False
    with console.capture() as captured:
        console.print(rich_table(suite_data(checkpoints, pair), checkpoints, pair, width))
    text = captured.get()
    row = next(line for line in text.splitlines() if "AI2D" in line)
    assert [part.strip() for part in row.strip("│┃ ").split("│")] == ["AI2D", cell, cell]
    assert "step_000100" in text


def test_the_papers_figures_belong_to_columns_of_the_table() -> None:
    columns = {b.column for b in PAPER}
    assert len(columns) == len(PAPER) == 14
    assert set(PAPER_SCORES) <= set(PAPER_MEANS)
    assert all(set(scores) <= columns for scores in PAPER_SCORES.values())
    assert tuple(b.task for b in PAPER) == get_args(BenchmarkName)
    assert tuple(b.task for b in PAPER if b.judge == "always") == JUDGED_BENCHMARKS
    assert [b.column for b in suite("offline")] == [
        b.column for b in PAPER if b.column not in ("MathVista", "MM-Vet", "MM-Vet-v2")
    ]


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("<think>A or B</think> C", "C"),
        ("<think>a</think>x<think>b</think>y", "xy"),
        ("so it is B</think>C", "C"),
        ("<think>never closed B", ""),
        ("A", "A"),
    ],
)
def test_thinking_text_is_stripped(text: str, rest: str) -> None:
    assert strip_thinking(text) == rest


def test_scores_of_vlmevalkit_are_read_as_percent_and_marked(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "My_VL_AI2D_TEST_acc.csv").write_text("split,Overall\nnone,0.7125\n")
    (tmp_path / "m" / "My_VL_MMMU_Pro_10c_acc.csv").write_text("split,Overall\ntest,0.25\n")
    (tmp_path / "m" / "My_VL_MMVet_gpt-4-turbo_score.csv").write_text(
        "Category,tot,acc\nrec,187,40.0\nOverall,218,61.5\n"
    )
    (row,) = read_vlmevalkit(tmp_path)
    assert (row.name, row.source, row.mean) == ("My_VL", "VLMEvalKit", None)
    assert row.scores == {"AI2D": 71.25, "MM-Vet": 61.5}  # MMMU-Pro lacks its vision part
    (tmp_path / "m" / "My_VL_AI2D_TEST_acc.csv").write_text("split\nnone\n")
    with pytest.raises(DataError, match=r"AI2D_TEST.*Overall|Overall.*AI2D_TEST"):
        read_vlmevalkit(tmp_path)
    with pytest.raises(DataError, match="--import"):
        read_vlmevalkit(tmp_path / "empty")


def test_options_are_checked() -> None:
    with pytest.raises(RecipeError, match=r"--suite: .*'papper'.*paper"):
        find_benchmarks("papper", [])
    with pytest.raises(RecipeError, match=r"--suite: .*'paper offline'"):
        find_benchmarks("paper offline", ["ai2d"])
    assert [b.task for b in find_benchmarks("paper", ["mmvet", "docvqa_val", "mmvet"])] == ["mmvet", "docvqa_val"]
    with pytest.raises(RecipeError, match=r"--beside.*'mine'"):
        other_rows(["mine"], [])
    with pytest.raises(RecipeError, match="--import: expected vlmevalkit FOLDER"):
        other_rows([], ["vlmevalkit"])


def test_a_missing_lmms_eval_prints_its_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    from rich.console import Console

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(RecipeError, match=r"openril\[benchmarks\]"):
        run_suite(Recipe(run_dir=str(tmp_path)), Console(), [], suite("offline"))


def test_a_suite_with_judged_benchmarks_needs_a_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.7.3")
    with pytest.raises(RecipeError, match=r"judge\.base_urls.*--suite offline"):
        run_suite(Recipe(run_dir=str(tmp_path)), Console(), [], suite("paper"))
    local = Recipe.model_validate({"run_dir": str(tmp_path), "judge": {"model_path": "models/judge"}})
    with pytest.raises(RecipeError, match=r"judge\.model_path: .*MM-Vet.*models/judge.*judge\.base_urls"):
        run_suite(local, Console(), [], suite("paper"))


def test_results_with_other_settings_and_failed_ones_are_no_scores(tmp_path: Path) -> None:
    from openril.stages.suite import _finished, read_checkpoint

    (ai2d,) = find_benchmarks("paper", ["ai2d"])
    place = tmp_path / "base"
    good = summarize("ai2d", "AI2D", units(1.0, 0.0), 50.0)
    write_json(place / "ai2d.json", {"key": "k", **good.as_dict()})
    assert _finished(place, ai2d, "k") and not _finished(place, ai2d, "other")
    assert read_checkpoint(tmp_path, "base", "", [ai2d], "k").results == {"ai2d": good}
    assert read_checkpoint(tmp_path, "base", "", [ai2d], "other").results == {}
    write_json(place / "ai2d.json", {"key": "k", **summarize("ai2d", "AI2D", units(None), 0.0).as_dict()})
    assert not _finished(place, ai2d, "k")


@pytest.mark.parametrize(
    ("engine", "expected"), [("transformers", [[("a", 0, 2), ("b", 0, 2)], [("a", 1, 2), ("b", 1, 2)]]),
                             ("vllm", [[("a", 0, 1), ("b", 0, 1)], []])]
)  # fmt: skip
def test_processes_share_each_checkpoint_but_one_keeps_servers_busy(
    engine: str, expected: list[list[tuple[str, int, int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from openril.stages import suite as stage
    from openril.stages.eval import Target

    def take(*arguments: Any, **_: Any) -> None:
        taken.append((arguments[2].name, *arguments[6]))

    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.7.3")
    monkeypatch.setattr(stage, "_evaluate", take)
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = Recipe.model_validate({"run_dir": str(tmp_path), "student": {"sampler": {"engine": engine}}})
    for rank in (1, 0):
        taken: list[tuple[str, int, int]] = []
        monkeypatch.setenv("RANK", str(rank))
        run_suite(recipe, Console(quiet=True), [Target(n, n) for n in "ab"], suite("offline"), offline=True)
        assert taken == expected[rank]
        assert (tmp_path / "eval" / "suite.md").is_file() == (rank == 0)  # the first process alone writes the table


def test_the_worker_gets_no_judge_of_lmms_eval_and_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    from openril.evaluation.suite.process import _environment

    for name in ("OPENAI_API_URL", "MODEL_VERSION", "API_TYPE", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("OPENAI_API_KEY", "of the judge")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    found = _environment(download=False)
    assert found["OPENAI_API_URL"].startswith("http://127.0.0.1:9")
    assert not {"MODEL_VERSION", "API_TYPE", "RANK", "WORLD_SIZE"} & set(found)
    assert (found["OPENAI_API_KEY"], found["HF_HUB_OFFLINE"]) == ("of the judge", "1")
    assert "HF_HUB_OFFLINE" not in _environment(download=True)
