"""Extraction of the final answer and of numbers from free text, for the answer rules. It uses no model."""

from __future__ import annotations

import re
import struct
import unicodedata
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

from openril.rewards.number_words import spell_in_digits
from openril.rewards.units import Unit, read_unit

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
    text = re.sub(r"\*\*|__|```(?:json|text)?|`", "", text)
    if "\\" in text or "$" in text:
        text = _latex(text)
    return text


def _latex(text: str) -> str:
    text = re.sub(r"\$\$|\$(?=(\S(?:[^$\n]{0,200}\S)?)\$(?!\d))\1\$", lambda m: m[1] or " ", text)  # $x$
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|operatorname|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b", "°", text)
    for _ in range(2):  # one inside the other
        text = re.sub(r"\\sqrt\s*(?:\{([^{}]*)\}|(\w))", lambda m: f"√({m[1]})" if m[1] else f"√{m[2]}", text)
        text = re.sub(r"(\d\s*)?\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\w))\s*(?:\{([^{}]*)\}|(\w))", _fraction, text)
    text = re.sub(r"\\(" + "|".join(_COMMANDS) + r")(?![A-Za-z])\s*", lambda m: _COMMANDS[m[1]], text)
    text = re.sub(r"\\([{}])", r"\1", re.sub(r"\\[,;! ]", " ", text))
    text = re.sub(r"\\[()\[\] ]|(?<!\\)\$(?!\s*[-+]?[\d.])", " ", text)
    return re.sub(r"\\([%$#&_])", r"\1", text)


_COMMANDS = {"times": "×", "cdot": "×", "pi": "π", "theta": "θ", "alpha": "α", "leq": "≤", "le": "≤", "geq": "≥", "ge": "≥",
             "infty": "∞", "cup": "∪", "in": "∈", "left": "", "right": "", "quad": " ", "approx": "≈", "neq": "≠",
             "pm": "±", "div": "/"}  # fmt: skip


def _fraction(m: re.Match[str]) -> str:
    top, bottom = m[2] or m[3] or "", m[4] or m[5] or ""
    sides = [side if re.fullmatch(r"-?[\d.]+|\w", side.strip()) else f"({side})" for side in (top, bottom)]
    return (f"{m[1].strip()} " if m[1] else "") + "/".join(sides)


def plain(text: str) -> str:
    """Normalize and case-fold a text, with single spaces, without a leading article or punctuation at the ends."""
    text = " ".join(normalize(text).casefold().replace("×", "x").split())
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
    r"|^[ \t]*答\s*:[ \t]*|^[ \t]*#*[ \t]*(?:final\s+answer|最终答案)[ \t]*$",
    re.I | re.M,
)
_JSON = re.compile(r"[\"'](?:final[_ ])?answer[\"']\s*:\s*(\"[^\"\n]*\"|'[^'\n]*'|\[[^\]\n]*\]|[^\s,}{][^,}\n]*)", re.I)
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


def without_thoughts(text: str) -> str:
    """Remove everything up to the last ``</think>`` and everything after a ``<think>`` that is not closed."""
    return _THINK.split(_END_THINK.split(text)[-1])[0]


_THINK, _END_THINK = (re.compile(rf"[<◁]\s*{slash}think(?:ing)?\s*[>▷]", re.I) for slash in ("", r"/\s*"))


def find_answers(text: str) -> list[Found]:
    """Return candidates for the final answer, the most reliable kind first.

    The kinds are ``<answer>`` tags, ``\\boxed{}``, a JSON field "answer", ``#### 7``, "the answer is ...", and the last
    line. Thoughts are ignored.
    """
    text = without_thoughts(text)
    boxed = _boxed(_INVISIBLE.sub("", text))
    text = normalize(text)
    found = []
    if tagged := tuple(t.strip() for t in _TAG.findall(text) if t.strip()):
        inner = (_boxed(t) or [t] for t in tagged)
        found.append(Found(tuple(_after_marker(normalize(t).strip()) for ts in inner for t in ts), True))
    if boxes := tuple(n for b in boxed if (n := normalize(b).strip())):
        found.append(Found(tuple(map(_after_marker, boxes)), True))
    if fields := tuple(m.strip("\"' ") for m in _JSON.findall(text)):
        found.append(Found(fields, True))
    text = re.sub(r"</?\s*answer\s*>", "\n", re.sub(r"\\f?boxed\s*\{", "", text), flags=re.I)
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if lines and lines[-1].startswith("####") and (hashed := lines[-1].strip("# ")):
        found.append(Found((_after_marker(hashed),), True))
    marked = []
    for marker in _MARKER.finditer(text):
        rest = text[marker.end() :].lstrip()
        line = rest.split("\n", 1)[0].strip()
        if line and not _NEGATED.match(line) and not _MARKER.search(line):  # "answer: the answer is ..." counts once
            marked.append(line)
    if marked:
        found.append(Found(tuple(marked), True))
    if lines and not (tagged or boxes or fields):
        found.append(Found((lines[-1],), False))
    return found


