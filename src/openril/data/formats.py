"""Turn one row of any supported format into a Question.

Ours:    question, answer, images, choices, rule, id
TRL:     prompt (text or messages) with images/image and answer/solution/ground_truth/completion; or messages
LLaVA:   conversations [{from: human, value: ...}, {from: gpt, value: ...}] with <image> markers

A LLaVA or ``messages`` row with several turns gives its first question and first answer; the number of omitted turns is
kept as metadata ``dropped_turns``. A ``prompt`` with several turns is refused, because its answer belongs to the last turn.
Chat-template tokens are removed from all text (data/sanitize.py).
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openril.data.embedded_images import keep_bytes
from openril.data.sanitize import has_special, strip_special
from openril.errors import DataError
from openril.records import IMAGE_MARKER, ImageSource, Question
from openril.storage import stable_hash

ANSWER_COLUMNS = ("answer", "solution", "ground_truth", "completion")
_FORMATS = ("question", "prompt", "conversations", "messages")
_USER = ("human", "user")
_ASSISTANT = ("gpt", "assistant", "model", "bot", "chatgpt")


def to_question(row: Any, *, columns: Mapping[str, str], folder: Path, origin: str) -> Question:
    """Return the question in ``row``.

    Args:
        columns: Field of a question -> column of the row.
        folder: Absolute path at which relative image paths start.
        origin: "file:line".

    Raises:
        DataError: With the cause. The caller adds the origin.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"expected a row with named columns, got {_kind(row)}")
    row = {str(k): v for k, v in row.items()}
    mapped = {ours: row.pop(theirs) for ours, theirs in columns.items() if theirs in row}
    row = {**{k: v for k, v in row.items() if k not in columns or k in mapped}, **mapped}

    text, answer, inline, dropped = _text_and_answer(row, "question" in mapped)
    images = _images(row, inline, folder)
    stripped = has_special(text, keep_markers=True) or has_special(answer)
    text = strip_special(text, keep_markers=True).strip()
    if not text.replace(IMAGE_MARKER, "").strip():
        raise DataError("question: expected text, got nothing")
    markers = text.count(IMAGE_MARKER)
    if markers not in (0, len(images)):
        raise DataError(
            f"question: expected one {IMAGE_MARKER} marker per image, or none, got {markers} for {len(images)} images"
        )
    choices = tuple(strip_special(choice).strip() for choice in _choices(row.pop("choices", None)))
    rule = row.pop("rule", None)
    if rule is not None and not isinstance(rule, str):
        raise DataError(f"rule: expected the name of an answer rule, got {_kind(rule)}")
    identity = _id(row.pop("id", None))
    if dropped:
        row["dropped_turns"] = dropped
    if stripped:
        row["special_tokens_removed"] = True
    question = Question(
        id=identity or "",
        question=text,
        answer=strip_special(answer).strip(),
        images=images,
        choices=choices,
        rule=rule or None,
        metadata={k: v for k, v in row.items() if v is not None},
        origin=origin,
    )
    return question if identity else _named_by_content(question)


def _named_by_content(question: Question) -> Question:
    """Derive the id from the content, so that it stays the same when rows are moved."""
    images = [str(i.path) if i.path else i.url or stable_hash((i.data or b"").hex()) for i in question.images]
    key = stable_hash(question.question, question.answer, list(question.choices), images)
    return dataclasses.replace(question, id=f"auto-{key:016x}")


def _text_and_answer(row: dict[str, Any], question_is_mapped: bool) -> tuple[str, str, list[Any], int]:
    """Return (question text, answer, images inside messages, omitted turns), and remove the columns it uses from ``row``."""
    names = ["question"] if question_is_mapped else [name for name in _FORMATS if row.get(name) is not None]
    if not names:
        raise DataError(
            f"expected a column question, prompt, messages or conversations, got {', '.join(row) or 'none'}. "
            "Name yours in data.columns, for instance {question: query}"
        )
    if len(names) > 1:
        raise DataError(f"expected one question, got {' and '.join(names)}. Set data.columns: {{question: ...}} to one")
    form = names[0]
    value = row.pop(form)
    inline: list[Any] = []
    if isinstance(value, str) and form in ("question", "prompt"):
        text, spoken, dropped = value, None, 0
    elif form == "question" and not question_is_mapped:
        raise DataError(f"question: expected text, got {_kind(value)}")
    else:
        text, spoken, inline, dropped = _turns(value, form)
    column = next((name for name in ANSWER_COLUMNS if row.get(name) is not None), None)
    answer = spoken if column is None else _answer(row.pop(column), column)
    return text, answer or "", inline, dropped


