"""The files that a run writes: metrics and rollouts as JSON lines, cut back to the checkpoint on resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openril.records import Group
from openril.storage import append_jsonl, read_jsonl, write_jsonl


class RunFolder:
    """``metrics.jsonl`` (one flat row a step), ``rollouts/`` (every response of a step), and paths of the other parts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_path = path / "metrics.jsonl"
        self.rollouts_path = path / "rollouts"
        self.checkpoints_path = path / "checkpoints"
        self.student_path = path / "student"

    def cut_after(self, step: int) -> None:
        """Remove the rows of steps after ``step``, the checkpoint from which the run continues."""
        rows = read_jsonl(self.metrics_path)
        kept = [row for row in rows if row.get("step", 0) <= step]
        if self.metrics_path.exists():
            write_jsonl(self.metrics_path, kept)
        for path in self.rollouts_path.glob("step_*.jsonl"):
            if int(path.stem.split("_")[1]) > step:
                path.unlink()

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        append_jsonl(self.metrics_path, dict(row))

    def log_rollouts(self, step: int, groups: Sequence[Group]) -> None:
        write_jsonl(self.rollouts_path / f"step_{step:06d}.jsonl", rollout_rows(step, groups))

    def metrics(self) -> list[dict[str, Any]]:
        return read_jsonl(self.metrics_path)


def rollout_rows(step: int, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return one plain row for each response, groups in order."""
    rows = []
    for group in groups:
        q = group.question
        for r in group.rollouts:
            rows.append(
                {
                    "step": step,
                    "question_id": q.id,
                    "question": q.question,
                    "images": [image.name for image in q.images],
                    "answer": " | ".join(q.answers),
                    "source": r.response.source,
                    "index": r.response.index,
                    "text": r.response.text,
                    "finish_reason": r.response.finish_reason,
                    "tokens": len(r.response.token_ids) if r.response.token_ids is not None else None,
                    "student_prob": r.student_prob,
                    "similarity": r.similarity,
                    "verdict": r.verdict,
                    "rewards": r.rewards,
                    "reward": r.reward,
                    "advantage": r.advantage,
                }
            )
    return rows
