"""Measure finished runs from their own files: training time, the judge's agreement, and the students' response styles."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from openril.data.reading import read_questions
from openril.recipe.schema import Recipe
from openril.records import STUDENT, Question
from openril.rewards import rules
from openril.storage import read_jsonl
from playground.world import style_of

STYLES = {None: "direct", "c": "own", "a": "a", "b": "b"}
"""Response styles by ``style_of``: an answer alone, or a derivation in the student's third style or a teacher's style."""

Judged = tuple[Question, str, float | None]
"""Question, response and verdict."""


def exactly_right(question: Question, text: str) -> bool:
    return rules.score(question.rule or "auto", question, text) == 1.0


def agreement(items: Iterable[Judged]) -> dict[str, Any]:
    """Compare verdicts with the exact rule.

    Returns:
        The number of known verdicts, the number of unknown ones (which count nowhere else), the share of the known ones
        that agree with the rule, the share of the responses wrong by the rule that the judge called right
        (wrongly_right), and the reverse (wrongly_wrong). Shares of nothing are None.
    """
    counts = Counter[tuple[bool, bool]]()
    unknown = 0
    right: dict[tuple[str, str], bool] = {}
    for question, text, verdict in items:
        if verdict is None:
            unknown += 1
            continue
        key = (question.id, text)
        if key not in right:
            right[key] = exactly_right(question, text)
        counts[right[key], verdict >= 0.5] += 1
    num_wrong, num_right = (counts[truth, False] + counts[truth, True] for truth in (False, True))
    return {
        "verdicts": num_wrong + num_right,
        "unknown": unknown,
        "agreement": share(counts[False, False] + counts[True, True], num_wrong + num_right),
        "wrongly_right": share(counts[False, True], num_wrong),
        "wrongly_wrong": share(counts[True, False], num_right),
    }


def share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def mean_validation_score(folder: Path) -> float | None:
    """Return the mean of a run's scores on validation questions during training, or None without any."""
    scores = [row["eval/score"] for row in read_jsonl(folder / "metrics.jsonl") if "eval/score" in row]
    return sum(scores) / len(scores) if scores else None


def rollouts(run: Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield the logged steps of a run, each with its responses."""
    for path in sorted((run / "rollouts").glob("step_*.jsonl")):
        yield int(path.stem.split("_")[1]), read_jsonl(path)


def student_styles(rows: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Count the styles of the student's samples."""
    return Counter(STYLES[style_of(row["text"])] for row in rows if row["source"] == STUDENT)


def measure_loop(recipe: Recipe) -> dict[str, Any]:
    """Measure a run of `ril train`.

    Returns:
        Its steps, the median seconds of one (without evaluations), the shares of the response styles by step ("ways"),
        and the judge's agreement on the responses in ``rollouts/``, for the student's samples and the teachers' responses.
    """
    steps = [row for row in read_jsonl(recipe.run_path / "metrics.jsonl") if "time/step" in row]
    seconds = [row["time/step"] - row.get("time/eval", 0.0) for row in steps]
    by_id = {q.id: q for q in read_questions(recipe.data, "train")}
    styles: dict[str, dict[str, float]] = {}
    judged: dict[str, list[Judged]] = {"student": [], "teachers": []}
    for step, rows in rollouts(recipe.run_path):
        counts = student_styles(rows)
        styles[str(step)] = {style: counts[style] / counts.total() for style in STYLES.values() if counts}
        for row in rows:
            side = "student" if row["source"] == STUDENT else "teachers"
            judged[side].append((by_id[row["question_id"]], row["text"], row["verdict"]))
    out: dict[str, Any] = {"steps": len(seconds), "seconds_per_step": median(seconds), "ways": styles}
    if recipe.answer_kind == "judge":
        out["judge"] = {side: agreement(items) for side, items in judged.items() if items}
    return out


def measure_sft(recipe: Recipe) -> dict[str, Any]:
    """Measure a run of `ril sft`; for rejection sampling also the verdicts that chose its text."""
    rows = read_jsonl(recipe.sft_student_path.parent / "metrics.jsonl")
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    out: dict[str, Any] = {"steps": len(seconds), "seconds_per_step": median(seconds)}
    if recipe.sft.targets == "judged_responses":
        out |= measure_cache(recipe, recipe.sft.sources or [t.name for t in recipe.teachers])
    return out


def cached_responses(recipe: Recipe, sources: Sequence[str]) -> dict[str, list[Judged]]:
    """Return the cached responses to the training questions by source, with the verdicts that the recipe collects."""
    from openril.responses.cache import ResponseCache
    from openril.rewards.answers import known_answers

    questions = read_questions(recipe.data, "train")
    loaded = ResponseCache.open(recipe.cache_path).load(
        questions, list(sources), recipe.collect.num_responses, check_hashes=False
    )
    out: dict[str, list[Judged]] = {}
    for name in sources:
        items = [(q, r.text) for q in questions for r in loaded.responses_for(q.id, name)]
        judged = recipe.collect.judge_responses
        scores = [answer.score for answer in known_answers(recipe)(items)] if judged else [None] * len(items)
        out[name] = [(question, text, score) for (question, text), score in zip(items, scores, strict=True)]
    return out


def measure_cache(recipe: Recipe, sources: Sequence[str]) -> dict[str, Any]:
    """Return the share of right responses by source, and the agreement of the cached verdicts if there are any."""
    cached = cached_responses(recipe, list(sources) or [*(t.name for t in recipe.teachers), STUDENT])
    right = {
        name: share(sum(exactly_right(q, text) for q, text, _ in items), len(items)) for name, items in cached.items()
    }
    out: dict[str, Any] = {"right": right}
    if recipe.collect.judge_responses and recipe.rewards.answer.kind == "judge":
        out["judge"] = {"cached": agreement(item for items in cached.values() for item in items)}
    return out


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def seconds_of(done: dict[str, Any]) -> float | None:
    """Return the seconds of training as the median step times the steps, so that a pause does not count."""
    step = done.get("seconds_per_step")
    return None if step is None else step * done["steps"]
