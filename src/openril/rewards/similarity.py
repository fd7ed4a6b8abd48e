"""The similarity reward, for responses that read like a teacher's (paper, section 3 and Fig. 6)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

from openril.errors import StateError
from openril.recipe.schema import GateConfig
from openril.storage import write_json

_CLOSEST = 1e-12


def similarity_reward(
    student_prob: float, kind: Literal["binary", "continuous", "levels", "raw"] = "binary", levels: int = 11
) -> float:
    """Return the reward for D's probability that a student wrote the response; all kinds but ``raw`` are in [0, 1].

    binary: 1 if student_prob < 0.5, else 0 (0 at exactly 0.5). continuous: 1 - student_prob. levels: 1 - student_prob,
    rounded to the nearest of ``levels`` equally spaced values from 0 to 1. A tie goes to the lower value, so that two
    levels are the binary reward. raw: the logit of 1 - student_prob, at most 27.6 in size. Raises ValueError for anything
    that is not a probability, including NaN, so that a broken discriminator is not mistaken for a low reward.
    """
    if not 0.0 <= student_prob <= 1.0:
        raise ValueError(f"student_prob: expected a probability, got {student_prob}. The weights may be NaN.")
    teacher_prob = 1.0 - student_prob
    match kind:
        case "binary":
            return 1.0 if student_prob < 0.5 else 0.0
        case "continuous":
            return teacher_prob
        case "levels":
            return math.ceil(teacher_prob * (levels - 1) - 0.5) / (levels - 1)
        case "raw":
            p = min(max(student_prob, _CLOSEST), 1 - _CLOSEST)
            return math.log((1 - p) / p)
    raise ValueError(f"rewards.similarity.kind: expected binary, continuous, levels or raw, got {kind!r}")


class SimilarityGate:
    """The factor of the similarity reward's weight, from D's balanced accuracy on groups it has not learned from."""

    def __init__(self, settings: GateConfig) -> None:
        self.settings = settings
        self.accuracy: float | None = None
        """Moving average of the balanced accuracy; None before it was measured."""

    def see(self, accuracy: float | None) -> None:
        """Take the balanced accuracy of one step; None, where it cannot be measured, changes nothing."""
        if accuracy is not None:
            kept = self.settings.smoothing if self.accuracy is not None else 0.0
            self.accuracy = kept * (self.accuracy or 0.0) + (1 - kept) * accuracy

    @property
    def factor(self) -> float:
        """0 up to ``closed_below`` or while nothing was measured, 1 from ``open_above`` on, and linear between."""
        low, high = self.settings.closed_below, self.settings.open_above
        return 0.0 if self.accuracy is None else min(1.0, max(0.0, (self.accuracy - low) / (high - low)))

    def save(self, path: Path) -> None:
        write_json(path, {"accuracy": self.accuracy})

    def load(self, path: Path) -> None:
        """Restore what ``save`` wrote. Raises StateError if the file is missing or unreadable."""
        try:
            self.accuracy = json.loads(path.read_text())["accuracy"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise StateError(
                f"{path}: expected the accuracy of the gate, got {e!r}. Remove this checkpoint to continue from the one"
                " before it."
            ) from e
