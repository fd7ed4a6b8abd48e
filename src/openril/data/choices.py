"""The options of a multiple-choice question and the one that its answer names, in the forms of different data sets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from openril.data.columns import Columns, is_list, is_mapping, kind, literal, plain_text
from openril.data.question_text import choice_letter
from openril.errors import DataError
from openril.records import IMAGE_MARKER

_LETTERED = re.compile(r"\(?([A-Za-z])\s*[).:、：]\s*(\S.*)", re.S)
_COLUMN = re.compile(r"(?:(?i:option|choice)(?:[_ ](?=[a-z])|[_ ]?(?![a-z])))?([A-Z]|(?<!^)[a-z\d])")
_IMAGE_FILE = re.compile(r"\S+\.(?:png|jpe?g|webp|gif|bmp|tiff?)", re.I)
_TEXT_KEYS, _LABEL_KEYS = ("text", "value", "content"), ("label", "key", "id", "letter")


@dataclass
class Choices:
    """The options as the data gives them."""

    texts: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    """Labels other than A, B, C, ...; answers may use them."""
    images: list[Any] = field(default_factory=list)
    """Options that are images. Their texts are ``<image>``."""


def read_choices(columns: Columns) -> tuple[Choices, bool]:
    """Return the options, and whether they came from one column each (A, B, C, ... or option_1, option_2, ...)."""
    given = [name for name in ("choices", "options") if columns.left.get(name)]
    if len(given) > 1 and "choices" not in columns.mapping:
        raise DataError(
            "choices: expected one source, got choices and options. Set data.columns: {choices: ...} to one"
        )
    name, value = columns.take("choices", *given, "choices", "options")
    if value is None and "choices" not in columns.mapping and (found := _by_column(columns)):
        return found, True
    try:
        return _read(literal(value), name), False
    except DataError as e:
        if name != "options" or name in columns.mapping.values():
            raise
        raise DataError(f'{e}. If it holds no choices, set data.columns: {{choices: ""}}') from e


def _by_column(columns: Columns) -> Choices | None:
    """Take columns A, B, C, ..., option_a, choice_1 and the like. They must begin at A, 0 or 1."""
    short = [n for n in columns.left if len(n) < 10 and (len(n) == 1 or n[:6].lower() in ("option", "choice"))]
    names = {m[1]: n for n in short if (m := _COLUMN.fullmatch(n))}
    first = min(names, default="")
    labels = [label for label in sorted(names) if ord(label) - ord(first) < 10]
    if len(labels) < 2 or first not in ("A", "a", "0", "1"):
        return None
    if labels != [chr(ord(first) + i) for i in range(len(labels))]:
        got = ", ".join(names[label] for label in labels)
        raise DataError(f"choices: expected columns in order without gaps, got {got}")
    texts = [plain_text(columns.take("choices", names[label])[1], f"choice {label}") for label in labels]
    while texts and not texts[-1].strip():  # a table has columns for the longest list
        texts.pop()
    return Choices(texts, labels if first.isdigit() else []) if texts else None


def _read(value: Any, name: str) -> Choices:
    if value is None or value == "":
        return Choices()
    labels: list[str] = []
    if is_mapping(value) and is_list(value.get("text")) and is_list(value.get("label")):
        if len(value["text"]) != len(value["label"]):
            raise DataError(f"{name}: expected one label per text, got {len(value['label'])} for {len(value['text'])}")
        labels, value = list(map(str, value["label"])), value["text"]
    elif is_mapping(value):
        present = {str(k): v for k, v in value.items() if v is not None}
        labels = list(present)
        if not _in_order(labels):
            raise DataError(
                f"{name}: expected a list, or keys A, B, C, ... in order, got {', '.join(map(str, value)) or 'none'}"
            )
        value = list(present.values())
    elif isinstance(value, str) and (lines := [line.strip() for line in value.splitlines() if line.strip()])[1:]:
        value = lines if all(map(_LETTERED.fullmatch, lines)) else value
    if not is_list(value):
        raise DataError(f"{name}: expected a list, got {kind(value)}")
    read = Choices()
    for i, item in enumerate(value, start=1):
        if is_mapping(item) and set(item) <= {*_TEXT_KEYS, *_LABEL_KEYS}:
            labels += [str(item[key]) for key in _LABEL_KEYS if item.get(key) is not None]
            item = next((item[key] for key in _TEXT_KEYS if item.get(key) is not None), None)
        if is_mapping(item) and not {"bytes", "path", "url"} & set(item):
            raise DataError(f"choice {i}: expected text or an image, got a mapping with {', '.join(map(str, item))}")
        if isinstance(item, Mapping | bytes):
            read.images.append(item)
            item = IMAGE_MARKER
        read.texts.append(plain_text(item, f"choice {i}"))
    if read.texts and all(_IMAGE_FILE.fullmatch(text) for text in read.texts):
        raise DataError(
            f"{name}: expected texts, got the image file {read.texts[0][:60]!r}. To show the images, write each as "
            '{"path": ...}'
        )
    split = [_LETTERED.fullmatch(text.strip()) for text in read.texts]
    if all(split) and _letters([m[1] for m in split if m]):
        read.texts = [m[2] for m in split if m]
    if len(labels) == len(read.texts) and not _letters(labels):
        read.labels = labels
    return read


def _letters(labels: Sequence[str]) -> bool:
    return [label.upper() for label in labels] == [choice_letter(i) for i in range(len(labels))]


def _in_order(labels: Sequence[str]) -> bool:
    return bool(labels) and (
        _letters(labels) or any(labels == [str(i + n) for n in range(len(labels))] for i in (0, 1))
    )


def letter_of(place: Any, name: str, first: int, choices: Sequence[str]) -> str:
    """Return the letter of the choice at a place that counts from ``first``.

    Args:
        place: A whole number, also as text or float, or already a letter.
    """
    if isinstance(place, str) and re.fullmatch(r"[A-Za-z]", place.strip()):
        return place.strip().upper()
    text = str(place).strip().removesuffix(".0")
    if isinstance(place, bool) or not re.fullmatch(r"\d{1,3}", text):
        raise DataError(f"{name}: expected the place of a choice, got {kind(place)}")
    if not 0 <= int(text) - first < len(choices):
        raise DataError(
            f"{name}: expected a place from {first} to {len(choices) - 1 + first} of the {len(choices)} choices, got {text}"
        )
    return choice_letter(int(text) - first)


def index_of(answer: str, choices: Sequence[str]) -> int | None:
    """Return the index of the choice that a truth names by text, letter, or both ("B. cat" or "(B) cat")."""
    answer = re.sub(r"(?s).*(?:<answer>|\\boxed\{)(.*?)(?:</answer>|\}).*", r"\1", answer)
    texts = [c.strip().casefold() for c in choices]
    if answer.strip().casefold() in texts:
        return texts.index(answer.strip().casefold())
    match = re.fullmatch(r"\(?([A-Za-z])\)?(?:[.:)]?\s*(.*))", answer.strip(), re.DOTALL)
    index = ord(match[1].upper()) - ord("A") if match else len(choices)
    if match is None or index >= len(choices):
        return None
    return index if not match[2] or match[2].strip().casefold() == texts[index] else None


def resolve(answer: str, choices: Choices, name: str) -> str:
    """Return the answer with a label of the data ("2") replaced by the letter of its choice.

    Raises:
        DataError: For a number that is neither a choice nor a label. It may count the choices, from 0 or from 1.
    """
    stripped = answer.strip()
    index = index_of(answer, choices.texts)
    labeled = choices.labels.index(stripped) if stripped in choices.labels else None
    if labeled is not None and index not in (None, labeled):
        raise DataError(f"{name}: {stripped!r} is the label of one choice and the text of another. Write its letter")
    if labeled is not None:
        return choice_letter(labeled)
    if choices.texts and index is None and re.fullmatch(r"\d{1,3}(?:\.0)?", stripped):
        raise DataError(
            f"{name}: expected one of the {len(choices.texts)} choices or its letter, got {stripped}, which is neither. If"
            f" answers count the choices, set data.columns: {{answer_index: {name}}} (from 0) or {{answer_number: {name}}}"
        )
    return answer
