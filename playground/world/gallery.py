"""The page of the docs that shows one picture and question of each skill, made from the generators."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from openril.data.question_text import choice_letter
from openril.storage import write_text
from playground.world.questions import SkillQuestion
from playground.world.scenes import PIXELS, render
from playground.world.skills import DIFFICULTIES, SKILLS, make_questions

SHOWN_DIFFICULTY = 2
ENLARGED = 3
GAP = 8
"""Grey pixels around pictures, before enlarging."""
_GREY = (225, 225, 232)
COUNTED = 40
"""Questions a skill and difficulty that the table's means are taken over."""
IMAGES = Path("images/skills")
"""Beside the page."""

_INTRO = f"""\
# What do the fourteen skills ask?

Fourteen kinds of questions about pictures that Pillow draws, each standing for the family of one of the paper's
benchmarks. They do not measure what those benchmarks measure: they differ from each other as those do, and small models
can learn them.

```
python -m playground.world --out runs/skills --num-train 20000 --num-validation 500 --num-test 500 --difficulty 1
python -m playground.world --page docs/skills.md     # makes this page again
```

A picture is {PIXELS} x {PIXELS} pixels, three by three cells of 28: an image token of Qwen2.5-VL or InternVL sees one
cell, and a digit or letter lies within one 14-pixel patch. Which split a scene belongs to follows from the scene itself,
so training, validation and test share none.

| file | what is in it |
|---|---|
| `train.jsonl`, `validation.jsonl`, `test.jsonl` | questions, the skills in turn |
| `descriptions.jsonl` | one row per training picture: "describe the picture." and every cell's content, to learn to see with |
| `images/` | the pictures |

Beside the usual columns (`id`, `images`, `question`, `answer`, `rule`, `choices`) a row has `direct_answer` (of an
option its own words, where `answer` is its letter; the rule takes both), `skill`, `benchmark`, `difficulty`,
`num_steps`, `scenes`, derivations in three styles (`derivation_a`: a teacher that talks in sentences; `derivation_b`: a
teacher that notes steps; `derivation_c`: a third way, no teacher's), and plausible wrong ones (`wrong_derivation_a`, ...,
which end in `wrong_answer`): a misread cell, a miscount, a slip of arithmetic. A recipe names the column that a model
learns: `data: {{columns: {{answer: derivation_a}}}}`.

`--difficulty` 1, 2 or 3 (or several, in turn) sets how many things there are and how many steps an answer takes. Means
over {COUNTED} questions each:
"""


def shown() -> dict[str, SkillQuestion]:
    """The question shown of each skill."""
    found: dict[str, SkillQuestion] = {}
    for question in make_questions("train", 8 * len(SKILLS), seed=3, difficulty=SHOWN_DIFFICULTY):
        known = found.get(question.skill)
        # One of the longer ways: a red light, say, shows little of the street.
        if known is None or question.num_steps > known.num_steps:
            found[question.skill] = question
    return {skill: found[skill] for skill in SKILLS}


def picture(question: SkillQuestion) -> Image.Image:
    """The question's scenes side by side, enlarged, with few colours."""
    width = GAP + len(question.scenes) * (PIXELS + GAP)
    image = Image.new("RGB", (width, PIXELS + 2 * GAP), _GREY)
    for i, scene in enumerate(question.scenes):
        image.paste(render(scene), (GAP + i * (PIXELS + GAP), GAP))
    image = image.resize((width * ENLARGED, image.height * ENLARGED), Image.Resampling.NEAREST)
    return image.quantize(colors=32, dither=Image.Dither.NONE)


def page_text() -> str:
    """The page in Markdown."""
    parts = [_INTRO, "\n".join(_table()) + "\n"]
    for skill, question in shown().items():
        entry = SKILLS[skill]
        parts.append(f"## {skill} ({entry.benchmark}): {entry.task}\n")
        parts.append(f"![{skill}]({(IMAGES / skill).as_posix()}.png)\n")
        asked = [question.question, *(f"{choice_letter(i)}. {c}" for i, c in enumerate(question.choices))]
        parts.append(f"```\n{'   '.join(asked)}\n```\n")
        parts.append(
            f"Answer `{question.direct_answer}`, rule `{question.rule}`. How the teachers A and B get there:\n"
        )
        parts.append(f"```\n{question.derivations['a']}\n```\n")
        parts.append(f"```\n{question.derivations['b']}\n```\n")
        parts.append(f"A wrong way, in the third style: `{question.wrong_derivation('c')}`\n")
    return "\n".join(parts)


def _table() -> Iterable[str]:
    yield "| skill | stands for | what it asks | rule | things | steps |"
    yield "|---|---|---|---|---:|---:|"
    made = {d: make_questions("train", COUNTED * len(SKILLS), seed=5, difficulty=d) for d in DIFFICULTIES}
    for skill, entry in SKILLS.items():
        of_skill = [[q for q in made[d] if q.skill == skill] for d in DIFFICULTIES]
        things = ", ".join(f"{sum(q.num_things for q in level) / len(level):.1f}" for level in of_skill)
        steps = ", ".join(f"{sum(q.num_steps for q in level) / len(level):.1f}" for level in of_skill)
        rule = of_skill[0][0].rule
        yield f"| {skill} | {entry.benchmark} | {entry.task} | {rule} | {things} | {steps} |"


def write_page(path: Path) -> None:
    """Write the page, and its pictures beside it."""
    folder = path.parent / IMAGES
    folder.mkdir(parents=True, exist_ok=True)
    for skill, question in shown().items():
        picture(question).save(folder / f"{skill}.png", optimize=True)
    write_text(path, page_text())
