"""Read the rollouts of a run folder as groups (docs/rollouts.md), of this version and of earlier ones.

Every text in them was written by a model, a data set or a user. It stays plain text here; the page escapes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from openril.errors import DataError
from openril.records import STUDENT

FLAGS = (
    "all_right", "all_wrong", "zero_advantage", "d_fooled", "d_judge_disagree", "verdict_unknown", "cut", "mixed",
)  # fmt: skip
"""The flags of groups, in the order of the page (docs/report.md)."""
SKILL_COLUMNS = ("skill", "benchmark", "category")
"""Columns of a question's metadata of which the first that it has is its skill."""

Row = dict[str, Any]
"""One response (docs/rollouts.md)."""


def step_files(run_dir: Path) -> list[tuple[int, Path]]:
    """Return the logged steps of a run and their files, in order."""
    found = [(re.fullmatch(r"step_(\d+)", p.stem), p) for p in (run_dir / "rollouts").glob("step_*.jsonl")]
    return sorted((int(match[1]), path) for match, path in found if match)


def read_step(path: Path) -> list[Row]:
    """Return the rows of a step's file. Raises DataError, naming file and line, for a line that is not a response."""
    with open(path, "rb") as file:
        return [read_row(line, f"{path}:{number}") for number, line in enumerate(file, 1)]


def read_row(line: bytes, where: str) -> Row:
    """Return one response, with every field of the current version. Raises DataError, naming ``where``."""
    try:
        row = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: expected one response as JSON, got {str(line[:60])[2:-1]!r} ({e}). {_FIX}") from e
    missing = [k for k in ("step", "question_id", "source", "text") if k not in row] if isinstance(row, dict) else []
    if not isinstance(row, dict) or missing or not isinstance(row["step"], int):
        what = f"no {', '.join(missing)}" if missing else str(line[:60])[2:-1]
        raise DataError(f"{where}: expected a response with step, question_id, source and text, got {what}. {_FIX}")
    return {"schema": 1, "group": None, **row}


_FIX = "Restore the file or remove it."


def split_groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield the rows of each group of a step. Version 1 does not number groups: one ends where the question changes, or
    where a response of the same source and index comes again."""
    group: list[Row] = []
    seen: set[Any] = set()
    for row in rows:
        key = (row["source"], row.get("index"))
        numbered = row["group"] is not None
        last = group[-1] if group else row
        same = row["group"] == last["group"] if numbered else key not in seen
        if group and not (same and row["question_id"] == last["question_id"]):
            yield group
            group, seen = [], set()
        group.append(row)
        seen.add(key)
    if group:
        yield group


def build_groups(rows: Sequence[Row], run: int = 0, *, most_chars: int | None = None) -> list[dict[str, Any]]:
    """Return the groups of one step as the report's ``Group`` objects (docs/report.md), flags included.

    Args:
        rows: All rows of the step.
        run: The number of the run in the report.
        most_chars: Characters after which texts are cut; None keeps them whole.
    """
    groups = [build_group(members, run, position, most_chars) for position, members in enumerate(split_groups(rows))]
    mixed = len({bool(g["images"] or g["missing_images"]) for g in groups}) > 1
    for group in groups:
        group["flags"] = group_flags(group, mixed=mixed)
    return groups


def build_group(rows: Sequence[Row], run: int, position: int, most_chars: int | None = None) -> dict[str, Any]:
    """Return one group without its flags. position: its place in the step."""
    first = rows[0]
    names = [text(name) for name in as_list(first.get("images"))]
    hashes = as_list(first.get("image_hashes")) or [None] * len(names)
    members = [build_member(row, most_chars) for row in rows]
    question, left_out = cut(text(first.get("question")), most_chars)
    truths = first["answers"] if "answers" in first else [first.get("answer", "")]
    return {
        "run": run,
        "id": f"{run}-{first['step']}-{position}",
        "step": first["step"],
        "question_id": text(first["question_id"]),
        "question": question,
        "question_cut": left_out,
        "choices": [text(choice) for choice in as_list(first.get("choices"))],
        "truths": [text(truth) for truth in as_list(truths)],
        "rule": text(first["rule"]) if first.get("rule") else None,
        "skill": skill_of(first),
        "images": [h for h in hashes if is_hash(h)],
        "image_names": [name for name, h in zip(names, hashes, strict=False) if is_hash(h)],
        "missing_images": [name for name, h in zip(names, hashes, strict=False) if not is_hash(h)],
        "flags": [],
        "longest": max((m["tokens"] or m["learned"] or 0 for m in members), default=0),
        "members": members,
    }


def build_member(row: Row, most_chars: int | None = None) -> dict[str, Any]:
    """Return a response as the report's ``Member`` object. ``cut``: characters left out of its text."""
    body, left_out = cut(text(row["text"]), most_chars)
    explanation, explanation_cut = cut(text(row.get("explanation") or row.get("cause") or ""), most_chars)
    rewards = row.get("rewards")
    return {
        "source": text(row["source"]),
        "index": whole(row.get("index")),
        "text": body,
        "cut": left_out,
        "extracted": None if row.get("extracted") is None else cut(text(row["extracted"]), 200)[0],
        "student_prob": finite(row.get("student_prob")),
        "similarity": finite(row.get("similarity")),
        "verdict": finite(row.get("verdict")),
        "judged": bool(row.get("judged")),
        "explanation": explanation or None,
        "explanation_cut": explanation_cut,
        "rule_score": finite(row.get("rule_score")),
        "rewards": {text(k): finite(v) for k, v in rewards.items()} if isinstance(rewards, dict) else {},
        "reward": finite(row.get("reward")),
        "advantage": finite(row.get("advantage")) or 0.0,
        "tokens": whole(row.get("tokens")),
        "finish_reason": text(row.get("finish_reason", "stop")),
        "learned": whole(row.get("learned")),
    }


