"""Questions about the playground's pictures, with exact answers and with derivations in three styles.

Eight kinds: count, colour, shape, sum (two digits in a picture), statement (true or false), choice (multiple choice),
text (arithmetic without a picture) and compare (two pictures). Training and validation share no scene: which split a
scene belongs to follows from the scene itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from openril.errors import DataError
from openril.storage import atomic_path, stable_hash, write_jsonl
from playground.scenes import COLOURS, DIGITS, SHAPES, Scene, Thing, place, render, scene_text, things

Split = Literal["train", "validation"]

VALIDATION_SHARE = 5
"""One scene in this many belongs to validation."""


@dataclass(frozen=True)
class WorldQuestion:
    """A question as the world makes it; ``row`` turns it into a row of a question file.

    derivations: an answer with its reasons in style "a", "b" and "c". All three end in the same answer.
    """

    kind: str
    question: str
    answer: str
    rule: str
    derivations: dict[str, str]
    scenes: tuple[Scene, ...] = ()
    choices: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """What belongs to one split: its scenes in words; or the text of a question without any."""
        return tuple(map(scene_text, self.scenes)) or (self.question,)


def _styles(looking: str, reason: str, answer: str) -> dict[str, str]:
    """looking: what there is to see, a list. reason: one clause. A talks in sentences, B in steps, C briefly."""
    return {
        "a": f"I see {looking}. So {reason}. The answer is {answer}.",
        "b": f"Look: {looking}.\nThink: {reason}.\nAnswer: {answer}",
        "c": f"{looking}, {reason}; answer: {answer}",
    }


def _listed(names: list[str]) -> str:
    return " and ".join(names) if names else "nothing"


def _shape(rng: random.Random, colour: str | None = None) -> Thing:
    return Thing(rng.choice(SHAPES), colour or rng.choice(list(COLOURS)))


def _digit(rng: random.Random, name: str | None = None) -> Thing:
    return Thing(name or rng.choice(DIGITS), rng.choice(list(COLOURS)))


def _count(rng: random.Random) -> WorldQuestion:
    colour = rng.choice(list(COLOURS))
    number = rng.randint(0, 4)
    others = [c for c in COLOURS if c != colour]
    wanted = [_shape(rng, colour) for _ in range(number)]
    scene = place(wanted + [_shape(rng, rng.choice(others)) for _ in range(rng.randint(1, 4))], rng)
    seen = _listed([str(t) for t in things(scene) if t.colour == colour])
    return WorldQuestion(
        "count", f"How many {colour} shapes are there?", str(number), "number",
        _styles(seen, f"that makes {number}", str(number)), (scene,),
    )  # fmt: skip


def _colour(rng: random.Random) -> WorldQuestion:
    asked = _shape(rng)
    others = [Thing(rng.choice([s for s in SHAPES if s != asked.name]), rng.choice(list(COLOURS)))
              for _ in range(rng.randint(1, 3))]  # fmt: skip
    scene = place([asked, *others], rng)
    seen = _listed([str(t) for t in things(scene)])
    return WorldQuestion(
        "colour", f"What colour is the {asked.name}?", asked.colour, "exact",
        _styles(seen, f"the {asked.name} is {asked.colour}", asked.colour), (scene,),
    )  # fmt: skip


def _which_shape(rng: random.Random) -> WorldQuestion:
    asked = _shape(rng)
    others = [_shape(rng, rng.choice([c for c in COLOURS if c != asked.colour])) for _ in range(rng.randint(1, 3))]
    scene = place([asked, *others], rng)
    return WorldQuestion(
        "shape", f"Which shape is {asked.colour}?", asked.name, "exact",
        _styles(_listed([str(t) for t in things(scene)]), f"{asked.colour} is the {asked.name}", asked.name), (scene,),
    )  # fmt: skip


def _sum(rng: random.Random) -> WorldQuestion:
    digits = [_digit(rng), _digit(rng)]
    scene = place(digits + [_shape(rng) for _ in range(rng.randint(0, 2))], rng)
    first, second = (t.name for t in things(scene) if t.is_digit)
    total = int(first) + int(second)
    return WorldQuestion(
        "sum", "What is the sum of the two digits?", str(total), "number",
        _styles(f"{first} and {second}", f"{first} + {second} = {total}", str(total)), (scene,),
    )  # fmt: skip


def _statement(rng: random.Random) -> WorldQuestion:
    number, said = rng.randint(1, 4), rng.randint(1, 4)
    if rng.random() < 0.4:
        said = number
    name = rng.choice(SHAPES)
    others = [s for s in SHAPES if s != name]
    wanted = [Thing(name, rng.choice(list(COLOURS))) for _ in range(number)]
    extra = [Thing(rng.choice(others), rng.choice(list(COLOURS))) for _ in range(rng.randint(0, 3))]
    scene = place(wanted + extra, rng)
    answer = "true" if said == number else "false"
    seen = _listed([str(t) for t in things(scene) if t.name == name])
    return WorldQuestion(
        "statement", f"True or false: the number of {name}s is {said}.", answer, "boolean",
        _styles(seen, f"that makes {number} and not {said}" if answer == "false" else f"that makes {number}", answer),
        (scene,),
    )  # fmt: skip


def _choice(rng: random.Random) -> WorldQuestion:
    asked = _digit(rng)
    scene = place([asked] + [_shape(rng) for _ in range(rng.randint(0, 3))], rng)
    choices = rng.sample(list(COLOURS), len(COLOURS))
    letter = "ABCD"[choices.index(asked.colour)]
    return WorldQuestion(
        "choice", "What colour is the digit?", letter, "choice",
        _styles(f"{asked}", f"the digit is {asked.colour} and {asked.colour} is {letter}", letter), (scene,),
        tuple(choices),
    )  # fmt: skip


def _text(rng: random.Random) -> WorldQuestion:
    a, b, c = (rng.randint(1, 9) for _ in range(3))
    total = a + b + c
    return WorldQuestion(
        "text", f"What is {a} + {b} + {c}?", str(total), "number",
        _styles(f"{a} and {b} and {c}", f"{a} + {b} = {a + b} and {a + b} + {c} = {total}", str(total)),
    )  # fmt: skip


def _compare(rng: random.Random) -> WorldQuestion:
    names = rng.sample(DIGITS, 2)
    scenes = tuple(place([_digit(rng, n)] + [_shape(rng) for _ in range(rng.randint(0, 1))], rng) for n in names)
    answer = "first" if int(names[0]) > int(names[1]) else "second"
    larger, smaller = sorted(names, reverse=True)
    return WorldQuestion(
        "compare", "Which picture has the larger digit, first or second?", answer, "exact",
        _styles(f"{names[0]} and {names[1]}", f"{larger} is larger than {smaller}", answer), scenes,
    )  # fmt: skip


KINDS: dict[str, Callable[[random.Random], WorldQuestion]] = {
    "count": _count, "colour": _colour, "shape": _which_shape, "sum": _sum,
    "statement": _statement, "choice": _choice, "text": _text, "compare": _compare,
}  # fmt: skip


def belongs_to(question: WorldQuestion, split: Split) -> bool:
    """Whether all its scenes (or, without any, its text) belong to the split."""
    return all(
        (stable_hash("split", part) % VALIDATION_SHARE == 0) == (split == "validation") for part in question.parts
    )


def make_questions(split: Split, number: int, seed: int = 0) -> list[WorldQuestion]:
    """``number`` different questions of a split, kinds in turn, the same for the same seed.

    Raises DataError when a kind has no more different questions to give (text: some 580 in training).
    """
    rng = random.Random(stable_hash("world", split, seed))
    made: list[WorldQuestion] = []
    seen: set[tuple[tuple[str, ...], str]] = set()
    for i in range(number):
        kind = list(KINDS)[i % len(KINDS)]
        for _ in range(5000):
            question = KINDS[kind](rng)
            key = (question.parts, question.question)
            if key not in seen and belongs_to(question, split):
                break
        else:
            raise DataError(f"the world has no {len(made) + 1}th {split} question of kind {kind}; ask for fewer")
        seen.add(key)
        made.append(question)
    return made


def row(question: WorldQuestion, question_id: str, images: list[str], rng: random.Random) -> dict[str, Any]:
    """A row of a question file. Beside Question's own fields: derivation_a, derivation_b, derivation_c, and ``mixed``
    (one third derivation c, else the plain answer), which the student's warm start learns."""
    out: dict[str, Any] = {
        "id": question_id,
        "images": images,
        "question": question.question,
        "answer": question.answer,
        "rule": question.rule,
        "skill": question.kind,
    }
    if question.choices:
        out["choices"] = list(question.choices)
    out |= {f"derivation_{style}": text for style, text in question.derivations.items()}
    out["mixed"] = question.derivations["c"] if rng.random() < 1 / 3 else question.answer
    out["scenes"] = [scene_text(scene) for scene in question.scenes]
    return out


