"""Cached teacher responses that are judged right, for ``train.teacher_draw: judged_right`` and ``train.retry``.

The verdicts are made by ``ril collect`` (``collect.judge_responses``); answer rules are run here. What is right is
written to the run folder when a run starts and read from there when it continues, because a verdict that becomes known
in between would change what a group draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from openril.errors import CacheError, StateError
from openril.recipe.schema import Recipe
from openril.records import Question, Response
from openril.responses.loaded import LoadedResponses
from openril.rewards.answers import NO_TRUTH, known_answers
from openril.storage import read_jsonl, write_jsonl

QUESTIONS_AT_ONCE = 256


def right_responses_file(recipe: Recipe) -> Path:
    return recipe.run_path / "right_responses.jsonl"


def write_right_responses(
    recipe: Recipe, questions: Sequence[Question], loaded: LoadedResponses, say: Callable[[str], None]
) -> None:
    """Write for every question which cached responses are right and which have no verdict, by teacher and index.

    Args:
        say: Receives the counts.

    Raises:
        CacheError: More than ``judge.max_unknown_share`` of the responses have no verdict. An unknown verdict is not a
            wrong one, but it makes no response right either.
    """
    score = known_answers(recipe)
    rows: list[dict[str, Any]] = []
    total = right = unknown = without = without_truth = 0
    for start in range(0, len(questions), QUESTIONS_AT_ONCE):
        part = questions[start : start + QUESTIONS_AT_ONCE]
        pairs = [(q, r) for q in part for t in loaded.sources for r in loaded.responses_for(q.id, t)]
        found: dict[str, dict[str, Any]] = {q.id: {"question_id": q.id, "right": {}, "unknown": {}} for q in part}
        for (q, r), answer in zip(pairs, score([(q, r.text) for q, r in pairs]), strict=True):
            if answer.cause == NO_TRUTH:
                without_truth += 1
                continue
            kind = "unknown" if answer.score is None else "right" if answer.score >= 1 else ""
            if kind:
                found[q.id][kind].setdefault(r.source, []).append(r.index)
            right += kind == "right"
            unknown += kind == "unknown"
        total += len(pairs)
        without += sum(not row["right"] for row in found.values())
        rows += found.values()
    if unknown > recipe.judge.max_unknown_share * (total - without_truth):
        raise CacheError(
            f"judge.max_unknown_share: the loop expects verdicts of cached responses, but {unknown} of {total} in"
            f" {recipe.cache_path} have none, and at most a share of {recipe.judge.max_unknown_share:g} may."
            " Set collect.judge_responses: true and run `ril collect`."
        )
    write_jsonl(right_responses_file(recipe), rows)
    say(
        f"{right} of {total} cached teacher responses are judged right, {unknown} have no verdict;"
        f" {without} of {len(questions)} questions have no right one"
        + (f", and {without_truth} responses answer questions without ground truth" if without_truth else "")
    )


def read_right_responses(recipe: Recipe) -> Callable[[Response], bool]:
    """Return whether a response was judged right when the run started. Raises StateError if the file is missing."""
    path = right_responses_file(recipe)
    if not path.exists():
        raise StateError(f"{path}: expected the file of the run that is continued. Restore it, or set another run_dir.")
    right = {
        (row["question_id"], source, index)
        for row in read_jsonl(path)
        for source, indices in row["right"].items()
        for index in indices
    }
    return lambda response: (response.question_id, response.source, response.index) in right
