"""What a report counts over all groups of a run, in one pass and with bounded memory (docs/report.md)."""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from openril.errors import DataError
from openril.records import STUDENT
from openril.report.rollouts import mistaken

LENGTHS, SURE, AUDITED, DISAGREEMENTS = 2000, 20, 40, 10_000
"""The most responses in the plot of lengths, in the list of confident errors, in the audit's sample, and among the
disagreements of judge and rule."""
_MOST_NAMES = 100

Group = Mapping[str, Any]


def rank(seed: int, key: str) -> int:
    """Return a number by which seeded samples are drawn: the smallest ranks. A longer run keeps most of a sample."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {key}".encode(), digest_size=7).digest(), "big")


class Sample:
    """The ``size`` items with the smallest ranks, and the number of all."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.total = size, seed, 0
        self._heap: list[tuple[int, str, Any]] = []

    def add(self, key: str, item: Any) -> None:
        self.total += 1
        entry = (-rank(self.seed, key), key, item)
        if len(self._heap) < self.size:
            heapq.heappush(self._heap, entry)
        elif entry[0] > self._heap[0][0]:
            heapq.heapreplace(self._heap, entry)

    def items(self) -> list[Any]:
        return [item for _, _, item in sorted(self._heap, key=lambda entry: -entry[0])]


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float] | None:
    """Return Wilson's interval for a share of ``right`` in ``n``, by default at 95 %; None without any."""
    if n == 0:
        return None
    share, spread = right / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass
class DiscriminatorStatistics:
    """Calibration, score against length, and the most confident errors."""

    seed: int
    bins: list[list[float]] = field(default_factory=lambda: [[0, 0.0, 0.0] for _ in range(10)])
    """Count, sum of student_prob and number of the student's responses, for each tenth of [0, 1]."""

    def __post_init__(self) -> None:
        self.lengths = Sample(LENGTHS, self.seed)
        self.wrong: dict[str, tuple[float, str]] = {}  # question -> confidence and member of its most confident error

    def add(self, group: Group) -> None:
        for number, member in enumerate(group["members"]):
            probability = member["student_prob"]
            if probability is None or not 0 <= probability <= 1:
                continue
            entry = self.bins[min(9, int(10 * probability))]
            entry[0] += 1
            entry[1] += probability
            entry[2] += member["source"] == STUDENT
            name = f"{group['id']}/{number}"
            tokens = member["tokens"] if member["tokens"] is not None else member["learned"] or None
            point = {"tokens": tokens, "characters": len(member["text"]) + member["cut"]}
            self.lengths.add(name, {**point, "student_prob": round(probability, 5), "source": member["source"]})
            if mistaken(member):
                self.wrong[group["question_id"]] = max(
                    self.wrong.get(group["question_id"], (0.0, "")), (abs(probability - 0.5), name)
                )
        if len(self.wrong) > 50 * SURE:
            self.wrong = dict(heapq.nlargest(SURE, self.wrong.items(), key=lambda item: item[1]))

    def result(self, metrics: Mapping[str, list[float | None]]) -> dict[str, Any] | None:
        """Return the report's ``discriminator``, or None for a run without one."""
        if not any(n for n, _, _ in self.bins):
            return None
        lengths = self.lengths.items()
        over_time = {k.removeprefix("discriminator/"): v for k, v in metrics.items() if "accuracy" in k}
        return {
            "calibration": [
                {"low": i / 10, "high": (i + 1) / 10, "predicted": p / n, "student_share": s / n, "n": int(n)}
                for i, (n, p, s) in enumerate(self.bins)
                if n
            ],
            "length": lengths,
            "length_unit": "tokens" if all(point["tokens"] is not None for point in lengths) else "characters",
            "over_time": {"step": metrics.get("step", []), **over_time},
            "confident_and_wrong": [name for _, name in heapq.nlargest(SURE, self.wrong.values())],
        }


class TeacherStatistics:
    """Right answers, wins and positive advantages by source."""

    def __init__(self) -> None:
        self.sources: dict[str, dict[str, int]] = {}
        self.skills: dict[str, dict[str, list[int]]] = defaultdict(dict)

    def add(self, group: Group) -> None:
        best: dict[str, float] = {}
        for member in group["members"]:
            source = member["source"]
            if source not in self.sources and len(self.sources) >= _MOST_NAMES:
                continue
            counts = self.sources.setdefault(
                source, dict.fromkeys(("responses", "known", "right", "groups", "wins", "positive"), 0)
            )
            counts["responses"] += 1
            counts["positive"] += member["advantage"] > 0
            if member["verdict"] is not None:
                right = member["verdict"] >= 0.5
                counts["known"] += 1
                counts["right"] += right
                skills = self.skills[source]
                if group["skill"] and (group["skill"] in skills or len(skills) < _MOST_NAMES):
                    entry = skills.setdefault(group["skill"], [0, 0])
                    entry[0] += 1
                    entry[1] += right
            reward = member["reward"]
            best[source] = max(best.get(source, -math.inf), -math.inf if reward is None else reward)
        for source, reward in best.items():
            if source in self.sources:
                self.sources[source]["groups"] += 1
                others = [other for name, other in best.items() if name != source]
                self.sources[source]["wins"] += bool(others) and reward > max(others)

    def result(self, too_long: Mapping[str, int]) -> list[dict[str, Any]]:
        """Return the report's ``teachers``, the student first. Empty for a run without teachers."""
        if not set(self.sources) - {STUDENT}:
            return []
        return [
            {
                "source": source,
                "responses": c["responses"],
                "right": _share(c["right"], c["known"]),
                "wins": _share(c["wins"], c["groups"]),
                "positive_advantage": _share(c["positive"], c["responses"]),
                "too_long": too_long.get(source),
                "skills": {s: {"n": n, "right": right / n} for s, (n, right) in sorted(self.skills[source].items())},
            }
            for source, c in sorted(self.sources.items(), key=lambda item: (item[0] != STUDENT, item[0]))
        ]


