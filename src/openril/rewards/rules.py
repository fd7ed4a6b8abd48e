"""Answer rules: is the final answer of a free text the ground truth? No model is asked.

``score`` gives 1.0, 0.0, or None where the response holds no answer that the rule could compare. Guards against reward
hacking are part of every rule: an empty response, several different final answers, "A or B or C" and a list of all
options score 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable
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
    normalise,
    numbers,
    plain,
    whole_number,
    whole_words,
)

RULES = ("auto", "exact", "choice", "number", "relaxed_number", "boolean", "contains")

RELAXED_TOLERANCE = Fraction(5, 100)
"""ChartQA's relaxed accuracy: a numeric answer may be off by 5 % of the truth."""

LONGEST_RESPONSE = 20_000
"""Of longer responses the rules read the first and last halves of this many characters."""

T = TypeVar("T")


def score(rule: str, question: Question, response_text: str) -> float | None:
    """1.0 right, 0.0 wrong, None when no answer to compare was found ("unparsed").

    rule: one of ``RULES``. Raises DataError for an unknown rule and for a question without ground truth, or whose
    ground truth the rule cannot read.
    """
    where = f"question {question.id}" + (f" ({question.origin})" if question.origin else "")
    if rule not in RULES:
        raise DataError(f"{where}: unknown answer rule {rule!r}; choose one of {', '.join(RULES)}")
    if not question.answer.strip():
        raise DataError(f"{where} has no answer to compare with; give it one, or set rewards.answer.kind none")
    if not plain(response_text):
        return 0.0
    if len(response_text) > LONGEST_RESPONSE:  # the answer stands at an end; runaway text must not stall a step
        response_text = f"{response_text[: LONGEST_RESPONSE // 2]}\n{response_text[-LONGEST_RESPONSE // 2 :]}"
    chosen = choose_rule(question) if rule == "auto" else rule
    answers = find_answers(response_text)
    match chosen:
        case "choice":
            return _choice(question, answers, response_text, where)
        case "number" | "relaxed_number":
            truth = whole_number(question.answer)
            if truth is None:
                if chosen == "relaxed_number":  # ChartQA: answers that are no numbers must match exactly
                    return _exact(question, answers, response_text)
                raise DataError(f"{where}: rule number, but its answer {question.answer!r} is not a number")
            relaxed = chosen == "relaxed_number" and not _asks_for_year(question)
            return _verdict(answers, _read_number, lambda found: _same_number(found, truth, relaxed))
        case "boolean":
            wanted = _BOOLEANS.get(plain(question.answer))
            if wanted is None:
                raise DataError(f"{where}: rule boolean, but its answer {question.answer!r} is not yes/no/true/false")
            return _boolean(answers, response_text, wanted)
        case "contains":
            return _contains(question, answers, response_text)
    return _exact(question, answers, response_text, strict=rule == "exact")


def choose_rule(question: Question) -> str:
    """The rule ``auto`` stands for: choice where there are options (in the data, or lettered lines in the text that the
    answer names); boolean for yes/no/true/false; number for a number with at most a unit; contains for up to five
    words; exact for longer answers (where a different wording is unparsed rather than wrong)."""
    if (options := find_options(question)) and (question.choices or truth_index(question.answer, options) is not None):
        return "choice"
    if plain(question.answer) in _BOOLEANS:
        return "boolean"
    if whole_number(question.answer) is not None:
        return "number"
    if re.fullmatch(r"\(?[A-H]\)?\.?", question.answer.strip()):
        return "choice"
    return "contains" if len(plain(question.answer).split()) <= 5 else "exact"


def _verdict(
    answers: list[Found], read: Callable[[str, bool], frozenset[T]], right: Callable[[T], bool]
) -> float | None:
    """Score by the surest kind of candidate that the rule can read; different answers of one kind score 0.

    read: the different answers a candidate states (empty: none; several: the writer hedges). right: whether one is it.
    """
    for found in answers:
        stated = {said for candidate in found.candidates for said in read(candidate, found.explicit)}
        if len(stated) == 1:
            return float(right(next(iter(stated))))
        if stated:
            return 0.0
    return None


def _choice(question: Question, answers: list[Found], response_text: str, where: str) -> float | None:
    options = find_options(question)
    if options:
        truth = truth_index(question.answer, options)
        if truth is None:
            raise DataError(f"{where}: its answer {question.answer!r} is none of its choices {', '.join(options)}")
    else:
        options = [""] * 26  # letters alone
        truth = truth_index(question.answer, options)
        if truth is None:
            raise DataError(
                f"{where}: rule choice, but it has no choices and its answer {question.answer!r} is no letter"
            )
    if answers and not answers[0].explicit:
        # A response that lists the options and stops has not chosen the last of them.
        letters = LISTING.findall(normalise(response_text))
        last = LISTING.match(answers[-1].candidates[0])
        if last and len(set(letters)) > 1 and letters.count(last[1]) == 1:
            return 0.0
    return _verdict(answers, lambda text, explicit: read_choice(text, options), lambda index: index == truth)


# number


