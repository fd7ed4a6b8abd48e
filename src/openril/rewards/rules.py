"""Answer rules: whether the final answer of a free text is the ground truth. They ask no model.

``score`` gives 1.0, 0.0, or None if the response has no answer that the rule can compare. Every rule guards against reward
hacking: an empty response, several different final answers, "A or B or C" and a list of all options score 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import TypeVar

from openril.errors import DataError
from openril.records import Question
from openril.rewards.choices import LISTING, find_options, read_choice, truth_index
from openril.rewards.extraction import (
    CONCLUSION,
    HEDGE,
    NEGATION,
    Found,
    Number,
    find_answers,
    normalize,
    numbers,
    plain,
    read_truth,
    shortened,
    whole_number,
    whole_words,
    without_thoughts,
)
from openril.rewards.number_words import spell_in_digits
from openril.rewards.values import Value, compare, find_values, read_value, same_number

RULES = ("auto", "exact", "choice", "number", "relaxed_number", "boolean", "contains")

RELAXED_TOLERANCE = Fraction(5, 100)
"""ChartQA's relaxed accuracy: a numeric answer may be off by 5 % of the truth."""

T = TypeVar("T")


def score(rule: str, question: Question, response_text: str) -> float | None:
    """Return 1.0 for right, 0.0 for wrong, None where no answer to compare was found ("unparsed").

    With several ground truths a response is right if it matches any, and wrong if it clearly is another one than each.

    Raises DataError for an unknown rule, and for a question whose ground truth is missing or cannot be read by the rule.
    """
    where = f"question {question.id}" + (f" ({question.origin})" if question.origin else "")
    if rule not in RULES:
        raise DataError(f"{where}: rule: expected one of {', '.join(RULES)}, got {rule!r}")
    if not question.answer.strip():
        raise DataError(f"{where}: expected an answer, got none. Add it, or set rewards.answer.kind: none.")
    if not plain(response_text):
        return 0.0
    response_text = shortened(response_text)
    if question.other_answers:
        verdicts = [score(rule, replace(question, answer=a, other_answers=()), response_text) for a in question.answers]
        return 1.0 if 1.0 in verdicts else None if None in verdicts else 0.0
    chosen = choose_rule(question) if rule == "auto" else rule
    answers = find_answers(response_text)
    if chosen != "choice":
        question = replace(question, answer=read_truth(question.answer))
    match chosen:
        case "choice":
            return _choice(question, answers, response_text, where)
        case "number" | "relaxed_number":
            truth = whole_number(question.answer) or (rule == "number" and _only_number(question.answer)) or None
            if truth is None:
                if chosen == "relaxed_number":  # ChartQA: answers that are not numbers must match exactly
                    return _exact(question, answers, response_text)
                raise DataError(f"{where}: rule number expects a number, got the answer {question.answer!r}")
            tolerance = RELAXED_TOLERANCE if chosen == "relaxed_number" and not _asks_for_year(question) else None
            return _verdict(answers, _read_number, lambda found: same_number(found, truth, tolerance))
        case "boolean":
            truth_value = _BOOLEANS.get(plain(question.answer))
            if truth_value is None:
                raise DataError(f"{where}: rule boolean expects yes/no/true/false, got the answer {question.answer!r}")
            return _boolean(answers, response_text, truth_value)
        case "contains":
            return _contains(question, answers, response_text, strict=rule == "contains")
        case "value":
            return _value(question, answers, response_text)
    return _exact(question, answers, response_text, strict=rule == "exact")


def choose_rule(question: Question) -> str:
    """Return the rule that ``auto`` selects for a question.

    ``choice`` where there are options, in the data or as lettered lines in the text that the answer names; ``boolean`` for
    yes/no/true/false; ``number`` for a number with at most a measuring unit; ``value``, which only ``auto`` selects, for
    other formal answers (times, dates, expressions, lists, "5 apples"); ``contains`` for up to five words; ``exact`` for
    longer answers. Under ``auto`` other words are unparsed rather than wrong.
    """
    if (options := find_options(question)) and (question.choices or truth_index(question.answer, options) is not None):
        return "choice"
    answer = read_truth(question.answer)
    if plain(answer) in _BOOLEANS:
        return "boolean"
    if whole_number(answer) is not None:
        return "number"
    if re.fullmatch(r"\(?[A-H]\)?\.?", answer.strip()):
        return "choice"
    if len(plain(answer).split()) <= 5:
        return "value" if _FORMAL.search(normalize(answer)) or read_value(answer) else "contains"
    return "value" if read_value(answer) else "exact"


