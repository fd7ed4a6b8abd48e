"""Multiple choice: the option that the ground truth names, and the options that a text chooses."""

from __future__ import annotations

import re
import string

from openril.records import IMAGE_MARKER, Question
from openril.rewards.extraction import (
    CONCLUSION,
    HEDGE,
    NEGATION,
    REJECTION,
    normalize,
    plain,
    read_truth,
    whole_words,
)


def find_options(question: Question) -> list[str]:
    """Return the texts of the options, from the data or from lettered lines of the question. That of an image is ""."""
    if question.choices:
        return [choice.replace(IMAGE_MARKER, "") for choice in question.choices]
    text = normalize(question.question)
    for form in (
        r"^\s*\(?([A-Z])\s*[).:、]\s*(\S.*?)\s*$",
        r"(?:(?<=\s)|(?<=^)|(?<=[?:.]))\(([A-Z])\)\s*(\S.*?)[,;]?(?=\s*\([A-Z]\)|\s*$)",
        r"(?:(?<=\s)|(?<=^)|(?<=[?:]))([A-Z])[).:、]\s*(\S.*?)[,;]?(?=\s+[A-Z][).:、]|\s*$)",
    ):
        lettered = re.findall(form, text, re.M)
        letters = "".join(letter for letter, _ in lettered)
        if len(lettered) >= 2 and string.ascii_uppercase.startswith(letters):
            return [option for _, option in lettered]
    return []


def truth_index(answer: str, options: list[str]) -> int | None:
    """Return the index of the option that the ground truth names, by its text or else by its letter."""
    if len(options) and not any(plain(option) == plain(answer) for option in options):
        answer = read_truth(answer)
    for i, option in enumerate(options):
        if plain(option) == plain(answer):
            return i
    letter = re.fullmatch(r"\(?([A-Za-z])\s*[).:、]?(?:\s+(.*)|(?<=[).:、])(\S.*))?", normalize(answer).strip())
    index = ord(letter[1].upper()) - ord("A") if letter else len(options)
    text = letter and (letter[2] or letter[3])
    return index if index < len(options) and (not text or plain(text) == plain(options[index])) else None


_LEADING = re.compile(
    r"\(?(?P<bracketed>[A-Z])\s*\)|\[(?P<squared>[A-Z])\]"
    r"|(?P<bare>[A-Z])(?=\s*(?:[.:,;]|-\s|$|\b(?:because|since|or|and|is)\b|[/|&或和、]))"
    r"|(?P<spaced>[B-HJ-Z])(?=\s)|(?:option|choice|选项)\s*\(?(?P<named>[A-Z])\b\)?"
)
_INSIDE = re.compile(
    r"\((?P<a>[A-Z])\)|\[(?P<d>[A-Z])\]|\b(?i:option|choice|answer)\s+\(?(?P<b>[A-Z])\b"
    r"|(?<![A-Za-z0-9'])(?P<c>[B-HJ-Z])(?![A-Za-z0-9'])|(?<![A-Za-z0-9'])(?P<e>A)(?=[.,:;)]|$|\s+(?:or|and)\b)"
)
LISTING = re.compile(r"^[ \t]*(?:[-*][ \t]*)?\(?([A-Z])\s*[).:](?=\s*\S)", re.M)


def read_choice(text: str, options: list[str]) -> frozenset[int]:
    """Return the indices of the options that a candidate text chooses."""
    texts = [plain(option) for option in options]
    if plain(text) in texts and plain(text):
        return frozenset({texts.index(plain(text))})
    parts = CONCLUSION.split(text)
    if len(parts) > 1 and (concluded := read_choice(parts[-1].strip(" ,:"), options)):
        return concluded
    if re.fullmatch(r"\W*[a-z]\W*", text):
        text = text.upper()
    within = string.ascii_uppercase[: len(options)]

    def letter_in(match: re.Match[str]) -> str:
        letter = next(g for g in match.groups() if g)
        return letter if letter in within else ""

    leading = _LEADING.match(text)
    if leading and not REJECTION.match(text, leading.end()) and (letter := letter_in(leading)):
        rest = text[leading.end() :]
        chosen = {letter}
        while more := re.match(rf"{HEDGE}(?:option\s+)?[(\[]?([{within}])(?![A-Za-z0-9'])[)\]]?", rest, re.I):
            chosen.add(more[1].upper())
            rest = rest[more.end() :]
        # "B. dog" is two answers if dog is the text of another option.
        named = plain(rest.lstrip(" )]."))
        if named in texts[: len(within)] and named and named != texts[within.index(letter)]:
            chosen.add(within[texts.index(named)])
        return frozenset(within.index(c) for c in chosen)
    inside = {
        letter
        for m in _INSIDE.finditer(text)
        if (letter := letter_in(m)) and not (NEGATION.search(text[: m.start()]) or REJECTION.match(text, m.end()))
    }
    if inside:
        return frozenset(within.index(c) for c in inside)
    remaining = plain(text)
    for option in sorted(filter(None, texts), key=len, reverse=True):
        if opening := re.match(rf"{re.escape(option)}(?=\s*[,.:;!])", remaining):  # "Yes, there is no dog"
            rest = re.sub(rf"^{HEDGE}", "", remaining[opening.end() :])
            if not any(re.match(rf"{re.escape(o)}(?![a-z0-9])", rest) for o in texts if o and o != option):
                return frozenset({texts.index(option)})
    # Longer texts first, and each match is blanked out, so that "dark red" does not also count as "red".
    chosen_texts = set()
    for index in sorted(range(len(texts)), key=lambda i: -len(texts[i])):
        if not texts[index]:
            continue
        for m in list(whole_words(texts[index]).finditer(remaining)):
            if not NEGATION.search(remaining[: m.start()]):
                chosen_texts.add(index)
            remaining = remaining[: m.start()] + "\0" * len(m.group()) + remaining[m.end() :]
    return frozenset(chosen_texts)