def extracted_answer(text: str) -> str | None:
    """Return the final answer that a response states, or None: the last of the most reliable kind of candidates."""
    found = find_answers(shortened(text))
    return found[0].candidates[-1] if found else None


LONGEST_RESPONSE = 20_000
"""The rules read only the first and last halves of this many characters of a longer response."""


def shortened(text: str) -> str:
    """Return both ends of a long response: the answer is near an end, and runaway text must not stall a step."""
    if len(text) <= LONGEST_RESPONSE:
        return text
    return f"{text[: LONGEST_RESPONSE // 2]}\n{text[-LONGEST_RESPONSE // 2 :]}"


@lru_cache(4096)
def read_truth(answer: str) -> str:
    """Return the answer that a ground truth states, which may be tagged, boxed, or the end of a worked solution."""
    text = without_thoughts(answer).strip() or answer.strip()
    for found in find_answers(text):
        stated = found.candidates[-1]
        if found.explicit and stated in (norm := normalize(text)):
            marked = norm.rindex(stated)  # a marker in the middle of a free text is part of it
            if re.search(r"<\s*answer|boxed|\"answer\"", text, re.I) or not norm[marked + len(stated) :].strip(" .\n"):
                return re.sub(r"(?<=[\w)])\.$", "", stated)
    return text


# Words around answers.

REJECTION = re.compile(r"\s*[)\].]?\s*(?:(?:is|are|was)\s+(?:wrong|incorrect|not\b|false)|是?(?:错|不正确|不对))", re.I)
NEGATION = re.compile(r"(?:\bnot|\bneither|\bnor|n't|不是|不选)\s*(?:the\s+|option\s+|an?\s+)*$", re.I)
CONCLUSION = re.compile(r"\b(?:so|therefore|thus|hence|consequently)\b|因此|所以|故", re.I)
HEDGE = r"\s*(?:,?\s*\b(?:or|and|versus|vs)\b|[/|,;&、]|或者|或|和)\s*"


def whole_words(text: str) -> re.Pattern[str]:
    """Return a pattern for the text as whole words. "3" is not a word of "3.5". Chinese has no word boundaries."""
    return re.compile(rf"(?<![a-z0-9])(?<!\d[.,]){re.escape(text)}(?![a-z0-9]|[.,]\d)")


# Numbers.

_SCALES = {
    "hundred": 2, "thousand": 3, "k": 3, "million": 6, "mn": 6, "M": 6, "billion": 9, "bn": 9, "B": 9, "trillion": 12,
    "百": 2, "千": 3, "万": 4, "亿": 8,
}  # fmt: skip
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.^])(?P<sign>[-+]?)(?:(?P<currency>[$€£¥₹₩]|\b(?:usd|eur|gbp|rmb|cny|jpy)\b)\s*)?(?P<sign2>[-+]?)"
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


_NO_UNIT = re.compile(
    r"[A-Za-zα-ωΑ-Ω_]|\s*(?:[π√^!*×·+=<>≤≥∞±∪]|[-/]\s*\d|:\d|\.\d|[-/.]\d|,\d|\\|[-–]?\s*(?:[ap]\.?\s?m\b|b\.?\s?c\b|b?c\.?e\b|ad\b|o'?clock"
    r"|pi\b|(?:halves|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|dozens?|pairs?|percentile)\b"
    r"|(?:jan|feb|mar|apr|may|june?|july?|aug|sept?|oct|nov|dec)(?:[a-z]{2,6})?\b(?=\.?\s*(?:\d|[,.;)]|$))|[b-hj-z]\b(?!')))"
    r"|\s*(?:[点时月日号半]|:\d)",
    re.I,
)
"""What makes a number part of something else: algebra, a time, a date, an era, a range, an ordinal, a seat."""


