"""The table of skills, splits that share no scene, and the question files.

The split of a scene is computed from the scene itself, so that no seed and no number of questions can mix splits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from openril.errors import DataError
from openril.storage import atomic_path, stable_hash, write_jsonl
from playground.world.disciplines import disciplines, disciplines_pro
from playground.world.headroom import form, measure, rest, route
from playground.world.multiple_choice import choice, choice_cn
from playground.world.numbers import arithmetic, charts, text_rich
from playground.world.open_ended import open_answer, open_multi
from playground.world.perception import needs_image, perception, spatial
from playground.world.questions import STYLES, SkillQuestion
from playground.world.reasoning import diagrams, everyday
from playground.world.scenes import Scene, describe, render

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
DIFFICULTIES = (1, 2, 3)
DESCRIBE = "describe the picture."
"""The question of the description rows."""


@dataclass(frozen=True)
class Skill:
    """benchmark: the benchmark it represents. make: draws a question of a difficulty. task: what it asks for."""

    benchmark: str
    make: Callable[[random.Random, int], SkillQuestion]
    task: str


SKILLS: dict[str, Skill] = {
    "diagrams": Skill("AI2D", diagrams, "follow arrows from box to box"),
    "charts": Skill("ChartQA", charts, "read bars, then subtract or add"),
    "arithmetic": Skill("MathVista", arithmetic, "find the digits of a color and add them"),
    "choice": Skill("MMBench", choice, "count things, then find the option"),
    "choice_cn": Skill("MMBench-CN", choice_cn, "the same in Chinese"),
    "open": Skill("MM-Vet", open_answer, "read the numbers of things and compare them"),
    "open_multi": Skill("MM-Vet-v2", open_multi, "compare two pictures thing by thing"),
    "disciplines": Skill("MMMU", disciplines, "apply a rule of mathematics, physics or biology"),
    "disciplines_pro": Skill("MMMU-Pro", disciplines_pro, "the same with a drawn question and ten options"),
    "needs_image": Skill("MMStar", needs_image, "a color, with all colors offered"),
    "perception": Skill("BLINK", perception, "the odd one out"),
    "spatial": Skill("SEED", spatial, "where one thing is relative to another"),
    "text_rich": Skill("SEED-2+", text_rich, "read the lines of a bill"),
    "everyday": Skill("RealWorldQA", everyday, "what a driver should do"),
}

HEADROOM: dict[str, Skill] = {
    "rest": Skill("", rest, "count the things that do not have a color"),
    "measure": Skill("", measure, "read a length and give it in the requested unit"),
    "form": Skill("", form, "count things and give the number in the requested form"),
    "route": Skill("", route, "follow arrows and add the digits on the way"),
}
"""Skills that represent no benchmark, in which a student can pass its teachers."""
ALL_SKILLS: dict[str, Skill] = SKILLS | HEADROOM


def split_of(scene: Scene) -> Split:
    """Return the split of a scene: three fifths are for training, one fifth each for validation and test."""
    share = stable_hash("skills", str(scene)) % 5
    return "validation" if share == 0 else "test" if share == 1 else "train"


def belongs_to(question: SkillQuestion, split: Split) -> bool:
    return all(split_of(scene) == split for scene in question.scenes)


def make_questions(
    split: Split,
    number: int,
    seed: int = 0,
    difficulty: int | Sequence[int] = 1,
    skills: Sequence[str] = tuple(SKILLS),
) -> list[SkillQuestion]:
    """Return ``number`` different questions of a split. The skills take turns. The same seed gives the same questions.

    Args:
        difficulty: 1, 2 or 3, or several of them, which take turns.

    Raises:
        DataError: For an unknown difficulty or skill, or a skill that has too few different questions.
    """
    levels = [difficulty] if isinstance(difficulty, int) else list(difficulty)
    if not levels or (unknown := sorted(set(levels) - set(DIFFICULTIES))):
        raise DataError(
            f"difficulty: expected some of {', '.join(map(str, DIFFICULTIES))}, got {unknown if levels else levels}"
        )
    if not skills or (missing := sorted(set(skills) - set(ALL_SKILLS))):
        raise DataError(f"skills: expected some of {', '.join(ALL_SKILLS)}, got {missing if skills else []}")
    made: list[SkillQuestion] = []
    seen: set[tuple[tuple[Scene, ...], str, tuple[str, ...]]] = set()
    for i in range(number):
        skill, which = skills[i % len(skills)], i // len(skills)
        level = levels[which % len(levels)]
        # A separate generator for each question, so that one skill's draws do not affect the others.
        rng = random.Random(stable_hash("skills", split, seed, skill, which))
        for _ in range(5000):
            question = ALL_SKILLS[skill].make(rng, level)
            key = (question.scenes, question.question, question.choices)
            if key not in seen and belongs_to(question, split):
                break
        else:
            raise DataError(
                f"{skill} has only {which} different {split} questions of difficulty {level}. Ask for fewer."
            )
        seen.add(key)
        made.append(question)
    return made


def row(question: SkillQuestion, question_id: str, images: list[str]) -> dict[str, Any]:
    """Return a row of a question file.

    Next to Question's own fields it has direct_answer (the option's text where the answer is a letter), skill, benchmark,
    difficulty, num_steps, scenes, the derivations (derivation_a, ...) and plausible wrong derivations
    (wrong_derivation_a, ...), which end in wrong_answer.
    """
    out: dict[str, Any] = {
        "id": question_id,
        "images": images,
        "question": question.question,
        "answer": question.answer,
        "direct_answer": question.direct_answer,
        "rule": question.rule,
        "skill": question.skill,
        "benchmark": ALL_SKILLS[question.skill].benchmark,
        "difficulty": question.difficulty,
        "num_steps": question.num_steps,
    }
    if question.choices:
        out["choices"] = list(question.choices)
    out |= {f"derivation_{style}": text for style, text in question.derivations.items()}
    out["wrong_answer"] = question.slips[0].ending
    out |= {f"wrong_derivation_{style}": question.wrong_derivation(style) for style in STYLES}
    out["scenes"] = [str(scene) for scene in question.scenes]
    return out


def write_skills_world(
    folder: Path,
    num_train: int,
    num_validation: int,
    num_test: int,
    seed: int = 0,
    difficulty: int | Sequence[int] = 1,
    skills: Sequence[str] = tuple(SKILLS),
) -> dict[Split, Path]:
    """Write ``train.jsonl``, ``validation.jsonl``, ``test.jsonl``, ``descriptions.jsonl`` and ``images/`` to ``folder``.

    The descriptions have one row for each training picture. The question is "describe the picture." and the answer is every
    cell's content. Models that start from random weights can learn to see from them.

    Returns:
        The files of the three splits.
    """
    numbers: dict[Split, int] = {"train": num_train, "validation": num_validation, "test": num_test}
    with atomic_path(folder) as temporary:
        (temporary / "images").mkdir(parents=True)
        descriptions: dict[str, dict[str, Any]] = {}
        for split, number in numbers.items():
            rows = []
            for i, question in enumerate(make_questions(split, number, seed, difficulty, skills)):
                question_id = f"{split}-{i:05d}-{question.skill}"
                images = [f"images/{question_id}-{n}.png" for n in range(len(question.scenes))]
                for name, scene in zip(images, question.scenes, strict=True):
                    render(scene).save(temporary / name, compress_level=1)
                    if split == "train":
                        descriptions.setdefault(str(scene), _description_row(scene, name))
                rows.append(row(question, question_id, images))
            write_jsonl(temporary / f"{split}.jsonl", rows)
        write_jsonl(temporary / "descriptions.jsonl", descriptions.values())
    return {split: folder / f"{split}.jsonl" for split in SPLITS}


def _description_row(scene: Scene, image: str) -> dict[str, Any]:
    question_id = f"description-{Path(image).stem}"
    return {
        "id": question_id, "images": [image], "question": DESCRIBE, "answer": describe(scene), "rule": "exact",
        "skill": "description",
    }  # fmt: skip


def corpus(number: int = 2000, seed: int = 0, difficulty: int | Sequence[int] = DIFFICULTIES) -> list[str]:
    """Return texts of the training split for tokenizers: questions, choices, answers, derivations and descriptions."""
    texts = [DESCRIBE]
    for q in make_questions("train", number, seed, difficulty, tuple(ALL_SKILLS)):
        texts += [q.question, q.answer, *q.choices, *q.derivations.values(), *map(describe, q.scenes)]
    return texts
