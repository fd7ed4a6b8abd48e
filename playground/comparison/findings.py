"""Read the finished cells, and compute everything that the page shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openril.errors import DataError
from openril.report.curves import series
from openril.storage import read_jsonl
from playground.comparison.archive import CURVES, question_ids
from playground.comparison.cells import DONE
from playground.comparison.costs import preparation, seconds_per_step
from playground.comparison.plan import (
    AT_D_RATE,
    CONTENDERS,
    EVERYBODY,
    LENGTHS,
    ONE_TEACHER,
    START,
    STEPS,
    STUDENTS,
    TEACHERS,
    WITH_ONE_TEACHER,
    Cell,
    skill_of,
)  # fmt: skip
from playground.comparison.recipes import Recipes
from playground.study.bootstrap import Estimate, Resampling, paired
from playground.world import SKILLS

WINNER, RIVAL, PUBLISHED, WITH_D = "ril_plus", "rejection_sampling", "ril", "ril_plus_d"
BASELINE = "dr_grpo"
PARTS_OF_WORLD = {"all": "eighteen skills", "fourteen": "the fourteen", "four": "the four with headroom"}


@dataclass(frozen=True)
class Scores:
    """The scores of a cell's seeds."""

    seeds: list[int | None]
    values: NDArray[np.float64]
    """[S, Q]: 1.0 right, 0.0 wrong."""
    folders: list[Path]


