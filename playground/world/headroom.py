"""Four skills beyond the fourteen in which a student can pass its teachers: rest, measure, form and route.

In the fourteen, a student at its best is close to what its teachers' right responses show. Real tasks leave more to find:
teachers are mostly wrong (``rest``), answer in another unit or form than the one that is asked for (``measure``,
``form``), or a derivation is long (``route``).
"""

from __future__ import annotations

import random
from collections.abc import Callable

from playground.world.questions import Derivation, SkillQuestion, Step, find_slips, listed, sum_steps, times_step
from playground.world.reasoning import drawn_path
from playground.world.scenes import COLORS, DIRECTIONS, NAMES, Scene, Thing, neighbor, where

WORDS = ("zero", "one", "two", "three", "four", "five", "six")
CHINESE = ("零", "一", "二", "三", "四", "五", "六")
FORMS: dict[str, Callable[[int], str]] = {"digits": str, "words": WORDS.__getitem__, "chinese": CHINESE.__getitem__}
"""The forms of a number that ``form`` asks for."""


def rest(rng: random.Random, difficulty: int) -> SkillQuestion:
    """Ask how many things do not have a color. All numbers are equally likely."""
    total_things, numbers = {1: (5, range(1, 5)), 2: (7, range(1, 7)), 3: (8, range(1, 8))}[difficulty]
    total = rng.choice(numbers)
    red = rng.choice(list(COLORS))
    others = [color for color in COLORS if color != red]
    colors = [rng.choice(others) for _ in range(total)] + [red] * (total_things - total)
    cells = rng.sample(range(9), total_things)
    scene = Scene.of({c: Thing(rng.choice(NAMES), color) for c, color in zip(cells, colors, strict=True)})

    def explain(counted: list[int]) -> Derivation | None:
        if not counted:
            return None
        number = len(counted)
        kinds = listed([scene.things[cell].kind for cell in counted])
        places = ", ".join(where(cell) for cell in counted)
        step = (f"not {red} {'are' if number > 1 else 'is'} {kinds}, {number} in all", f"not {red} {places} : {number}")
        return Derivation((step,), str(number))

    facts = [cell for cell, thing in scene.things.items() if thing.color != red]
    right = explain(facts)
    assert right is not None

    def misread() -> list[int]:
        """Draw the things that do have the color, or a thing that is missed or counted by mistake."""
        rest_ = [cell for cell in scene.things if cell not in facts]
        if rng.random() < 0.5:
            return rest_
        if rng.random() < 0.5:
            return rng.sample(facts, len(facts) - 1)
        return sorted([*facts, rng.choice(rest_)])

    slips = find_slips(right, lambda found: explain(sorted(found)), misread)
    return SkillQuestion("rest", difficulty, f"how many things are not {red}?", "number", (scene,), right, slips)


def measure(rng: random.Random, difficulty: int) -> SkillQuestion:
    """Ask for the length of a line in centimeters or millimeters. The label is in centimeters, and the unit counts."""
    number = {1: 2, 2: 3, 3: 4}[difficulty]
    colors = rng.sample(list(COLORS), number)
    cells = rng.sample(range(9), number)
    scene = Scene.of(
        {c: Thing(rng.choice(("wide", "high")), k, str(rng.randint(1, 9))) for c, k in zip(cells, colors, strict=True)}
    )
    lengths = {thing.color: int(thing.label) for thing in scene.things.values()}
    places = {thing.color: cell for cell, thing in scene.things.items()}
    red, unit = colors[0], rng.choice(("cm", "mm"))

    def explain(color: str, length: int, in_unit: str) -> Derivation:
        steps: list[Step] = [
            (f"the {red} line is at {where(places[color])}", f"{red} line {where(places[color])}"),
            (f"its length is {length} cm", f"length {length} cm"),
        ]
        if in_unit == "mm":
            step, length = times_step(length, 10)
            steps.append(step)
        return Derivation(tuple(steps), f"{length} {in_unit}")

    right = explain(red, lengths[red], unit)

    def misread() -> tuple[str, int, str]:
        """Draw the other unit, another line, or a misread label."""
        if rng.random() < 0.6:
            return red, lengths[red], "mm" if unit == "cm" else "cm"
        color = rng.choice(colors)
        return color, lengths[color] if color != red else rng.randint(1, 9), unit

    slips = find_slips(right, lambda found: explain(*found), misread)
    text = f"how long is the {red} line? answer in {unit}."
    return SkillQuestion("measure", difficulty, text, "exact", (scene,), right, slips)


