"""The similarity reward, for responses that read like a teacher's (paper, section 3 and Fig. 6)."""

from __future__ import annotations

import math
from typing import Literal


def similarity_reward(
    student_prob: float, kind: Literal["binary", "continuous", "levels"] = "binary", levels: int = 11
) -> float:
    """Return the reward in [0, 1] for D's probability that a student wrote the response.

    binary: 1 if student_prob < 0.5, else 0 (0 at exactly 0.5). continuous: 1 - student_prob. levels: 1 - student_prob,
    rounded to the nearest of ``levels`` equally spaced values from 0 to 1. A tie goes to the lower value, so that two
    levels are the binary reward. Raises ValueError for anything that is not a probability, including NaN, so that a broken
    discriminator is not mistaken for a low reward.
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
    raise ValueError(f"rewards.similarity.kind: expected binary, continuous or levels, got {kind!r}")
