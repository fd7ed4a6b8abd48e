"""Rows that look right and are not: each kind is named, and rows that are right are not."""

from __future__ import annotations

from typing import Any

import pytest

from openril.data.row_checks import also_in_train, row_warnings, set_problems, summaries
from openril.records import ImageSource, Question


def question(answer: str = "red", text: str = "Which color?", id: str = "a", line: int = 1, **more: Any) -> Question:
    return Question(id, text, answer, origin=f"q.jsonl:{line}", **more)


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        (question("cat", choices=("cat",)), "single choice", "at least two"),
        (question("cat", choices=("cat", " ", "dog")), "empty choice", "nothing for B"),
        (question("cat", choices=("cat", "dog", "Dog ")), "duplicate choices", "'dog' as B and C"),
        (question("nan"), "missing value as answer", "nan"),
        (question("None"), "missing value as answer", "None"),
        (question("0.30000000000000004"), "float noise", " 0.3 "),
        (question("3.0999999046325684"), "float noise", " 3.1 "),  # the float32 next to 3.1
        (question("B"), "letter without options", "letter B"),
        (question("(C)", "Look and choose."), "letter without options", "letter (C)"),
    ],
)
def test_a_suspicious_row_is_named(row: Question, kind: str, words: str) -> None:
    (found,) = row_warnings(row)
    assert (found.kind, found.level, found.origin) == (kind, "warning", "q.jsonl:1") and words in found.cause


@pytest.mark.parametrize(
    "row",
    [
        question("cat", choices=("cat", "dog")),
        question("none", "How many?"),
        question("None", choices=("None", "One")),
        question("0.125"),
        question("3.14159265"),
        question("B", "Which is right?\nA. red\nB. blue"),
        question("B", "Which? (A) red (B) blue"),
        question("B", "Which letter is on the sign?"),
        question("B", choices=("red", "blue")),
    ],
)
def test_a_row_that_is_right_is_not(row: Question) -> None:
    assert list(row_warnings(row)) == []


def test_one_answer_for_most_rows_is_named() -> None:
    rows = [question(a, line=i) for i, a in enumerate(["Yes", "no", "yes", "yes ", "yes", "yes"])]
    (found,) = set_problems(rows)
    assert found.kind == "one answer for most rows" and "5 of 6 are 'yes'" in found.cause
    assert list(set_problems([question(a) for a in ("yes", "no", "yes", "no", "yes", "yes")])) == []  # 4 of 6
    assert list(set_problems([question("yes")] * 4)) == []  # too few to say


def test_class_numbers_are_named_and_counts_are_not() -> None:
    rows = [question(str(n), "What animal is this?") for n in (0, 1, 2, 1)]
    assert [p.kind for p in set_problems(rows)] == ["numbers for classes"]
    assert list(set_problems([question(str(n), "How many animals?") for n in (0, 1, 2, 1)])) == []
    assert list(set_problems([question(str(n), "What animal is this?") for n in (17, 40, 25)])) == []


def test_validation_rows_in_train_are_found_by_content_and_by_id() -> None:
    red, blue = ImageSource(data=b"red"), ImageSource(data=b"blue")
    train = [
        question(id="1", line=1, images=(red,)),
        question(id="2", line=2, images=(blue,), choices=("a", "b")),
        question(text="Name it.", id="named", line=3),
    ]
    validation = [
        question(text=" which  COLOR ", id="7", line=11, images=(red,)),
        question(id="8", line=12, images=(blue,)),  # without the choices of the second
        question(id="9", line=13, images=(blue,), choices=("B", "A")),
        question(text="Which size?", id="named", line=14),
        question(text="Which size?", id="1", line=15),  # the same number is no sign
    ]

    def digests(questions: Any) -> dict[str, tuple[str, ...]]:
        return {q.origin: tuple(i.data.decode() for i in q.images) for q in questions}

    found = list(also_in_train(train, validation, digests))
    assert [(p.origin, p.level) for p in found] == [(f"q.jsonl:{n}", "warning") for n in (11, 13, 14)]
    assert "as 1 at q.jsonl:1" in found[0].cause and "same id" in found[2].cause
    (line,) = summaries(found, "validation", 5, shown=2)
    assert "data.validation: also in data.train: 3 of 5 questions (q.jsonl:11, q.jsonl:13, ...)" in line
