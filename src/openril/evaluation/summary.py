"""What an evaluation says: means with standard errors, by group, and the paired difference of two. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

GROUP_COLUMNS = ("benchmark", "skill")
"""Metadata columns of questions by which scores are grouped where they are present."""


@dataclass(frozen=True)
class Row:
    """One question's answer. score: 1.0, 0.0, or None where no verdict could be had. parsed: False where a rule found
    no answer to compare. finish_reason: "length" for an answer cut at the limit. groups: values of ``GROUP_COLUMNS``.
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
    """n: questions. score: mean over those whose score is known, in [0, 1]; None where none is. standard_error: of that
    mean, from the sample variance; None below two known scores. unparsed, unknown, cut: counts (see ``Row``)."""

    n: int
    score: float | None
    standard_error: float | None
    unparsed: int
    unknown: int
    cut: int


@dataclass(frozen=True)
class Evaluation:
    """Scores of one checkpoint. name, checkpoint: what was evaluated. groups: column -> value -> summary. group_means:
    column -> unweighted mean of its groups' scores (as a table of benchmarks is averaged)."""

    name: str
    checkpoint: str
    summary: Summary
    groups: dict[str, dict[str, Summary]]
    group_means: dict[str, float]
    rows: list[Row]

    def as_dict(self) -> dict[str, Any]:
        """Plain data without the rows."""
        return {
            "name": self.name,
            "checkpoint": self.checkpoint,
            **asdict(self.summary),
            "group_means": self.group_means,
            "groups": {c: {v: asdict(s) for v, s in by.items()} for c, by in self.groups.items()},
        }


@dataclass(frozen=True)
class Comparison:
    """b - a on the n questions whose score is known in both. standard_error: of the mean difference; None below two
    questions. better, worse: questions on which b scores more, or less."""

    n: int
    difference: float | None
    standard_error: float | None
    better: int
    worse: int


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean, and sqrt(sample variance / n)."""
    if not values:
        return None, None
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def summarise(rows: Iterable[Row]) -> Summary:
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
    """An evaluation from its rows."""
    groups: dict[str, dict[str, Summary]] = {}
    for column in GROUP_COLUMNS:
        values = dict.fromkeys(r.groups[column] for r in rows if column in r.groups)
        if values:
            groups[column] = {v: summarise(r for r in rows if r.groups.get(column) == v) for v in values}
    means: dict[str, float] = {}
    for column, by_value in groups.items():
        mean, _ = mean_and_error([s.score for s in by_value.values() if s.score is not None])
        if mean is not None:
            means[column] = mean
    return Evaluation(name, checkpoint, summarise(rows), groups, means, list(rows))


def groups_of(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The groups a question belongs to."""
    return {c: str(metadata[c]) for c in GROUP_COLUMNS if metadata.get(c) not in (None, "")}


def compare(a: Evaluation, b: Evaluation) -> Comparison:
    """b against a on the same questions. Pairing takes the questions' difficulty out of the error, so that a gain of a
    few questions can be told from noise where two separate standard errors would overlap."""
    first = {r.question_id: r.score for r in a.rows}
    differences = [
        r.score - before for r in b.rows if r.score is not None and (before := first.get(r.question_id)) is not None
    ]
    mean, error = mean_and_error(differences)
    return Comparison(len(differences), mean, error, sum(d > 0 for d in differences), sum(d < 0 for d in differences))