def _read_number(text: str, explicit: bool) -> frozenset[Number]:
    """The number a candidate states: behind its last "=" or "so"; its only number; or the one it begins with. A list of
    numbers ("3 or 4", "1, 2, 3") states them all. In a sentence with several numbers none of this settles: nothing."""
    for separator in (r"=|≈", CONCLUSION.pattern):
        parts = re.split(separator, text, flags=re.I)
        if len(parts) > 1 and numbers(parts[-1]):
            text = parts[-1]
    text = re.sub(r"^\s*(?:[-*•]\s+|about|approximately|around|roughly|exactly|~|≈)\s*", "", text, flags=re.I)
    found = numbers(text)
    leads = bool(found) and found[0].start == 0
    for a, b in zip(found, found[1:2] if leads else found[1:], strict=False):
        if re.fullmatch(rf"(?:\s*[^\W\d]+)?{HEDGE}(?:about\s+)?", text[a.end : b.start], re.I) and a.value != b.value:
            return frozenset(found)
    return frozenset(found[:1]) if leads or explicit or len({n.value for n in found}) == 1 else frozenset()


def _same_number(found: Number, truth: Number, relaxed: bool) -> bool:
    values = [found.value]
    if found.percent != truth.percent:  # 35 and 0.35 both say 35 %
        values.append(found.value / 100 if found.percent else found.value * 100)
    if relaxed:
        return any(abs(v - truth.value) <= abs(truth.value) * RELAXED_TOLERANCE for v in values)
    if found.places is not None and found.places >= 2 and truth.places is None:
        return any(round(truth.value, found.places) == v for v in values)  # 0.33 for 1/3
    return truth.value in values


def _asks_for_year(question: Question) -> bool:
    """5 % of 2010 is a century: years are compared exactly."""
    year = re.fullmatch(r"(?:1[5-9]|20)\d\d", question.answer.strip())
    return bool(year and re.search(r"\byears?\b|\bwhen\b|年", question.question, re.I))


# boolean

_BOOLEANS = dict.fromkeys(("yes", "true", "correct", "是", "对", "正确", "是的", "对的"), True)
_BOOLEANS |= dict.fromkeys(("no", "false", "incorrect", "否", "不是", "错", "错误", "不对", "不正确"), False)
_SAID = "|".join(sorted(_BOOLEANS, key=len, reverse=True))
_START = re.compile(rf"\W*(?:it(?:'s| is)\s+)?({_SAID})(?![a-z])", re.I)
_TRUTH_WORD = re.compile(r"(\bnot\s+|n't\s+)?\b(true|false)\b", re.I)


def _read_boolean(text: str, explicit: bool = False) -> frozenset[bool]:
    """Yes or no at the start, or true/false anywhere ("not true" is false). "yes or no" states both."""
    if start := _START.match(text):
        value = _BOOLEANS[start[1].casefold()]
        more = re.match(rf"{HEDGE}({_SAID})(?![a-z])", text[start.end() :], re.I)
        return frozenset({value, _BOOLEANS[more[1].casefold()]} if more else {value})
    parts = CONCLUSION.split(text)
    if len(parts) > 1 and (concluded := _read_boolean(parts[-1].strip(" ,:"))):
        return concluded
    return frozenset((m[2].casefold() == "true") != bool(m[1]) for m in _TRUTH_WORD.finditer(text))


def _boolean(answers: list[Found], response_text: str, wanted: bool) -> float | None:
    if answers and answers[0].explicit:
        return _verdict(answers, _read_boolean, lambda said: said == wanted)
    # Without a marked answer people say it first or last; saying both is two answers.
    stated = _read_boolean(answers[-1].candidates[0]) if answers else frozenset()
    first = _START.match(normalise(response_text))
    if first:
        stated |= _read_boolean(normalise(response_text).strip().split("\n", 1)[0])
    return float(stated == {wanted}) if stated else None


# exact and contains


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\w\w)[.!?](?:\s|$)", text, maxsplit=1)[0]


def _is_brief(text: str) -> bool:
    """Whether a response is nothing but an answer: one line of at most six words."""
    return len(plain(text).split()) <= 6 and "\n" not in text.strip()


def _exact(question: Question, answers: list[Found], response_text: str, strict: bool = True) -> float | None:
    """The stated answer equals the truth but for case, spaces, leading articles and outer punctuation. Unmarked text
    counts as the answer when it is one line of at most six words; ``strict`` off leaves other wordings unparsed."""
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


def _contains(question: Question, answers: list[Found], response_text: str) -> float | None:
    """The truth stands as whole words in the stated answer (or the last line), not denied and not one of a list. An
    unmarked sentence without the truth is unparsed: it may say the same in other words."""
    truth = plain(question.answer)
    for found in answers:
        if all(_holds(plain(c), truth) for c in found.candidates):
            return 1.0
        if (
            found.explicit
            or _is_brief(response_text)
            or any(whole_words(truth).search(plain(c)) for c in found.candidates)
        ):
            return 0.0
    return None


def _holds(text: str, truth: str) -> bool:
    hits = list(whole_words(truth).finditer(text))
    if not hits or any(NEGATION.search(text[: m.start()]) for m in hits):
        return False
    rest = whole_words(truth).sub("\0", text)
    items = {item for part in re.split(HEDGE, rest) if (item := part.strip(" .")) and len(item.split()) <= 3}
    only_commas = not re.search(r"\b(?:or|and|versus|vs)\b|[/|&、]|或|和", rest)
    return not (any(item.endswith("\0") for item in items) and len(items) >= (3 if only_commas else 2))
