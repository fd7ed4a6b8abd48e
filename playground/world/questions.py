"""A question of the skills' world, its derivations in three styles, and plausible wrong ones."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from playground.world.scenes import Scene

Style = Literal["a", "b", "c"]
STYLES: tuple[Style, ...] = ("a", "b", "c")
"""a: a teacher that talks in sentences. b: a teacher that notes steps, a line each. c: a third way, which no teacher has."""

LETTERS = "ABCDEFGHIJ"

Step = tuple[str, str]
"""One step as a sentence and as a note."""


@dataclass(frozen=True)
class Derivation:
    """The way to an answer. answer: what it ends in. said: how it says that, where it is not by the answer itself: an
    option's own words for its letter."""

    steps: tuple[Step, ...]
    answer: str
    chinese: bool = False
    said: str = ""

    @property
    def ending(self) -> str:
        """What its text ends in."""
        return self.said or self.answer

    def text(self, style: Style) -> str:
        """In b every line but the last begins with a dash, so that what follows is the same token as elsewhere."""
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
"""How derivations end; and how they begin, for those that were cut off. In the order in which they are looked for."""


def style_of(text: str) -> Style | None:
    """The style that a response is derived in; None for an answer alone. Told by how it ends, since a model may begin badly."""
    return next((style for style, mark in _MARKS if re.search(mark, text)), None)


@dataclass(frozen=True)
class SkillQuestion:
    """A question as a skill makes it.

    rule: the answer rule (rewards/rules.py). derivation: the right way to the answer. slips: plausible wrong ways (a
    misread cell, a miscount, a slip of arithmetic), each ending in another answer. choices: for rule choice, whose
    answer is a letter.
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
        """The ground truth; of an option its letter."""
        return self.derivation.answer

    @property
    def direct_answer(self) -> str:
        """The answer alone, as a student says it; of an option its own words. The rule takes its letter as well, but to
        find it is a search that models of this size learn only late, and which has little to do with seeing."""
        return self.derivation.ending

    @property
    def derivations(self) -> dict[Style, str]:
        return {style: self.derivation.text(style) for style in STYLES}

    def wrong_derivation(self, style: Style, slip: int = 0) -> str:
        """A plausible derivation that ends in a wrong answer. slip: which of its wrong ways, from 0, in turn."""
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
    """Up to NUM_SLIPS, at least one, derivations from misread facts that end in an answer other than the right one.

    explain: facts to derivation, None where they lead nowhere. misread: draws wrong facts, None for a bad draw.
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
    """ "x", "x and y", "x, y and z"."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def sum_steps(numbers: Sequence[int], slip: int = 0) -> tuple[list[Step], int]:
    """Adding up one after the other. slip: what the last sum is off by."""
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
    """A way to one of the options, which is said in its own words. letter: of the option that is taken by mistake."""
    letter = letter or LETTERS[choices.index(value)]
    return Derivation(tuple(steps), letter, chinese, choices[LETTERS.index(letter)])


def other_letter(right: Derivation, choices: Sequence[str], rng: random.Random) -> str:
    """Another option's letter."""
    return rng.choice([letter for letter in LETTERS[: len(choices)] if letter != right.answer])


def drawn_choices(answer: str, draw: Callable[[], str], number: int, rng: random.Random) -> tuple[str, ...]:
    """The answer among ``number`` options in any order. draw: gives the answer of another question of the same kind, so
    that no option looks likelier than another."""
    options = [answer]
    while len(options) < number:
        if (other := draw()) not in options:
            options.append(other)
    rng.shuffle(options)
    return tuple(options)
