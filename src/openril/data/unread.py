"""Columns that are only metadata although they look like part of the question, and answers that may mean another one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from openril.data.columns import is_list, literal
from openril.data.reading import RowProblem
from openril.records import Question

CONTEXT = ("context", "hint", "passage", "instruction", "input")
_IMAGE_TEXT = re.compile(r"data:image/|\S+\.(?:png|jpe?g|webp|gif|bmp|tiff?)$", re.I)
_LINKED = re.compile(r"!\[[^\]]*\]\([^)\s]+\)|<img\s[^>]*\bsrc\s*=", re.I)


def unread_warnings(questions: Sequence[Question], mapping: Mapping[str, str]) -> list[RowProblem]:
    """Return one warning for each column and kind, at its first row.

    Args:
        mapping: ``data.columns``. What it sets is taken as intended.
    """
    names = dict.fromkeys(name for q in questions for name in q.metadata)
    found: list[RowProblem] = []
    for name in names if "context" not in mapping else ():
        if name in CONTEXT:
            cause = (
                f"no model sees the column {name}. Set data.columns: {{context: {name}}} to put it before the question"
            )
            fix = f'{cause}, or {{context: ""}}'
            found += _first(questions, lambda q, name=name: bool(q.metadata.get(name)), "unread column", fix)  # type: ignore[misc]
    for name in names if "images" not in mapping else ():
        cause = f"no image, although the column {name} looks like one. Set data.columns: {{images: {name}}}"
        is_image: Callable[[Question], bool] = lambda q, name=name: not q.images and _is_image(q.metadata.get(name))  # type: ignore[misc] # noqa: E731
        found += _first(questions, is_image, "unread image", cause)
    cause = "no image, although the text links to one. Write <img>path</img>, or name it in the column images"
    found += _first(questions, lambda q: not q.images and bool(_LINKED.search(q.question)), "unread image", cause)
    cause = "the answer is a list in one text. If each item is right alone, map data.columns.answers to its column"
    found += _first(
        questions, lambda q: is_list(literal(q.answer)) and q.answer[1:2] in "'\"", "answer is a list", cause
    )
    numbers = [q for q in questions if q.choices and q.answer.isdecimal() and q.answer in q.choices]
    if all(int(q.answer) < len(q.choices) for q in numbers):  # otherwise some answer can only be a text
        cause = (
            "the answer is the text of one choice and could be the place of another. It is read as the text; if answers"
            " count the choices, set data.columns: {answer_index: ...} (from 0) or {answer_number: ...} (from 1)"
        )
        found += _first(numbers, lambda q: q.choices[int(q.answer)] != q.answer, "ambiguous answer", cause)
    return found


def _first(
    questions: Sequence[Question], is_one: Callable[[Question], bool], kind: str, cause: str
) -> Iterator[RowProblem]:
    rows = [q for q in questions if is_one(q)]
    if rows:
        yield RowProblem(kind, rows[0].origin, rows[0].id, f"{cause}; rows like this: {len(rows):,}", "warning")


def _is_image(value: Any) -> bool:
    value = value[0] if is_list(value) and value else value
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    return isinstance(value, bytes) or (isinstance(value, str) and bool(_IMAGE_TEXT.match(value[:300])))
