"""What the student said in earlier steps, for the discriminator to be reminded of.

A discriminator that only meets the student of today may forget the student of before, who then comes back (replay of
older student responses: arXiv 2609.30864). Whole groups are replayed: an old response beside teacher responses to *its*
question, drawn again from the cache. Without them one that sees the question would learn which questions are replayed,
and Bradley-Terry would have no pairs.
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
    """The student responses of the last ``steps`` steps, those of all processes: every process holds the same.

    share: of the discriminator's update that is about them. A question is known by its position in the run's endless
    row of questions, from which its images, its visit and its teacher responses follow.
    """

    def __init__(self, share: float, steps: int) -> None:
        assert 0 <= share < 1
        self.share = share
        self._steps: deque[list[tuple[int, list[Response]]]] = deque(maxlen=steps)

    def __len__(self) -> int:
        """Groups that can be drawn."""
        return sum(map(len, self._steps))

    def keep(self, first_position: int, groups: Sequence[Group]) -> None:
        """Remember a step's groups (of all processes, in order), the first of which stood at ``first_position``."""
        self._steps.append(
            [(first_position + i, [without_ids(r.response) for r in g.students]) for i, g in enumerate(groups)]
        )

    def draw(self, num_groups: int, seed: int) -> list[tuple[int, list[Response]]]:
        """(position, student responses) of groups to put beside ``num_groups`` new ones, all alike likely, none twice.

        As many as make ``share`` of all groups, at least one; fewer when fewer are there. Follows from ``seed`` and what
        was kept.
        """
        wanted = max(1, round(num_groups * self.share / (1 - self.share))) if self.share else 0
        everything = [entry for step in self._steps for entry in step]
        return random.Random(seed).sample(everything, min(wanted, len(everything)))

    def save(self, path: Path) -> None:
        """One row a step that is remembered."""
        rows = [
            [{"position": p, "question_id": rs[0].question_id, "texts": [r.text for r in rs]} for p, rs in step]
            for step in self._steps
        ]
        write_jsonl(path, [{"groups": groups} for groups in rows])

    def load(self, path: Path) -> None:
        """Inverse of ``save``. Raises StateError when the file is not there or not readable."""
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
                f"{path}: the student responses to be replayed cannot be read ({e}); remove this checkpoint to go on from"
                " the one before"
            ) from e


def without_ids(response: Response) -> Response:
    """What a discriminator needs of a response: it reads text. The same, whether a checkpoint lay between or not."""
    return Response(response.question_id, STUDENT, response.index, response.text)
