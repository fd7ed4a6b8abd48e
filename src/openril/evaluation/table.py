"""Tables of evaluations: for the terminal, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from openril.evaluation.summary import Comparison, Evaluation, Summary, compare

if TYPE_CHECKING:
    from rich.table import Table

MANY_GROUPS = 8
"""The largest number of groups with a column each on the terminal; Markdown has all."""


def percent(value: float | None, error: float | None = None) -> str:
    """Write a share as ``71.3 ± 1.2``, in percent."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def difference(comparison: Comparison) -> str:
    """Write a difference as ``+2.1 ± 0.9``, in percentage points."""
    if comparison.difference is None:
        return "-"
    error = comparison.standard_error
    return f"{100 * comparison.difference:+.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def cells(evaluations: Sequence[Evaluation], max_groups: int | None = None) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows. The gain is the paired difference of a row to the first one."""
    first = evaluations[0]
    columns: list[tuple[str, str]] = []
    for column in dict.fromkeys(c for e in evaluations for c in e.groups):
        values = list(dict.fromkeys(v for e in evaluations for v in e.groups.get(column, {})))
        if max_groups is None or len(values) <= max_groups:
            columns += [(column, v) for v in values]
        columns.append((column, ""))
    header = ["checkpoint", "score", f"gain over {first.name}", "n", "unparsed", "unknown", "cut"]
    header += [value or f"mean over {column}s" for column, value in columns]
    rows = []
    for e in evaluations:
        s = e.summary
        row = [
            e.name,
            percent(s.score, s.standard_error),
            "" if e is first else difference(compare(first, e)),
            *map(str, (s.n, s.unparsed, s.unknown, s.cut)),
        ]
        for column, value in columns:
            if not value:
                row.append(percent(e.group_means.get(column)))
            else:
                group: Summary | None = e.groups.get(column, {}).get(value)
                row.append(percent(group.score) if group else "-")
        rows.append(row)
    return header, rows


def rich_table(evaluations: Sequence[Evaluation], width: int = 120) -> Table:
    """Return a table for a terminal of ``width`` characters. Groups have separate columns only if all of them fit."""
    from rich.markup import escape
    from rich.table import Table

    header, rows = cells(evaluations, MANY_GROUPS)
    table = Table(title="evaluation (percent, ± standard error)")
    if _width(header, rows) > width:
        narrow, rows = cells(evaluations, 0)
        if len(narrow) < len(header):
            header, table.caption = narrow, "each group's score is in eval/table.md"
    droppable = [name for name in ("cut", "n", "unparsed", "unknown") if name in header] + header[:6:-1]
    for name in droppable:
        if _width(header, rows) <= width:
            break
        at = header.index(name)
        header, rows = header[:at] + header[at + 1 :], [row[:at] + row[at + 1 :] for row in rows]
        table.caption = "eval/table.md has the columns that do not fit here"
    for number, name in enumerate(header):
        table.add_column(escape(name), justify="left" if number == 0 else "right", no_wrap=number < 3)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _width(header: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    return sum(max(map(len, column)) + 3 for column in zip(header, *rows, strict=True)) + 1


def markdown_table(evaluations: Sequence[Evaluation]) -> str:
    header, rows = cells(evaluations)
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = ["| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in (header, rule, *rows)]
    return "\n".join(lines) + "\n"


def table_data(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Return the table as plain data: one entry for each evaluation, with its ``gain`` over the first."""
    out = []
    for e in evaluations:
        entry = e.as_dict()
        if e is not evaluations[0]:
            entry["gain"] = {"over": evaluations[0].name, **asdict(compare(evaluations[0], e))}
        out.append(entry)
    return out
