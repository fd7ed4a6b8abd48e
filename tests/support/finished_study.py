"""Write a study's folder as if its cells had run, with random scores and made-up metrics."""

from __future__ import annotations

import random
from pathlib import Path

from openril.storage import write_json, write_jsonl
from playground.study.recipes import Place, result_name
from playground.world import SKILLS

CHANCES = {
    "base": 0.35, "sft": 0.4, "dr_grpo": 0.5, "grpo": 0.48, "ril_both": 0.8, "ril_a": 0.7, "ril_b": 0.72,
    "sft_teacher_text": 0.68, "rejection_sampling": 0.71, "gail": 0.55, "gad_like": 0.52,
}  # fmt: skip
"""Probability of a right answer."""


def write_scores(folder: Path, result: str, scores: dict[str, float], **done: object) -> None:
    """Write the scores of a finished cell by question id, which ends in the question's skill."""
    rows = [
        {
            "question_id": i,
            "question": "?",
            "answer": "1",
            "text": "1",
            "score": s,
            "groups": {"skill": i.split("-")[1]},
        }
        for i, s in scores.items()
    ]
    write_jsonl(folder / "eval" / f"{result}.jsonl", [{"key": "k"}, *rows])
    write_json(folder / "done.json", {"result": result, "seconds": 60.0, **done})


def write_cell(out: Path, place: Place, each: int = 10, chance: float | None = None, steps: int = 20) -> Path:
    """Write a finished cell with ``each`` questions of every skill."""
    rng = random.Random(place.path)
    chance = CHANCES.get(place.name, 0.75) if chance is None else chance
    ids = [f"test{i}-{skill}" for i in range(each) for skill in SKILLS]
    folder = out / place.path
    timed = {"steps": steps, "seconds_per_step": 1.5 if place.name.startswith("ril") else 0.5}
    verdicts = {"verdicts": 100, "unknown": 0, "agreement": 0.99, "wrongly_right": 0.01, "wrongly_wrong": 0.01}
    loop = {
        "ways": {
            str(s): {"direct": 1 - s / steps, "own": s / steps, "a": 0.0, "b": 0.0} for s in range(5, steps + 1, 5)
        },
        "judge": {"student": verdicts},
    }
    done = {"as_is": {}, "sft": timed, "loop": timed | loop}[place.cell.how]
    scores = {i: float(rng.random() < chance) for i in ids}
    write_scores(folder, result_name(place.cell), scores, **done)
    if place.cell.how == "loop":
        rows = []
        for step in range(1, steps + 1):
            row = {
                "step": step,
                "reward/student_similarity": 0.2 + 0.4 * step / steps + 0.05 * rng.random(),
                "reward/student_answer": 0.3 + 0.3 * step / steps,
            }
            rows.append(row | ({"eval/score": 0.4 + 0.3 * step / steps} if step % 5 == 0 else {}))
        write_jsonl(folder / "metrics.jsonl", rows)
    return folder