_FORMAL = re.compile(r"[\dπ√=<>≤≥∪∞^]")


def _verdict(
    answers: list[Found], read: Callable[[str, bool], frozenset[T]], right: Callable[[T], bool | None]
) -> float | None:
    """Score by the most reliable kind of candidate that the rule can read. Different answers of one kind score 0.

    read: returns the different answers that a candidate states: none, one, or several if the writer hedges.
    """
    for found in answers:
        stated = {answer for candidate in found.candidates for answer in read(candidate, found.explicit)}
        if len(stated) == 1:
            verdict = right(next(iter(stated)))
            return None if verdict is None else float(verdict)
        if stated:
            return 0.0
    return None


def _choice(question: Question, answers: list[Found], response_text: str, where: str) -> float | None:
    options = find_options(question)
    if options:
        truth = truth_index(question.answer, options)
        if truth is None:
            raise DataError(f"{where}: answer: expected one of {', '.join(options)}, got {question.answer!r}")
    else:
        options = [""] * 26  # letters alone
        truth = truth_index(question.answer, options)
        if truth is None:
            raise DataError(f"{where}: rule choice expects choices or a letter as the answer, got {question.answer!r}")
    if answers and not answers[0].explicit:
        lines = [line.strip() for line in normalize(without_thoughts(response_text)).split("\n") if line.strip()]
        alone = [bool(re.fullmatch(r"\(?[A-Z]\)?[.:]?", line)) for line in lines]
        if len(lines) > 1 and alone[0] and alone[-1] and lines[0].strip("().:") != lines[-1].strip("().:"):
            return 0.0
        if len(lines) > 1 and alone[0] and not any(alone[1:]) and not LISTING.match(lines[-1]):
            last = CONCLUSION.split(lines[-1]) if CONCLUSION.search(lines[-1]) else []
            answers = [Found((lines[0], *last[-1:]), False)]  # an explanation follows the letter
        # A response that ends with a list of the options has not chosen the last one.
        letters = LISTING.findall(normalize(response_text))
        item = LISTING.match(answers[-1].candidates[0])
        if item and len(set(letters)) > 1 and letters.count(item[1]) == 1:
            return 0.0
    return _verdict(answers, lambda text, explicit: read_choice(text, options), lambda index: index == truth)


# number


def _only_number(answer: str) -> Number | None:
    """Return the only number of an answer such as "5 apples", for data that asks for the rule number."""
    found = numbers(spell_in_digits(normalize(answer)))
    return found[0] if len(found) == 1 and found[0].alone else None


def _read_number(text: str, explicit: bool) -> frozenset[Number]:
    """Return the number after the last "=" or "so", the only number, or the one at the start; of a list, all numbers.

    A number that is part of something else, such as "9 am", "5x" and "12 + 30", is none.
    """
    text = spell_in_digits(text)
    for separator in (r"=|≈", CONCLUSION.pattern):
        parts = re.split(separator, text, flags=re.I)
        if len(parts) > 1 and numbers(parts[-1]):
            text = parts[-1]
    text = re.sub(r"^\s*(?:[-*•]\s+|about|approximately|around|roughly|exactly|~|≈|大约|约)\s*", "", text, flags=re.I)
    if whole := whole_number(text):
        return frozenset({whole})
    if re.fullmatch(r"\s*-?\d+,\d{1,2}\s*", text):  # a decimal comma, or two numbers
        return frozenset()
    found = numbers(text)
    leads = bool(found) and found[0].start == 0
    for a, b in zip(found, found[1:2] if leads else found[1:], strict=False):
        if re.fullmatch(rf"(?:\s*[^\W\d]+)?{HEDGE}(?:about\s+)?", text[a.end : b.start], re.I) and a.value != b.value:
            return frozenset(found)
    if leads or len({n.value for n in found}) == 1:
        return frozenset(found[:1]) if found[0].alone else frozenset()
    found = [n for n in found if n.alone]
    return frozenset(found[:1]) if explicit or len({n.value for n in found}) == 1 else frozenset()


