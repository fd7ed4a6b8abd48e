"""Summarize an evaluation: means with standard errors, by group, and the paired difference of two. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

GROUP_COLUMNS = ("benchmark", "skill")
"""Metadata columns of questions by which scores are grouped, where the questions have them."""

TOO_LONG = "too_long"


@dataclass(frozen=True)
class Row:
    """One question's answer.

    score: 1.0, 0.0, or None where the verdict is missing. parsed: False where a rule found no answer to compare.
    finish_reason: "length" for an answer cut at the limit, ``TOO_LONG`` for a question that is too long to be answered.
    groups: the values of ``GROUP_COLUMNS``.
    """

    question_id: str
    question: str
    answer: str
    text: str
    finish_reason: str = "stop"
    tokens: int | None = None
    score: float | None = None
    parsed: bool = True
    asked_judge: bool = False
    cause: str = ""
    explanation: str = ""
    groups: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """The figures of a set of answers.

    n: the number of questions. score: the mean over known scores, in [0, 1]; None without any. standard_error: that of
    the mean, from the sample variance; None below two known scores. unparsed, unknown, cut: counts (see ``Row``).
    """

    n: int
    score: float | None
    standard_error: float | None
    unparsed: int
    unknown: int
    cut: int


@dataclass(frozen=True)
class Evaluation:
    """The scores of one checkpoint. groups: column -> value -> summary. group_means: column -> unweighted mean of its
    groups' scores, as a table of benchmarks is averaged."""

    name: str
    checkpoint: str
    summary: Summary
    groups: dict[str, dict[str, Summary]]
    group_means: dict[str, float]
    rows: list[Row]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data without the rows."""
        return {
            "name": self.name,
            "checkpoint": self.checkpoint,
            **asdict(self.summary),
            "group_means": self.group_means,
            "groups": {c: {v: asdict(s) for v, s in by.items()} for c, by in self.groups.items()},
        }


@dataclass(frozen=True)
class Comparison:
    """The difference b - a on the n questions whose score is known in both. standard_error: that of the mean; None below
    two questions. better, worse: the number of questions on which b scores more, or less."""

    n: int
    difference: float | None
    standard_error: float | None
    better: int
    worse: int


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean and its standard error sqrt(sample variance / n)."""
    if not values:
        return None, None
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def summarize(rows: Iterable[Row]) -> Summary:
    rows = list(rows)
    score, error = mean_and_error([r.score for r in rows if r.score is not None])
    return Summary(
        n=len(rows),
        score=score,
        standard_error=error,
        unparsed=sum(not r.parsed for r in rows),
        unknown=sum(r.score is None for r in rows),
        cut=sum(r.finish_reason == "length" for r in rows),
    )


def build_evaluation(name: str, checkpoint: str, rows: Sequence[Row]) -> Evaluation:
    """Build an evaluation from its rows."""
    groups: dict[str, dict[str, Summary]] = {}
    for column in GROUP_COLUMNS:
        values = dict.fromkeys(r.groups[column] for r in rows if column in r.groups)
        if values:
            groups[column] = {v: summarize(r for r in rows if r.groups.get(column) == v) for v in values}
    means: dict[str, float] = {}
    for column, by_value in groups.items():
        mean, _ = mean_and_error([s.score for s in by_value.values() if s.score is not None])
        if mean is not None:
            means[column] = mean
    return Evaluation(name, checkpoint, summarize(rows), groups, means, list(rows))


def groups_of(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the groups of a question, by column."""
    return {c: str(metadata[c]) for c in GROUP_COLUMNS if metadata.get(c) not in (None, "")}


def compare(a: Evaluation, b: Evaluation) -> Comparison:
    """Compare b with a on the same questions. Pairing removes the difficulty of the questions from the error, so that a
    small gain can be distinguished from noise even where two separate standard errors overlap."""
    first = {r.question_id: r.score for r in a.rows}
    differences = [
        r.score - before for r in b.rows if r.score is not None and (before := first.get(r.question_id)) is not None
    ]
    mean, error = mean_and_error(differences)
    return Comparison(len(differences), mean, error, sum(d > 0 for d in differences), sum(d < 0 for d in differences))
