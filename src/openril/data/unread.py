"""Columns that are only metadata although they look like part of the question, and answers that may mean another one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from openril.data.columns import is_list, literal
from openril.data.reading import RowProblem
from openril.records import Question

_CONTEXT = ("context", "hint", "passage", "instruction", "input")
_IMAGE = re.compile(r"data:image/|\S+\.(?:png|jpe?g|webp|gif|bmp|tiff?)$", re.I)
_VIDEO = re.compile(r"\S+\.(?:mp4|avi|mov|mkv|webm|wav|mp3|flac|m4a)$", re.I)
_LINKED = re.compile(r"!\[[^\]]*\]\([^)\s]+\)|<img\s[^>]*\bsrc\s*=", re.I)


def unread_warnings(questions: Sequence[Question], mapping: Mapping[str, str]) -> list[RowProblem]:
    """Return one warning for each column and kind, at its first row.

    Args:
        mapping: ``data.columns``. What it sets is taken as intended.
    """
    found: list[RowProblem] = []

    def add(kind: str, rows: Sequence[Question], cause: str) -> None:
        if rows:
            cause = f"{cause}; rows like this: {len(rows):,}"
            found.append(RowProblem(kind, rows[0].origin, rows[0].id, cause, "warning"))

    without = [q for q in questions if not q.images]
    for name in dict.fromkeys(name for q in questions for name in q.metadata):
        if name in _CONTEXT and "context" not in mapping:
            cause = (
                f"no model sees the column {name}. Set data.columns: {{context: {name}}} to put it before the question"
            )
            add("unread column", [q for q in questions if q.metadata.get(name)], f'{cause}, or {{context: ""}}')
        if mapping.get("images") != "":
            looks: Callable[[re.Pattern[str]], list[Question]]
            looks = lambda form, name=name: [q for q in without if _looks(form, q.metadata.get(name))]  # type: ignore[misc] # noqa: E731
            fix = f"Set data.columns: {{images: {name}}}"
            add("unread image", looks(_IMAGE), f"no image, although the column {name} looks like one. {fix}")
            add("unread video", looks(_VIDEO), f"the column {name} looks like a video or a sound, which is not read")
    cause = "no image, although the text links to one. Write <img>path</img>, or name it in the column images"
    add("unread image", [q for q in without if _LINKED.search(q.question)], cause)
    cause = "the answer is a list in one text. If each item is right alone, map data.columns.answers to its column"
    add(
        "answer is a list",
        [q for q in questions if q.answer[1:2] in tuple("'\"") and is_list(literal(q.answer))],
        cause,
    )
    several = [q for q in questions if q.other_answers]
    if len(several) > 1 and len({len(q.answers) for q in several}) == 1 and len(several[0].answers) > 2:
        cause = (
            f"{len(several[0].answers)} accepted answers, as in every row with several. If they are choices, set"
            " data.columns: {choices: answers}"
        )
        add("answers like choices", several, cause)
    numbers = [q for q in questions if q.choices and q.answer.isdecimal() and q.answer in q.choices]
    if all(int(q.answer) < len(q.choices) for q in numbers):  # otherwise some answer can only be a text
        cause = (
            "the answer is the text of one choice and could be the place of another. It is read as the text; if answers"
            " count the choices, set data.columns: {answer_index: ...} (from 0) or {answer_number: ...} (from 1)"
        )
        add("ambiguous answer", [q for q in numbers if q.choices[int(q.answer)] != q.answer], cause)
    return found


def _looks(form: re.Pattern[str], value: Any) -> bool:
    """Return whether a value, or the first of a list, is a file of the form. Bytes are taken for an image."""
    value = value[0] if is_list(value) and value else value
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return form is _IMAGE
    return isinstance(value, str) and bool(form.match(value[:300]))
