"""Formal answers that are no plain numbers: expressions, equations, lists, intervals, ranges, times and dates."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

from openril.rewards.extraction import Number, normalize, whole_number
from openril.rewards.number_words import spell_in_digits


@dataclass(frozen=True)
class Value:
    """A parsed answer. ``data`` depends on ``kind``."""

    kind: str
    data: Any
    terms: int = 0
    """Number of additions in an expression. A response with more has not finished the calculation."""


# Times and dates.

_HALF = r"(?P<half>[ap]\.?\s?m\b\.?)"
_CLOCK = re.compile(
    rf"(?<![\d:.])(?P<h>\d{{1,2}})(?:[:.](?P<m>[0-5]\d)(?::(?P<s>[0-5]\d))?)?\s*{_HALF}"
    rf"|(?<![\d:.])(?P<h2>\d{{1,2}}):(?P<m2>[0-5]\d)(?::(?P<s2>[0-5]\d))?(?![\d:])|(?<!\d)(?P<h3>\d{{1,2}})\s*o'?\s?clock"
    r"|(?P<part>凌晨|早上|上午|中午|下午|傍晚|晚上)?(?<!\d)(?P<h4>\d{1,2})(?:点|时(?!间))(?:(?P<m4>\d{1,2})分?|(?P<fraction>半)|整|钟)*"
    r"|\b(?P<word>noon|midnight)\b",
    re.I,
)
_MONTHS = {m: i for i, m in enumerate(re.findall("...", "janfebmaraprmayjunjulaugsepoctnovdec"), 1)}
_MONTH = (
    r"(?P<{}>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\b\.?"
)
_DATE = re.compile(
    rf"\b(?P<d1>\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?{_MONTH.format('m1')}(?:,?\s+(?P<y1>\d{{4}}))?"
    rf"|\b{_MONTH.format('m2')}\s+(?P<d2>\d{{1,2}})(?:st|nd|rd|th)?\b(?:,?\s+(?P<y2>\d{{4}}))?|\b{_MONTH.format('m3')},?\s+(?P<y3>\d{{4}})"
    r"|(?<![\d-])(?P<y4>\d{4})(?P<sep>[-/.])(?P<m4>\d{1,2})(?P=sep)(?P<d4>\d{1,2})(?![\d-])"
    r"|(?:(?<!\d)(?P<y5>\d{4})年)?(?<!\d)(?P<m5>\d{1,2})月(?:(?P<d5>\d{1,2})[日号]?)?",
    re.I,
)
_ERA = re.compile(
    r"(?<!\d)(?P<n1>\d+)\s*(?P<era>(?:b\.?\s?c|b\.?\s?c\.?\s?e|c\.?\s?e|a\.?\s?d)(?!\w)\.?)|\bad\s+(?P<n2>\d+)\b|公元(?P<before>前)?(?P<n3>\d+)年?",
    re.I,
)


def _clock(m: re.Match[str]) -> Value | None:
    if m["word"]:
        return Value("clock", (12 * (m["word"].lower() == "noon"), 0, 0, True))
    hour = int(m["h"] or m["h2"] or m["h3"] or m["h4"])
    minute, second = int(m["m"] or m["m2"] or m["m4"] or (30 if m["fraction"] else 0)), int(m["s"] or m["s2"] or 0)
    half = (m["half"] or "")[:1].lower() or {"凌": "a", "早": "a", "上": "a", None: ""}.get(
        m["part"] and m["part"][0], "p"
    )
    if hour > 24 or minute > 59 or (half and m["half"] and not 1 <= hour <= 12):
        return None
    if half and hour <= 12:
        hour = hour % 12 + 12 * (half == "p")
    return Value("clock", (hour % 24, minute, second, bool(half) or not 1 <= hour <= 12))


def _date(m: re.Match[str]) -> Value | None:
    parts = [
        next((m[f"{p}{i}"] for i in range(1, 6) if f"{p}{i}" in m.groupdict() and m[f"{p}{i}"]), None) for p in "ymd"
    ]
    month = parts[1] and (_MONTHS.get(parts[1][:3].lower()) or int(parts[1]))
    year, day = (int(p) if p else None for p in (parts[0], parts[2]))
    return Value("date", (year, month, day)) if month and 1 <= month <= 12 and (day is None or 1 <= day <= 31) else None


def _era(m: re.Match[str]) -> Value:
    before = m["before"] or (m["era"] or "").lower().startswith("b")
    return Value("era", int(m["n1"] or m["n2"] or m["n3"]) * (-1 if before else 1))


_SCANS = (("clock", _CLOCK, _clock), ("date", _DATE, _date), ("era", _ERA, _era))


def find_values(text: str, kind: str) -> list[Value]:
    """Return the times, dates or years with an era in a text."""
    text = spell_in_digits(text)
    return [v for k, pattern, read in _SCANS if k == kind for m in pattern.finditer(text) if (v := read(m))]


# Expressions.

_TOKEN = re.compile(
    r"\s*(?:(\d+\s+\d+/\d+|\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)|(sin|cos|tan|log|ln|sqrt|pi)(?![a-z])|([A-Za-zα-ωΑ-Ω])|([-+*/^()!√]))"
)
_FUNCTIONS = {"sin": math.sin, "cos": math.cos, "tan": math.tan, "log": math.log10, "ln": math.log, "sqrt": math.sqrt}
_POINTS = 3
_Amount = Fraction | float


class _Parser:
    """Evaluate an expression, with variables at one point."""

    def __init__(self, tokens: list[str], point: int) -> None:
        self.tokens, self.point, self.at = tokens, point, 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1]

    def sum(self) -> _Amount:
        value = self.product()
        while self.peek() in ("+", "-"):
            value = value + self.product() if self.take() == "+" else value - self.product()
        return value

    def product(self) -> _Amount:
        value = self.signed()
        while (token := self.peek()) and token not in "+-)":
            if token in "*/":
                value = value * self.signed() if self.take() == "*" else value / self.signed()
            elif token[0].isdigit() or token in "^!":
                raise ValueError(token)  # "A4" and "x 2" are no products
            else:
                value *= self.power()
        return value

    def signed(self) -> _Amount:
        if self.peek() in ("+", "-"):
            return -self.signed() if self.take() == "-" else self.signed()
        return self.power()

    def power(self) -> _Amount:
        value: Any = self.atom()
        if self.peek() == "^":
            self.take()
            exponent: Any = self.signed()
            if abs(exponent) > 64:
                raise ValueError("exponent")
            value = value ** (int(exponent) if exponent == int(exponent) else float(exponent))
            if isinstance(value, complex):
                raise ValueError("complex")
        return cast(_Amount, value)

    def atom(self) -> _Amount:
        token = self.take()
        if token == "(":
            value = self.sum()
            if self.take() != ")":
                raise ValueError("(")
            return value
        if token in ("√", "sqrt"):
            value = self.power() if token == "√" else self.atom()
            square = Fraction(value)
            root = Fraction(math.isqrt(abs(square.numerator)), math.isqrt(square.denominator))
            return root if root * root == value else math.sqrt(value)
        if token in _FUNCTIONS:
            return _FUNCTIONS[token](self.power())
        if token in ("pi", "π"):
            return math.pi
        if token[0].isdigit() or token[0] == ".":
            whole, _, part = token.replace(",", "").rpartition(" ")
            return Fraction(part) + Fraction(whole.strip() or 0)
        if token.isalpha():
            return Fraction(1009 + 37 * ord(token) + 101 * self.point**2, 1013 + 11 * self.point)
        raise ValueError(token)


def _evaluate(text: str) -> tuple[tuple[_Amount, ...], int] | None:
    """Return the values of an expression at some points, and its number of additions; None for other text."""
    tokens: list[str] = []
    at = 0
    text = re.sub(r"(?<=[\d)])\s*x\s*(?=\d)|×|·", "*", re.sub(r"[{}]", lambda m: "()"[m.group() == "}"], text)).strip()
    while at < len(text):
        m = _TOKEN.match(text, at)
        if m is None or len(tokens) > 100:
            return None
        tokens.append(next(g for g in m.groups() if g))
        at = m.end()
    if not tokens or re.search(
        r"[A-Za-z]{3,}|(?<![-+*/(=])\s[A-Za-z]{2}|\d(?:st|nd|rd|th)\b", re.sub(r"sqrt|sin|cos|tan|log|ln|pi", "", text)
    ):
        return None
    try:
        values = []
        for point in range(_POINTS):
            parser = _Parser(tokens, point)
            values.append(parser.sum())
            if parser.peek():
                return None
    except (ValueError, ArithmeticError, IndexError, RecursionError):
        return None
    return tuple(values), sum(t in "+-" for t in tokens[1:])


def _equal(a: _Amount, b: _Amount) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    return math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-12)


# Everything.

_RELATION = re.compile(r"<=|>=|[=<>≤≥≠]")
_RANGE = re.compile(
    r"(?:from\s+|between\s+)?(.*?\d\S*?(?:\s*[a-z%°]+)?)\s*(?:-|~|–|—|\bto\b|至|到|(?<=\d)\s*\band\b)\s*(\S.*)", re.I
)


def _split(text: str, separators: str) -> list[str]:
    """Split at separators outside brackets."""
    parts, depth, start = [], 0, 0
    for m in re.finditer(rf"[(\[{{]|[)\]}}]|{separators}", text, re.I):
        if m.group() in "([{":
            depth += 1
        elif m.group() in ")]}":
            depth -= 1
        elif depth == 0:
            parts.append(text[start : m.start()])
            start = m.end()
    return [part.strip() for part in [*parts, text[start:]]]


def read_value(text: str) -> Value | None:
    """Return the value that a whole text states, or None if it is no number and no formal answer."""
    text = spell_in_digits(re.sub(r"(?<=[\w)\]}])\.$", "", normalize(text).strip()))
    if not text or len(text) > 300 or not re.search(r"[\dπ√=<>≤≥∪∞^+*/]|noon|midnight", text, re.I):
        return None
    for _, pattern, read in _SCANS:
        if m := pattern.fullmatch(text):
            return read(m)
    if number := whole_number(text):
        return Value("number", number)
    if m := re.fullmatch(r"(\d+)\s*:\s*(\d+)", text):
        return Value("ratio", (int(m[1]), int(m[2])))
    if re.match(r"between\s|from\s", text, re.I) and (ends := _ends(text)):
        return _items("range", list(ends))
    if len(parts := _split(text, "∪")) > 1:
        return _items("∪", parts)
    thousands = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    if (
        re.fullmatch(r"[(\[{].*[)\]}]", text)
        and len(_split(text[1:-1], r"\)")) == 1
        and ("," in text or text[0] == "{")
    ):
        return _items(text[0] + text[-1], _split(text[1:-1], ","))
    if len(parts := _split(thousands if ", " in text else text, r",?\s+(?:and|or)\s+|[,;、]|和|或者?")) > 1:
        return _items("", [p for p in parts if p])
    if sides := _RELATION.split(text)[:5]:
        values = [_evaluate(side) for side in sides]
        if len(sides) == 1 and values[0]:
            if re.fullmatch(r"-?[\d.]+\s*-\s*[\d.]+", text) and (ends := _ends(text)):
                return _items("range", list(ends))
            return Value("expression", *values[0])
        if len(sides) > 1 and all(values):
            marks = [{"<=": "≤", ">=": "≥"}.get(m, m) for m in _RELATION.findall(text)]
            relations = []
            for mark, a, b in zip(marks, values, values[1:], strict=False):
                flipped = mark in ">≥"
                assert a is not None and b is not None
                side = tuple((y - x) if flipped else (x - y) for x, y in zip(a[0], b[0], strict=True))
                relations.append(({">": "<", "≥": "≤"}.get(mark, mark), side))
            name = marks == ["="] and re.fullmatch(r"\s*[^\W\d]\s*", sides[0])
            return Value("relation", (tuple(relations), read_value(sides[1]) if name else None))
    if (m := _RANGE.fullmatch(text)) and (ends := _ends(text)):
        return _items("range", list(ends))
    return None


def _ends(text: str) -> tuple[str, str] | None:
    m = re.fullmatch(r"(-?[\d.]+)\s*-\s*([\d.]+)", text) or _RANGE.fullmatch(text)
    return (m[1].strip(), m[2].strip()) if m else None


def _items(brackets: str, parts: list[str]) -> Value | None:
    items = [Value("limit", p.strip()) if re.fullmatch(r"\s*[-+]?∞\s*", p) else read_value(p) for p in parts]
    if brackets == "" and not all(items):  # words
        return None
    words = [item or Value("word", part.casefold().strip()) for item, part in zip(items, parts, strict=True)]
    return Value("list", (brackets, tuple(words)))


def compare(stated: Value, truth: Value) -> bool | None:
    """Return whether two values are equal; None if they cannot be compared."""
    if truth.kind == "relation" and stated.kind != "relation" and truth.data[1]:  # "5" for "x = 5"
        return compare(stated, truth.data[1])
    if stated.kind == "relation" and truth.kind != "relation" and stated.data[1]:
        return compare(stated.data[1], truth)
    a, b = stated.data, truth.data
    if {stated.kind, truth.kind} == {"number", "expression"}:
        number, other = (a, b) if stated.kind == "number" else (b, a)
        if number.unit or number.percent:
            return None
        if not any(_equal(other[i], other[0]) for i in range(1, _POINTS)):
            return False  # it holds a variable
        close = math.isclose(float(number.value), float(other[0]), rel_tol=0.02)
        return None if close or stated.terms else False
    if stated.kind != truth.kind:
        return None
    match truth.kind:
        case "number":
            return same_number(a, b)
        case "expression":
            same = all(map(_equal, a, b))
            return (True if stated.terms <= truth.terms else None) if same else False
        case "relation":
            if [mark for mark, _ in a[0]] != [mark for mark, _ in b[0]]:
                return None if len(a[0]) != len(b[0]) else False
            return all(_proportional(x, y, mark) for (mark, x), (_, y) in zip(a[0], b[0], strict=True))
        case "clock":
            if a[3] and b[3]:
                return a[:3] == b[:3]
            same = (a[0] % 12, *a[1:3]) == (b[0] % 12, *b[1:3])
            return (True if a[3] == b[3] and a == b else None) if same else False
        case "date":
            if a == b:
                return True
            return False if any(x and y and x != y for x, y in zip(a, b, strict=True)) else None
        case "ratio":
            return True if a == b else None if a[0] * b[1] == a[1] * b[0] else False
        case "list":
            return _same_list(a, b)
    return bool(a == b)


def _same_list(a: tuple[str, tuple[Value, ...]], b: tuple[str, tuple[Value, ...]]) -> bool | None:
    if a[0] != b[0]:
        return None
    if len(a[1]) != len(b[1]):
        return None if a[0] == "∪" else False
    results = [compare(x, y) for x, y in zip(a[1], b[1], strict=True)]
    if all(results):
        return True
    if len(b[1]) <= 6 and a[0] in ("", "{}", "∪"):
        for order in itertools.permutations(a[1]):
            if all(compare(x, y) for x, y in zip(order, b[1], strict=True)):
                return None if a[0] == "" else True  # only a set has no order
    return False if False in results and None not in results else None


def _proportional(a: tuple[_Amount, ...], b: tuple[_Amount, ...], mark: str) -> bool:
    pairs = list(zip(a, b, strict=True))
    at = next((i for i, (_, y) in enumerate(pairs) if y), None)
    if at is None or not pairs[at][0]:
        return all(_equal(x, y) for x, y in pairs)
    if mark in "<≤" and pairs[at][0] / pairs[at][1] < 0:
        return False
    return all(_equal(x * pairs[at][1], y * pairs[at][0]) for x, y in pairs)


def same_number(found: Number, truth: Number, tolerance: Fraction | None = None) -> bool | None:
    """Return whether two numbers are equal. Units are converted; one may lack its unit. None if the units do not fit.

    tolerance: Largest difference as a share of the truth.
    """
    value = found.value
    near = Fraction(0)
    if found.unit and truth.unit:
        if found.unit.dimensions != truth.unit.dimensions:
            return None
        if found.unit.factor != truth.unit.factor:
            value, near = value * found.unit.factor / truth.unit.factor, Fraction(1, 50)
    elif (unit := found.unit or truth.unit) and (unit.glued_letter or found.percent or truth.percent):
        near = Fraction(1)
    values = [value]
    if found.percent != truth.percent and not (found.unit or truth.unit):  # 35 and 0.35 both say 35 %
        values.append(value / 100 if found.percent else value * 100)
    if tolerance is not None:
        equal = any(abs(v - truth.value) <= abs(truth.value) * tolerance for v in values)
    elif found.places is not None and found.places >= 2 and truth.places is None:
        equal = any(round(truth.value, found.places) == v for v in values)  # 0.33 for 1/3
    else:
        equal = truth.value in values
    if near == 1:  # the letter may be a variable or a label
        return None if equal else False
    return equal or (None if near and abs(value - truth.value) <= abs(truth.value) * near else False)
