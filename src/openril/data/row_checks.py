"""Find rows that can be read but do not say what they mean: alone, as a set, and against the training data."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from openril.data.reading import RowProblem
from openril.records import IMAGE_MARKER, Question

ONE_ANSWER, FEWEST = 2 / 3, 5
"""The share of rows with one answer that is reported, from this many rows on."""

_FEWEST_NUMBERS = 3
_MISSING = {"nan", "NaN", "NAN", "None", "null", "NULL", "<NA>", "#N/A", "undefined", "nil"}
_LETTER = re.compile(r"\(?[A-H]\)?\.?")
_LISTED = re.compile(r"(?:^|[\s(（\[])A\s*[)）.:、．\]]")
_ASKS_FOR_LETTER = re.compile(r"letter|character|alphabet|grade|vitamin|blood|字母", re.IGNORECASE)
_ASKS_FOR_NUMBER = re.compile(
    r"\d|how (?:many|much|old|long|far|tall|high|big|often)|number|count|digit|\bage\b|year|sum|total|score|percent|price"
    r"|value|time|amount|几|多少|数",
    re.IGNORECASE,
)


def row_warnings(q: Question) -> Iterator[RowProblem]:
    """Yield what a row shows alone: it can be used, but probably not as it is meant."""

    def warning(kind: str, cause: str) -> RowProblem:
        return RowProblem(kind, q.origin, q.id, cause, "warning")

    answer, choices = q.answer, [c.strip().casefold() for c in q.choices]
    if len(choices) == 1:
        yield warning("single choice", "choices: expected at least two, got one, so every letter but A is wrong")
    if "" in choices:
        letter = chr(ord("A") + choices.index("") % 26)
        yield warning(
            "empty choice", f"choices: expected text, got nothing for {letter}, which the student reads as it is"
        )
    if double := next((c for c, n in Counter(choices).items() if n > 1 and c and IMAGE_MARKER not in c), None):
        letters = " and ".join(chr(ord("A") + i % 26) for i, c in enumerate(choices) if c == double)
        yield warning("duplicate choices", f"choices: expected different texts, got {double[:40]!r} as {letters}")
    if answer in _MISSING and answer.casefold() not in choices:
        yield warning(
            "missing value as answer", f"answer: expected a ground truth, got the word {answer} of a missing value"
        )
    if (short := _without_noise(answer)) is not None:
        cause = f"answer: {answer[:40]} looks like {short} with rounding noise. It is compared rounded; SFT teaches it as it is"
        yield warning("float noise", cause)
    listed = choices or _LISTED.search(q.question) or _ASKS_FOR_LETTER.search(q.question)
    if not listed and _LETTER.fullmatch(answer):
        cause = f"answer: got the letter {answer} without choices and without lettered options in the question"
        yield warning("letter without options", cause)


def set_problems(questions: Sequence[Question]) -> Iterator[RowProblem]:
    """Yield what a set of questions shows as a whole: one answer for most rows, and class numbers without names."""
    known = [q for q in questions if q.answer]
    for answer, n in Counter(q.answer.strip().casefold() for q in known).most_common(1):
        if len(known) >= FEWEST and n > ONE_ANSWER * len(known):
            first = next(q for q in known if q.answer.strip().casefold() == answer)
            cause = (
                f"answer: {n} of {len(known)} are {answer[:40]!r}, so a student that always says it is right as often"
            )
            yield RowProblem("one answer for most rows", first.origin, first.id, cause, "warning")
    numbers = [q for q in known if not q.choices and re.fullmatch(r"\d{1,3}", q.answer)]
    classes = {int(q.answer) for q in numbers}
    plain = numbers and not any(_ASKS_FOR_NUMBER.search(q.question) for q in numbers)
    if (
        plain
        and len(numbers) >= _FEWEST_NUMBERS
        and len(classes) > 1
        and min(classes) <= 1
        and 2 * len(numbers) > len(known)
    ):
        q = numbers[0]
        cause = (
            f"answer: {len(numbers)} of {len(known)} are whole numbers ({q.answer} here), but no question asks for a"
        )
        cause += " number. If they are classes, write their names"
        yield RowProblem("numbers for classes", q.origin, q.id, cause, "warning")


def also_in_train(
    train: Sequence[Question],
    validation: Sequence[Question],
    digests: Callable[[Sequence[Question]], dict[str, tuple[str | None, ...]]],
) -> Iterator[RowProblem]:
    """Yield a warning for each validation question that is in train too, whatever its case and whitespace.

    Args:
        digests: Function of questions that returns the digests of their images by origin, None for unusable ones.
    """
    texts = {_normal(q) for q in validation}
    same = [q for q in train if _normal(q) in texts]
    texts = {_normal(q) for q in same}
    of = digests([q for q in [*same, *validation] if q.images and _normal(q) in texts])

    def content(q: Question) -> tuple[object, ...]:
        return _normal(q), of.get(q.origin, ())

    contents = {content(q): q for q in same if None not in of.get(q.origin, ())}
    ids = {q.id for q in validation if not q.id.isdigit()}  # which number the rows of most files from 0
    by_id = {q.id: q for q in train if q.id in ids}
    for q in validation:
        if other := contents.get(content(q)):
            cause = f"same question and images as {other.id} at {other.origin}"
        elif other := by_id.get(q.id):
            cause = f"same id as the question at {other.origin}"
        else:
            continue
        yield RowProblem("also in data.train", q.origin, q.id, cause, "warning")


def summaries(problems: Sequence[RowProblem], which: str, total: int, shown: int = 3) -> list[str]:
    """Return one line for each kind of problem: its count, its first rows, and the cause in the first of them."""
    kinds: dict[str, list[RowProblem]] = {}
    for problem in problems:
        kinds.setdefault(problem.kind, []).append(problem)
    lines = []
    for kind, found in kinds.items():
        places = list(dict.fromkeys(p.origin for p in found))
        rows = ", ".join(places[:shown]) + ", ..." * (len(places) > shown)
        count = f"{len(places)} of {total} questions"
        lines.append(f"data.{which}: {kind}: {count} ({rows}). The first: {found[0].cause}.")
    return lines


def _normal(q: Question) -> tuple[str, ...]:
    def plain(text: str) -> str:
        text = unicodedata.normalize("NFKC", text.replace(IMAGE_MARKER, " ")).casefold()
        return " ".join(text.split()).rstrip(" ?!.:")

    return plain(q.question), *sorted(map(plain, q.choices))


def _without_noise(answer: str) -> str | None:
    """Return the short number that a float of 32 or 64 bits with many digits stands for, or None."""
    if not re.fullmatch(r"-?\d+\.\d{8,}", answer):
        return None
    number = float(answer)
    rounded = f"{number:.12g}"
    single = str(np.float32(number))
    if float(np.float32(number)) == number and len(single) < len(rounded):
        rounded = single
    return rounded if len(answer) - len(rounded) >= 4 else None
