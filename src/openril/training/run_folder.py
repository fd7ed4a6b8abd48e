"""The files that a run writes: metrics, warnings and rollouts as JSON lines, cut back to the checkpoint on resume."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openril.errors import DataError
from openril.records import Group, Question, Rollout
from openril.rewards import rules
from openril.rewards.extraction import extracted_answer
from openril.storage import append_jsonl, read_jsonl, write_json, write_jsonl
from openril.training.pictures import Pictures

ROLLOUTS_SCHEMA = 2
"""The version in each row of ``rollouts/`` (docs/rollouts.md). Rows of version 1 do not name it."""
SHORT = 40
"""Length in characters up to which a text of a question's metadata is kept in its rows."""


class RunFolder:
    """``metrics.jsonl`` (one flat row a step), ``rollouts/`` (every response of a step), and paths of the other parts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_path = path / "metrics.jsonl"
        self.warnings_path = path / "warnings.jsonl"
        self.rollouts_path = path / "rollouts"
        self.checkpoints_path = path / "checkpoints"
        self.student_path = path / "student"
        self.pictures = Pictures(path / "pictures")

    def cut_after(self, step: int) -> None:
        """Remove the rows of steps after ``step``, the checkpoint from which the run continues.

        Pictures stay: they are named after their content and do not depend on the step.
        """
        for rows_path in (self.metrics_path, self.warnings_path):
            if rows_path.exists():
                write_jsonl(rows_path, [row for row in read_jsonl(rows_path) if (row.get("step") or 0) <= step])
        for path in self.rollouts_path.glob("step_*.jsonl"):
            if int(path.stem.split("_")[1]) > step:
                path.unlink()

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        append_jsonl(self.metrics_path, dict(row))

    def log_warning(self, text: str, step: int | None = None) -> None:
        """Record a warning that the run printed. step: None for one before the first step, which is recorded once."""
        row = {"step": step, "text": text.encode("utf-8", "replace").decode()}
        if step is not None or row not in read_jsonl(self.warnings_path):
            append_jsonl(self.warnings_path, row)

    def log_environment(self, **about: Any) -> None:
        """Record where the run takes place: ``versions`` by package, ``device``, and ``processes``."""
        write_json(self.path / "environment.json", about)

    def log_rollouts(
        self, step: int, groups: Sequence[Group], questions: Mapping[str, Question] | None = None, rule: str = "auto"
    ) -> None:
        """Write the groups of a step.

        Args:
            questions: The questions with their images, by id; without them the rows have no picture hashes.
            rule: The rule that the judge is compared with for questions that name none.
        """
        hashes = {g.question.id: self.pictures.keep((questions or {}).get(g.question.id, g.question)) for g in groups}
        path = self.rollouts_path / f"step_{step:06d}.jsonl"
        write_jsonl(path, rollout_rows(step, groups, hashes, rule), errors="replace")

    def metrics(self) -> list[dict[str, Any]]:
        return read_jsonl(self.metrics_path)


def rollout_rows(
    step: int, groups: Sequence[Group], hashes: Mapping[str, list[str | None]] | None = None, rule: str = "auto"
) -> list[dict[str, Any]]:
    """Return one plain row for each response, groups in order (docs/rollouts.md).

    Args:
        hashes: The content hashes of the pictures of each question, by its id.
        rule: The rule that the judge is compared with for questions that name none.
    """
    rows = []
    for number, group in enumerate(groups):
        q = group.question
        about = {
            "schema": ROLLOUTS_SCHEMA,
            "step": step,
            "group": number,
            "question_id": q.id,
            "question": q.question,
            "choices": list(q.choices),
            "answer": " | ".join(q.answers),
            "answers": list(q.answers),
            "rule": q.rule or rule,
            "metadata": {k: v for k, v in list(q.metadata.items())[:32] if _short(v)},
            "images": [image.name for image in q.images],
            "image_hashes": (hashes or {}).get(q.id, [None] * len(q.images)),
        }
        for r in group.rollouts:
            rows.append(
                {
                    **about,
                    "source": r.response.source,
                    "index": r.response.index,
                    "text": r.response.text,
                    "extracted": extracted_answer(r.response.text),
                    "finish_reason": r.response.finish_reason,
                    "tokens": len(r.response.token_ids) if r.response.token_ids is not None else None,
                    "learned": r.learned,
                    "student_prob": r.student_prob,
                    "similarity": r.similarity,
                    "verdict": r.verdict,
                    "judged": r.judged,
                    "explanation": r.explanation,
                    "cause": r.cause,
                    "rule_score": rule_score(q, r, rule),
                    "rewards": r.rewards,
                    "reward": r.reward,
                    "advantage": r.advantage,
                }
            )
    return rows


def rule_score(question: Question, rollout: Rollout, rule: str) -> float | None:
    """Return what the answer rule says about a response that the judge has judged, or None where it does not apply."""
    if not rollout.judged:
        return None
    try:
        return rules.score(question.rule or rule, question, rollout.response.text)
    except DataError:  # the rule cannot read this ground truth
        return None


def _short(value: Any) -> bool:
    """Return whether a value of a question's metadata is kept: a truth value, a finite number or a short text."""
    if isinstance(value, str):
        return len(value) <= SHORT
    return isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))
