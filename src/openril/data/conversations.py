"""The first question and the first answer of a conversation, in the forms of chat APIs, LLaVA, ShareGPT and pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from openril.data.columns import is_list, is_mapping, kind, literal
from openril.errors import DataError
from openril.records import IMAGE_MARKER

_USER = ("human", "user")
_ASSISTANT = ("gpt", "assistant", "model", "bot", "chatgpt")
_SYSTEM = ("system", "developer")
_PAIRS = (("user", "assistant"), ("input", "output"), ("query", "response"), ("question", "answer"))
_MEDIA = ("video", "video_url", "input_video", "audio", "audio_url", "input_audio")


@dataclass
class Conversation:
    """What is used of a conversation, and what is not."""

    question: str
    answer: str | None = None
    images: list[Any] = field(default_factory=list)
    """Images that the question's parts carry."""
    dropped: list[str] = field(default_factory=list)
    """Texts of the later turns."""
    dropped_images: int = 0
    """Images that the parts of the other turns carry."""
    system: str = ""
    """Text of system turns."""


def read_conversation(value: Any, form: str) -> Conversation:
    """Return the first turn of the user and of the assistant.

    Args:
        form: Name of the column, for messages. A ``prompt`` may hold one turn only.
    """
    value = literal(value)
    if not is_list(value) or not value:
        raise DataError(f"{form}: expected text or a list of turns, got {kind(value)}")
    turns: list[tuple[str, Any]] = []
    system = []
    for role, content in (pair for i, turn in enumerate(value, start=1) for pair in _pairs(turn, f"{form}: turn {i}")):
        if role in _SYSTEM:  # student.system_prompt of the recipe is used for all questions
            system.append(_content(content, form)[0])
        else:
            turns.append((role, content))
    first = turns[0][0] if turns else "none"
    if first not in _USER:
        raise DataError(f"{form}: expected a first turn of the user (human or user), got {first!r}")
    if form == "prompt" and len(turns) > 1:
        raise DataError(f"prompt: expected one user turn, got {len(turns)} turns. Keep the last with its context")
    text, images = _content(turns[0][1], form)
    read = Conversation(text, images=images, system="\n".join(system))
    if len(turns) > 1:
        if turns[1][0] not in _ASSISTANT:
            raise DataError(f"{form}: expected a second turn of the assistant (gpt or assistant), got {turns[1][0]!r}")
        read.answer, carried = _content(turns[1][1], form)
        read.dropped_images += len(carried)
    for _, content in turns[2:]:
        text, images = _content(content, form)
        read.dropped.append(text)
        read.dropped_images += len(images)
    return read


def _pairs(turn: Any, where: str) -> list[tuple[str, Any]]:
    """Return the roles and contents of an entry: one turn, or a question with its answer (``_PAIRS``)."""
    if not is_mapping(turn):
        raise DataError(f"{where}: expected role and content (or from and value), got {kind(turn)}")
    pair = next((p for p in _PAIRS if turn.get(p[0]) is not None), None)
    if "role" not in turn and "from" not in turn and pair is not None:
        named = zip(("system", "user", "assistant"), ("system", *pair), strict=True)
        return [(role, turn[key]) for role, key in named if turn.get(key)]
    role = turn.get("from") if turn.get("from") is not None else turn.get("role")
    content = turn.get("value") if turn.get("value") is not None else turn.get("content")
    if not isinstance(role, str) or content is None:
        got = ", ".join(map(str, turn)) or "none"
        raise DataError(f"{where}: expected role and content (or from and value), got {got}")
    return [(role.lower(), content)]


def _content(content: Any, form: str) -> tuple[str, list[Any]]:
    """Return the text of one turn, with a marker for each image part, and the images inside those parts."""
    if isinstance(content, str):
        return content, []
    if not is_list(content):
        raise DataError(f"{form}: expected text or a list of parts in a turn, got {kind(content)}")
    text, images, places = "", [], 0
    for part in content:
        if isinstance(part, str):
            text += part
            continue
        if not is_mapping(part):
            raise DataError(f"{form}: expected a part {{type: text, ...}} or {{type: image}}, got {kind(part)}")
        which = part.get("type") or next((k for k in ("text", "image", "image_url", *_MEDIA) if part.get(k)), None)
        if which in ("text", "input_text"):
            if not isinstance(part.get("text"), str):
                raise DataError(f"{form}: expected text in a text part, got {kind(part.get('text'))}")
            text += part["text"]
        elif which in ("image", "image_url", "input_image"):
            places += 1
            text += IMAGE_MARKER
            if (carried := _carried(part)) is not None:
                images.append(carried)
        elif which in _MEDIA:
            raise DataError(f"{form}: expected parts of type text or image, got {which!r}. {NO_MEDIA}")
        else:
            raise DataError(f"{form}: expected parts of type text or image, got {which!r}")
    if images and len(images) != places:
        raise DataError(f"{form}: expected images in all image parts or in none, got {len(images)} in {places} parts")
    return text, images


NO_MEDIA = "Only images are read: leave the row out, or give frames as images"


def _carried(part: Mapping[str, Any]) -> Any:
    names = ("image", "image_url", "url", "path", "bytes", "base64", "source")
    carried = next((part[k] for k in names if part.get(k) is not None), None)
    if is_mapping(carried):  # {url: ...} of OpenAI, {type: base64, media_type, data} of Anthropic
        carried = next((carried[k] for k in ("url", "data") if isinstance(carried.get(k), str)), carried)
    return carried