def _turns(value: Any, form: str) -> tuple[str, str | None, list[Any], int]:
    """Return (first user turn, first assistant turn, images in the user turn, number of later turns)."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise DataError(f"{form}: expected text or a list of turns, got {_kind(value)}")
    turns: list[tuple[str, Any]] = []
    for i, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping):
            raise DataError(f"{form}: turn {i}: expected role and content (or from and value), got {_kind(turn)}")
        role = turn.get("from") if turn.get("from") is not None else turn.get("role")
        content = turn.get("value") if turn.get("value") is not None else turn.get("content")
        if not isinstance(role, str) or content is None:
            raise DataError(
                f"{form}: turn {i}: expected role and content (or from and value), got {', '.join(map(str, turn)) or 'none'}"
            )
        if role.lower() != "system":  # student.system_prompt of the recipe is used for all questions
            turns.append((role.lower(), content))
    first = turns[0][0] if turns else "none"
    if first not in _USER:
        raise DataError(f"{form}: expected a first turn of the user (human or user), got {first!r}")
    later = len(turns) - 1
    if form == "prompt" and later:
        raise DataError(f"prompt: expected one user turn, got {len(turns)} turns. Keep the last with its context")
    text, images = _content(turns[0][1], form)
    spoken = None
    if later:
        if turns[1][0] not in _ASSISTANT:
            raise DataError(f"{form}: expected a second turn of the assistant (gpt or assistant), got {turns[1][0]!r}")
        spoken, _ = _content(turns[1][1], form)
    return text, spoken, images, max(later - 1, 0)


def _content(content: Any, form: str) -> tuple[str, list[Any]]:
    """Return the text of one turn, with a marker for each image part, and the images inside those parts."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise DataError(f"{form}: expected text or a list of parts in a turn, got {_kind(content)}")
    text, images, places = "", [], 0
    for part in content:
        if isinstance(part, str):
            text += part
            continue
        if not isinstance(part, Mapping):
            raise DataError(f"{form}: expected a part {{type: text, ...}} or {{type: image}}, got {_kind(part)}")
        kind = part.get("type")
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise DataError(f"{form}: expected text in a text part, got {_kind(part.get('text'))}")
            text += part["text"]
        elif kind in ("image", "image_url"):
            places += 1
            text += IMAGE_MARKER
            carried = next((part[k] for k in ("image", "image_url", "url", "path") if part.get(k) is not None), None)
            if isinstance(carried, Mapping) and "url" in carried:
                carried = carried["url"]
            if carried is not None:
                images.append(carried)
        else:
            raise DataError(f"{form}: expected parts of type text or image, got {kind!r}")
    if images and len(images) != places:
        raise DataError(f"{form}: expected images in all image parts or in none, got {len(images)} in {places} parts")
    return text, images


def _answer(value: Any, name: str) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        if len(value) == 1 and isinstance(value[0], Mapping):
            return _content(value[0].get("content"), name)[0]
        if len(value) == 1:
            value = value[0]
        else:
            raise DataError(f"{name}: expected one answer, got a list of {len(value)}")
    return _plain(value, name)


def _plain(value: Any, name: str) -> str:
    """Return the text of a scalar. JSON numbers, true and false are valid too."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    raise DataError(f"{name}: expected text or a number, got {_kind(value)}")


def _id(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"id: expected text or a whole number, got {_kind(value)}")
    return str(value)


def _choices(value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, Mapping):
        letters = [chr(ord("A") + i) for i in range(len(value))]
        present = {k: v for k, v in value.items() if v is not None}
        if list(present) != letters[: len(present)]:
            raise DataError(
                f"choices: expected a list, or keys A, B, C, ... in order, got {', '.join(map(str, value))}"
            )
        value = list(present.values())
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise DataError(f"choices: expected a list, got {_kind(value)}")
    return [_plain(choice, f"choice {i}") for i, choice in enumerate(value, start=1)]


def _images(row: dict[str, Any], inline: list[Any], folder: Path) -> tuple[ImageSource, ...]:
    found: list[Any] = list(inline)
    used = ["messages"] if inline else []
    for name in ("images", "image"):
        value = row.pop(name, None)
        if value is None or (isinstance(value, Sequence) and len(value) == 0):
            continue
        used.append(name)
        single = isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence)
        found += [value] if single else list(value)
    if len(used) > 1:
        raise DataError(f"images: expected one source, got {' and '.join(used)}. Keep one")
    return tuple(to_image(value, folder, i) for i, value in enumerate(found, start=1))


def to_image(value: Any, folder: Path, number: int = 1) -> ImageSource:
    """Return the source of an image: a path, URL, bytes, {"bytes", "path"} or PIL image. Nothing is opened here."""
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            value = value["bytes"]
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
        path = Path(value)
        return ImageSource(path=folder / (path.expanduser() if value.startswith("~") else path))
    if hasattr(value, "save") and hasattr(value, "mode"):  # a PIL image, without importing PIL
        buffer = io.BytesIO()
        value.save(buffer, format="PNG")
        return keep_bytes(buffer.getvalue())
    raise DataError(f"image {number}: expected a path, URL or bytes, got {_kind(value)}")


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, str):
        return f"text {json.dumps(value[:40], ensure_ascii=False)}"
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return "a list" if value else "an empty list"
    return f"{type(value).__name__} {str(value)[:40]}"
