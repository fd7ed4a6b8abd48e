"""disciplines (MMMU) and disciplines_pro (MMMU-Pro): apply a rule of a subject to what the picture shows.

In disciplines the question names the subject and the quantity, and there are four options. In disciplines_pro the question
is drawn into the top row of the picture, and there are ten options.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from playground.world.questions import (
    Derivation,
    SkillQuestion,
    Step,
    chosen,
    drawn_choices,
    find_slips,
    minus_step,
    other_letter,
    sum_steps,
    times_step,
)
from playground.world.scenes import COLORS, DRAWN_WORDS, ROWS, SIDE, Scene, Thing

LEGS = {"dog": 4, "person": 2}


@dataclass(frozen=True)
class _Case:
    """Facts of one subject. work: makes steps and a result of facts and an arithmetic error."""

    subject: str
    facts: tuple[tuple[str, int], ...]
    things: dict[int, Thing]
    work: Callable[[tuple[tuple[str, int], ...], int], tuple[list[Step], int]]

    @property
    def result(self) -> int:
        return self.work(self.facts, 0)[1]


QUESTIONS = {
    "maths": ("maths: how large is the area?", "area"),
    "physics": ("physics: how large is the pull to the right?", "pull"),
    "biology": ("biology: how many legs are there?", "legs"),
}
"""The question of each subject, and the word that asks it in the picture."""


def _maths(rng: random.Random, difficulty: int) -> _Case:
    """Draw a box with its width and height. Difficulty 2 subtracts a hole, and 3 adds two boxes."""
    rows = sorted(rng.sample((1, 2), 2 if difficulty == 3 else 1))
    most = 4 if difficulty == 3 else 6
    color = rng.choice(list(COLORS))
    facts: list[tuple[str, int]] = []
    things = {}
    for row in rows:
        columns = rng.sample(range(SIDE), SIDE)
        sides = [("wide", rng.randint(1, most)), ("high", rng.randint(1, most))]
        if difficulty == 2:
            sides.append(("hole", rng.randint(1, max(1, min(9, sides[0][1] * sides[1][1] - 1)))))
        for column, (name, size) in zip(columns, sides, strict=False):
            things[row * SIDE + column] = Thing(name, "" if name == "hole" else color, str(size))
        facts += sides

    def work(read: tuple[tuple[str, int], ...], slip: int) -> tuple[list[Step], int]:
        steps: list[Step] = []
        areas = []
        for i, row in enumerate(rows):
            wide, high = read[2 * i][1], read[2 * i + 1][1]
            box = f"the {ROWS[row]} box" if len(rows) > 1 else "the box"
            note = f"{ROWS[row]} " if len(rows) > 1 else ""
            steps.append((f"{box} is {wide} times {high}", f"{note}wide {wide}, high {high}"))
            step, area = times_step(wide, high, slip if difficulty == 1 else 0)
            steps.append(step)
            areas.append(area)
        sums, result = sum_steps(areas, slip)
        steps += sums
        if difficulty == 2:
            hole = read[2][1]
            steps.append((f"the hole is {hole}", f"hole {hole}"))
            step, result = minus_step(result, hole, slip)
            steps.append(step)
        return steps, result

    return _Case("maths", tuple(facts), things, work)


def _physics(rng: random.Random, difficulty: int) -> _Case:
    """Draw arrows that pull to the right and to the left."""
    rights, lefts = {1: (1, 1), 2: (2, 1), 3: (2, 2)}[difficulty]
    cells = sorted(rng.sample(range(SIDE, SIDE * SIDE), rights + lefts))
    directions = rng.sample(["right"] * rights + ["left"] * lefts, len(cells))
    while True:
        sizes = [rng.randint(1, 9) for _ in cells]
        if sum(s if w == "right" else -s for s, w in zip(sizes, directions, strict=True)) >= 0:
            break
    color = rng.choice(list(COLORS))
    things = {c: Thing(w, color, str(s)) for c, w, s in zip(cells, directions, sizes, strict=True)}

    def work(read: tuple[tuple[str, int], ...], slip: int) -> tuple[list[Step], int]:
        steps: list[Step] = []
        pulls = []
        for direction in ("right", "left"):
            found = [size for name, size in read if name == direction]
            phrase = " and ".join(map(str, found))
            steps.append((f"to the {direction} there is {phrase}", f"{direction} {', '.join(map(str, found))}"))
            sums, pull = sum_steps(found or [0])
            steps += sums
            pulls.append(pull)
        step, result = minus_step(pulls[0], pulls[1], slip)
        return [*steps, step], result

    return _Case("physics", tuple(zip(directions, sizes, strict=True)), things, work)


def _biology(rng: random.Random, difficulty: int) -> _Case:
    """Draw animals next to a tree. A label gives the number of each."""
    most = {1: 9, 2: 4, 3: 3}[difficulty]
    *cells, tree = rng.sample(range(SIDE, SIDE * SIDE), difficulty + 1)
    cells.sort()
    facts = [(rng.choice(list(LEGS)), rng.randint(1, most)) for _ in cells]
    things = {cell: Thing(name, "", str(count)) for cell, (name, count) in zip(cells, facts, strict=True)}
    things[tree] = Thing("tree", rng.choice(list(COLORS)))

    def work(read: tuple[tuple[str, int], ...], slip: int) -> tuple[list[Step], int]:
        steps: list[Step] = []
        legs = []
        for name, count in read:
            number = count * LEGS[name] + (slip if len(read) == 1 else 0)
            phrase = f"1 {name} has" if count == 1 else f"{count} {name}s have"
            steps.append((f"{phrase} {number} legs", f"{name} {count} x {LEGS[name]} = {number}"))
            legs.append(number)
        sums, total = sum_steps(legs, slip)
        return [*steps, *sums], total

    return _Case("biology", tuple(facts), things, work)


CASES: dict[str, Callable[[random.Random, int], _Case]] = {"maths": _maths, "physics": _physics, "biology": _biology}


def disciplines(rng: random.Random, difficulty: int) -> SkillQuestion:
    return _question(rng, difficulty, pro=False)


def disciplines_pro(rng: random.Random, difficulty: int) -> SkillQuestion:
    return _question(rng, difficulty, pro=True)


def _question(rng: random.Random, difficulty: int, pro: bool) -> SkillQuestion:
    subject = rng.choice(list(CASES))
    case = CASES[subject](rng, difficulty)

    def other() -> str:
        """Draw the answer of another question with the same text."""
        return str(CASES[rng.choice(list(CASES)) if pro else subject](rng, difficulty).result)

    choices = drawn_choices(str(case.result), other, 10 if pro else 4, rng)

    def explain(facts: tuple[tuple[str, int], ...], slip: int, letter: str = "") -> Derivation | None:
        steps, result = case.work(facts, slip)
        if str(result) not in choices:
            return None
        if pro:
            steps.insert(0, (f"it is {subject}", subject))
        return chosen(steps, str(result), choices, letter)

    most = max(2, *(number for _, number in case.facts))
    right = explain(case.facts, 0)
    assert right is not None

    def misread() -> tuple[tuple[tuple[str, int], ...], int, str]:
        """Draw a misread number, an arithmetic error that leads to another option, or a wrong letter."""
        sort = rng.random()
        if sort < 0.1:
            return case.facts, 0, other_letter(right, choices, rng)
        if sort < 0.3:
            near = sorted((abs(int(c) - case.result), int(c)) for c in choices)[1:3]
            return case.facts, rng.choice(near)[1] - case.result, ""
        which = rng.randrange(len(case.facts))
        facts = list(case.facts)
        facts[which] = facts[which][0], rng.randint(1, most)
        return tuple(facts), 0, ""

    slips = find_slips(right, lambda found: explain(*found), misread)
    text, drawn = QUESTIONS[subject]
    things = dict(case.things)
    if pro:
        text = "answer the question in the picture."
        things |= {cell: Thing("text", "", label) for cell, label in enumerate((*DRAWN_WORDS[drawn], "?"))}
    skill = "disciplines_pro" if pro else "disciplines"
    return SkillQuestion(skill, difficulty, text, "choice", (Scene.of(things),), right, slips, choices)
