"""Extraction of the final answer and of numbers from free text, for the answer rules. It uses no model."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

_MINUS = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2212\uff0d\ufe63", "-"))
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]")
_SUPERSCRIPT = re.compile("[\u00b2\u00b3\u00b9\u2070-\u207f]+")
_VULGAR = re.compile(r"(?<=\d)(?=[\u00bc-\u00be\u2150-\u215e])")


def normalize(text: str) -> str:
    """Apply NFKC, use one kind of minus sign, and remove invisible characters, Markdown emphasis and inline LaTeX marks.

    NFKC turns full-width letters and digits into plain ones. Case and line breaks are kept.
    """
    text = _VULGAR.sub(" ", _INVISIBLE.sub("", text))
    text = re.sub("(?<=\\d)[\u00a0\u2009\u202f](?=\\d{3}(?!\\d))", ",", text).replace("{,}", ",")  # 1 000, 1{,}000
    text = _SUPERSCRIPT.sub(lambda m: "^" + unicodedata.normalize("NFKC", m.group()), text)  # 10⁶ is not 106
    text = unicodedata.normalize("NFKC", text).translate(_MINUS).replace("\u2044", "/").replace("\u3002", ".")
    text = re.sub(r"\*\*|__|`", "", text)
    text = re.sub(r"\\d?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[,;!]", "", re.sub(r"\\(?:times|cdot)", "x", text))
    text = re.sub(r"\\[()\[\] ]|(?<!\\)\$(?!\s*[-+]?[\d.])", " ", text)
    return re.sub(r"\\([%$#&_])", r"\1", text)


def plain(text: str) -> str:
    """Normalize and case-fold a text, with single spaces, without a leading article or punctuation at the ends."""
    text = " ".join(normalize(text).casefold().split())
    text = text.strip(" .,:;!?\"'()[]{}<>*_$`")
    return re.sub(r"^(?:the|an?)\s+(?=\S)", "", text)


@dataclass(frozen=True)
class Found:
    """Candidates for the final answer."""

    candidates: tuple[str, ...]
    explicit: bool
    """Whether the writer marked them (tags, a box, "the answer is"); False for a text that is only the last line."""


_TAG = re.compile(r"<\s*answer\s*>(.*?)<\s*/\s*answer\s*>", re.I | re.S)
_MARKER = re.compile(
    r"(?:\b(?:final|correct|right|best|my)\s+)?\b(?:answers?|option|choice)(?:\s+(?:to|for|of)\s+[^.:\n]{1,60}?)?"
    r"\s*(?:\bis\b|\bare\b|\bwould be\b|\bshould be\b|\bmust be\b|:|=)\s*(?:therefore|thus|simply|just)?\s*:?[ \t]*"
    r"|(?:最终|正确)?(?:答案|选项|结果)\s*(?:应该是|应该为|应为|应是|是|为|选|:)\s*:?[ \t]*"
    r"|(?:所以|因此|故|应该|应|正确)(?:选择?|答案)(?:的是|是|为)?\s*:?[ \t]*"
    r"|^[ \t]*答\s*:[ \t]*",
    re.I | re.M,
)
_NEGATED = re.compile(r"\s*(?:not|never|neither|isn't|cannot)\b|\s*不", re.I)


LONGEST_BOX = 1000
"""Characters after which an unclosed box is ignored."""
MOST_BOXES = 20
"""Number of boxes that are read, counted from the end."""


def _boxed(text: str) -> list[str]:
    """Return the contents of ``\\boxed{...}`` with balanced braces."""
    found = []
    for start in list(re.finditer(r"\\f?boxed\s*\{", text))[-MOST_BOXES:]:
        depth, i = 1, start.end()
        while i < min(len(text), start.end() + LONGEST_BOX) and depth:
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            i += 1
        if depth == 0:
            found.append(text[start.end() : i - 1])
    return found


def _after_marker(text: str) -> str:
    """Return the text after the last "the answer is", or all of it."""
    return _MARKER.split(text)[-1].strip() or text


def find_answers(text: str) -> list[Found]:
    """Return candidates for the final answer, the most reliable kind first.

    The kinds are ``<answer>`` tags, ``\\boxed{}``, "the answer is ...", and the last line. Text in ``<think>`` is ignored.
    """
    text = re.sub(r"<\s*think\s*>.*?<\s*/\s*think\s*>", "", text, flags=re.I | re.S)
    boxed = _boxed(_INVISIBLE.sub("", text))
    text = normalize(text)
    found = []
    if tagged := tuple(t.strip() for t in _TAG.findall(text) if t.strip()):
        found.append(Found(tuple(map(_after_marker, tagged)), True))
    if boxes := tuple(n for b in boxed if (n := normalize(b).strip())):
        found.append(Found(tuple(map(_after_marker, boxes)), True))
    text = re.sub(r"</?\s*answer\s*>", "\n", re.sub(r"\\f?boxed\s*\{", "", text), flags=re.I)
    marked = []
    for marker in _MARKER.finditer(text):
        rest = text[marker.end() :].lstrip()
        line = rest.split("\n", 1)[0].strip()
        if line and not _NEGATED.match(line) and not _MARKER.search(line):  # "answer: the answer is ..." counts once
            marked.append(line)
    if marked:
        found.append(Found(tuple(marked), True))
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if lines:
        found.append(Found((lines[-1],), False))
    return found


# Words around answers.

NEGATION = re.compile(r"(?:\bnot|\bneither|\bnor|n't|不是|不选)\s*(?:the\s+|option\s+|an?\s+)*$", re.I)
CONCLUSION = re.compile(r"\b(?:so|therefore|thus|hence|consequently)\b|因此|所以|故", re.I)
HEDGE = r"\s*(?:,?\s*\b(?:or|and|versus|vs)\b|[/|,;&、]|或者|或|和)\s*"


def whole_words(text: str) -> re.Pattern[str]:
    """Return a pattern for the text as whole words. "3" is not a word of "3.5". Chinese has no word boundaries."""
    return re.compile(rf"(?<![a-z0-9])(?<!\d[.,]){re.escape(text)}(?![a-z0-9]|[.,]\d)")


# Numbers.

_WORDS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_NUMBER_WORDS = {word: Fraction(i) for i, word in enumerate(_WORDS)} | {"none": Fraction(0)}
_NUMBER_WORDS |= {word: Fraction(10 * i) for i, word in enumerate(_TENS, 2)}
_WORD_NUMBER = re.compile(
    rf"\b(?P<tens>{'|'.join(_TENS)})[ -](?P<unit>{'|'.join(_WORDS[1:10])})\b|\b(?P<word>{'|'.join(_NUMBER_WORDS)})\b",
    re.I,
)
_SCALES = {
    "hundred": 2, "thousand": 3, "k": 3, "million": 6, "mn": 6, "M": 6, "billion": 9, "bn": 9, "B": 9, "trillion": 12,
    "百": 2, "千": 3, "万": 4, "亿": 8,
}  # fmt: skip
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.^])(?P<sign>[-+]?)(?:[$€£¥]\s*|(?:usd|eur|rmb)\s+)?(?P<sign2>[-+]?)"
    r"(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2})*,\d{3}(?!\d)|\d+|(?=\.\d))(?P<decimals>\.\d+)?"
    r"(?:(?:\s*(?:x|\*|×)\s*10\s*\^\s*\{?|[eE])(?P<exponent>[-+]?\d{1,3})\}?)?"
    r"(?:\^\{?(?P<power>\d{1,2})\}?)?"
    r"(?:\s+(?P<mixed>\d+\s*/\s*\d+)|\s*/\s*(?P<denominator>\d+(?:\.\d+)?))?"
    r"(?:\s*(?P<scale>hundred|thousand|million|billion|trillion|mn|bn|百|千|万|亿)(?![a-z])|(?P<letter>(?-i:[kKMB]))(?!\w))?"
    r"(?P<percent>\s*(?:%|percent\b|per cent\b))?",
    re.I,
)


LONGEST_NUMBER = 200
"""Longer sequences of digits (a model in a loop) are not numbers. Python refuses to parse 4300 digits or more."""


@dataclass(frozen=True)
class Number:
    """A number in a text."""

    value: Fraction
    percent: bool = False
    places: int | None = 0
    """Digits after the decimal point, None for a fraction."""
    start: int = 0
    end: int = 0


def numbers(text: str) -> list[Number]:
    """Return every number in normalized text. Number words ("three cats") count only in a text without digits."""
    found = []
    for m in _NUMBER.finditer(text):
        if len(m.group()) > LONGEST_NUMBER:
            continue
        value = Fraction((m["whole"] or "0").replace(",", "") + (m["decimals"] or ""))
        places: int | None = len(m["decimals"] or ".") - 1
        if m["exponent"]:
            value *= Fraction(10) ** int(m["exponent"])
        if m["power"]:
            value **= int(m["power"])
        if m["mixed"] or m["denominator"]:
            top, bottom = (m["mixed"] or f"1/{m['denominator']}").split("/")
            if Fraction(bottom.strip()) == 0:
                continue
            part = Fraction(top.strip()) / Fraction(bottom.strip())
            value, places = (value + part if m["mixed"] else value * part), None
        scale = m["scale"] or m["letter"] or ""
        if scale:
            value *= 10 ** _SCALES[scale.lower() if scale.lower() in _SCALES else scale.upper()]
        if "-" in (m["sign"], m["sign2"]):
            value = -value
        found.append(Number(value, bool(m["percent"]), places, m.start(), m.end()))
    if not found:
        for m in _WORD_NUMBER.finditer(text):
            parts = [m["tens"], m["unit"]] if m["tens"] else [m["word"]]
            value = sum((_NUMBER_WORDS[part.casefold()] for part in parts), Fraction(0))
            found.append(Number(value, False, 0, m.start(), m.end()))
    return found


def whole_number(text: str) -> Number | None:
    """Return the number that a text consists of, with at most one word of unit after it ("1,200 km", "-3 %"), or None."""
    text = normalize(text).strip().rstrip(".")
    found = numbers(text)
    if len(found) != 1 or found[0].start > 0:
        return None
    return found[0] if re.fullmatch(r"\s*°?[^\W\d]{0,12}(?:\^?[23])?", text[found[0].end :]) else None
