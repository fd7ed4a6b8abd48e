"""Turn one row of any supported format into a Question.

Ours:    question, answer, images, choices, rule, id
TRL:     prompt (text or messages) with images/image and answer/solution/ground_truth/completion; or messages
LLaVA:   conversations [{from: human, value: ...}, {from: gpt, value: ...}] with <image> markers
Alpaca:  instruction, input, output

docs/data.md lists what is read of further data sets, and what is refused or only counted.

A LLaVA or ``messages`` row with several turns gives its first question and first answer; the number of omitted turns is
kept as metadata ``dropped_turns``. A ``prompt`` with several turns is refused, because its answer belongs to the last turn.
Chat-template tokens are removed from all text (data/sanitize.py).
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openril.data.choices import Choices, index_of, letter_of, read_choices, resolve
from openril.data.columns import Columns, is_list, is_mapping, kind, literal, plain_text
from openril.data.conversations import NO_MEDIA, Conversation, read_conversation
from openril.data.embedded_images import keep_bytes
from openril.data.markers import find_places
from openril.data.sanitize import strip_special
from openril.errors import DataError
from openril.records import IMAGE_MARKER, ImageSource, Question
from openril.storage import stable_hash

ANSWER_COLUMNS = ("answer", "solution", "ground_truth", "completion", "reward_model.ground_truth")
COMPUTED = ("dropped_turns", "dropped_images", "special_tokens_removed", "system_turns")
"""Names of metadata that reading adds."""
_NUMBERED = re.compile(r"(?:image|img)_(\d{1,2})")
_FORMATS = ("question", "prompt", "conversations", "messages")


def to_question(
    row: Any, *, columns: Mapping[str, str], folder: Path, origin: str, used: Counter[str] | None = None
) -> Question:
    """Return the question in ``row``.

    Args:
        columns: Field of a question -> column of the row, or "" to read no column.
        folder: Absolute path at which relative image paths start.
        origin: "file:line".
        used: Receives what each column was read as.

    Raises:
        DataError: With the cause. The caller adds the origin.
    """
    if not is_mapping(row):
        raise DataError(f"expected a row with named columns, got {kind(row)}")
    row = Columns(row, columns)
    _refuse_unusable(row)
    talk, form = _question(row)
    answers, answer_column = _answers(row, talk, form)
    choices, by_column = read_choices(row)
    answers = _among_choices(row, answers, answer_column, choices)
    context = row.take("context", *(["hint"] if by_column else []))[1]
    if context is not None:
        talk.question = f"{plain_text(context, 'context')}\n{talk.question}"

    (text, *options), images = _places(row, talk, choices, folder)
    given = (text, options, answers)
    text = strip_special(text, keep_markers=True)
    options = [strip_special(option, keep_markers=True) for option in options]
    answers = [strip_special(answer) for answer in answers]
    stripped = given != (text, options, answers)
    text = text.strip()
    if not text.replace(IMAGE_MARKER, "").strip():
        raise DataError("question: expected text, got nothing")
    markers = sum(piece.count(IMAGE_MARKER) for piece in (text, *options))
    if markers not in (0, len(images)):
        raise DataError(
            f"question: expected one {IMAGE_MARKER} marker per image, or none, got {markers} for {len(images)} images"
        )
    rule = row.take("rule", "rule")[1]
    if rule is not None and not isinstance(rule, str):
        raise DataError(f"rule: expected the name of an answer rule, got {kind(rule)}")
    identity = _id(row.take("id", "id")[1])
    if talk.dropped:
        row.left["dropped_turns"] = len(talk.dropped)
    if talk.dropped_images:
        row.left["dropped_images"] = talk.dropped_images
    if talk.system:
        row.left["system_turns"] = talk.system
    if stripped:
        row.left["special_tokens_removed"] = True
    if used is not None:
        used.update(row.read)
    truths = list(dict.fromkeys(answer.strip() for answer in answers))
    question = Question(
        id=identity or "",
        question=text,
        answer=truths[0] if truths else "",
        images=images,
        choices=tuple(option.strip() for option in options),
        rule=rule or None,
        metadata=row.left,
        origin=origin,
        other_answers=tuple(truths[1:]),
    )
    return question if identity else _named_by_content(question)


def _named_by_content(question: Question) -> Question:
    """Derive the id from the content, so that it stays the same when rows are moved."""
    images = [str(i.path) if i.path else i.url or stable_hash((i.data or b"").hex()) for i in question.images]
    key = stable_hash(question.question, question.answer, list(question.choices), images)
    if question.other_answers:
        key = stable_hash(key, question.other_answers)
    return dataclasses.replace(question, id=f"auto-{key:016x}")


def _refuse_unusable(row: Columns) -> None:
    """Raise DataError for a column without which the row means something else."""
    for name, singular in (("videos", "video"), ("audios", "audio")):
        column = next((c for c in (name, singular) if row.left.get(c)), "")
        if column and column not in row.mapping.values() and name not in row.mapping:
            fix = f'{NO_MEDIA}, or set data.columns: {{{name}: ""}} to use the rest of the row'
            raise DataError(f"{column}: expected none, got {kind(row.left[column])}. {fix}")
    history = literal(row.take("history", "history")[1])
    if history:
        raise DataError(
            f"history: expected none, got {kind(history)}. The question depends on it: write it into the question, or set"
            ' data.columns: {history: ""} to leave it out'
        )


def _question(row: Columns) -> tuple[Conversation, str]:
    """Take the column of the question. Return what is used of it, and its name."""
    names = ["question"] if row.is_mapped("question") else [n for n in _FORMATS if row.left.get(n) is not None]
    names = names or ["instruction"] * ("instruction" in row.left)
    if not names:
        raise DataError(
            f"expected a column question, prompt, messages or conversations, got {', '.join(row.left) or 'none'}. "
            "Name yours in data.columns, for instance {question: query}"
        )
    if len(names) > 1:
        raise DataError(f"expected one question, got {' and '.join(names)}. Set data.columns: {{question: ...}} to one")
    if row.is_mapped("question"):
        form, value = row.take("question")
    else:
        form, value = names[0], row.left.pop(names[0])
        row.read.append(form if form == "question" else f"{form} as question")
    mapped = "question" in row.mapping and row.mapping["question"] == form
    if not isinstance(value, str) or form in ("conversations", "messages"):
        if not mapped and form in ("question", "instruction"):
            raise DataError(f"{form}: expected text, got {kind(value)}")
        return read_conversation(value, form), form
    more = row.left.get("input") if "input" not in row.mapping.values() else None
    if more in (None, "") or row.mapping.get("context") == "":
        return Conversation(value), form
    if form != "instruction":
        raise DataError(
            f"input: expected none next to the question {form}, got {kind(more)}. Set data.columns: {{context: input}} to"
            ' put it before the question, or {context: ""} to leave it out'
        )
    del row.left["input"]
    row.read.append("input as question")
    return Conversation(f"{value}\n{plain_text(more, 'input')}"), form


def _answers(row: Columns, talk: Conversation, form: str) -> tuple[list[str], str]:
    """Take the columns with ground truths. Return the accepted ones, the main one first, and the name of the first column."""
    default = [*ANSWER_COLUMNS, *(["output"] if form == "instruction" else [])]
    name, value = row.take("answer", *default)
    found = [] if value is None else _listed(value, name)
    several, values = row.take("answers", "answers")
    if values is not None:
        others = _listed(literal(values), several)
        if found and re.fullmatch(r"\(?[A-Z]\)?|\d", found[0].strip()) and found[0] not in others:
            raise DataError(
                f"{several}: expected the accepted answers, but the answer is {found[0].strip()!r}, as if these were choices."
                f' Set data.columns: {{choices: {several}}}, or {{answers: ""}}'
            )
        most = Counter(others).most_common()  # of annotators, in order of their first mention
        found, name = [*found, *(answer for answer, _ in most)], name if found else several
    if talk.answer is not None:
        if found:
            row.left["assistant_turn"] = talk.answer
        else:
            found = [talk.answer]
    return [answer for answer in found if answer.strip()] or found[:1], name


def _listed(value: Any, name: str) -> list[str]:
    """Return the texts of one answer or of several: scalars, ``{answer: ...}``, ``{text: [...]}``, or a message."""
    if is_mapping(value) and is_list(value.get("text")):  # SQuAD
        value = value["text"]
    if not is_list(value):
        return [plain_text(value, name)]
    found = []
    for item in value:
        if is_mapping(item) and "content" in item and len(value) == 1:
            found.append(read_conversation([{**item, "role": "user"}], name).question)
            continue
        if is_mapping(item):
            item = next((item[key] for key in ("answer", "text") if isinstance(item.get(key), str)), item)
        found.append(plain_text(item, name))
    return found


def _among_choices(row: Columns, answers: list[str], column: str, choices: Choices) -> list[str]:
    """Return the answers in terms of the choices: places and labels become letters."""
    if not choices.texts:
        if "answer_index" in row.mapping or "answer_number" in row.mapping:
            field = "answer_index" if "answer_index" in row.mapping else "answer_number"
            raise DataError(f"{field}: expected choices that the answer counts, got none")
        return answers
    answers = [resolve(answer, choices, column) for answer in answers]
    for field, first, names in (("answer_index", 0, ("answer_index", "answer_idx")), ("answer_number", 1, ())):
        name, place = row.take(field, *names)
        if place is None:
            continue
        letter = letter_of(place, name, first, choices.texts)
        if answers and index_of(answers[0], choices.texts) != index_of(letter, [""] * len(choices.texts)):
            raise DataError(
                f"{name}: expected the place of the answer {answers[0][:40]!r}, got {place}, which is {letter}. Set"
                f' data.columns: {{answer_number: {name}}} if it counts from 1, or {{{field}: ""}} to use the answer'
            )
        answers = answers or [letter]
    places = {index_of(answer, choices.texts) for answer in answers}
    if len(places) > 1:
        shown = ", ".join(repr(answer[:20]) for answer in answers[:4])
        raise DataError(f"{column}: expected one right choice, got {shown}. Questions with several cannot be scored")
    return answers[:1]


def _places(
    row: Columns, talk: Conversation, choices: Choices, folder: Path
) -> tuple[list[str], tuple[ImageSource, ...]]:
    """Return the texts of the question and its choices with a marker for each image, and the images in their order."""
    pieces, inline, numbers = find_places([talk.question, *choices.texts])
    sources = {"messages": talk.images, "the text": inline, **_image_columns(row)}
    if len(given := [name for name, found in sources.items() if found]) > 1:
        raise DataError(
            f"images: expected one source, got {' and '.join(given)}. Keep one, or map data.columns: images"
        )
    found = sources[given[0]] if given else []
    if talk.dropped:
        found = _first_turn_images(talk, pieces, numbers, found, given)
    if numbers and sorted(numbers) == list(range(min(numbers), min(numbers) + len(found))):
        if numbers != sorted(numbers) and re.search(r"\bimage \d", " ".join(pieces)):
            raise DataError("question: expected the images in the order of their numbers, or each of them named once")
        found = [found[number - min(numbers)] for number in numbers]
    if choices.images:
        if sum(piece.count(IMAGE_MARKER) for piece in pieces) == len(choices.images):
            pieces[0] = IMAGE_MARKER * len(found) + pieces[0]
        found = [*found, *choices.images]
    return pieces, tuple(to_image(value, folder, i) for i, value in enumerate(found, start=1))


def _first_turn_images(
    talk: Conversation, pieces: list[str], numbers: list[int], found: list[Any], given: list[str]
) -> list[Any]:
    """Return the images of the first turn. Those whose markers are in later turns are left out and counted."""
    later, inline, later_numbers = find_places(talk.dropped)
    here = sum(piece.count(IMAGE_MARKER) for piece in pieces)
    there = len(set(later_numbers) - set(numbers)) if later_numbers else "".join(later).count(IMAGE_MARKER)
    talk.dropped_images += len(inline)
    if given not in (["messages"], ["the text"]) and there and here + there == len(found):
        talk.dropped_images += there
        return found[:here]
    return found


def _image_columns(row: Columns) -> dict[str, list[Any]]:
    """Take the columns of images: images and image, or image_1, image_2, ... as MMMU has them."""
    found: dict[str, list[Any]] = {}
    for name in ("images", "image"):
        if "images" in row.mapping and name == "image":
            break  # a mapped column replaces both
        column, value = row.take(name, name)
        value = literal(value)
        if value is None or (is_list(value) and not value):
            continue
        found[column] = list(value) if is_list(value) else [value]
    if not found and "images" not in row.mapping:
        numbered = {int(m[1]): n for n in row.left if n[:2] == "im" and (m := _NUMBERED.fullmatch(n))}
        if numbered and sorted(numbered) != list(range(min(numbered), min(numbered) + len(numbered))):
            raise DataError(f"images: expected numbered columns without gaps, got {', '.join(numbered.values())}")
        if min(numbered, default=2) < 2:
            found["numbered columns"] = [row.take("images", numbered[i])[1] for i in sorted(numbered)]
    return found


def _id(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"id: expected text or a whole number, got {kind(value)}")
    return str(value)


_BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR)[A-Za-z0-9+/\s]{40,}={0,2}\s*|[A-Za-z0-9+/\s]{400,}={0,2}\s*")
"""Encoded JPEG, PNG, GIF and WebP files by how they begin, and any text that is too long for a path."""


def to_image(value: Any, folder: Path, number: int = 1) -> ImageSource:
    """Return the source of an image: a path, URL, bytes, base64, {"bytes", "path"} or PIL image. Nothing is opened here."""
    if is_mapping(value):
        if value.get("bytes") is not None:
            value = value["bytes"]
            if isinstance(value, str):
                return keep_bytes(_decoded(value, number))
        elif isinstance(value.get("path"), str):
            value = value["path"]
        elif isinstance(value.get("url"), str):
            value = value["url"]
        else:
            raise DataError(f'image {number}: expected {{"bytes": ..., "path": ...}} with one of them set')
    if isinstance(value, bytes | bytearray | memoryview):
        return keep_bytes(bytes(value))
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"image {number}: expected a path, got an empty one")
        scheme = value.split(":", 1)[0].lower() if ":" in value[:12] else ""
        if scheme in ("http", "https", "data"):
            return ImageSource(url=value)
        if "://" in value[:16]:
            raise DataError(f"image {number}: expected a path, an http(s) address or a data URL, got {scheme}://")
        if "\0" in value:
            raise DataError(f"image {number}: expected a path, got one with a zero byte")
        if len(value) > 50 and _BASE64.fullmatch(value):
            return keep_bytes(_decoded(value, number))
        path = Path(value)
        return ImageSource(path=folder / (path.expanduser() if value.startswith("~") else path))
    if hasattr(value, "save") and hasattr(value, "mode"):  # a PIL image, without importing PIL
        buffer = io.BytesIO()
        value.save(buffer, format="PNG")
        return keep_bytes(buffer.getvalue())
    raise DataError(f"image {number}: expected a path, URL or bytes, got {kind(value)}")


def _decoded(text: str, number: int) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as e:
        raise DataError(f"image {number}: expected base64, got {kind(text)} ({e})") from e
