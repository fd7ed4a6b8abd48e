"""A question of the world, its derivations in three response styles, and plausible wrong derivations."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from playground.world.scenes import Scene

Style = Literal["a", "b", "c"]
STYLES: tuple[Style, ...] = ("a", "b", "c")
"""Response styles. a: a teacher that writes sentences. b: a teacher that writes one note a line. c: a third style, which no
teacher has."""

LETTERS = "ABCDEFGHIJ"

Step = tuple[str, str]
"""One step of a derivation, as a sentence and as a note."""


@dataclass(frozen=True)
class Derivation:
    """The steps to an answer.

    option: for a choice, the text of the option, which replaces the answer as the last words of the derivation. The
    answer is its letter.
    """

    steps: tuple[Step, ...]
    answer: str
    chinese: bool = False
    option: str = ""

    @property
    def ending(self) -> str:
        """The last words of its text."""
        return self.option or self.answer

    def text(self, style: Style) -> str:
        """Return the derivation in a style.

        In style b, every line but the last begins with a dash, so that the word after it has the same token as elsewhere.
        """
        sentences, notes = [s for s, _ in self.steps], [n for _, n in self.steps]
        if self.chinese:
            match style:
                case "a":
                    return " ".join(f"{s}." for s in [*sentences, f"所以 答案 是 {self.ending}"])
                case "b":
                    return "\n".join([*(f"- {n}" for n in notes), f"答案: {self.ending}"])
            return f"先 {', 再 '.join(notes)}; 答案 是 {self.ending}"
        match style:
            case "a":
                return " ".join(f"{s}." for s in [*sentences, f"so the answer is {self.ending}"])
            case "b":
                return "\n".join([*(f"- {n}" for n in notes), f"answer: {self.ending}"])
        return f"see {', then '.join(notes)}; answer = {self.ending}"


_MARKS: tuple[tuple[Style, str], ...] = (
    ("b", r"answer:|答案:"), ("c", r"answer =|; 答案 是"), ("a", r"answer is|答案 是"),
    ("b", r"^- "), ("c", r"^(see|先) "),
)  # fmt: skip
"""The closing markers of the styles, then the opening markers for responses that were cut off, in search order."""


def style_of(text: str) -> Style | None:
    """Return the style of a response, or None for an answer without a derivation.

    The style is detected from the closing marker, because sampled responses often start with a malformed token.
    """
    return next((style for style, mark in _MARKS if re.search(mark, text)), None)


@dataclass(frozen=True)
class SkillQuestion:
    """A question of a skill.

    rule: the answer rule (rewards/rules.py). derivation: the right derivation. slips: plausible wrong derivations (a
    misread cell, a miscount, an arithmetic error), each with another answer. choices: the options for the rule
    ``choice``, whose answer is a letter.
    """

    skill: str
    difficulty: int
    question: str
    rule: str
    scenes: tuple[Scene, ...]
    derivation: Derivation
    slips: tuple[Derivation, ...]
    choices: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """The ground truth; the letter for a choice."""
        return self.derivation.answer

    @property
    def direct_answer(self) -> str:
        """The answer that a student gives without a derivation: the option's text for a choice.

        The rule accepts the letter too. Finding the letter is a search that models of this size learn late, and that has
        little to do with seeing.
        """
        return self.derivation.ending

    @property
    def derivations(self) -> dict[Style, str]:
        return {style: self.derivation.text(style) for style in STYLES}

    def wrong_derivation(self, style: Style, slip: int = 0) -> str:
        """Return a plausible derivation of a wrong answer. slip: its index, from 0; the indices wrap around."""
        return self.slips[slip % len(self.slips)].text(style)

    @property
    def num_steps(self) -> int:
        return len(self.derivation.steps)

    @property
    def num_things(self) -> int:
        return sum(len(scene.things) for scene in self.scenes)


Facts = TypeVar("Facts")
NUM_SLIPS = 2


def find_slips(
    right: Derivation,
    explain: Callable[[Facts], Derivation | None],
    misread: Callable[[], Facts | None],
) -> tuple[Derivation, ...]:
    """Return one to NUM_SLIPS derivations from misread facts whose answers are wrong.

    Args:
        right: The right derivation.
        explain: Makes a derivation of facts, or returns None where they lead to no answer.
        misread: Draws wrong facts, or returns None for a draw that is of no use.
    """
    found: list[Derivation] = []
    for _ in range(300):
        facts = misread()
        slip = None if facts is None else explain(facts)
        if slip is not None and slip.answer != right.answer and slip not in found:
            found.append(slip)
            if len(found) == NUM_SLIPS:
                break
    assert found, right
    return tuple(found)


def listed(words: Sequence[str]) -> str:
    """Join words as in "x", "x and y", "x, y and z"."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def sum_steps(numbers: Sequence[int], slip: int = 0) -> tuple[list[Step], int]:
    """Return the steps that add up numbers one after the other, and the sum. slip: error of the last step."""
    steps, total = [], numbers[0]
    for i, number in enumerate(numbers[1:], 2):
        result = total + number + (slip if i == len(numbers) else 0)
        steps.append((f"{total} plus {number} is {result}", f"{total} + {number} = {result}"))
        total = result
    return steps, total


def minus_step(a: int, b: int, slip: int = 0) -> tuple[Step, int]:
    result = a - b + slip
    return (f"{a} minus {b} is {result}", f"{a} - {b} = {result}"), result


def times_step(a: int, b: int, slip: int = 0) -> tuple[Step, int]:
    result = a * b + slip
    return (f"{a} times {b} is {result}", f"{a} x {b} = {result}"), result


def chosen(
    steps: Iterable[Step], value: str, choices: Sequence[str], letter: str = "", chinese: bool = False
) -> Derivation:
    """Return a derivation that ends in an option's text. letter: the option that is taken by mistake, if any."""
    letter = letter or LETTERS[choices.index(value)]
    return Derivation(tuple(steps), letter, chinese, choices[LETTERS.index(letter)])


def other_letter(right: Derivation, choices: Sequence[str], rng: random.Random) -> str:
    """Draw the letter of a wrong option."""
    return rng.choice([letter for letter in LETTERS[: len(choices)] if letter != right.answer])


def drawn_choices(answer: str, draw: Callable[[], str], number: int, rng: random.Random) -> tuple[str, ...]:
    """Return the answer among ``number`` options in random order.

    Args:
        draw: Draws the answer of another question of the same kind, so that no option looks more likely than another.
    """
    options = [answer]
    while len(options) < number:
        if (other := draw()) not in options:
            options.append(other)
    rng.shuffle(options)
    return tuple(options)