@dataclass(frozen=True)
class Number:
    """A number in a text."""

    value: Fraction
    percent: bool = False
    places: int | None = 0
    """Digits after the decimal point, None for a fraction and for a rounded endless decimal."""
    start: int = 0
    end: int = 0
    unit: Unit | None = None
    alone: bool = True
    """False for a part of something else: the 9 of "9 am", the 5 of "5x", the 3 of "3-5"."""


def _without_noise(digits: str) -> tuple[str, bool]:
    """Return a decimal without the noise of 32- and 64-bit floats, and whether it still is an endless decimal."""
    if len(digits.replace(".", "").lstrip("0")) <= 12 or "." not in digits or len(digits) > 40:
        return digits, False
    value = float(digits)
    if value < 3e38 and struct.unpack("f", struct.pack("f", value))[0] == value:
        short = next(
            t for n in range(1, 18) if struct.pack("f", float(t := f"{value:.{n}g}")) == struct.pack("f", value)
        )
        if len(short) < 12 and "e" not in short:
            return short, len(short.replace(".", "").lstrip("0")) >= 8
    short = f"{Decimal(digits):.12f}".rstrip("0").rstrip(".") if abs(value) >= 1e-3 else digits
    return short, len(short.replace(".", "").lstrip("0")) >= 12


_OPERAND = re.compile(r"[π√^*×·/<>≤≥±(|]\s*$|[\w)]\s*[-+]\s*$|\d\s*x\s*$|\w:$|\d\s*to\s+$|(?<=\w)/$")


def _part_of_more(before: str, sign: str) -> bool:
    """Return whether the text before a number makes it the operand of an expression or the end of a range."""
    minus = sign and re.search(r"[\w)]\s*$", before) and not re.search(r"[A-Za-z]{2,}\s+$|[\u3400-\u9fff]$", before)
    return bool(minus or _OPERAND.search(before))


def numbers(text: str) -> list[Number]:
    """Return every number in normalized text, with its measuring unit."""
    found = []
    for m in _NUMBER.finditer(text):
        if len(m.group()) > LONGEST_NUMBER:
            continue
        digits, endless = _without_noise((m["whole"] or "0").replace(",", "") + (m["decimals"] or ""))
        value = Fraction(digits)
        places: int | None = None if endless else len(digits.partition(".")[2])
        if m["decimals"] and not endless:
            places = max(places or 0, len(m["decimals"]) - 1 if len(m["decimals"]) < 12 else 0)
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
        end, rest, unit = m.end(), text[m.end() : m.end() + 60], None
        if m["currency"]:
            unit = read_unit(m["currency"])
        elif not m["percent"] and not re.match(r"\s*x\s*\d", rest):
            unit = read_unit(rest)
            end += unit[1] if unit else 0
        before = text[max(0, m.start() - 40) : m.start()]
        alone = not _NO_UNIT.match(text, end if unit else m.end()) and not _part_of_more(before, m["sign"])
        if re.search(r"(?:^|[^\w)])\($", before) and text[end : end + 1] == ")":
            alone = True
        found.append(Number(value, bool(m["percent"]), places, m.start(), end, unit[0] if unit else None, alone))
    return found


def whole_number(text: str) -> Number | None:
    """Return the number that a text consists of, with at most a measuring unit ("1,200 km", "-3 %"), or None.

    Several numbers with units of one dimension are one: "2 h 30 min" is 150 min.
    """
    text = spell_in_digits(re.sub(r"(?<=\w)[.]$", "", normalize(text).strip()))
    text = re.sub(r"(?<=\d)\s*个$|^(?:about|approximately|approx\.|around|~|≈|大约|约)\s*", "", text, flags=re.I)
    found = numbers(text)
    if not found or found[0].start > 0 or found[-1].end < len(text) or not all(n.alone for n in found):
        return None
    total = found[0]
    for a, b in pairwise(found):
        same = a.unit and b.unit and a.unit.dimensions == b.unit.dimensions and a.unit.factor > b.unit.factor
        if (
            not same
            or text[a.end : b.start].strip(" ,") not in ("", "and")
            or b.value < 0
            or total.unit is None
            or not b.unit
        ):
            return None
        total = replace(total, value=total.value + b.value * b.unit.factor / total.unit.factor, places=None, end=b.end)
    return total
