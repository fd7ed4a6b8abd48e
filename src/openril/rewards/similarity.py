"""The similarity reward: what a response earns for reading like a teacher's (paper, section 3, and its Fig. 6)."""

from __future__ import annotations

import math
from typing import Literal


def similarity_reward(
    student_prob: float, kind: Literal["binary", "continuous", "levels"] = "binary", levels: int = 11
) -> float:
    """Reward in [0, 1] from D's probability that a student wrote the response.

    binary: 1 if student_prob < 0.5, else 0 (exactly 0.5 earns 0). continuous: 1 - student_prob. levels: 1 -
    student_prob rounded to the nearest of ``levels`` equally spaced values from 0 to 1; a tie goes to the lower value,
    so that two levels are the binary reward. Raises ValueError for anything that is no probability, NaN included: a
    broken discriminator must not pass for a low reward.
    """
    if not 0.0 <= student_prob <= 1.0:
        raise ValueError(f"student_prob is {student_prob}, not a probability; the discriminator's weights may be NaN")
    teacher_prob = 1.0 - student_prob
    match kind:
        case "binary":
            return 1.0 if student_prob < 0.5 else 0.0
        case "continuous":
            return teacher_prob
        case "levels":
            return math.ceil(teacher_prob * (levels - 1) - 0.5) / (levels - 1)
    raise ValueError(f"unknown similarity {kind!r}; choose binary, continuous or levels")
