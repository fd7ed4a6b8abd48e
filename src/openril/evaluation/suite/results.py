"""Scores of benchmarks: means over strata with standard errors, and paired differences. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from openril.evaluation.summary import mean_and_error

INTERVAL = 1.96
"""Half width of a 95% interval in standard errors."""


@dataclass(frozen=True)
class Scored:
    """One scored unit: a question, or the circular copies of a question of MMBench.

    id: unique within the benchmark. score: in [0, 1], an answer that cannot be read counting as wrong; None if it is
    unknown because the judge failed or the prompt was too long. lmms_eval: what lmms-eval gives for it, its random letters
    and its zeros for failed judgements included. parsed: False if the task's parser found no answer. stratum: see
    ``Benchmark.strata``.
    """

    id: str
    score: float | None
    lmms_eval: float
    parsed: bool = True
    stratum: str = ""
    cause: str = ""


@dataclass(frozen=True)
class BenchmarkResult:
    """The result of a checkpoint on one benchmark, in percent.

    score: unparsed answers are wrong, unknown ones are left out. lmms_eval_score: the figure that lmms-eval prints.
    failed: why there is no score, or "".
    """

    task: str
    column: str
    n: int
    score: float | None
    standard_error: float | None
    lmms_eval_score: float | None
    unparsed: int = 0
    unknown: int = 0
    cut: int = 0
    failed: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def stratified(values: Iterable[tuple[str, float]]) -> tuple[float | None, float | None]:
    """Return the unweighted mean of the strata's means and its standard error, from pairs (stratum, value).

    The error is sqrt(sum of the strata's squared errors) / S over S strata. A stratum with one value has no error of its
    mean, and then there is none of the whole.
    """
    strata: dict[str, list[float]] = {}
    for stratum, value in values:
        strata.setdefault(stratum, []).append(value)
    if not strata:
        return None, None
    figures = [mean_and_error(v) for v in strata.values()]
    mean = math.fsum(m for m, _ in figures if m is not None) / len(figures)
    errors = [e for _, e in figures]
    if any(e is None for e in errors):
        return mean, None
    return mean, math.sqrt(math.fsum(e * e for e in errors if e is not None)) / len(figures)


def summarize(
    task: str,
    column: str,
    scored: Sequence[Scored],
    lmms_eval_score: float,
    *,
    cut: int = 0,
    max_unknown_share: float = 0.0,
    details: dict[str, Any] | None = None,
) -> BenchmarkResult:
    """Return the result of a benchmark. It has no score if more than ``max_unknown_share`` of it is unknown."""
    unknown = [s for s in scored if s.score is None]
    failed = ""
    if not scored:
        failed = "there are no questions"
    elif len(unknown) > max_unknown_share * len(scored) or len(unknown) == len(scored):
        failed = f"{len(unknown)} of {len(scored)} scores are unknown; the first: {unknown[0].cause}"
    mean, error = stratified((s.stratum, s.score) for s in scored if s.score is not None)
    return BenchmarkResult(
        task=task,
        column=column,
        n=len(scored),
        score=None if failed or mean is None else 100 * mean,
        standard_error=None if failed or error is None else 100 * error,
        lmms_eval_score=lmms_eval_score,
        unparsed=sum(not s.parsed for s in scored),
        unknown=len(unknown),
        cut=cut,
        failed=failed,
        details=details or {},
    )


def paired_difference(before: Sequence[Scored], after: Sequence[Scored]) -> dict[str, Any]:
    """Return the difference after - before on the units that are known in both, in percentage points, with its standard
    error and 95% interval."""
    known = {s.id: s.score for s in before if s.score is not None}
    pairs = [(s.stratum, s.score - known[s.id]) for s in after if s.score is not None and s.id in known]
    mean, error = stratified(pairs)
    if mean is None:
        return {"n": 0, "difference": None, "standard_error": None, "interval": None}
    interval = None if error is None else [100 * (mean - INTERVAL * error), 100 * (mean + INTERVAL * error)]
    return {
        "n": len(pairs),
        "difference": 100 * mean,
        "standard_error": None if error is None else 100 * error,
        "interval": interval,
    }


def mean_score(results: Mapping[str, BenchmarkResult], tasks: Sequence[str]) -> float | None:
    """Return the unweighted mean over the benchmarks, or None if one is missing or has failed."""
    scores = [results[t].score if t in results else None for t in tasks]
    known = [s for s in scores if s is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(tasks) else None


def mean_difference(differences: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, Any] | None:
    """Return the mean of the benchmarks' paired differences with its interval, or None if one is missing."""
    found = [differences.get(t) or {} for t in tasks]
    values, errors = [d.get("difference") for d in found], [d.get("standard_error") for d in found]
    if not found or any(v is None for v in values):
        return None
    mean = math.fsum(v for v in values if v is not None) / len(values)
    if any(e is None for e in errors):
        return {"difference": mean, "standard_error": None, "interval": None}
    error = math.sqrt(math.fsum(e * e for e in errors if e is not None)) / len(errors)
    return {
        "difference": mean,
        "standard_error": error,
        "interval": [mean - INTERVAL * error, mean + INTERVAL * error],
    }
