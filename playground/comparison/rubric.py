"""A judge with a rubric, for the regime in which a response has no one right wording.

The rubric asks for two things: the right answer, and the facts that lead to it. The facts are the words that the world's
three styles of writing a derivation share, so that they favor no style: names, numbers, colors and places. A response may
name them in any order and in any sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from openril.records import Question
from openril.storage import read_jsonl

SHARE = 0.75
"""Share of the facts that a response has to name."""

Score = Callable[[str, Question, str], float | None]


def words(text: str) -> set[str]:
    """Return the words and numbers of a text; a plural counts as its singular."""
    found = re.findall(r"\w+", text.lower())
    return {word[:-1] if len(word) > 3 and word.endswith("s") else word for word in found}


def facts(row: Mapping[str, Any]) -> set[str]:
    """Return the facts of a row of the world: the words that all styles of its derivation share, without its answer."""
    styles = [words(row[f"derivation_{style}"]) for style in "abc"]
    return set.intersection(*styles) - words("the answer is 答案 是") - words(row["direct_answer"])


def read_facts(world: Path) -> dict[str, set[str]]:
    """Return the facts of every question of a world, by the question's id."""
    files = [world / f"{split}.jsonl" for split in ("train", "validation", "test")]
    return {row["id"]: facts(row) for path in files for row in read_jsonl(path)}


def by_rubric(score: Score, facts_of: Mapping[str, set[str]]) -> Score:
    """Return a judge that lets only those right responses count that name ``SHARE`` of their question's facts.

    score: Whether the answer is right.
    """

    def judged(rule: str, question: Question, text: str) -> float | None:
        verdict = score(rule, question, text)
        needed = facts_of[question.id]
        named = len(needed & words(text))
        return verdict if verdict != 1.0 or named >= SHARE * len(needed) else 0.0

    return judged
