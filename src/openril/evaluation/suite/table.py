"""The table of benchmarks: as Markdown, for the terminal, and as the data of suite.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from openril.evaluation.suite.benchmarks import PAPER_MEANS, PAPER_METHODS, PAPER_SCORES, PAPER_SOURCE, Benchmark
from openril.evaluation.suite.results import (
    BenchmarkResult,
    Scored,
    mean_difference,
    mean_score,
    paired_difference,
)

if TYPE_CHECKING:
    from rich.table import Table

ELSEWHERE = "measured elsewhere"
MISSING = "n/a"


@dataclass(frozen=True)
class Checkpoint:
    """The results of one checkpoint by lmms-eval's task name. units: the scored units of the same benchmarks."""

    name: str
    checkpoint: str
    results: Mapping[str, BenchmarkResult]
    units: Mapping[str, Sequence[Scored]] = field(default_factory=dict)


@dataclass(frozen=True)
class OtherRow:
    """A row that was not measured here. scores: percent by column title. source: where the figures come from."""

    name: str
    source: str
    scores: Mapping[str, float]
    mean: float | None = None


def paper_rows() -> list[OtherRow]:
    """Return the paper's own rows."""
    rows = []
    for model, means in PAPER_MEANS.items():
        for n, method in enumerate(PAPER_METHODS):
            known = PAPER_SCORES.get(model, {}).items()
            scores = {column: value for column, values in known if (value := values[n]) is not None}
            rows.append(OtherRow(f"{model}, {method}", PAPER_SOURCE, scores, means[n]))
    return rows


def suite_data(
    checkpoints: Sequence[Checkpoint], benchmarks: Sequence[Benchmark], others: Sequence[OtherRow] = ()
) -> dict[str, Any]:
    """Return the table as plain data. Differences are to the first checkpoint."""
    tasks = [b.task for b in benchmarks]
    rows = []
    for c in checkpoints:
        row: dict[str, Any] = {
            "name": c.name,
            "checkpoint": c.checkpoint,
            "mean": mean_score(c.results, tasks),
            "results": {task: result.as_dict() for task, result in c.results.items()},
        }
        if c is not checkpoints[0]:
            row["difference"] = differences(checkpoints[0], c, tasks)
            row["difference"]["mean"] = mean_difference(row["difference"], tasks)
            row["difference"]["over"] = checkpoints[0].name
        rows.append(row)
    return {
        "benchmarks": {b.task: b.column for b in benchmarks},
        "checkpoints": rows,
        "elsewhere": [{"name": o.name, "source": o.source, "scores": dict(o.scores), "mean": o.mean} for o in others],
    }


def differences(first: Checkpoint, other: Checkpoint, tasks: Sequence[str]) -> dict[str, Any]:
    """Return the paired differences by task, of the benchmarks that both have a score of."""
    return {
        task: paired_difference(first.units[task], other.units[task])
        for task in tasks
        if all(c.units.get(task) and c.results[task].score is not None for c in (first, other))
    }


def figure(result: BenchmarkResult | None, error: bool = True) -> str:
    """Write a score as ``71.3 ± 1.2``; "-" for a benchmark that was not run, "failed" for one without a score."""
    if result is None:
        return "-"
    if result.score is None:
        return "failed"
    text = f"{result.score:.1f}"
    return f"{text} ± {result.standard_error:.1f}" if error and result.standard_error is not None else text


def gain(difference: Mapping[str, Any] | None) -> str:
    """Write a difference with its 95% interval, as ``+2.1 [0.4, 3.8]``."""
    if not difference or difference.get("difference") is None:
        return "-"
    interval = difference.get("interval")
    return f"{difference['difference']:+.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")


