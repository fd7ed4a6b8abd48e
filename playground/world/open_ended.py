"""open (MM-Vet) and open_multi (MM-Vet-v2): free answers about one picture, and about two."""

from __future__ import annotations

import random

from playground.world.questions import Derivation, SkillQuestion, Step, find_slips, listed
from playground.world.scenes import COLORS, NAMES, Scene, Thing


def _kinds(rng: random.Random, number: int) -> list[tuple[str, str]]:
    """Draw different (color, name) pairs."""
    return rng.sample([(color, name) for color in COLORS for name in NAMES], number)


def open_answer(rng: random.Random, difficulty: int) -> SkillQuestion:
    """Ask which thing has the largest or smallest number."""
    number = {1: 3, 2: 4, 3: 5}[difficulty]
    kinds = _kinds(rng, number)
    digits = rng.sample(range(1, 10), number)
    cells = rng.sample(range(9), number)
    scene = Scene.of({c: Thing(n, k, str(d)) for c, (k, n), d in zip(cells, kinds, digits, strict=True)})
    which = rng.choice(("largest", "smallest"))
    best = max if which == "largest" else min

    def explain(read: dict[str, int], taken: str = "") -> Derivation | None:
        if len(set(read.values())) < len(read):
            return None
        chosen = taken or best(read, key=lambda kind: read[kind])
        steps: list[Step] = [(f"the {kind} has {digit}", f"{kind} {digit}") for kind, digit in read.items()]
        steps.append((f"{read[chosen]} is the {which}", f"{which} {read[chosen]}"))
        return Derivation(tuple(steps), chosen)

    facts = {thing.kind: int(thing.label) for thing in scene.things.values()}
    right = explain(facts)
    assert right is not None

    def misread() -> tuple[dict[str, int], str]:
        """Draw a misread digit or a wrong comparison."""
        if rng.random() < 0.4:
            return facts, rng.choice(list(facts))
        return {**facts, rng.choice(list(facts)): rng.randint(1, 9)}, ""

    slips = find_slips(right, lambda found: explain(*found), misread)
    text = f"which thing has the {which} number?"
    return SkillQuestion("open", difficulty, text, "exact", (scene,), right, slips)


def open_multi(rng: random.Random, difficulty: int) -> SkillQuestion:
    """Ask which thing is in one picture and not in the other. Each picture has one thing that the other lacks."""
    number = {1: 2, 2: 3, 3: 4}[difficulty]
    kinds = _kinds(rng, number + 1)
    both, gone, new = kinds[: number - 1], kinds[number - 1], kinds[number]
    scenes = []
    for members in ([*both, gone], [*both, new]):
        cells = rng.sample(range(9), number)
        scenes.append(Scene.of({c: Thing(name, color) for c, (color, name) in zip(cells, members, strict=True)}))
    seen = [[thing.kind for thing in scene.things.values()] for scene in scenes]
    asked, other = (0, 1) if rng.random() < 0.5 else (1, 0)
    words = ("first", "second")

    def explain(lists: list[list[str]]) -> Derivation | None:
        left = [kind for kind in lists[asked] if kind not in lists[other]]
        if len(left) != 1:
            return None
        steps: list[Step] = [
            (f"the {words[i]} picture has {listed(lists[i])}", f"{words[i]} : {', '.join(lists[i])}")
            for i in (asked, other)
        ]
        steps.append((f"the {left[0]} is not there", f"not in {words[other]} : {left[0]}"))
        return Derivation(tuple(steps), left[0])

    right = explain(seen)
    assert right is not None

    def misread() -> list[list[str]]:
        """Draw an error: a thing of the other picture is taken for the right answer, or the answer itself is misread."""
        lists = [list(kinds) for kinds in seen]
        if rng.random() < 0.6:
            which = rng.randrange(number)
            lists[other][which] = right.answer
        else:
            which = lists[asked].index(right.answer)
            color, name = right.answer.split()
            wrong = (rng.choice(list(COLORS)), name) if rng.random() < 0.5 else (color, rng.choice(NAMES))
            lists[asked][which] = " ".join(wrong)
        return lists

    slips = find_slips(right, explain, misread)
    text = f"which thing in the {words[asked]} picture is not in the {words[other]} one?"
    return SkillQuestion("open_multi", difficulty, text, "exact", tuple(scenes), right, slips)