def group_flags(group: Mapping[str, Any], *, mixed: bool = False) -> list[str]:
    """Return the flags of a group, in the order of ``FLAGS`` (docs/report.md defines them).

    Args:
        mixed: Whether its step holds questions with and without pictures.
    """
    members = group["members"]
    own = [m["verdict"] for m in members if m["source"] == STUDENT]
    known = bool(own) and None not in own
    holds = {
        "all_right": known and all(v >= 0.5 for v in own),
        "all_wrong": known and all(v < 0.5 for v in own),
        "zero_advantage": all(abs(m["advantage"]) < 1e-9 for m in members),
        "d_fooled": fooled(members),
        "d_judge_disagree": disagree(members),
        "verdict_unknown": any("answer" in m["rewards"] and m["verdict"] is None for m in members),
        "cut": any(m["finish_reason"] == "length" for m in members),
        "mixed": mixed,
    }
    return [flag for flag in FLAGS if holds[flag]]


def fooled(members: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the discriminator takes half of the student's responses or more for a teacher's.

    A single one would say little: at chance, nearly every group has one.
    """
    own = [m["student_prob"] for m in members if m["source"] == STUDENT and m["student_prob"] is not None]
    return bool(own) and 2 * sum(p < 0.5 for p in own) >= len(own)


def mistaken(member: Mapping[str, Any]) -> bool:
    """Return whether the discriminator takes a student's response for a teacher's, or a teacher's for the student's."""
    probability = member["student_prob"]
    if probability is None or probability == 0.5:
        return False
    return bool((probability > 0.5) != (member["source"] == STUDENT))


def disagree(members: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the discriminator takes a wrong response of the student more for a teacher's than a right one.

    Opposite rewards of a single response would say little: a right response that is recognized as the student's has them.
    """
    own = [m for m in members if m["source"] == STUDENT and m["student_prob"] is not None and m["verdict"] is not None]
    right = [m["student_prob"] for m in own if m["verdict"] >= 0.5]
    wrong = [m["student_prob"] for m in own if m["verdict"] < 0.5]
    return bool(right and wrong) and min(wrong) < max(right)


def skill_of(row: Row) -> str | None:
    """Return the skill of a row's question, or None."""
    metadata = row.get("metadata")
    found = (metadata[c] for c in SKILL_COLUMNS if metadata.get(c)) if isinstance(metadata, dict) else iter(())
    value = next(found, None)
    return None if value is None else cut(text(value), 100)[0]


def text(value: Any) -> str:
    """Return a value as text that UTF-8 can hold: a lone surrogate becomes a question mark."""
    return str(value).encode("utf-8", "replace").decode() if value is not None else ""


def cut(value: str, most_chars: int | None) -> tuple[str, int]:
    """Return the beginning of a text and how many characters are left out."""
    if most_chars is None or len(value) <= most_chars:
        return value, 0
    return value[:most_chars], len(value) - most_chars


def finite(value: Any) -> float | None:
    """Return a number, or None for anything else: a page cannot read NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 else None


def whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53 else None


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def is_hash(value: Any) -> bool:
    """Return whether a value is a picture's hash. It becomes the name of a file, so nothing else may pass."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32}", value) is not None


def sources_of(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the sources of the members, the student first."""
    found = {m["source"]: None for g in groups for m in g["members"]}
    return sorted(found, key=lambda name: (name != STUDENT, name))
