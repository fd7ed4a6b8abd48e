"""Build the report document of run folders: plain data that a page, or anybody's script, reads (docs/report.md)."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from openril._version import __version__
from openril.errors import DataError, OpenRILError
from openril.evaluation.summary import Evaluation
from openril.recipe.schema import Recipe
from openril.records import Question
from openril.report import run_files
from openril.report.html import render_page
from openril.report.pictures import embedded, file_hash
from openril.report.rollouts import Row, build_groups, read_row, sources_of, step_files, text
from openril.report.statistics import (
    AuditStatistics,
    DiscriminatorStatistics,
    Record,
    TeacherStatistics,
    chosen,
    rank,
    read_ticks,
)
from openril.rewards import rules
from openril.rewards.extraction import extracted_answer

SCHEMA = "openril.report/1"
GROUPS = 200
"""Groups of each run that a report shows unless told otherwise."""
MOST_BYTES = 10_000_000
"""Size of a report's file."""
MOST_CHARS = 4000
"""Characters after which a text is cut in a report."""
DISAGREEMENTS_IN_A_PART = 30
"""The most disagreements of judge and rule in a page that does not show every group."""

Warn = Callable[[str], None]


def build_document(
    run_dirs: Sequence[Path],
    *,
    groups: int | None = GROUPS,
    most_bytes: int | None = MOST_BYTES,
    ticks: Path | None = None,
    seed: int = 0,
    warn: Warn | None = None,
) -> dict[str, Any]:
    """Return the report document of one or several run folders.

    The rollouts are read step by step, twice if groups are shown, and only sums and samples of them are kept.

    Args:
        groups: The largest number of groups of each run to show; None for all.
        most_bytes: The size in bytes that the page may have; None for any.
        ticks: A file of verdicts that a person has checked, as the page exports it.
        seed: Of the sample of groups and of the audit.
        warn: Receives a message for each line of the rollouts that cannot be read, which is then left out.

    Raises:
        DataError: A folder is no run, or holds a line that cannot be read and ``warn`` is None.
    """
    for run_dir in run_dirs:
        run_files.require_run(run_dir)
    ticked = read_ticks(ticks) if ticks is not None else {}
    names = _names(run_dirs)
    runs = [
        _Run(i, run_dir, name, seed, ticked.pop(name, {}), warn)
        for i, (run_dir, name) in enumerate(zip(run_dirs, names, strict=True))
    ]
    if ticked:
        raise DataError(
            f"{ticks}: expected ticks of {', '.join(names)}, got some of {', '.join(sorted(ticked))[:200]}. Pass their run"
            " folders as well."
        )
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "openril": __version__,
        "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "runs": [run.about() for run in runs],
        "comparison": _comparison(runs) if len(runs) > 1 else None,
        "shown": 0,
        "total": sum(len(run.records) for run in runs),
        "groups": [],
        "images": {},
    }
    if groups:
        for about in document["runs"]:
            if about["audit"]:
                about["audit"]["disagreements"] = about["audit"]["disagreements"][:DISAGREEMENTS_IN_A_PART]
    if groups != 0:
        orders = [
            chosen(run.records, [name.partition("/")[0] for name in _pointed_to(about)])[:groups]
            for run, about in zip(runs, document["runs"], strict=True)
        ]
        order = [name for names in zip_longest(*orders) for name in names if name is not None]
        _fill(document, runs, order, most_bytes)
        shown = {group["id"] for group in document["groups"]}
        for about in document["runs"]:
            _keep_shown(about, shown)
    return document


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """Return a name for each run: the last part of its path, with more parts where two are equal."""
    paths = [run_dir.resolve().parts for run_dir in run_dirs]
    depth = 1
    while depth < 8 and len({path[-depth:] for path in paths}) < len({*paths}):
        depth += 1
    return [text("/".join(path[-depth:])) for path in paths]


