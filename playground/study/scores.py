"""What the cells scored: per question, from their run folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openril.errors import DataError
from openril.storage import read_jsonl
from playground.study.cells import Place
from playground.study.jobs import read_done
from playground.study.plan import CELLS, GROUPS, STUDENTS, TEACHERS, Group


@dataclass(frozen=True)
class Scores:
    """A contender's scores. seeds: their numbers, or [None] for what was measured as it is. values [S, Q]: 1.0 right, 0.0
    wrong, questions in the order of the test. done: what each seed's job left. folders: their run folders."""

    seeds: list[int | None]
    values: NDArray[np.float64]
    done: list[dict[str, Any]] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Questions:
    """Questions that everything was scored on: ids and skills [Q]."""

    ids: list[str]
    skills: list[str]

    @property
    def names(self) -> list[str]:
        """The skills, in the order in which they come."""
        return list(dict.fromkeys(self.skills))


@dataclass
class Results:
    """Finished cells. cells: student -> group -> name -> scores. teachers: by name. cache: what the collection of the
    teachers' responses left."""

    questions: Questions
    cells: dict[str, dict[Group, dict[str, Scores]]]
    teachers: dict[str, Scores]
    cache: dict[str, Any] | None = None

    def get(self, student: str, group: Group, name: str) -> Scores | None:
        return self.cells.get(student, {}).get(group, {}).get(name)


def read_results(out: Path) -> Results:
    """Everything that is finished in a study's folder. Raises DataError when nothing is."""
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
        """The finished ones among the folders; None if there is none."""
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