def _asks_for_year(question: Question) -> bool:
    """Return whether the answer is a year. Years are compared exactly, since 5 % of 2010 is a century."""
    year = re.fullmatch(r"(?:1[5-9]|20)\d\d", question.answer.strip())
    return bool(year and re.search(r"\byears?\b|\bwhen\b|年", question.question, re.I))


# boolean

_BOOLEANS = dict.fromkeys(("yes", "true", "correct", "是", "对", "正确", "是的", "对的"), True)
_BOOLEANS |= dict.fromkeys(("no", "false", "incorrect", "否", "不是", "错", "错误", "不对", "不正确"), False)
_YES_NO = "|".join(sorted(_BOOLEANS, key=len, reverse=True))
_START = re.compile(rf"\W*(?:it(?:'s| is)\s+)?({_YES_NO})(?![a-z])", re.I)
_TRUTH_WORD = re.compile(r"(\bnot\s+|n't\s+)?\b(true|false)\b", re.I)


def _read_boolean(text: str, explicit: bool = False) -> frozenset[bool]:
    """Read yes or no at the start, or true/false anywhere ("not true" is false). "yes or no" states both."""
    if start := _START.match(text):
        value = _BOOLEANS[start[1].casefold()]
        more = re.match(rf"{HEDGE}({_YES_NO})(?:\s*[.,;!?/|]|\s*$|\s+(?:and|or)\b)", text[start.end() :], re.I)
        return frozenset({value, _BOOLEANS[more[1].casefold()]} if more else {value})
    parts = CONCLUSION.split(text)
    if len(parts) > 1 and (concluded := _read_boolean(parts[-1].strip(" ,:"))):
        return concluded
    return frozenset((m[2].casefold() == "true") != bool(m[1]) for m in _TRUTH_WORD.finditer(text))


def _boolean(answers: list[Found], response_text: str, truth: bool) -> float | None:
    if answers and answers[0].explicit:
        return _verdict(answers, _read_boolean, lambda value: value == truth)
    # An unmarked answer comes first or last. A response that has both gives two answers.
    stated = _read_boolean(answers[-1].candidates[0]) if answers else frozenset()
    first = _START.match(normalize(response_text))
    if first:
        stated |= _read_boolean(normalize(response_text).strip().split("\n", 1)[0])
    return float(stated == {truth}) if stated else None


# exact and contains


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\w\w)[.!?](?:\s|$)", text, maxsplit=1)[0]


def _is_brief(text: str) -> bool:
    """Return whether a response is only an answer: one line of at most six words."""
    return len(plain(text).split()) <= 6 and "\n" not in text.strip()


def _exact(question: Question, answers: list[Found], response_text: str, strict: bool = True) -> float | None:
    """Return whether the stated answer equals the truth up to case, spaces, leading articles and outer punctuation.

    Unmarked text counts as the answer if it is one line of at most six words. Without ``strict``, other wordings are
    unparsed.
    """
    truth = plain(question.answer)
    if plain(response_text) == truth:
        return 1.0
    for found in answers:
        stated = {plain(c) if plain(c) == truth else plain(_first_sentence(c)) for c in found.candidates}
        if stated == {truth}:
            return 1.0
        if strict and (found.explicit or _is_brief(response_text)):
            return 0.0
    return None


def _contains(question: Question, answers: list[Found], response_text: str, strict: bool = True) -> float | None:
    """Return whether the stated answer or the last line contains the truth as whole words, not negated, not in a list.

    An unmarked sentence without the truth is unparsed, because it may express the truth in other words. Without
    ``strict`` so is a marked answer, unless it names another member of a closed set (colors, days, directions).
    """
    truth = plain(question.answer)
    for found in answers:
        if all(_contains_truth(plain(c), truth) for c in found.candidates):
            return 1.0
        if any(whole_words(truth).search(plain(c)) for c in found.candidates):
            return 0.0
        if found.explicit or _is_brief(response_text):
            return 0.0 if strict or all(_excludes(plain(c), truth) for c in found.candidates) else None
    return None