def form(rng: random.Random, difficulty: int) -> SkillQuestion:
    """Ask for a number of things in a form: digits, words, or Chinese. Only the form that is asked for is right."""
    total_things, numbers = {1: (4, range(1, 5)), 2: (6, range(1, 6)), 3: (8, range(1, 7))}[difficulty]
    total = rng.choice(numbers)
    name = rng.choice(NAMES)
    named = [name] * total + [rng.choice([n for n in NAMES if n != name]) for _ in range(total_things - total)]
    cells = rng.sample(range(9), total_things)
    scene = Scene.of({c: Thing(n, rng.choice(list(COLORS))) for c, n in zip(cells, named, strict=True)})
    asked = rng.choice(list(FORMS))
    facts = [cell for cell, thing in scene.things.items() if thing.name == name]

    def explain(counted: list[int], as_form: str) -> Derivation | None:
        number = len(counted)
        if not 1 <= number < len(WORDS):
            return None
        colors = listed([scene.things[cell].color for cell in counted])
        phrase = f"the {name}s are" if number > 1 else f"the {name} is"
        written = FORMS[as_form](number)
        steps: list[Step] = [
            (f"{phrase} {colors}, {number} in all", f"{name} {', '.join(map(where, counted))} : {number}"),
            (f"in {as_form} that is {written}", f"in {as_form} {written}"),
        ]
        return Derivation(tuple(steps), written)

    right = explain(facts, asked)
    assert right is not None

    def misread() -> tuple[list[int], str]:
        """Draw another form, or a thing that is missed or counted by mistake."""
        if rng.random() < 0.7:
            return facts, rng.choice([other for other in FORMS if other != asked])
        others = [cell for cell in scene.things if cell not in facts]
        if others and rng.random() < 0.5:
            return sorted([*facts, rng.choice(others)]), asked
        return sorted(rng.sample(facts, len(facts) - 1)), asked

    slips = find_slips(right, lambda found: explain(*found), misread)
    text = f"how many {name}s are there? answer in {asked}."
    return SkillQuestion("form", difficulty, text, "exact", (scene,), right, slips)


def route(rng: random.Random, difficulty: int) -> SkillQuestion:
    """Ask for the sum of the digits on a way along arrows, which takes six, eight or ten steps."""
    number, follow = {1: (5, 3), 2: (7, 4), 3: (9, 5)}[difficulty]
    path, moves, cells = drawn_path(rng, number, follow)
    digits = dict(zip(cells, rng.sample(range(1, 10), number), strict=True))
    arrows = dict(zip(path, moves, strict=False))
    for cell in cells:
        possible = [d for d in DIRECTIONS if neighbor(cell, d) in cells]
        if cell not in arrows and possible:
            arrows[cell] = rng.choice(possible)
    scene = Scene.of({cell: Thing(arrows.get(cell, "box"), "", str(digits[cell])) for cell in cells})

    def explain(shown: dict[int, str], slip: int) -> Derivation | None:
        steps: list[Step] = []
        cell, found = path[0], [digits[path[0]]]
        for _ in range(follow):
            if cell not in shown:
                return None
            after = neighbor(cell, shown[cell])
            if after not in digits:
                return None
            steps.append((
                f"{digits[cell]} at {where(cell)} points {shown[cell]} to {digits[after]}",
                f"{digits[cell]} {where(cell)} : {shown[cell]} : {digits[after]}",
            ))  # fmt: skip
            cell = after
            found.append(digits[cell])
        sums, total = sum_steps(found, slip)
        return Derivation((*steps, *sums), str(total))

    right = explain(arrows, 0)
    assert right is not None

    def misread() -> tuple[dict[int, str], int]:
        """Draw a misread arrow or an error of the last sum."""
        if rng.random() < 0.5:
            return arrows, rng.choice((-2, -1, 1, 2))
        return {**arrows, rng.choice(path[:-1]): rng.choice(list(DIRECTIONS))}, 0

    slips = find_slips(right, lambda found: explain(*found), misread)
    text = f"start at the {digits[path[0]]} and follow {follow} arrows: what is the sum of all digits on the way?"
    return SkillQuestion("route", difficulty, text, "number", (scene,), right, slips)
