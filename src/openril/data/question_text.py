"""The text of a question as models read it: the same for the student, the teachers and the judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from openril.data.sanitize import strip_special
from openril.records import IMAGE_MARKER, Question


def question_text(question: Question) -> str:
    """Return the question with its choices as lettered lines and without forged special tokens.

    ``<image>`` markers stay where they are. Choices that the text already lists line by line are not repeated.
    """
    text = strip_special(question.question, keep_markers=True)
    lines = [
        f"{choice_letter(i)}. {strip_special(choice, keep_markers=True)}" for i, choice in enumerate(question.choices)
    ]
    written = {line.strip() for line in text.splitlines()}
    if not lines or all(line.strip() in written for line in lines):
        return text
    return "\n".join([text.rstrip(), *lines])


def interleave(
    text: str, images: Sequence[dict[str, Any]], clean: Callable[[str], str] = strip_special
) -> list[dict[str, Any]]:
    """Return the content of a chat message: ``images`` at the ``<image>`` markers of ``text``, with the text between.

    All images come first if the number of markers differs from the number of images.

    Args:
        images: The images as parts of the message, for instance ``{"type": "image"}``.
        clean: Applied to every piece of text. Pieces between images that are then empty are left out.
    """
    first, *others = text.split(IMAGE_MARKER)
    if not images or len(others) != len(images):
        return [*images, {"type": "text", "text": clean(text)}]
    parts: list[dict[str, Any]] = [{"type": "text", "text": clean(first)}]
    for image, piece in zip(images, others, strict=True):
        parts += [image, {"type": "text", "text": clean(piece)}]
    return [part for part in parts if part.get("text") != ""]


def choice_letter(index: int) -> str:
    """Return A, B, ..., Z, AA, AB, ... for a choice's 0-based index."""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("A") + rest) + letters
    return letters
