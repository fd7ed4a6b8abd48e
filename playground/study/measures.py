"""What a finished job's own files say: how long it trained, how often its judge was right, how its student talks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from openril.data.reading import read_questions
from openril.recipe.schema import Recipe
from openril.records import STUDENT, Question
from openril.rewards import rules
from openril.storage import read_jsonl
from playground.world import style_of

WAYS = {None: "direct", "c": "own", "a": "a", "b": "b"}
"""What a student's sample is counted as, by its style: an answer alone, a derivation in a third manner, or in a teacher's."""


def agreement(items: Iterable[tuple[Question, str, float | None]]) -> dict[str, Any]:
    """(question, response, verdict) against the exact rule. agreement: share of the known verdicts that are the rule's;
    None without one. wrongly_right: of the responses that the rule calls wrong, those the judge called right;
    wrongly_wrong: the other way round. unknown: verdicts that could not be had, which are in none of these."""
    counts = {(truth, verdict): 0 for truth in (0, 1) for verdict in (0, 1)}
    unknown = 0
    for question, text, verdict in items:
        if verdict is None:
            unknown += 1
            continue
        truth = int(rules.score(question.rule or "auto", question, text) == 1.0)
        counts[truth, int(verdict >= 0.5)] += 1
    wrong, right = counts[0, 0] + counts[0, 1], counts[1, 0] + counts[1, 1]
    return {
        "verdicts": wrong + right,
        "unknown": unknown,
        "agreement": (counts[0, 0] + counts[1, 1]) / (wrong + right) if wrong + right else None,
        "wrongly_right": counts[0, 1] / wrong if wrong else None,
        "wrongly_wrong": counts[1, 0] / right if right else None,
    }


def on_the_way(folder: Path) -> float | None:
    """Mean of a run's scores on validation questions while it trained: how soon it got where it ended. None without any."""
    scores = [row["eval/score"] for row in read_jsonl(folder / "metrics.jsonl") if "eval/score" in row]
    return sum(scores) / len(scores) if scores else None


def of_loop(recipe: Recipe) -> dict[str, Any]:
    """Training seconds (evaluations on the way left out), the judge's agreement on the responses in ``rollouts/`` (the
    student's samples and the teachers' apart), and by step the shares of the ways in which the student talks."""
    steps = [row for row in read_jsonl(recipe.run_path / "metrics.jsonl") if "time/step" in row]
    seconds = [row["time/step"] - row.get("time/eval", 0.0) for row in steps]
    by_id = {q.id: q for q in read_questions(recipe.data, "train")}
    ways: dict[str, dict[str, float]] = {}
    judged: dict[str, list[tuple[Question, str, float | None]]] = {"student": [], "teachers": []}
    for path in sorted((recipe.run_path / "rollouts").glob("step_*.jsonl")):
        rows = read_jsonl(path)
        samples = [WAYS[style_of(row["text"])] for row in rows if row["source"] == STUDENT]
        ways[str(int(path.stem.split("_")[1]))] = {
            way: samples.count(way) / len(samples) for way in WAYS.values() if samples
        }
        for row in rows:
            side = "student" if row["source"] == STUDENT else "teachers"
            judged[side].append((by_id[row["question_id"]], row["text"], row["verdict"]))
    out: dict[str, Any] = {"steps": len(seconds), "seconds_per_step": median(seconds), "ways": ways}
    if recipe.answer_kind == "judge":
        out["judge"] = {side: agreement(items) for side, items in judged.items() if items}
    return out


def of_sft(recipe: Recipe) -> dict[str, Any]:
    """Training seconds, and for rejection sampling the agreement of the verdicts that chose its text."""
    rows = read_jsonl(recipe.sft_student_path.parent / "metrics.jsonl")
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    out: dict[str, Any] = {"steps": len(seconds), "seconds_per_step": median(seconds)}
    if recipe.sft.targets == "judged_responses":
        out |= of_cache(recipe, recipe.sft.sources or [t.name for t in recipe.teachers])
    return out


def of_cache(recipe: Recipe, sources: Sequence[str]) -> dict[str, Any]:
    """Agreement of the cached verdicts on the teachers' responses, and by source the share the exact rule calls right."""
    from openril.responses.cache import ResponseCache

    questions = read_questions(recipe.data, "train")
    names = list(sources) or [t.name for t in recipe.teachers] + [STUDENT]
    loaded = ResponseCache.open(recipe.cache_path).load(
        questions, names, recipe.collect.num_responses, check_hashes=False
    )
    items: list[tuple[Question, str, float | None]] = []
    right: dict[str, float] = {}
    for name in names:
        scores = []
        for question in questions:
            responses, verdicts = loaded.responses_for(question.id, name), loaded.verdicts_for(question.id, name)
            scores += [rules.score(question.rule or "auto", question, r.text) == 1.0 for r in responses]
            items += [(question, r.text, v) for r, v in zip(responses, verdicts, strict=True)]
        right[name] = sum(scores) / len(scores)
    out: dict[str, Any] = {"right": right}
    if recipe.collect.judge_responses and recipe.rewards.answer.kind == "judge":
        out["judge"] = {"cached": agreement(items)}
    return out


def median(values: Sequence[float]) -> float | None:
    ordered = sorted(values)
    if not ordered:
        return None
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def seconds_of(done: dict[str, Any]) -> float | None:
    """Seconds of training: the median step times the steps, so that a pause does not count."""
    step = done.get("seconds_per_step")
    return None if step is None else step * done["steps"]
