"""The gallery of the docs: one picture and question of each skill, drawn by the generators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image

from openril.data.question_text import choice_letter
from openril.storage import write_text
from playground.world.questions import SkillQuestion
from playground.world.scenes import PIXELS, render
from playground.world.skills import ALL_SKILLS, DIFFICULTIES, HEADROOM, SKILLS, Skill, make_questions

SHOWN_DIFFICULTY = 2
ENLARGED = 3
GAP = 8
"""Gray pixels around pictures, before enlarging."""
_GRAY = (225, 225, 232)
COUNTED = 40
"""Number of questions for each mean in the table."""
IMAGES = Path("images/skills")
"""Folder of the pictures, relative to the page."""

_INTRO = f"""\
# What do the fourteen skills ask?

The world of the demo and the study has fourteen kinds of questions about pictures that Pillow draws. Each skill
represents the family of one of the paper's benchmarks. The skills do not measure what those benchmarks measure. They
differ from each other as the benchmarks do, and small models can learn them.

```
python -m playground.world --out runs/skills --num-train 20000 --num-validation 500 --num-test 500 --difficulty 1
python -m playground.world --page docs/skills.md     # writes this page again
```

- A picture has {PIXELS} x {PIXELS} pixels: three by three cells of 28 pixels.
- One image token of Qwen2.5-VL or InternVL covers one cell. A digit or letter fits into one 14-pixel patch.
- The split of a scene is computed from the scene itself. Training, validation and test share no scene.
- `--difficulty` 1, 2 or 3 (or several, which take turns) sets the number of things and of steps to the answer.

## Files

| file | content |
|---|---|
| `train.jsonl`, `validation.jsonl`, `test.jsonl` | questions; the skills take turns |
| `descriptions.jsonl` | one row for each training picture: "describe the picture." and the content of every cell |
| `images/` | the pictures |

A row has the usual columns (`id`, `images`, `question`, `answer`, `rule`, `choices`) and these:

| column | content |
|---|---|
| `direct_answer` | the answer without a derivation; for a choice the option's text (the rule accepts text and letter) |
| `derivation_a`, `derivation_b` | the derivation in sentences (teacher A) and in notes (teacher B) |
| `derivation_c` | the derivation in a third response style, which no teacher has |
| `wrong_derivation_a`, `..._b`, `..._c` | a plausible wrong one: a misread cell, a miscount or an arithmetic error |
| `wrong_answer` | the answer of the wrong derivation |
| `skill`, `benchmark`, `difficulty`, `num_steps`, `scenes` | labels, the number of steps, and the scenes in words |

A recipe names the column that a model learns, for example `data: {{columns: {{answer: derivation_a}}}}`.

## Skills

Things and steps are means over {COUNTED} questions for each difficulty (1, 2, 3).
"""

_HEADROOM = """\
## Skills with headroom

In these four, a student can pass its teachers. They represent no benchmark and are not in the default world; name them
with `--skills`.

```
python -m playground.world --out runs/headroom --skills rest measure form route --difficulty 1
```
"""


def shown() -> dict[str, SkillQuestion]:
    """Return the question that the gallery shows of each skill."""
    found: dict[str, SkillQuestion] = {}
    skills = list(ALL_SKILLS)
    for question in make_questions("train", 8 * len(skills), seed=3, difficulty=SHOWN_DIFFICULTY, skills=skills):
        known = found.get(question.skill)
        # Prefer a long derivation. A red light, for example, needs only one step.
        if known is None or question.num_steps > known.num_steps:
            found[question.skill] = question
    return {skill: found[skill] for skill in ALL_SKILLS}


def picture(question: SkillQuestion) -> Image.Image:
    """Draw the question's scenes next to each other, enlarged, with few colors."""
    width = GAP + len(question.scenes) * (PIXELS + GAP)
    image = Image.new("RGB", (width, PIXELS + 2 * GAP), _GRAY)
    for i, scene in enumerate(question.scenes):
        image.paste(render(scene), (GAP + i * (PIXELS + GAP), GAP))
    image = image.resize((width * ENLARGED, image.height * ENLARGED), Image.Resampling.NEAREST)
    return image.quantize(colors=32, dither=Image.Dither.NONE)


def page_text() -> str:
    """Return the page in Markdown."""
    parts = [_INTRO, "\n".join(_table(SKILLS)) + "\n", _HEADROOM, "\n".join(_table(HEADROOM)) + "\n"]
    for skill, question in shown().items():
        entry = ALL_SKILLS[skill]
        parts.append(f"## {skill}\n")
        parts.append(f"{entry.benchmark}: {entry.task}.\n" if entry.benchmark else f"{entry.task.capitalize()}.\n")
        parts.append(f"![{skill}]({(IMAGES / skill).as_posix()}.png)\n")
        asked = [question.question, *(f"{choice_letter(i)}. {c}" for i, c in enumerate(question.choices))]
        parts.append(f"```\n{'   '.join(asked)}\n```\n")
        parts.append(
            f"Answer `{question.direct_answer}`, rule `{question.rule}`. The derivations of teachers A and B:\n"
        )
        parts.append(f"```\n{question.derivations['a']}\n```\n")
        parts.append(f"```\n{question.derivations['b']}\n```\n")
        parts.append(f"A wrong derivation in style c:\n\n```\n{question.wrong_derivation('c')}\n```\n")
    return "\n".join(parts)


def _table(skills: Mapping[str, Skill]) -> Iterable[str]:
    yield "| skill | benchmark | task | rule | things | steps |"
    yield "|---|---|---|---|---:|---:|"
    number = COUNTED * len(skills)
    made = {d: make_questions("train", number, seed=5, difficulty=d, skills=list(skills)) for d in DIFFICULTIES}
    for skill, entry in skills.items():
        of_skill = [[q for q in made[d] if q.skill == skill] for d in DIFFICULTIES]
        things = ", ".join(f"{sum(q.num_things for q in level) / len(level):.1f}" for level in of_skill)
        steps = ", ".join(f"{sum(q.num_steps for q in level) / len(level):.1f}" for level in of_skill)
        rule = of_skill[0][0].rule
        yield f"| [{skill}](#{skill}) | {entry.benchmark or '-'} | {entry.task} | {rule} | {things} | {steps} |"


def write_page(path: Path) -> None:
    """Write the page, and its pictures next to it."""
    folder = path.parent / IMAGES
    folder.mkdir(parents=True, exist_ok=True)
    for skill, question in shown().items():
        picture(question).save(folder / f"{skill}.png", optimize=True)
    write_text(path, page_text())
