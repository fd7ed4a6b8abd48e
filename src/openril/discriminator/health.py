"""Is the discriminator any good, and is it too good? Numbers from one batch, and a watch over several."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from openril.discriminator.losses import length_only_accuracy
from openril.records import STUDENT


@dataclass(frozen=True)
class Scored:
    """One response as the discriminator saw it. source: teacher name or ``STUDENT``. length: characters."""

    source: str
    logit: float
    length: int


def health(scored: Sequence[Scored]) -> dict[str, float]:
    """Metrics of one batch, by name; a value that the batch cannot give (no responses of a side) is left out.

    accuracy: share on the right side of student_prob = 0.5. accuracy_student, accuracy_<teacher>: the same per source.
    entropy: mean entropy of the prediction in nats (log 2 at chance). margin: mean student logit - mean teacher logit.
    length_only_accuracy: what the best threshold on length alone reaches on this batch.
    """
    if not scored:
        return {}
    logits = torch.tensor([s.logit for s in scored], dtype=torch.float64)
    is_student = torch.tensor([s.source == STUDENT for s in scored])
    right = (logits >= 0) == is_student
    p = logits.sigmoid()
    entropy = torch.nn.functional.binary_cross_entropy(p, p, reduction="none")
    out = {"accuracy": float(right.double().mean()), "entropy": float(entropy.mean())}
    for source in dict.fromkeys(s.source for s in scored):
        member = torch.tensor([s.source == source for s in scored])
        out[f"accuracy_{source}"] = float(right[member].double().mean())
        out[f"student_prob_{source}"] = float(p[member].mean())
    if is_student.any() and (~is_student).any():
        out["margin"] = float(logits[is_student].mean() - logits[~is_student].mean())
        out["length_only_accuracy"] = length_only_accuracy(torch.tensor([s.length for s in scored]), is_student)
    return out


class HealthWatch:
    """Warns once per episode when the mean accuracy over ``window`` steps says the discriminator is asleep or has won."""

    def __init__(self, window: int, asleep: float, won: float) -> None:
        self.recent: deque[float] = deque(maxlen=window)
        self.asleep, self.won = asleep, won
        self._warned = ""

    def see(self, accuracy: float | None) -> str | None:
        """Take one step's accuracy; returns a warning to show, or None."""
        if accuracy is None or math.isnan(accuracy):
            return None
        self.recent.append(accuracy)
        if len(self.recent) < (self.recent.maxlen or 1):
            return None
        mean = sum(self.recent) / len(self.recent)
        state = "asleep" if mean < self.asleep else "won" if mean > self.won else ""
        warn, self._warned = state and state != self._warned, state
        if not warn:
            return None
        if state == "asleep":
            return (
                f"the discriminator is asleep: accuracy {mean:.3f} over {len(self.recent)} steps is near chance, so the"
                " similarity reward is noise; raise discriminator.optimizer.learning_rate or pre-train longer"
            )
        return (
            f"the discriminator has won: accuracy {mean:.3f} over {len(self.recent)} steps leaves no similarity reward"
            " to earn; lower discriminator.optimizer.learning_rate, or see length_only_accuracy: it may just read length"
            " (discriminator.match_length)"
        )