class _Run:
    """Everything about one run that does not depend on the choice of groups."""

    def __init__(
        self, number: int, path: Path, name: str, seed: int, ticks: Mapping[str, Mapping[str, Any]], warn: Warn | None
    ) -> None:
        self.number, self.path, self.name, self.warn = number, path, name, warn
        self.recipe: Recipe | None = run_files.read_recipe(path)
        self.metrics, self.seconds = run_files.read_metrics(path)
        self.evaluations: dict[str, Evaluation] = run_files.read_evaluations(path)
        self.records: list[Record] = []
        self.steps: list[int] = []
        self._earlier: EarlierRows | None = None
        self._discriminator = DiscriminatorStatistics(seed)
        self._teachers, self._audit = TeacherStatistics(), AuditStatistics(seed, ticks)
        self._responses = 0
        self._skills: dict[str, None] = {}
        self._sources: dict[str, None] = {}
        for step, file in step_files(path):
            self.steps.append(step)
            self._count(self.groups_of(file), seed)

    def _count(self, groups: Sequence[dict[str, Any]], seed: int) -> None:
        for group in groups:
            for statistics in (self._discriminator, self._teachers, self._audit):
                statistics.add(group)
            place = rank(seed, group["question_id"])
            self.records.append(Record(group["id"], group["step"], place, tuple(group["flags"])))
            self._responses += len(group["members"])
            if group["skill"] and len(self._skills) < 200:
                self._skills[group["skill"]] = None
        if len(self._sources) < 100:
            self._sources |= dict.fromkeys(sources_of(groups))

    def groups_of(self, path: Path, most_chars: int | None = None, *, hashes: bool = False) -> list[dict[str, Any]]:
        """Return the groups of a step. hashes: also of the pictures that rows of version 1 name by their path alone."""
        rows = list(self._rows(path))
        if any(row["schema"] == 1 for row in rows):
            if self._earlier is None:
                self._earlier = EarlierRows(self.recipe)
            for row in rows:
                self._earlier.complete(row, hashes)
        return build_groups(rows, self.number, most_chars=most_chars)

    def _rows(self, path: Path) -> Iterator[Row]:
        try:
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    try:
                        yield read_row(line, f"{path}:{number}")
                    except DataError as e:
                        if self.warn is None:
                            raise
                        self.warn(str(e))
        except FileNotFoundError:  # a run that continues after an interrupt has removed it meanwhile
            return

    def about(self) -> dict[str, Any]:
        """Return the run's part of the document."""
        versions, device = run_files.read_environment(self.path)
        return {
            "name": self.name,
            "path": text(self.path),
            "steps": max([*self.metrics["step"], *self.steps], default=0),
            "logged_steps": len(self.steps),
            "groups": len(self.records),
            "responses": self._responses,
            "recipe": run_files.recipe_differences(self.recipe),
            "versions": versions,
            "device": device,
            "seconds": self.seconds,
            "metrics": self.metrics,
            "warnings": run_files.read_warnings(self.path),
            "skills": sorted(self._skills),
            "sources": sorted(self._sources, key=lambda name: (name != "student", name)),
            "evaluations": run_files.evaluation_rows(self.evaluations),
            "discriminator": self._discriminator.result(self.metrics),
            "audit": self._audit.result(),
            "teachers": self._teachers.result(run_files.teachers_too_long(self.metrics)),
        }


class EarlierRows:
    """Completes rows of version 1 from the recipe's question files, if these are still where they were."""

    def __init__(self, recipe: Recipe | None) -> None:
        self.judged = recipe is not None and recipe.answer_kind == "judge"
        self.rule = recipe.rewards.answer.rule if recipe is not None else "auto"
        self.questions: dict[str, Question] = {}
        self._scores: dict[tuple[str, str], float | None] = {}
        if recipe is not None and all(Path(str(name)).is_file() for name in recipe.data.train):
            from openril.data.reading import read_questions

            try:
                self.questions = {q.id: q for q in read_questions(recipe.data, "train")}
            except (OpenRILError, OSError):
                self.questions = {}

    def complete(self, row: Row, hashes: bool = False) -> None:
        """Add what version 2 records and can still be found out."""
        question, body = self.questions.get(str(row["question_id"])), text(row["text"])
        row["extracted"] = extracted_answer(body) if hashes else None
        row["judged"] = self.judged and row.get("verdict") is not None
        if hashes:
            row["image_hashes"] = [file_hash(text(name)) for name in row.get("images") or []]
        if question is None or question.question != row.get("question"):
            return
        row |= {"choices": list(question.choices), "answers": list(question.answers), "metadata": question.metadata}
        row["rule"] = question.rule or self.rule
        if row["judged"]:
            key = (question.id, body)
            if key not in self._scores:
                try:
                    self._scores[key] = rules.score(row["rule"], question, body)
                except DataError:
                    self._scores[key] = None
            row["rule_score"] = self._scores[key]