class AuditStatistics:
    """A seeded sample of the judge's verdicts, its disagreements with the rule, and what a person ticked."""

    def __init__(self, seed: int, ticks: Mapping[str, Mapping[str, Any]]) -> None:
        self.seed = seed
        self.ticks = ticks  # by member
        self.sample = Sample(AUDITED, seed)
        self.disagreements = Sample(DISAGREEMENTS, seed)
        self.counts = {("sample", True): 0, ("sample", False): 0, ("other", True): 0, ("other", False): 0}
        self.seen: set[int] = set()

    def add(self, group: Group) -> None:
        for number, member in enumerate(group["members"]):
            name = f"{group['id']}/{number}"
            tick = self.ticks.get(name.partition("-")[2])
            if tick and tick["question_id"] == group["question_id"] and tick["source"] == member["source"]:
                self.counts["sample" if tick.get("part") == "sample" else "other", tick["tick"] == "right"] += 1
            if member["verdict"] is None or not member["judged"]:
                continue
            self.sample.add(name, name)
            rule = member["rule_score"]
            if rule is not None and (rule >= 0.5) != (member["verdict"] >= 0.5):
                same = hash((group["question_id"], member["text"]))
                if same not in self.seen:  # the same response to the same question is checked once
                    self.seen.add(same)
                    found = {"judge": member["verdict"], "rule": rule, "rule_name": group["rule"]}
                    self.disagreements.add(name, {"member": name, **found})

    def result(self) -> dict[str, Any] | None:
        """Return the report's ``audit``, or None for a run without a judge."""
        if not self.sample.total:
            return None
        return {
            "seed": self.seed,
            "sample": self.sample.items(),
            "sample_total": self.sample.total,
            "disagreements": self.disagreements.items(),
            "disagreements_total": self.disagreements.total,
            "ticks": self._ticked() if self.ticks else None,
        }

    def _ticked(self) -> dict[str, Any]:
        right, wrong = self.counts["sample", True], self.counts["sample", False]
        low, high = wilson(right, right + wrong) or (None, None)
        return {
            "right": right,
            "wrong": wrong,
            "agreement": _share(right, right + wrong),
            "low": low,
            "high": high,
            "disagreements": {"right": self.counts["other", True], "wrong": self.counts["other", False]},
            "unused": len(self.ticks) - sum(self.counts.values()),
        }


def read_ticks(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the ticks that the page exported, by run and member (``STEP-POSITION/INDEX``); of several the last.

    Raises DataError, naming file and line, for a line that is no tick.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    try:
        lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    except OSError as e:
        raise DataError(f"--audit {path}: expected a file of ticks, got an error ({e.strerror or e}).") from e
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            tick = json.loads(line)
            ok = tick["tick"] in ("right", "wrong") and all(isinstance(tick[k], str) for k in _TICK)
        except (ValueError, TypeError, KeyError):
            ok = False
        if not ok:
            raise DataError(
                f"{path}:{number}: expected a tick with {', '.join(_TICK)} and tick: right or wrong, got {line[:60]!r}."
                " Export the ticks again."
            )
        found.setdefault(tick["run"], {})[tick["member"].partition("-")[2]] = tick
    return found


_TICK = ("run", "member", "question_id", "source")


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


class Record(NamedTuple):
    """What the choice of groups needs to know of one."""

    id: str
    step: int
    rank: int
    """Rank of its question (``rank``)."""
    flags: tuple[str, ...]


def chosen(records: Sequence[Record], must: Sequence[str], per: int = 4) -> list[str]:
    """Return the ids of a run's groups in the order in which a report of limited size takes them.

    First some groups of the first and of the last logged step, then some of each flag, then those that the other pages of the
    report point to, then the rest by the ranks of the questions, so that a question comes with all its steps, in every run.

    Args:
        records: All groups in order.
        must: Ids that the other pages point to.
        per: Groups of each step, and of each flag, that come first.
    """
    ends = dict.fromkeys((records[0].step, records[-1].step)) if records else {}
    first = [r.id for step in ends for r in [r for r in records if r.step == step][:per]]
    by_rank = sorted(records, key=lambda r: (r.rank, r.step))
    flags: dict[str, list[str]] = defaultdict(list)
    for record in by_rank:
        for flag in record.flags:
            flags[flag] += [record.id] * (len(flags[flag]) < per)
    flagged = [i for ids in flags.values() for i in ids]
    known = {record.id for record in records}
    return list(dict.fromkeys([*first, *flagged, *(i for i in must if i in known), *(r.id for r in by_rank)]))
