"""charts (ChartQA), arithmetic (MathVista) and text_rich (SEED-2+): numbers to read and to calculate with."""

from __future__ import annotations

import random

from playground.world.questions import (
    LETTERS,
    Derivation,
    SkillQuestion,
    Step,
    find_slips,
    listed,
    minus_step,
    sum_steps,
    times_step,
)
from playground.world.scenes import COLORS, MOST_BLOCKS, ROWS, SIDE, Scene, Thing, where


def charts(rng: random.Random, difficulty: int) -> SkillQuestion:
    """Ask how much larger one bar is than another: in one chart, then in two. Difficulty 3: add one color in three charts."""
    rows = {1: [rng.randrange(SIDE)], 2: [0, 2], 3: [0, 1, 2]}[difficulty]
    red, blue = rng.sample(list(COLORS), 2)
    heights: dict[int, tuple[str, int]] = {}
    for row in rows:
        rest = rng.choice([c for c in COLORS if c not in (red, blue)])
        for column, color in enumerate(rng.sample([red, blue, rest], SIDE)):
            heights[row * SIDE + column] = color, rng.randint(1, MOST_BLOCKS)
    if difficulty == 3:
        asked = [cell for cell, (color, _) in heights.items() if color == red]
        text = f"what is the sum of the {red} bars?"
    else:
        tall, low = (rows[0], rows[-1]) if rng.random() < 0.5 else (rows[-1], rows[0])
        asked = [
            next(c for c in heights if c // SIDE == r and heights[c][0] == w) for r, w in ((tall, red), (low, blue))
        ]
        difference = rng.randint(1, MOST_BLOCKS - 1)  # every difference is equally likely
        lower = rng.randint(1, MOST_BLOCKS - difference)
        heights[asked[0]], heights[asked[1]] = (red, lower + difference), (blue, lower)
        charts_ = [f" in the {ROWS[row]} chart" * (difficulty == 2) for row in (tall, low)]
        text = f"how much larger is the {red} bar{charts_[0]} than the {blue} bar{charts_[1]}?"
    scene = Scene.of({c: Thing("bar", color, str(h)) for c, (color, h) in heights.items()}, "chart")

    def explain(read: list[int], slip: int = 0) -> Derivation | None:
        if difficulty == 3:
            steps: list[Step] = [
                (f"the {red} bars are {listed(list(map(str, read)))}",
                 ", ".join(f"{ROWS[c // SIDE]} {red} {h}" for c, h in zip(asked, read, strict=True)))
            ]  # fmt: skip
            sums, result = sum_steps(read, slip)
            return Derivation((*steps, *sums), str(result))
        steps = []
        for cell, height in zip(asked, read, strict=True):
            color, row = heights[cell][0], ROWS[cell // SIDE]
            sentence = f"the {row} {color} bar is {height}" if difficulty == 2 else f"the {color} bar is {height}"
            steps.append((sentence, f"{row} {color} {height}" if difficulty == 2 else f"{color} {height}"))
        step, result = minus_step(read[0], read[1], slip)
        return Derivation((*steps, step), str(result)) if result >= 0 else None

    facts = [heights[cell][1] for cell in asked]
    right = explain(facts)
    assert right is not None

    def misread() -> tuple[list[int], int]:
        """Draw a height that is off by one, another bar's height, or an arithmetic error."""
        if rng.random() < 0.25:
            return facts, rng.choice((-1, 1))
        read = list(facts)
        which = rng.randrange(len(read))
        near = [h for h in (read[which] - 1, read[which] + 1) if 1 <= h <= MOST_BLOCKS]
        read[which] = rng.choice(near) if rng.random() < 0.5 else rng.choice(list(heights.values()))[1]
        return read, 0

    slips = find_slips(right, lambda found: explain(*found), misread)
    return SkillQuestion("charts", difficulty, text, "number", (scene,), right, slips)


def arithmetic(rng: random.Random, difficulty: int) -> SkillQuestion:
    """Ask for the sum of the digits of one color. Difficulty 3: minus the digit of another color."""
    number, others = {1: (2, 2), 2: (3, 3), 3: (3, 4)}[difficulty]
    red, blue = rng.sample(list(COLORS), 2)
    cells = rng.sample(range(9), number + others)
    colors = [red] * number + [rng.choice([c for c in COLORS if c != red]) for _ in range(others)]
    if difficulty == 3:
        rest = [c for c in COLORS if c not in (red, blue)]
        colors[number:] = [blue, *(rng.choice(rest) for _ in range(others - 1))]
    scene = Scene.of({c: Thing("card", color, str(rng.randint(1, 9))) for c, color in zip(cells, colors, strict=True)})
    asked = [cell for cell, thing in scene.things.items() if thing.color == red]
    away = [cell for cell, thing in scene.things.items() if thing.color == blue][:1] if difficulty == 3 else []
    text = f"what is the sum of the {red} digits?"
    if away:
        text = f"what is the sum of the {red} digits minus the {blue} digit?"

    def explain(read: dict[int, int], slip: int = 0) -> Derivation | None:
        plus = [read[cell] for cell in read if cell not in away]
        if len(plus) < 2:
            return None
        steps: list[Step] = [
            (f"the {red} digits are {listed(list(map(str, plus)))}",
             f"{red} " + ", ".join(f"{where(c)} {d}" for c, d in read.items() if c not in away))
        ]  # fmt: skip
        sums, result = sum_steps(plus, 0 if away else slip)
        steps += sums
        if away:
            (cell,) = away
            steps.append((f"the {blue} digit is {read[cell]}", f"{blue} {where(cell)} {read[cell]}"))
            step, result = minus_step(result, read[cell], slip)
            steps.append(step)
        return Derivation(tuple(steps), str(result)) if result >= 0 else None

    digits = {cell: int(thing.label) for cell, thing in scene.things.items()}
    facts = {cell: digits[cell] for cell in sorted(asked) + away}
    right = explain(facts)
    if right is None:  # the result would be negative
        return arithmetic(rng, difficulty)

    def misread() -> tuple[dict[int, int], int]:
        """Draw an arithmetic error, a misread digit, or a digit of another color."""
        sort = rng.random()
        if sort < 0.35:
            return facts, rng.choice((-2, -1, 1, 2))
        cell = rng.choice(list(facts))
        if sort < 0.6:
            return {**facts, cell: rng.randint(1, 9)}, 0
        wrong = rng.choice([c for c in digits if c not in facts])
        if cell in away:
            return {**facts, cell: digits[wrong]}, 0
        kept = sorted([c for c in asked if c != cell] + [wrong])
        return {c: digits[c] for c in kept + away}, 0

    slips = find_slips(right, lambda found: explain(*found), misread)
    return SkillQuestion("arithmetic", difficulty, text, "number", (scene,), right, slips)


def text_rich(rng: random.Random, difficulty: int) -> SkillQuestion:
    """Ask for a price on a bill of two or three lines, which hold an item, its number and its price."""
    most, dearest = {1: (5, 9), 2: (5, 7), 3: (3, 6)}[difficulty]
    filled = sorted(rng.sample(range(SIDE), 2 if difficulty == 1 else SIDE))
    letters = dict(zip(filled, rng.sample(LETTERS, len(filled)), strict=True))
    lines = {row: (rng.randint(1, most), rng.randint(2, dearest)) for row in filled}
    things = {}
    for row, (count, price) in lines.items():
        for column, label in enumerate((letters[row], f"{count}x", f"${price}")):
            things[row * SIDE + column] = Thing("text", "", label)
    asked = sorted(rng.sample(filled, 2 if difficulty == 3 else 1))
    names = [letters[row] for row in asked]
    text = f"what is the price of {'one' if difficulty == 1 else 'all'} {listed(names)}?"

    def explain(rows: list[int], read: list[tuple[int, int]], slip: int = 0) -> Derivation:
        """rows: the rows in which the items are found."""
        if difficulty == 1:
            price = read[0][1]
            steps: list[Step] = [
                (f"{names[0]} is in the {ROWS[rows[0]]} row", f"{names[0]} {ROWS[rows[0]]}"),
                (f"the price there is {price}", f"price {price}"),
            ]
            return Derivation(tuple(steps), str(price))
        steps, costs = [], []
        for name, row, (count, price) in zip(names, rows, read, strict=True):
            there = "there is" if count == 1 else "there are"
            note = f"{name} {ROWS[row]} : {count}, price {price}"
            steps.append((f"{there} {count} {name} for {price} each", note))
            step, cost = times_step(count, price, slip if len(names) == 1 else 0)
            steps.append(step)
            costs.append(cost)
        sums, total = sum_steps(costs, slip)
        return Derivation((*steps, *sums), str(total))

    facts = asked, [lines[row] for row in asked]
    right = explain(*facts)

    def misread() -> tuple[list[int], list[tuple[int, int]], int] | None:
        """Draw another line, a misread digit, or an arithmetic error."""
        if rng.random() < 0.3 and difficulty > 1:
            slip = rng.choice((-2, -1, 1, 2))
            return (*facts, slip) if int(right.answer) + slip >= 0 else None
        rows, read = list(asked), list(facts[1])
        which = rng.randrange(len(rows))
        if rng.random() < 0.6:
            rows[which] = rng.choice([row for row in filled if row not in asked])
            read[which] = lines[rows[which]]
        else:
            count, price = read[which]
            read[which] = (count, rng.randint(2, dearest)) if rng.random() < 0.5 else (rng.randint(1, most), price)
        return rows, read, 0

    slips = find_slips(right, lambda found: explain(*found), misread)
    return SkillQuestion("text_rich", difficulty, text, "number", (Scene.of(things, "table"),), right, slips)