def write_world(folder: Path, num_train: int, num_validation: int, seed: int = 0) -> tuple[Path, Path]:
    """Write ``train.jsonl``, ``validation.jsonl`` and ``images/`` to ``folder``; returns the two question files."""
    numbers: dict[Split, int] = {"train": num_train, "validation": num_validation}
    with atomic_path(folder) as temporary:
        (temporary / "images").mkdir(parents=True)
        for split, number in numbers.items():
            rng = random.Random(stable_hash("mixed", split, seed))
            rows = []
            for i, question in enumerate(make_questions(split, number, seed)):
                question_id = f"{split}-{i:05d}-{question.kind}"
                images = [f"images/{question_id}-{n}.png" for n in range(len(question.scenes))]
                for name, scene in zip(images, question.scenes, strict=True):
                    render(scene).save(temporary / name)
                rows.append(row(question, question_id, images, rng))
            write_jsonl(temporary / f"{split}.jsonl", rows)
    return folder / "train.jsonl", folder / "validation.jsonl"


def corpus(split: Split = "train", number: int = 800, seed: int = 0) -> list[str]:
    """Texts of the world, to train tokenizers on: questions, answers and derivations."""
    texts = []
    for q in make_questions(split, number, seed):
        texts += [q.question, q.answer, *q.derivations.values(), *q.choices]
    return texts
