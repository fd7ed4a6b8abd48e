"""diagrams (AI2D) and everyday (RealWorldQA): follow what the picture shows, step by step."""

from __future__ import annotations

import random

from playground.world.questions import LETTERS, Derivation, SkillQuestion, Step, find_slips
from playground.world.scenes import COLORS, DIRECTIONS, SIDE, Scene, Thing, neighbor, where


def drawn_path(rng: random.Random, number: int, follow: int) -> tuple[list[int], list[str], list[int]]:
    """Draw a path of ``follow`` moves that visits no cell twice, its moves, and ``number`` sorted cells that include it."""
    while True:
        path = [rng.randrange(9)]
        moves: list[str] = []
        while len(moves) < follow:
            free = [d for d in DIRECTIONS if (n := neighbor(path[-1], d)) is not None and n not in path]
            if not free:
                break
            moves.append(rng.choice(free))
            step = neighbor(path[-1], moves[-1])
            assert step is not None
            path.append(step)
        if len(moves) == follow:
            break
    others = [cell for cell in range(9) if cell not in path]
    return path, moves, sorted(path + rng.sample(others, number - len(path)))


def diagrams(rng: random.Random, difficulty: int) -> SkillQuestion:
    """Ask where a number of arrows between lettered boxes leads."""
    number, follow = {1: (5, 2), 2: (7, 3), 3: (9, 4)}[difficulty]
    path, moves, cells = drawn_path(rng, number, follow)
    letters = dict(zip(cells, rng.sample(LETTERS, number), strict=True))
    arrows = dict(zip(path, moves, strict=False))
    for cell in cells:
        possible = [d for d in DIRECTIONS if neighbor(cell, d) in cells]
        if cell not in arrows and possible:
            arrows[cell] = rng.choice(possible)
    scene = Scene.of({cell: Thing(arrows.get(cell, "box"), "", letters[cell]) for cell in cells})

    def explain(shown: dict[int, str], times: int) -> Derivation | None:
        cell, steps = path[0], []
        for _ in range(times):
            if cell not in shown:
                return None
            direction = shown[cell]
            after = neighbor(cell, direction)
            if after not in letters:
                return None
            steps.append((
                f"{letters[cell]} at {where(cell)} points {direction} to {letters[after]}",
                f"{letters[cell]} {where(cell)} : {direction} : {letters[after]}",
            ))  # fmt: skip
            cell = after
        return Derivation(tuple(steps), letters[cell])

    right = explain(arrows, follow)
    assert right is not None

    def misread() -> tuple[dict[int, str], int]:
        """Draw a misread arrow, or one arrow too few or too many."""
        if rng.random() < 0.25:
            return arrows, follow + rng.choice((-1, 1))
        cell = rng.choice(path[:-1])
        return {**arrows, cell: rng.choice(list(DIRECTIONS))}, follow

    slips = find_slips(right, lambda facts: explain(*facts), misread)
    text = f"start at {letters[path[0]]} and follow {follow} arrows: what is at the end?"
    return SkillQuestion("diagrams", difficulty, text, "exact", (scene,), right, slips)


def everyday(rng: random.Random, difficulty: int) -> SkillQuestion:
    """Ask what a driver should do: stop at a red light, wait for a person on the road, slow down for a sign, or go.

    Difficulty 1 has a light and maybe a person, 2 adds a speed sign, and 3 adds a second car and people next to the road.
    """
    answer = rng.choice(("stop", "wait", "go") if difficulty == 1 else ("stop", "wait", "slow", "go"))
    light = "red" if answer == "stop" else "green"
    person = answer == "wait" or (answer == "stop" and rng.random() < 0.5)
    while True:
        speed, limit = rng.randint(1, 9), rng.randint(1, 9)
        if answer in ("stop", "wait") or (speed > limit) == (answer == "slow"):
            break
    colors = rng.sample(list(COLORS), 2)
    columns = rng.sample(range(SIDE), SIDE)
    road = 2 * SIDE
    things = {road + columns[0]: Thing("car", colors[0], str(speed) if difficulty > 1 else "")}
    if person:
        things[road + columns[1]] = Thing("person")
    if difficulty == 3:
        things[road + columns[2]] = Thing("car", colors[1], str(rng.randint(1, 9)))
    sidewalk = rng.sample(range(2 * SIDE), 4)
    things[sidewalk[0]] = Thing("light", light)
    if difficulty > 1:
        things[sidewalk[1]] = Thing("sign", "", str(limit))
    for cell in sidewalk[2 : 2 + difficulty - 1] or sidewalk[2:3]:
        things[cell] = Thing(rng.choice(("tree", "house")), rng.choice(list(COLORS)))
    if difficulty == 3 and rng.random() < 0.7:
        things[sidewalk[3]] = Thing("person")
    car = f"the {colors[0]} car"

    def explain(color: str, on_road: bool, drives: int, allowed: int, done: str = "") -> Derivation:
        at = where(road + columns[0])
        steps: list[Step] = [(f"{car} is at {at}", f"{colors[0]} car {at}")] if difficulty == 3 else []
        steps.append((f"the light is {color}", f"light {color}"))
        if color == "red":
            return Derivation(tuple(steps), done or "stop")
        steps.append(("a person is on the road", "person on road") if on_road else ("the road is free", "road free"))
        if on_road:
            return Derivation(tuple(steps), done or "wait")
        if difficulty == 1:
            return Derivation(tuple(steps), done or "go")
        faster = drives > allowed
        steps.append((f"{car} has {drives} and the sign has {allowed}", f"{colors[0]} car {drives}, sign {allowed}"))
        steps.append((f"{drives} is {'' if faster else 'not '}larger than {allowed}",
                      f"{drives} {'larger' if faster else 'not larger'} {allowed}"))  # fmt: skip
        return Derivation(tuple(steps), done or ("slow" if faster else "go"))

    right = explain(light, person, speed, limit)
    assert right.answer == answer

    def misread() -> tuple[str, bool, int, int, str]:
        """Draw a misread light, person or number, or a wrong conclusion."""
        if rng.random() < 0.2:
            return light, person, speed, limit, rng.choice(("stop", "wait", "go"))
        sort = rng.randrange(3)
        return (
            rng.choice(("red", "green")) if sort == 0 else light,
            rng.random() < 0.5 if sort == 1 else person,
            rng.randint(1, 9) if sort == 2 else speed,
            limit,
            "",
        )

    slips = find_slips(right, lambda facts: explain(*facts), misread)
    text = f"what should {car} do?"
    return SkillQuestion("everyday", difficulty, text, "exact", (Scene.of(things, "road"),), right, slips)
