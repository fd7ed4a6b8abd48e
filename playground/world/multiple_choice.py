"""choice (MMBench) and choice_cn (MMBench-CN): count things, then find the option. One skill in two languages."""

from __future__ import annotations

import random
from dataclasses import dataclass

from playground.world.questions import (
    Derivation,
    SkillQuestion,
    Step,
    chosen,
    find_slips,
    listed,
    other_letter,
    sum_steps,
)
from playground.world.scenes import COLORS, NAMES, Scene, Thing, where

_CHINESE = {
    "red": "红", "green": "绿", "blue": "蓝", "yellow": "黄",
    "circle": "圆", "square": "方块", "triangle": "三角", "car": "车", "tree": "树", "house": "房子",
    "top": "上", "middle": "中", "bottom": "下", "left": "左", "center": "中", "right": "右",
}  # fmt: skip


@dataclass(frozen=True)
class _Group:
    """The things of one name, each as (cell, color)."""

    name: str
    members: tuple[tuple[int, str], ...]


def choice(rng: random.Random, difficulty: int) -> SkillQuestion:
    return _count(rng, difficulty, chinese=False)


def choice_cn(rng: random.Random, difficulty: int) -> SkillQuestion:
    return _count(rng, difficulty, chinese=True)


def _count(rng: random.Random, difficulty: int, chinese: bool) -> SkillQuestion:
    """Ask how many things of a name there are. Difficulty 3: of two names together.

    All possible numbers are equally likely, and the options are drawn from them.
    """
    names = rng.sample(NAMES, 2 if difficulty == 3 else 1)
    total_things, numbers = {1: (5, range(1, 5)), 2: (7, range(1, 7)), 3: (8, range(2, 8))}[difficulty]
    total = rng.choice(numbers)
    counts = [total]
    if difficulty == 3:
        first = rng.randint(max(1, total - 4), min(4, total - 1))
        counts = [first, total - first]
    others = [name for name in NAMES if name not in names]
    named = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
    named += [rng.choice(others) for _ in range(total_things - total)]
    cells = rng.sample(range(9), total_things)
    scene = Scene.of({c: Thing(n, rng.choice(list(COLORS))) for c, n in zip(cells, named, strict=True)})
    offered = [total, *rng.sample([n for n in numbers if n != total], 3)]
    choices = tuple(map(str, rng.sample(offered, 4)))
    facts = [_Group(n, tuple((c, t.color) for c, t in scene.things.items() if t.name == n)) for n in names]

    def explain(groups: list[_Group], letter: str = "") -> Derivation | None:
        counts_read = [len(g.members) for g in groups]
        if str(sum(counts_read)) not in choices or 0 in counts_read:
            return None
        steps: list[Step] = []
        for group in groups:
            steps.append(_seen_cn(group) if chinese else _seen(group))
        if len(counts_read) > 1:
            (step,) = sum_steps(counts_read)[0]
            steps.append((step[1], step[1]) if chinese else step)
        return chosen(steps, str(sum(counts_read)), choices, letter, chinese)

    right = explain(facts)
    assert right is not None

    def misread() -> tuple[list[_Group], str]:
        """Draw a thing that is missed, a thing that is counted by mistake, or a wrong letter."""
        if rng.random() < 0.2:
            return facts, other_letter(right, choices, rng)
        which = rng.randrange(len(facts))
        wrong = [(c, t.color) for c, t in scene.things.items() if t.name not in names]
        members = list(facts[which].members)
        if rng.random() < 0.5 and len(members) > 1:
            members = rng.sample(members, rng.randint(1, len(members) - 1))
        elif wrong:
            members += rng.sample(wrong, rng.randint(1, len(wrong)))
        groups = list(facts)
        groups[which] = _Group(facts[which].name, tuple(sorted(members)))
        return groups, ""

    slips = find_slips(right, lambda found: explain(*found), misread)
    if chinese:
        text = f"图 里 有 几 个 {' 和 '.join(_CHINESE[n] for n in names)}?"
    else:
        text = f"how many {listed([f'{n}s' for n in names])} are there?"
    skill = "choice_cn" if chinese else "choice"
    return SkillQuestion(skill, difficulty, text, "choice", (scene,), right, slips, choices)


def _seen(group: _Group) -> Step:
    """Return the step: the sentence lists colors, the note lists places, and both end in the number."""
    number = len(group.members)
    colors = listed([color for _, color in group.members])
    places = ", ".join(where(cell) for cell, _ in group.members)
    phrase = f"the {group.name}s are" if number > 1 else f"the {group.name} is"
    return f"{phrase} {colors}, {number} in all", f"{group.name} {places} : {number}"


def _seen_cn(group: _Group) -> Step:
    name, number = _CHINESE[group.name], len(group.members)
    colors = ", ".join(f"{_CHINESE[color]} {name}" for _, color in group.members)
    places = ", ".join(" ".join(_CHINESE[word] for word in where(cell).split()) for cell, _ in group.members)
    return f"我 看到 {colors}, 一共 {number} 个", f"{name} {places} : {number}"