class Findings:
    """Everything about a comparison in ``out``."""

    def __init__(self, out: Path, resamples: int = 4000) -> None:
        self.out = out
        ids = question_ids(out)  # first, because it says what is missing
        self.settings = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
        self.recipes = Recipes(out, out, out / "world")
        self.ids = ids
        skills = [skill_of(question) for question in self.ids]
        groups = {"all": skills, "fourteen": [s for s in skills if s in SKILLS]}
        groups["four"] = [s for s in skills if s not in SKILLS]
        self.masks = {
            "all": np.full(len(skills), True), "fourteen": np.array([s in SKILLS for s in skills]),
            "four": np.array([s not in SKILLS for s in skills]),
        }  # fmt: skip
        self.resampling = {name: Resampling(of, resamples) for name, of in groups.items() if of}
        self._read: dict[str, Scores | None] = {}

    def scores(self, cell: Cell) -> Scores | None:
        """Return the scores of a cell's finished seeds, or None if there is none."""
        folder = (self.out / cell.path).parent
        key = str(folder)
        if key not in self._read:
            paths = sorted(folder.glob(f"seed_*/{DONE}"), key=lambda p: int(p.parent.name[5:]))
            values = [self._values(path) for path in paths]
            seeds: list[int | None] = [None] if cell.name == START else [int(p.parent.name[5:]) for p in paths]
            self._read[key] = Scores(seeds, np.array(values), [p.parent for p in paths]) if paths else None
        return self._read[key]

    def _values(self, path: Path) -> list[float]:
        found = json.loads(path.read_text(encoding="utf-8"))["scores"]
        if missing := [i for i in self.ids if i not in found]:
            raise DataError(f"{path}: no score of {len(missing)} test questions, for instance {missing[0]}")
        return [found[i] for i in self.ids]

    def mean(self, cell: Cell, part: str = "all") -> dict[str, Any] | None:
        found = self.scores(cell)
        return None if found is None else self._estimate(found.values, part).as_dict()

    def _estimate(self, values: NDArray[np.float64], part: str) -> Estimate:
        return self.resampling[part].mean(values[:, self.masks[part]])

    def over(self, cell: Cell, other: Cell, part: str = "all") -> dict[str, Any] | None:
        """Return the score of ``cell`` over that of ``other``, on the seeds that both have."""
        a, b = self.scores(other), self.scores(cell)
        if a is None or b is None:
            return None
        values, seeds = paired(a.values, b.values, a.seeds, b.seeds)
        return self._estimate(values, part).as_dict() if seeds else None

    def skills(self, cell: Cell) -> dict[str, float] | None:
        found = self.scores(cell)
        if found is None:
            return None
        resampling = self.resampling["all"]
        return dict(zip(resampling.skills, map(float, resampling.by_skill(found.values)), strict=True))

    @cached_property
    def tuning(self) -> dict[str, Any]:
        path = self.out / "tuning_scores.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @cached_property
    def tuned(self) -> dict[str, Any]:
        path = self.out / "tuned.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def everything(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "teachers": {t: found for t in TEACHERS if (found := self.teacher(t)) is not None},
            "questions": len(self.ids),
            "tuning": self.tuning,
            "tuned": self.tuned,
            "students": {s: self.student(s) for s in STUDENTS if any((self.out / s / "plain").glob(f"*/*/*/{DONE}"))},
        }

    def teacher(self, name: str) -> dict[str, Any] | None:
        path = self.out / "teachers" / name / "scored" / DONE
        if not path.is_file():
            return None
        values = np.array([self._values(path)])
        resampling = self.resampling["all"]
        by_skill = dict(zip(resampling.skills, map(float, resampling.by_skill(values)), strict=True))
        parts = {part: self._estimate(values, part).as_dict() for part in self.resampling}
        return {"parts": parts, "skills": by_skill}

    def student(self, student: str) -> dict[str, Any]:
        winner = Cell(student, WINNER)
        return {
            "start": {part: self.mean(Cell(student, START), part) for part in self.resampling},
            "contenders": {n: row for n in EVERYBODY if (row := self.row(Cell(student, n), winner)) is not None},
            "seconds": {n: row for n in CONTENDERS if (row := self.equal_seconds(student, n, winner)) is not None},
            "steps": {n: row for n in CONTENDERS if (row := self.lengths(Cell(student, n))) is not None},
            "regimes": self.regimes(student),
            "distillation": self.distillation(student),
            "discriminators": {n: found for n in EVERYBODY if (found := self.discriminator(Cell(student, n)))},
        }

    def row(self, cell: Cell, winner: Cell) -> dict[str, Any] | None:
        found = self.scores(cell)
        if found is None:
            return None
        start = Cell(cell.student, START)
        before = preparation(self.out, self.recipes, cell)
        step = seconds_per_step(self.out, cell)
        return {
            "mean": self.mean(cell),
            "parts": {part: self.mean(cell, part) for part in self.resampling},
            "over_start": self.over(cell, start),
            "winner_over": None if cell == winner else self.over(winner, cell),
            "without_d_over": self._control(cell),
            "skills": self.skills(cell),
            "seeds": len(found.seeds),
            "rate": self.tuned.get(cell.student, {}).get(EVERYBODY[cell.name].tuned_as or cell.name),
            "seconds_per_step": step,
            "preparation": before,
            "total": sum(before.values()) + step * cell.steps,
        }

    def _control(self, cell: Cell) -> dict[str, Any] | None:
        """Return a control's score over that of the contender it changes."""
        of = EVERYBODY[cell.name].tuned_as
        return self.over(cell, replace(cell, name=of)) if of else None

    def equal_seconds(self, student: str, name: str, winner: Cell) -> dict[str, Any] | None:
        folders = sorted((self.out / student / "seconds" / name).glob("steps_*"))
        if not folders:
            return None
        steps = int(folders[0].name[6:])
        cell = Cell(student, name, steps=steps, regime="seconds")
        if (mean := self.mean(cell)) is None:
            return None
        return {"steps": steps, "mean": mean, "winner_over": self.over(winner, cell), "seeds": mean["seeds"]}

    def lengths(self, cell: Cell) -> dict[str, Any] | None:
        found = {n: replace(cell, steps=n) for n in sorted((STEPS, *LENGTHS))}
        rows = {n: self.mean(c) for n, c in found.items()}
        if sum(row is not None for row in rows.values()) < 2:
            return None
        return {
            "means": {str(n): row for n, row in rows.items()},
            "over_80": {str(n): self.over(c, cell) for n, c in found.items() if n != STEPS},
            "winner_over": {
                str(n): self.over(replace(c, name=WINNER), c) for n, c in found.items() if c.name != WINNER
            },
        }

    def regimes(self, student: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for regime in ("", *_regimes()):
            names = [n for n in EVERYBODY if self.scores(Cell(student, n, regime=regime)) is not None]
            if regime and not names:
                continue
            cells = {n: Cell(student, n, regime=regime) for n in names}
            with_d, without = Cell(student, WITH_D, regime=regime), Cell(student, WINNER, regime=regime)
            rival = Cell(student, RIVAL, regime=regime)
            found[regime] = {
                "means": {n: self.mean(c) for n, c in cells.items()},
                "with_d_over_without": self.over(with_d, without),
                "winner_over_rival": self.over(without, rival),
                "at_d_rate": self.at_d_rate(student, regime),
                "with_d_over_start": self.over(with_d, Cell(student, START)),
            }
        return found

    def at_d_rate(self, student: str, regime: str) -> dict[str, Any] | None:
        """Return RIL+ at the rate of RIL+ with its discriminator, and how far the two and RIL+ are apart."""
        cell = Cell(student, AT_D_RATE, regime=regime)
        if (mean := self.mean(cell)) is None:
            return None
        over = {"over_without": self.over(cell, replace(cell, name=WINNER))}
        return {"mean": mean, **over, "with_d_over": self.over(replace(cell, name=WITH_D), cell)}

    def distillation(self, student: str) -> dict[str, Any]:
        """Return what each contender makes of one teacher, by name."""
        cells = {n: Cell(student, n, regime=ONE_TEACHER) for n in WITH_ONE_TEACHER}
        winner = cells[WINNER]
        return {n: row for n, cell in cells.items() if (row := self.row(cell, winner)) is not None}

    def discriminator(self, cell: Cell) -> dict[str, list[float]]:
        """Return the discriminator's loss over chance and accuracies by step, means over the seeds."""
        found = self.scores(cell)
        if found is None:
            return {}
        out: dict[str, list[float]] = {}
        for name in CURVES:
            curves = [series(read_jsonl(f / "metrics.jsonl"), f"discriminator/{name}")[1] for f in found.folders]
            curves = [c for c in curves if c]
            if curves:
                shortest = min(map(len, curves))
                out[name] = [float(v) for v in np.mean([c[:shortest] for c in curves], axis=0)]
        return out


def _regimes() -> Sequence[str]:
    from playground.comparison.plan import REGIMES

    return tuple(REGIMES)


def goals(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the table of goals: what was asked for, what was found, and whether it is reached (None: not measured)."""
    rows: list[dict[str, Any]] = []
    for student, results in found["students"].items():
        contenders = results["contenders"]

        def add(
            goal: str, required: str, e: dict[str, Any] | None, reached: bool | None, student: str = student
        ) -> None:
            rows.append({"student": student, "goal": goal, "required": required, "found": e, "reached": reached})

        for name, goal, least in (
            (RIVAL, "RIL+ over tuned rejection sampling, equal steps", 0.03),
            (PUBLISHED, "RIL+ over RIL as published", 0.0),
            (BASELINE, "RIL+ over Dr.GRPO", 0.0),
        ):
            e = contenders.get(name, {}).get("winner_over")
            text = "at least +3, interval above 0" if least else "interval above 0"
            add(goal, text, e, None if e is None else e["low"] > 0 and e["value"] >= least)
        e = results["seconds"].get(RIVAL, {}).get("winner_over")
        add(
            "RIL+ over tuned rejection sampling, equal cost", "at least +3, interval above 0", e,
            None if e is None else e["low"] > 0 and e["value"] >= 0.03,
        )  # fmt: skip
        e = results["steps"].get(WINNER, {}).get("over_80", {}).get("320")
        add(
            "RIL+ at 320 steps over itself at 80",
            "not below 0 by more than the interval",
            e,
            None if e is None else e["high"] >= 0,
        )
        by_regime = {
            r: row["with_d_over_without"] for r, row in results["regimes"].items() if row["with_d_over_without"]
        }
        if by_regime:
            best = max(by_regime, key=lambda r: by_regime[r]["low"])
            e = by_regime[best]
            add(
                f"RIL+ with its discriminator over without, best regime ({best or 'plain'})",
                "interval above 0",
                e,
                e["low"] > 0,
            )
    return rows
