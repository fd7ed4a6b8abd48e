"""Write a run folder of any size with made-up groups, in the current format of rollouts.

``python tests/support/synthetic_run.py FOLDER --steps 1000`` writes the large run of docs/report.md (about 600 MB).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from openril.records import STUDENT, Group, ImageSource, Question, Response, Rollout
from openril.storage import append_jsonl
from openril.training.pictures import Pictures
from openril.training.run_folder import rollout_rows

SKILLS = ("counting", "colors", "charts", "arithmetic")
TEACHERS = ("teacher_a", "teacher_b")
WORDS = """
the image shows a red blue green small large circle square chart bar line left right above below number total each value
first second third therefore because so we count compare add subtract axis label legend object answer choice
""".split()  # noqa: SIM905


def write_run(
    folder: Path,
    steps: int,
    *,
    groups: int = 36,
    members: int = 8,
    words: int = 120,
    questions: int = 12_000,
    seed: int = 0,
    first_step: int = 1,
) -> None:
    """Write ``rollouts/``, ``pictures/``, ``metrics.jsonl`` and the pictures that the questions name.

    Args:
        groups: Groups of a step.
        members: Responses of a group, half of them the student's.
        words: Mean length of a response in words.
        questions: Different questions; later steps ask them again.
        first_step: Continue a run from here on.
    """
    rng = random.Random(f"{seed}-{first_step}")
    images = write_pictures(folder / "images")
    pictures = Pictures(folder / "pictures")
    pool = [make_group(rng, members, words, images[i % len(images)], i) for i in range(64)]
    hashes = {g.question.id: pictures.keep(g.question) for g in pool}
    pictures.wait()
    rows = rollout_rows(0, pool, hashes)
    templates = [rows[i : i + members] for i in range(0, len(rows), members)]
    (folder / "rollouts").mkdir(parents=True, exist_ok=True)
    for step in range(first_step, first_step + steps):
        lines = []
        for position in range(groups):
            number = ((step - 1) * groups + position) % questions
            lines += [json.dumps(row) for row in stamped(rng, rng.choice(templates), step, position, number)]
        (folder / "rollouts" / f"step_{step:06d}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        share = 0.3 + 0.4 * step / (first_step + steps)
        append_jsonl(
            folder / "metrics.jsonl",
            {
                "step": step,
                "reward/student_answer": share + rng.gauss(0, 0.05),
                "reward/student_similarity": 0.2 + rng.gauss(0, 0.05),
                "discriminator/accuracy": 0.8 + rng.gauss(0, 0.03),
                "discriminator/balanced_accuracy": 0.8 + rng.gauss(0, 0.03),
                "discriminator/length_only_accuracy": 0.6 + rng.gauss(0, 0.03),
                "train/kl": 0.01 * step**0.5,
                "train/completions/mean_length": words * 1.4 + rng.gauss(0, 5),
            },
        )


def write_pictures(folder: Path, count: int = 24) -> list[Path]:
    """Draw colored shapes, each picture another."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, paths = random.Random(0), []
    for i in range(count):
        picture = Image.new("RGB", (224, 168), "white")
        draw = ImageDraw.Draw(picture)
        for _ in range(2 + i % 5):
            x, y = rng.randrange(180), rng.randrange(120)
            shape = rng.choice([draw.ellipse, draw.rectangle])
            shape((x, y, x + 40, y + 40), fill=rng.choice(["red", "navy", "green", "orange"]))
        paths.append(folder / f"{i:03d}.png")
        picture.save(paths[-1])
    return paths


def make_group(rng: random.Random, members: int, words: int, image: Path, number: int) -> Group:
    """Return a group with random texts; one in eight questions has no picture."""
    skill = SKILLS[number % len(SKILLS)]
    question = Question(
        id=f"q{number}",
        question=f"How many {rng.choice(WORDS)} objects are there? (pattern {number})",
        answer=str(number % 10),
        images=() if number % 8 == 7 else (ImageSource(path=image),),
        choices=tuple("0123456789") if number % 3 == 0 else (),
        rule="number",
        metadata={"skill": skill},
    )
    rollouts = []
    for i in range(members):
        half = members // 2
        source, index = (STUDENT, i) if i < half else (TEACHERS[i % len(TEACHERS)], i - half)
        text = " ".join(rng.choices(WORDS, k=max(1, int(rng.expovariate(1 / words)))))
        rollouts.append(Rollout(Response(question.id, source, index, text)))
    return Group(question, rollouts)


def stamped(
    rng: random.Random, template: Sequence[dict[str, object]], step: int, position: int, number: int
) -> list[dict[str, object]]:
    """Return the rows of a group with another question and other texts, rewards and probabilities."""
    rows = []
    for row in template:
        student = row["source"] == STUDENT
        answer, unknown = rng.randrange(10), rng.random() < 0.01
        similarity = float(rng.random() < (0.3 if student else 0.8))
        verdict = None if unknown else float(rng.random() < (0.5 if student else 0.8))
        long = rng.random() < 0.03
        text = f"{row['text']} step {step} question {number}. the answer is {answer}"
        rows.append(
            {
                **row,
                "step": step,
                "group": position,
                "question_id": f"q{number}",
                "text": text,
                "extracted": str(answer),
                "finish_reason": "length" if long else "stop",
                "tokens": len(text) // 4 if student else None,
                "learned": len(text) // 4,
                "student_prob": rng.betavariate(5, 2) if student else rng.betavariate(2, 5),
                "similarity": similarity,
                "verdict": verdict,
                "judged": True,
                "explanation": f"The response says {answer}.",
                "rule_score": float(rng.random() < 0.6),
                "rewards": {"similarity": similarity, "answer": verdict},
                "reward": None if unknown else similarity + (verdict or 0.0),
            }
        )
    known = [float(row["reward"]) for row in rows if row["reward"] is not None]  # type: ignore[arg-type]
    mean = sum(known) / len(known) if known else 0.0
    for row in rows:
        row["advantage"] = 0.0 if row["reward"] is None else float(row["reward"]) - mean  # type: ignore[arg-type]
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--groups", type=int, default=36)
    parser.add_argument("--members", type=int, default=8)
    flags = parser.parse_args()
    write_run(flags.folder, flags.steps, groups=flags.groups, members=flags.members)
