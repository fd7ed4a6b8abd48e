"""Scripted answers to the small benchmarks, and the scores that they must have, worked by hand.

The truth of question n is the letter n mod 4, except where a comment says otherwise.
"""

from __future__ import annotations

from support.benchmark_data import BLINK, COLORS, COUNT, LETTERS, mmbench

LETTER_ANSWERS = [
    "A", "B.", "(C)", "The answer is D", "", "<think>A. or (C)</think>B", "<think>C", "A", "a", "B", "C.", "A"
]  # fmt: skip
"""By question. 4 says nothing, 6 never stops thinking, 7 and 11 are wrong, 8 is in lower case."""


def letter_answer(n: int) -> str:
    return LETTER_ANSWERS[n % COUNT]


EXPECTED: dict[str, tuple[float, int]] = {
    # Right: 0 1 2 5 8 9 10, as punctuation and case are ignored. Unparsed: 3 (a sentence), 4, 6.
    "ai2d": (100 * 7 / 12, 3),
    # Even questions exact, 1 5 9 within 5%, 3 7 11 off by 20%.
    "chartqa": (100 * 9 / 12, 0),
    # 0 1 2 3 5 | 9 | 10 right of 6, 4 and 2 questions; the mean of the three categories. Unparsed: 4, 6, 8 (lower case).
    "mmstar": (100 * (5 / 6 + 1 / 4 + 1 / 2) / 3, 3),
    # 0 1 2 5 9 10 12 13 right of 14; 3 7 11 are open questions. Unparsed, for which lmms-eval draws: 4, 6, 8.
    "mmmu_val": (100 * 8 / 14, 3),
    # Standard: 0 1 2 3 5 9 10 right, 4 6 8 unparsed. Vision, where only the bare letter counts: 0 5 9 right, 7 11 wrong.
    "mmmu_pro": (100 * (7 / 12 + 3 / 12) / 2, 3 + 7),
    # All but jigsaw, whose two answers have no letter.
    "blink": (100 * 26 / 28, 2),
    # Of 0 1 2 4 5 6 8 9 10 12 13 14 (the others are videos): 0 1 5 8 9 10 12 13 right. Unparsed: 2 and 14 "(", 4, 6.
    "seedbench": (100 * 8 / 12, 4),
    # 0 1 5 8 9 10 right. Unparsed: 2 "(", 3 "T", 4, 6.
    "seedbench_2_plus": (100 * 6 / 12, 4),
    # 0 1 2 5 9 10 right; 3 7 11 are open and wrong. Unparsed: 4, 6, 8.
    "realworldqa": (100 * 6 / 12, 3),
    # All copies right but those of 1 (one wrong), 2 (one without a letter).
    "mmbench_en_dev": (100 * 10 / 12, 1),
    # The same, and without a judge 6 and 8 have no letter either, and in the FAIL of 7 is a wrong A.
    "mmbench_cn_dev": (100 * 7 / 12, 3),
}
"""Score in percent and number of unparsed units without a judge."""

JUDGED: dict[str, tuple[float | None, int, int]] = {
    # Known: 0 1 2 5 9 10 right; 3 (nearest choice), 4, 11 unparsed; 8 wrong. 6 and 7 have no verdict.
    "mathvista_testmini_format": (100 * 6 / 10, 3, 2),
    # Eight answers of 0.8, one of 0; the other three have no verdict.
    "mmvet": (100 * 8 * 0.8 / 9, 0, 3),
    # Four of twelve have no verdict, which is too much.
    "mmvetv2": (None, 0, 4),
    "mmbench_en_dev": (100 * 10 / 12, 1, 0),
    # Of the known eleven, 1 is wrong, and 2 and 8 match no choice. The judge reads 6; 7 has no verdict.
    "mmbench_cn_dev": (100 * 8 / 11, 2, 1),
}
"""Score, unparsed and unknown with the judge of ``judge_reply``."""

MATHVISTA = ["A", "1", "2.5", "yellowish", "4 squares", "5.5", "FAIL", "REFUSE", "9.5", "(B)", "10", ""]
MMVET = ["good"] * 7 + ["slowly"] + ["bad", "words", "HANG", "five"]
MMVETV2 = ["good"] * 8 + ["words", "FAIL", "five", "DRIBBLE"]


def mmbench_answer(row: int, judged: bool) -> str:
    """Return the answer to a row of the data: the right letter, but for a few copies.

    judged: answers to question 2 ask a judge too.
    """
    rows = [(i, s) for i in range(COUNT) for s in range(2 if i == 3 else 4)]
    index, shift = rows[row]
    truth = mmbench(index, shift)["answer"]
    if (index, shift) == (1, 2):
        return LETTERS[(LETTERS.index(truth) + 1) % 4]
    if (index, shift) == (2, 0):
        return "it looks nice"
    if index == 4:
        return f"it is {COLORS[index % 4]}"
    if judged and shift == 0 and index in (6, 7, 8):
        return {6: f"pick {truth.lower()}", 7: "FAIL", 8: "none of them"}[index]
    return f"({truth})" if shift % 2 else truth


def answer(task: str, n: int) -> str:
    """Return the scripted answer of a student to row n of a task."""
    if task == "chartqa":
        return str(round((10 * n + 1) * (1 if n % 2 == 0 else 1.04 if n % 4 == 1 else 1.2), 3))
    if task.startswith("mmbench"):
        return mmbench_answer(n, judged="cn" in task)
    if task.startswith("blink"):
        return ("I cannot see", "")[n] if task == "blink_jigsaw" else ("A", "B.")[n]
    scripts = {"mathvista_testmini_format": MATHVISTA, "mmvet": MMVET, "mmvetv2": MMVETV2}
    return scripts[task][n] if task in scripts else letter_answer(n)


def blink_tasks() -> list[str]:
    return [f"blink_{name.lower().replace('-', '_')}" for name in BLINK]
