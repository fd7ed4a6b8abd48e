"""Read the scores of the finished cells, by question, from their run folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openril.errors import DataError
from openril.storage import read_jsonl
from playground.study.jobs import read_done
from playground.study.plan import CELLS, GROUPS, STUDENTS, TEACHERS, Group
from playground.study.recipes import Place


@dataclass(frozen=True)
class Scores:
    """Scores of a method."""

    seeds: list[int | None]
    """[None] for a student or teacher that is only measured."""
    values: NDArray[np.float64]
    """[S, Q]: 1.0 right, 0.0 wrong; questions in the order of the test."""
    done: list[dict[str, Any]] = field(default_factory=list)
    """What the job of each seed left."""
    folders: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Questions:
    """The questions that everything was scored on."""

    ids: list[str]
    skills: list[str]
    """Of each question."""

    @property
    def names(self) -> list[str]:
        """The different skills, in their order."""
        return list(dict.fromkeys(self.skills))


@dataclass
class Results:
    """The finished cells."""

    questions: Questions
    cells: dict[str, dict[Group, dict[str, Scores]]]
    """By student, group and name."""
    teachers: dict[str, Scores]
    cache: dict[str, Any] | None = None
    """What the collection of the teachers' responses left."""

    def get(self, student: str, group: Group, name: str) -> Scores | None:
        return self.cells.get(student, {}).get(group, {}).get(name)


def read_results(out: Path) -> Results:
    """Read everything that is finished in a study's folder. Raises DataError when nothing is."""
    reader = _Reader(out)
    teachers = {t: s for t in TEACHERS if (s := reader.scores({None: out / "teachers" / t}))}
    cells: dict[str, dict[Group, dict[str, Scores]]] = {}
    for student in STUDENTS:
        for group in GROUPS:
            for name, cell in CELLS[group].items():
                folders: dict[int | None, Path]
                if cell.how == "as_is":
                    folders = {None: out / Place(student, group, name, None).path}
                else:
                    top = out / student / group / name
                    found = sorted(int(p.name[5:]) for p in top.glob("seed_*") if p.name[5:].isdigit())
                    folders = {seed: out / Place(student, group, name, seed).path for seed in found}
                if scores := reader.scores(folders):
                    cells.setdefault(student, {}).setdefault(group, {})[name] = scores
    if reader.questions is None:
        raise DataError(f"{out}: no cell is finished yet; run the study first")
    return Results(reader.questions, cells, teachers, read_done(out / "teachers" / "cache"))


class _Reader:
    """Reads cells that were scored on the same questions."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.questions: Questions | None = None

    def scores(self, folders: Mapping[int | None, Path]) -> Scores | None:
        """Read the finished folders; None if there are none."""
        found = [(seed, folder, done) for seed, folder in folders.items() if (done := read_done(folder)) is not None]
        if not found:
            return None
        values = np.array([self._row(folder / "eval" / f"{done['result']}.jsonl") for _, folder, done in found])
        return Scores([s for s, _, _ in found], values, [d for _, _, d in found], [f for _, f, _ in found])

    def _row(self, path: Path) -> list[float]:
        rows = {row["question_id"]: row for row in read_jsonl(path) if "question_id" in row}
        if self.questions is None:
            self.questions = Questions(list(rows), [row["groups"]["skill"] for row in rows.values()])
        if missing := [i for i in self.questions.ids if i not in rows or rows[i]["score"] is None]:
            raise DataError(f"{path} has no score of {len(missing)} questions, for instance {missing[0]}")
        return [rows[i]["score"] for i in self.questions.ids]