_CLOSED_SETS = [
    set(words.split())
    for words in (
        "red orange yellow green blue purple pink brown black white gray",
        "红色 橙色 黄色 绿色 蓝色 紫色 粉色 棕色 黑色 白色 灰色",
        "monday tuesday wednesday thursday friday saturday sunday",
        "january february march april may june july august september october november december",
        "left right",
        "north south east west",
    )
]


def _excludes(text: str, truth: str) -> bool:
    """Return whether a text names one member of a closed set, and the truth is another one."""
    return any(
        truth in words and len(named := words & set(text.split())) == 1 and truth not in named for words in _CLOSED_SETS
    )


def _contains_truth(text: str, truth: str) -> bool:
    hits = list(whole_words(truth).finditer(text))
    if not hits or any(NEGATION.search(text[: m.start()]) for m in hits):
        return False
    rest = whole_words(truth).sub("\0", text)
    items = {item for part in re.split(HEDGE, rest) if (item := part.strip(" .")) and len(item.split()) <= 3}
    only_commas = not re.search(r"\b(?:or|and|versus|vs)\b|[/|&、]|或|和", rest)
    return not (any(item.endswith("\0") for item in items) and len(items) >= (3 if only_commas else 2))


# value


_STATED = re.compile(r".*(?:\b(?:is|are|equals?|be|to|at|on|in|about)\b|=|:|≈|为|是|等于|得)\s*", re.I | re.S)
_COUNTED = re.compile(r"\s+([a-z]+(?:\s[a-z]+)?|[\u3400-\u9fff]{1,6})$", re.I)


def _value(question: Question, answers: list[Found], response_text: str) -> float | None:
    """Compare a formal answer: a time, date, expression, equation, list, range, or a number of things.

    Equal text is right. Other text is wrong only if it is a value of the same kind, and unparsed otherwise.
    """
    truth_text = _squeezed(question.answer)
    truth = read_value(question.answer)
    if _squeezed(response_text) == truth_text:
        return 1.0
    for found in answers:
        if all(_squeezed(c) == truth_text for c in found.candidates):
            return 1.0
        if truth is None:
            verdicts = {_same_text(c, question.answer) for c in found.candidates}
        else:
            verdicts = {v for c in found.candidates for v in _compare_values(c, truth, found.explicit)}
        verdict = verdicts.pop() if len(verdicts) == 1 else False if {True, False} <= verdicts else None
        if verdict is not None:
            return float(verdict)
        if found.explicit:
            return None
    return None


def _squeezed(text: str) -> str:
    return "".join(normalize(text).casefold().split()).rstrip(".")


def _compare_values(text: str, truth: Value, explicit: bool) -> set[bool | None]:
    whole = read_value(text)
    stated = [whole] if whole else find_values(text, truth.kind)
    if not whole and not stated:
        rest = _STATED.sub("", text)
        for end in (rest, rest.split(". ")[0]):
            stated = stated or ([value] if (value := read_value(end)) and value.kind in (truth.kind, "number") else [])
    if whole and truth.kind in ("expression", "number") and whole.kind == "relation":
        last = read_value(re.split(r"=", text)[-1])  # A = πr^2 = 12π
        stated = [last] if last else stated
    verdicts = {compare(value, truth) for value in stated} or {None}
    return verdicts if len(stated) <= 1 or explicit or verdicts == {False} else {None}


def _same_text(text: str, truth: str) -> bool | None:
    """Compare an answer with digits that is no formal value: "5 apples", "Route 66", "seat 12 C"."""
    a, b = (spell_in_digits(" ".join(normalize(t).casefold().split()).strip(" .")) for t in (text, truth))
    if a == b:
        return True
    noun = _COUNTED.search(b)
    number = whole_number(b[: noun.start()]) if noun else None
    if noun and number and number.alone:
        word = noun[1].removesuffix("s")
        counted = [n for n in numbers(a) if re.match(rf"\s*{re.escape(word)}(?:s|es)?\b", a[n.end :])]
        if len({n.value for n in counted}) == 1:
            return same_number(counted[0], number)
        return False if counted else None
    words = re.compile(rf"(?<![\w.+*/^√-])(?<![-+*/^]\s){re.escape(b)}(?![\w^]|\s*[-+*/^=]|[.,]\d)")
    if words.search(a) and not NEGATION.search(a[: words.search(a).start()]):  # type: ignore[union-attr]
        return _contains_truth(a, b)
    return None
