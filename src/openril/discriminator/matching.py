"""Length matching: what of two responses may be compared so that length tells nothing.

Cutting the longer of a pair to the shorter's length is not enough: a text that breaks off beside one that ends still
says which is longer. So neither shows its end. What is left are two beginnings of the same number of tokens, and over a
group exactly the same weighted lengths on both sides: whoever looks at length alone is right half of the time.
Responses are scored as they are learnt from. A whole text would show an end that the discriminator has never seen, at
lengths it may never have seen on that side, and a response could earn by being long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """Student response number ``student`` beside teacher response number ``teacher``, of each its first ``tokens``.

    weight: the pair's share of the group; those of a group sum to 1.
    """

    student: int
    teacher: int
    weight: float
    tokens: int


def matched_pairs(student_lengths: Sequence[int], teacher_lengths: Sequence[int], limit: int) -> list[Pair]:
    """Pairs that use every student response with weight 1/S in all and every teacher response with 1/T.

    student_lengths [S], teacher_lengths [T]: tokens. limit: most tokens shown. Both sides are walked through from short
    to long, which makes the mean difference of lengths as small as it can be: with S = T the shortest meets the
    shortest, and so on; otherwise a response meets several of the other side, with parts of its weight. Empty when a
    side is empty: then there is nothing to compare.
    """
    # Weights in whole parts of 1 / (S T): a student response has T of them, a teacher response S.
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
    """Tokens shown of two responses of ``a`` and ``b`` tokens: all but the last of the shorter, which would show that it
    ends, but at least the first if both have one."""
    shorter = min(a, b)
    return min(limit, shorter - 1 if shorter > 1 else shorter)