def markdown(data: Mapping[str, Any], checkpoints: Sequence[Checkpoint], benchmarks: Sequence[Benchmark]) -> str:
    """Return suite.md: the scores, the differences, and how each figure came about."""
    columns = [b.column for b in benchmarks]
    mean = f"mean of {len(benchmarks)}"
    lines = [
        "# Benchmarks",
        "",
        "Percent ± standard error. Unparsed answers count as wrong, unknown ones are left out.",
        "Settings: " + ", ".join(f"{key} {value!r}" for key, value in data["settings"].items()) + ".",
        "",
    ]
    scores = [["checkpoint", *columns, mean]]
    for c, row in zip(checkpoints, data["checkpoints"], strict=True):
        cells = [figure(c.results.get(b.task)) for b in benchmarks]
        scores.append([c.name, *cells, "-" if row["mean"] is None else f"{row['mean']:.1f}"])
    for other in data["elsewhere"]:
        cells = [f"{other['scores'][c]:.1f}" if c in other["scores"] else MISSING for c in columns]
        overall = MISSING if other["mean"] is None else f"{other['mean']:.1f}"
        scores.append([f"{other['name']} ({ELSEWHERE}: {other['source']})", *cells, overall])
    lines += _rows(scores)
    if data["elsewhere"]:
        lines += ["", f"{MISSING}: this project has no record of the figure."]
    changes = [["checkpoint", *columns, mean]]
    for row in data["checkpoints"][1:]:
        found = row["difference"]
        changes.append([row["name"], *[gain(found.get(b.task)) for b in benchmarks], gain(found["mean"])])
    if len(changes) > 1:
        first = data["checkpoints"][0]["name"]
        lines += ["", f"Paired differences to {first} with 95% intervals:", "", *_rows(changes)]
    header = "checkpoint/benchmark/n/score/as lmms-eval scores/unparsed/unknown/cut/judge/lmms-eval/task version/prompt"
    how = [f"{header}/max new tokens/image size limits/note".split("/")]
    for c in checkpoints:
        for b in benchmarks:
            if (r := c.results.get(b.task)) is not None:
                d, theirs = r.details, r.lmms_eval_score
                method = d.get("judge") or d.get("eval_method") or ""
                rest = [d.get(k, "") for k in ("lmms_eval", "task_version", "prompt_variant", "max_new_tokens")]
                rest.append(", ".join(f"{k} {v}" for k, v in d.get("image_limits", {}).items()))
                shown = "-" if theirs is None else f"{theirs:.1f}"
                counts = [r.unparsed, r.unknown, r.cut]
                how.append([c.name, b.column, *map(str, (r.n, figure(r), shown, *counts, method, *rest, r.failed))])
    lines += ["", "How each figure came about:", "", *_rows(how)]
    return "\n".join(lines) + "\n"


def rich_table(
    data: Mapping[str, Any], checkpoints: Sequence[Checkpoint], benchmarks: Sequence[Benchmark], width: int = 120
) -> Table:
    """Return a table for a terminal of ``width`` characters, with one row a benchmark and one column a checkpoint.

    Counts and then errors are left out of it if they do not fit.
    """
    from rich.markup import escape
    from rich.table import Table

    for counts, error in ((True, True), (False, True), (False, False)):
        rows = [["benchmark", *(c.name for c in checkpoints)]]
        for b in benchmarks:
            found = [c.results.get(b.task) for c in checkpoints]
            rows.append([b.column, *(figure(r, error) + (_counts(r) if counts else "") for r in found)])
        rows.append([f"mean of {len(benchmarks)}", *(_percent(row["mean"]) for row in data["checkpoints"])])
        if sum(max(map(len, column)) + 3 for column in zip(*rows, strict=True)) < width:
            break
    left_out = "" if counts else ", also the counts" + ("" if error else " and errors") + " that do not fit here"
    table = Table(title="benchmarks (percent, ± standard error)", caption=f"suite.md has every figure{left_out}")
    for number, name in enumerate(rows[0]):
        table.add_column(escape(name), justify="right" if number else "left", overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(escape, row))
    return table


def _counts(result: BenchmarkResult | None) -> str:
    notes = [f"{n} {what}" for what in ("unparsed", "unknown") if result and (n := getattr(result, what))]
    return f" ({', '.join(notes)})" if notes else ""


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _rows(rows: Sequence[Sequence[str]]) -> list[str]:
    header, *body = rows
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [
        "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in row) + " |" for row in (header, rule, *body)
    ]
