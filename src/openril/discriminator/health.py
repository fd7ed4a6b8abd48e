"""Measure how well the discriminator tells student from teachers: metrics of one batch, and a watch over several."""

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
    """One response as the discriminator saw it."""

    source: str
    """The teacher's name, or ``STUDENT``."""
    logit: float
    """Logit of student_prob."""
    length: int
    """Characters of the response."""


def health(scored: Sequence[Scored]) -> dict[str, float]:
    """Return the metrics of one batch by name (docs/metrics.md); those that it cannot give are left out.

    accuracy: the share on the right side of student_prob = 0.5. accuracy_student, accuracy_<teacher>: the same by source.
    balanced_accuracy: the mean of the accuracies on student and on teacher responses, 0.5 at chance however many
    responses each side has. entropy: the mean entropy of the prediction in nats, log 2 at chance. margin: the mean
    student logit minus the mean teacher logit. length_only_accuracy: what the best threshold on length reaches.
    """
    if not scored:
        return {}
    logits = torch.tensor([s.logit for s in scored], dtype=torch.float64)
    is_student = torch.tensor([s.source == STUDENT for s in scored])
    right = ((logits >= 0) == is_student).double()
    p = logits.sigmoid()
    entropy = torch.nn.functional.binary_cross_entropy(p, p, reduction="none")
    out = {"accuracy": float(right.mean()), "entropy": float(entropy.mean())}
    for source in dict.fromkeys(s.source for s in scored):
        member = torch.tensor([s.source == source for s in scored])
        out[f"accuracy_{source}"] = float(right[member].mean())
        out[f"student_prob_{source}"] = float(p[member].mean())
    if is_student.any() and (~is_student).any():
        out["balanced_accuracy"] = float(right[is_student].mean() + right[~is_student].mean()) / 2
        out["margin"] = float(logits[is_student].mean() - logits[~is_student].mean())
        out["length_only_accuracy"] = length_only_accuracy(torch.tensor([s.length for s in scored]), is_student)
    return out


class HealthWatch:
    """Warns once per episode when the mean accuracy of ``window`` steps is below ``at_chance`` or above ``saturated``."""

    def __init__(self, window: int, at_chance: float, saturated: float) -> None:
        self.recent: deque[float] = deque(maxlen=window)
        self.at_chance, self.saturated = at_chance, saturated
        self._warned = ""

    def see(self, accuracy: float | None) -> str | None:
        """Take the balanced accuracy of one step, and return a warning to show or None."""
        if accuracy is None or math.isnan(accuracy):
            return None
        self.recent.append(accuracy)
        if len(self.recent) < (self.recent.maxlen or 1):
            return None
        mean = sum(self.recent) / len(self.recent)
        state = "at chance" if mean < self.at_chance else "saturated" if mean > self.saturated else ""
        warn, self._warned = state and state != self._warned, state
        if not warn:
            return None
        found = f"the discriminator is {state}: its balanced accuracy over {len(self.recent)} steps is {mean:.3f}"
        effect, more = "hardly any response can earn the similarity reward", ""
        if state == "at chance":
            effect, more = "the similarity reward is noise now", ", or rewards.similarity.weight: 0"
        return (
            f"{found}, so {effect}. Compare discriminator/length_only_accuracy: it may know nothing but length. Options:"
            f" discriminator.match_length: true, a lower discriminator.optimizer.learning_rate{more}."
        )
