"""Student responses of earlier steps, which the discriminator's update can repeat.

A discriminator that only sees the current student may forget the earlier one, whose responses then earn reward again
(replay of older student responses: arXiv 2609.30864). Whole groups are replayed: old responses together with teacher
responses to *their* question, drawn again from the cache. Without those, a discriminator that sees the question would
learn which questions are replayed, and Bradley-Terry would have no pairs.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from openril.errors import StateError
from openril.records import STUDENT, Group, Response
from openril.storage import write_jsonl


class ReplayMemory:
    """The student responses of the last ``steps`` steps of all processes; every process holds the same.

    A question is stored as its position in the run's endless sequence of questions, from which its images, its epoch and
    its teacher responses follow.

    Args:
        share: The share of the discriminator's loss that replayed groups have.
    """

    def __init__(self, share: float, steps: int) -> None:
        assert 0 <= share < 1
        self.share = share
        self._steps: deque[list[tuple[int, list[Response]]]] = deque(maxlen=steps)

    def __len__(self) -> int:
        """Return the number of groups that can be drawn."""
        return sum(map(len, self._steps))

    def keep(self, first_position: int, groups: Sequence[Group]) -> None:
        """Remember a step's groups of all processes, in order; the first has position ``first_position``."""
        self._steps.append(
            [(first_position + i, [without_ids(r.response) for r in g.students]) for i, g in enumerate(groups)]
        )

    def draw(self, num_groups: int, seed: int) -> list[tuple[int, list[Response]]]:
        """Draw (position, student responses) of groups to join ``num_groups`` new ones, uniformly and none twice.

        They are as many as make ``share`` of all groups, at least one, or fewer if fewer are remembered. The draw depends
        on ``seed`` and the remembered groups only.
        """
        count = max(1, round(num_groups * self.share / (1 - self.share))) if self.share else 0
        everything = [entry for step in self._steps for entry in step]
        return random.Random(seed).sample(everything, min(count, len(everything)))

    def save(self, path: Path) -> None:
        """Write one row for each remembered step."""
        rows = [
            [{"position": p, "question_id": rs[0].question_id, "texts": [r.text for r in rs]} for p, rs in step]
            for step in self._steps
        ]
        write_jsonl(path, [{"groups": groups} for groups in rows])

    def load(self, path: Path) -> None:
        """Restore what ``save`` wrote. Raises StateError if the file is missing or unreadable."""
        try:
            steps = [json.loads(line)["groups"] for line in path.read_text(encoding="utf-8").split("\n") if line]
            self._steps.clear()
            self._steps.extend(
                [
                    (g["position"], [Response(g["question_id"], STUDENT, i, t) for i, t in enumerate(g["texts"])])
                    for g in groups
                ]
                for groups in steps
            )
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise StateError(
                f"{path}: expected the student responses to replay, got {e!r}. Remove this checkpoint to continue from the"
                " one before it."
            ) from e


def without_ids(response: Response) -> Response:
    """Return the response with its text only, as it is after a checkpoint: the discriminator reads nothing else."""
    return Response(response.question_id, STUDENT, response.index, response.text)
