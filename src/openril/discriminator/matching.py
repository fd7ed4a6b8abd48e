"""Length matching: choose the parts of two responses that can be compared without length giving the author away.

Cutting the longer response of a pair to the length of the shorter is not enough: a text that breaks off next to one that
ends still shows which is longer. So neither shows its end. Both are beginnings of the same number of tokens, and over a
group both sides have exactly the same weighted lengths: a classifier by length alone is right half of the time.
Scoring shows the same beginnings as the update. A whole text would show an end that the discriminator has never seen, at
lengths it may never have seen on that side, and a response could earn reward by being long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """The first ``tokens`` tokens of student response number ``student`` and of teacher response number ``teacher``."""

    student: int
    teacher: int
    weight: float
    """The pair's share of the group; the shares of a group sum to 1."""
    tokens: int


def matched_pairs(student_lengths: Sequence[int], teacher_lengths: Sequence[int], limit: int) -> list[Pair]:
    """Return pairs in which every student response has weight 1/S in all and every teacher response 1/T.

    Both sides are walked from short to long, which makes the mean difference of lengths as small as possible: with S = T
    the shortest is paired with the shortest, and so on; otherwise a response is paired with several of the other side,
    each with a part of its weight. There are no pairs if a side is empty.

    Args:
        student_lengths: [S] tokens.
        teacher_lengths: [T] tokens.
        limit: The most tokens that are shown.
    """
    # Weights are counted in parts of 1 / (S T): a student response has T of them, a teacher response S.
    students = sorted(range(len(student_lengths)), key=student_lengths.__getitem__)
    teachers = sorted(range(len(teacher_lengths)), key=teacher_lengths.__getitem__)
    whole = len(students) * len(teachers)
    pairs = []
    done = 0
    while done < whole:
        s, t = students[done // len(teachers)], teachers[done // len(students)]
        until = min((done // len(teachers) + 1) * len(teachers), (done // len(students) + 1) * len(students))
        tokens = shown_tokens(student_lengths[s], teacher_lengths[t], limit)
        pairs.append(Pair(s, t, (until - done) / whole, tokens))
        done = until
    return pairs


def shown_tokens(a: int, b: int, limit: int) -> int:
    """Return how many tokens to show of two responses of ``a`` and ``b`` tokens: all but the last of the shorter.

    The last would show that it ends. At least the first is shown if both have one.
    """
    shorter = min(a, b)
    return min(limit, shorter - 1 if shorter > 1 else shorter)