def _comparison(runs: Sequence[_Run]) -> dict[str, Any]:
    return {
        "recipe": run_files.compare_recipes([run.recipe for run in runs]),
        "paired": run_files.compare_evaluations([run.evaluations for run in runs]),
    }


def _pointed_to(about: Mapping[str, Any]) -> list[str]:
    """Return the members that the pages of a run point to."""
    audit, discriminator = about["audit"] or {}, about["discriminator"] or {}
    disagreements = [d["member"] for d in audit.get("disagreements", [])]
    return [*audit.get("sample", []), *disagreements, *discriminator.get("confident_and_wrong", [])]


def _keep_shown(about: dict[str, Any], shown: set[str]) -> None:
    """Remove references to groups that the document does not hold."""

    def there(member: str) -> bool:
        return member.partition("/")[0] in shown

    if audit := about["audit"]:
        audit["sample"] = [m for m in audit["sample"] if there(m)]
        audit["disagreements"] = [d for d in audit["disagreements"] if there(d["member"])]
    if discriminator := about["discriminator"]:
        discriminator["confident_and_wrong"] = [m for m in discriminator["confident_and_wrong"] if there(m)]


def _fill(document: dict[str, Any], runs: Sequence[_Run], order: Sequence[str], most_bytes: int | None) -> None:
    """Add the groups and their pictures, in order, as long as the page stays within ``most_bytes``."""
    found = dict(_read_groups(runs, set(order)))
    left = None if most_bytes is None else most_bytes - len(render_page(document).encode()) - 1000
    pictures: dict[str, dict[str, Any]] = {}
    originals: dict[str, str] = {}

    def take(value: Any) -> bool:
        nonlocal left
        if left is None:
            return True
        size = len(json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")) + 1
        if size > left:
            return False
        left -= size
        return True

    for name in order:
        if name not in found:
            continue
        group, names = found[name]
        new = {h: p for h, n in names.items() if h not in pictures and (p := embedded(runs[group["run"]].path, h, n))}
        thumbs = {h: {**p, "full": None} for h, p in new.items()}
        if not take([group, thumbs]):
            continue
        document["groups"].append(group)
        pictures |= thumbs
        originals |= {h: p["full"] for h, p in new.items() if p["full"]}
    for hash, full in originals.items():
        if take(full):
            pictures[hash]["full"] = full
    for group in document["groups"]:
        names = found[group["id"]][1]
        group["missing_images"] += [names[h] for h in group["images"] if h not in pictures]
        group["images"] = [h for h in group["images"] if h in pictures]
    document["groups"].sort(key=lambda g: (g["run"], g["step"], int(g["id"].rsplit("-", 1)[1])))
    document["images"] = pictures
    document["shown"] = len(document["groups"])


def _read_groups(runs: Sequence[_Run], wanted: set[str]) -> Iterator[tuple[str, tuple[dict[str, Any], dict[str, str]]]]:
    """Yield id, group and the name of each picture by its hash."""
    for run in runs:
        steps = {int(name.split("-")[1]) for name in wanted if name.startswith(f"{run.number}-")}
        for step, path in step_files(run.path):
            if step not in steps:
                continue
            for group in run.groups_of(path, MOST_CHARS, hashes=True):
                if group["id"] in wanted:
                    yield group["id"], (group, dict(zip(group["images"], group.pop("image_names"), strict=True)))
