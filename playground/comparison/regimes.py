"""Change the judge, the teachers or the discriminator's labels of a cell, inside the process that runs it.

The settings of a recipe cannot express these changes, so that `ril train` does not repeat such a cell by hand.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import openril.stages.train as train_stage
from openril.records import Question, Response
from openril.responses.loaded import LoadedResponses
from openril.rewards import rules
from openril.storage import read_jsonl, stable_hash
from openril.training.discriminator_update import Discriminator
from playground.comparison.plan import TEACHERS
from playground.comparison.rubric import Score, by_rubric, read_facts


@dataclass(frozen=True)
class Regime:
    """A regime by its name in ``plan.REGIMES``, or "" for none."""

    name: str
    seed: int
    world: Path = field(default=Path(), compare=False)
    """Folder of the questions, for the rubric and for teachers that are always right."""

    @property
    def kind(self) -> str:
        return self.name.partition("_")[0]

    @property
    def share(self) -> float:
        return float(self.name.partition("_")[2] or 100) / 100

    @property
    def changes_verdicts(self) -> bool:
        return self.kind in ("judge", "rubric")

    def contexts(self, labels: str) -> list[AbstractContextManager[Any]]:
        """Return what has to be in force while a cell trains."""
        found: list[AbstractContextManager[Any]] = []
        if self.kind == "judge":
            found.append(patch.object(rules, "score", erring(rules.score, self.share, self.seed)))
        found += self.scoring()
        if self.kind == "teachers":
            written = read_derivations(self.world) if self.share == 1 else None
            found.append(teachers_right(self.share, written=written))
        if labels == "shuffled":
            found.append(patch.object(Discriminator, "_sides", shuffled_sides))
        return found

    def scoring(self) -> list[AbstractContextManager[Any]]:
        """Return what has to be in force while the student is scored, too. A judge that errs is not: truth is truth."""
        if self.kind != "rubric":
            return []
        return [patch.object(rules, "score", by_rubric(rules.score, read_facts(self.world)))]


def erring(score: Score, share: float, seed: int) -> Score:
    """Return a judge that gives the opposite verdict on a share of all responses, always on the same ones."""

    def judged(rule: str, question: Question, text: str) -> float | None:
        right = score(rule, question, text)
        drawn = stable_hash(seed, "judge", question.id, text) % 10_000 / 10_000
        return right if drawn >= share else float(right != 1.0)

    return judged


def read_derivations(world: Path) -> dict[tuple[str, str], str]:
    """Return the right derivation of every training question in the style of each teacher, by question id and teacher."""
    rows = read_jsonl(world / "train.jsonl")
    return {(row["id"], teacher): row[f"derivation_{teacher[-1]}"] for row in rows for teacher in TEACHERS}


@contextmanager
def teachers_right(
    share: float, number: int = 4, written: Mapping[tuple[str, str], str] | None = None
) -> Iterator[None]:
    """Let the loop see ``number`` cached responses of each teacher, of which about ``share`` are right.

    Where a question has too few right ones, or too few wrong ones, it keeps what it has.

    Args:
        written: Texts that all responses are, in the place of cached ones, by question id and teacher.
    """
    load = train_stage.ResponseCache.load

    def loaded(cache: Any, questions: list[Question], *args: Any, **kwargs: Any) -> LoadedResponses:
        every = load(cache, questions, *args, **kwargs)
        by_id = {q.id: q for q in questions}
        whole = every.responses_for
        kept: dict[tuple[str, str], list[Response]] = {}

        def some(question_id: str, source: str) -> list[Response]:
            if source == "student":
                return whole(question_id, source)
            if (question_id, source) not in kept and written is not None:
                text = written[question_id, source]
                kept[question_id, source] = [Response(question_id, source, n, text) for n in range(number)]
            if (question_id, source) not in kept:
                kept[question_id, source] = choose(by_id[question_id], whole(question_id, source), share, number)
            return kept[question_id, source]

        every.responses_for = some  # type: ignore[method-assign]
        return every

    with patch.object(train_stage.ResponseCache, "load", loaded):
        yield


def choose(question: Question, responses: list[Response], share: float, number: int) -> list[Response]:
    """Return ``number`` of the responses, about ``share`` of them right, in a fixed random order."""
    rng = random.Random(stable_hash("teachers", question.id, responses[0].source if responses else ""))
    right = [r for r in responses if rules.score(question.rule or "auto", question, r.text) == 1.0]
    wrong = [r for r in responses if r not in right]
    rng.shuffle(right)
    rng.shuffle(wrong)
    asked = share * number
    count = int(asked) + (rng.random() < asked % 1)
    count = min(len(right), max(count, number - len(wrong)))
    return sorted([*right[:count], *wrong[: number - count]], key=lambda r: r.index)


def shuffled_sides(self: Discriminator, group: Any, device: torch.device) -> torch.Tensor:
    """Return the labels of a group in an order that the group's question and texts decide at random."""
    sides = [r.response.from_student for r in group.rollouts]
    texts = [r.response.text for r in group.rollouts]
    random.Random(stable_hash("labels", group.question.id, *texts)).shuffle(sides)
    return torch.tensor(sides, device=device)
