"""How often a judge's verdict is the exact rule's, on held-out responses."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from openril.rewards.judge_prompt import read_verdict
from openril.sampling.greedy_batch import GreedyDecoder
from openril.storage import stable_hash
from playground.judge.cases import Case, make_cases, world_questions

NUM_HELD_OUT = 1400
"""Number of held-out questions."""


def measure(folder: Path, number: int, seed: int) -> dict[str, Any]:
    """Compare a judge with the exact rule on ``number`` responses to questions of the validation split.

    Returns:
        The fields of ``compare`` and ``verdicts_per_second`` in batches of 64.
    """
    cases = make_cases(world_questions("validation", NUM_HELD_OUT, seed), number, stable_hash("held out", seed))
    reader = GreedyDecoder.from_checkpoint(folder)
    started = time.perf_counter()
    replies: list[str] = []
    for start in range(0, len(cases), 64):
        replies += reader.replies([case.messages() for case in cases[start : start + 64]])
    seconds = time.perf_counter() - started
    return compare(cases, replies) | {"verdicts_per_second": round(len(cases) / seconds, 1)}


def compare(cases: Sequence[Case], replies: Sequence[str]) -> dict[str, Any]:
    """Compare a judge's replies with the exact rule.

    Returns:
        ``agreement``; ``false_positive_rate``, the share of the wrong responses that the judge calls right;
        ``false_negative_rate``; ``unreadable``, the share of replies without a verdict, which never agree; the numbers of
        verdicts and of right responses; and all of these ``by_skill`` and ``by_sort``.
    """
    read = [read_verdict(reply) for reply in replies]
    given = [None if isinstance(verdict, str) else int(verdict[0]) for verdict in read]
    rows = list(zip(cases, given, strict=True))

    def table(key: Callable[[Case], str]) -> dict[str, dict[str, Any]]:
        names = sorted({key(case) for case in cases})
        return {name: _rates([row for row in rows if key(row[0]) == name]) for name in names}

    return {
        **_rates(rows),
        "unreadable": given.count(None) / max(1, len(given)),
        "by_skill": table(lambda case: case.skill),
        "by_sort": table(lambda case: case.sort),
    }


def _rates(rows: Sequence[tuple[Case, int | None]]) -> dict[str, Any]:
    """Return the rates of these verdicts; a rate without any response to count over is None."""
    wrong = [given for case, given in rows if not case.verdict]
    right = [given for case, given in rows if case.verdict]
    return {
        "agreement": (wrong.count(0) + right.count(1)) / max(1, len(rows)),
        "false_positive_rate": wrong.count(1) / len(wrong) if wrong else None,
        "false_negative_rate": right.count(0) / len(right) if right else None,
        "num_verdicts": len(rows),
        "num_right": len(right),
    }


def show(result: dict[str, Any], say: Callable[[str], None] = print) -> None:
    """Print the measurements as tables."""

    def line(name: str, row: dict[str, Any]) -> None:
        rates = [row["agreement"], row["false_positive_rate"], row["false_negative_rate"]]
        shown = [f"{rate:.1%}" if rate is not None else "-" for rate in rates]
        say(f"  {name:24}{shown[0]:>10}{shown[1]:>17}{shown[2]:>17}{row['num_verdicts']:>9}{row['num_right']:>7}")

    say(f"  {'':24}{'agreement':>10}{'false positives':>17}{'false negatives':>17}{'verdicts':>9}{'right':>7}")
    for group in ("by_skill", "by_sort"):
        for name, row in result[group].items():
            line(name, row)
        say("")
    line("all", result)
    say(
        f"judge: agrees with the exact rule on {result['agreement']:.2%} of {result['num_verdicts']} held-out verdicts; "
        f"unreadable {result['unreadable']:.2%}; {result['verdicts_per_second']:.0f} verdicts a second"
    )
