"""How a question is put to a model, in words: the same for the student, the teachers and the judge."""

from __future__ import annotations

from openril.data.sanitize import strip_special
from openril.records import Question


def question_text(question: Question) -> str:
    """The question with its choices as lettered lines, forged special tokens taken out.

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


def choice_letter(index: int) -> str:
    """A, B, ..., Z, AA, AB, ... for a choice's 0-based index."""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("A") + rest) + letters
    return letters
