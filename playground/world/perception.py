"""needs_image (MMStar), perception (BLINK) and spatial (SEED): what is where."""

from __future__ import annotations

import random
from collections import Counter

from playground.world.questions import (
    Derivation,
    SkillQuestion,
    Step,
    chosen,
    find_slips,
    other_letter,
)
from playground.world.scenes import COLORS, COLUMNS, NAMES, ROWS, SIDE, Scene, Thing, neighbor, where

RELATIONS = {"left of": "left", "right of": "right", "above": "up", "below": "down"}
"""The words of a question for the next cell in a direction."""


def different_things(rng: random.Random, number: int) -> dict[int, Thing]:
    """Draw things of different names in random cells."""
    names = rng.sample(NAMES, number)
    return {c: Thing(n, rng.choice(list(COLORS))) for c, n in zip(rng.sample(range(9), number), names, strict=True)}


def needs_image(rng: random.Random, difficulty: int) -> SkillQuestion:
    """Ask for a color, with all four offered in random order. Difficulty 3: of the thing next to the named one."""
    things = different_things(rng, {1: 3, 2: 5, 3: 6}[difficulty])
    choices = tuple(rng.sample(list(COLORS), len(COLORS)))
    relation = ""
    cell = asked = rng.choice(list(things))
    if difficulty == 3:
        pairs = [(c, r, n) for c in things for r, d in RELATIONS.items() if (n := neighbor(c, d)) in things]
        if not pairs:
            return needs_image(rng, difficulty)
        cell, relation, asked = rng.choice(pairs)
    name = things[cell].name

    def explain(seen: dict[int, Thing], at: int, letter: str = "") -> Derivation:
        thing = seen[at]
        steps: list[Step] = [(f"the {name} is {thing.color}", f"{name} {thing.color}")]
        if relation:
            steps = [
                (f"the {name} is at {where(cell)}", f"{name} {where(cell)}"),
                (f"{relation} it is a {thing.kind}", f"{relation} it {thing.kind}"),
            ]
        return chosen(steps, thing.color, choices, letter)

    right = explain(things, asked)

    def misread() -> tuple[dict[int, Thing], int, str]:
        if rng.random() < 0.3:
            return things, asked, other_letter(right, choices, rng)
        if rng.random() < 0.5:  # another thing's color
            other = things[rng.choice(list(things))].color
            return {**things, asked: Thing(things[asked].name, other)}, asked, ""
        return {**things, asked: Thing(things[asked].name, rng.choice(list(COLORS)))}, asked, ""

    asked_name = f"thing {relation} the {name}" if relation else name
    slips = find_slips(right, lambda facts: explain(*facts), misread)
    return SkillQuestion(
        "needs_image",
        difficulty,
        f"what colour is the {asked_name}?",
        "choice",
        (Scene.of(things),),
        right,
        slips,
        choices,
    )


def perception(rng: random.Random, difficulty: int) -> SkillQuestion:
    """Ask for the odd one out. Difficulty 3: the others share a color or a name, but not both."""
    number = {1: 4, 2: 6, 3: 8}[difficulty]
    cells = sorted(rng.sample(range(9), number))
    odd = rng.choice(cells)
    by_color = rng.random() < 0.5
    colors, names = rng.sample(list(COLORS), 2), rng.sample(NAMES, 2)
    things = {}
    for cell in cells:
        color = colors[cell == odd and by_color]
        name = names[cell == odd and not by_color]
        if difficulty == 3 and by_color:
            name = rng.choice(NAMES)
        elif difficulty == 3:
            color = rng.choice(list(COLORS))
        things[cell] = Thing(name, color)
    usual = f"{colors[0]} {names[0]}s"
    if difficulty == 3:
        others = Counter(t.name if by_color else t.color for t in things.values())
        if max(others.values()) > number - 2:  # two odd ones
            return perception(rng, difficulty)
        usual = colors[0] if by_color else f"{names[0]}s"

    def explain(cell: int, kind: str) -> Derivation:
        steps = ((f"most things are {usual}", f"most {usual}"), (f"one is a {kind}", f"one {kind}"))
        return Derivation(steps, where(cell))

    right = explain(odd, things[odd].kind)

    def misread() -> tuple[int, str]:
        """Draw a wrong place."""
        return rng.choice(cells), things[odd].kind

    slips = find_slips(right, lambda facts: explain(*facts), misread)
    return SkillQuestion(
        "perception", difficulty, "where is the odd one out?", "exact", (Scene.of(things),), right, slips
    )


def spatial(rng: random.Random, difficulty: int) -> SkillQuestion:
    """Ask where one thing is relative to another. Difficulty 3: also diagonally."""
    things = different_things(rng, {1: 2, 2: 4, 3: 6}[difficulty])
    signs = rng.choice([(-1, 0), (1, 0), (0, -1), (0, 1)] + [(-1, -1), (-1, 1), (1, -1), (1, 1)] * (difficulty == 3))
    pairs = [(a, b) for a in things for b in things if a != b and _signs(a, b) == signs]
    if not pairs:
        return spatial(rng, difficulty)
    cell, seen_from = rng.choice(pairs)
    name, other = things[cell].name, things[seen_from].name

    def explain(a: int, b: int) -> Derivation | None:
        if a == b or (difficulty < 3 and 0 not in _signs(a, b)):
            return None
        down, right = _signs(a, b)
        rows, columns = (ROWS[a // SIDE], ROWS[b // SIDE]), (COLUMNS[a % SIDE], COLUMNS[b % SIDE])
        vertical = {-1: "above", 0: "", 1: "below"}[down]
        horizontal = {-1: "left", 0: "", 1: "right"}[right]
        steps: list[Step] = [
            (f"the {name} is at {where(a)}", f"{name} {where(a)}"),
            (f"the {other} is at {where(b)}", f"{other} {where(b)}"),
            (
                f"{rows[0]} is {vertical} {rows[1]}" if vertical else f"both are in the {rows[0]} row",
                f"row {' '.join(rows)} : {vertical or 'same'}",
            ),
            (
                f"{columns[0]} is {horizontal} of {columns[1]}"
                if horizontal
                else f"both are in the {columns[0]} column",
                f"column {' '.join(columns)} : {horizontal or 'same'}",
            ),
        ]
        return Derivation(tuple(steps), " ".join(filter(None, (vertical, horizontal))))

    answer = explain(cell, seen_from)
    assert answer is not None

    def misread() -> tuple[int, int]:
        if rng.random() < 0.3:
            return seen_from, cell
        return (rng.randrange(9), seen_from) if rng.random() < 0.5 else (cell, rng.randrange(9))

    slips = find_slips(answer, lambda facts: explain(*facts), misread)
    text = f"where is the {name}, seen from the {other}?"
    return SkillQuestion("spatial", difficulty, text, "exact", (Scene.of(things),), answer, slips)


def _signs(a: int, b: int) -> tuple[int, int]:
    """Return whether cell a is above (-1) or below (1), and left (-1) or right (1) of cell b; 0 for neither."""
    down, right = a // SIDE - b // SIDE, a % SIDE - b % SIDE
    return (down > 0) - (down < 0), (right > 0) - (right < 0)
