"""Run the work of the comparison, each piece in a process that is forked from one that has loaded everything once.

The code is that of `ril collect`, `ril discriminator` and `ril train`. What the pieces share is kept in memory: the frozen
vision tower's outputs and the encoded prompts of every picture, and the rule's verdicts on the cached responses.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console

import openril.stages.train as train_stage
import openril.training.right_responses as right_responses
import openril.training.setup as setup
from openril.data.reading import read_questions
from openril.evaluation.evaluate import GREEDY
from openril.models.vision_features import FeatureCache
from openril.recipe.schema import Recipe
from openril.records import Question
from openril.rewards import rules
from openril.rewards.answers import AnswerScore, score_answers
from openril.storage import write_json
from playground.comparison.distillation import by_logits
from playground.comparison.plan import Contender
from playground.comparison.regimes import Regime

DONE = "done.json"


class Shared:
    """What the cells of one student share."""

    def __init__(self) -> None:
        self.features = FeatureCache(2**31)
        self.encoder: Any = None
        self.verdicts: dict[tuple[str, str], AnswerScore] = {}

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the trainers inside use it. The feature cache serves the student and its reference, which share a tower."""
        make_encoder, make_store = setup.make_encoder, setup.feature_store
        calls = iter([self.features])  # The first store is the student's. A discriminator gets its own.

        def encoder(
            recipe: Recipe, processor: Any, model: Any, keep: int | None = None, max_prompt_length: int = 0
        ) -> Any:
            if keep is not None:
                return make_encoder(recipe, processor, model, keep, max_prompt_length)
            if self.encoder is None:
                self.encoder = make_encoder(recipe, processor, model, 10_000, max_prompt_length)
            return self.encoder

        def store(recipe: Recipe) -> FeatureCache:
            return next(calls, None) or make_store(recipe)

        with patch.object(setup, "make_encoder", encoder), patch.object(setup, "feature_store", store):
            yield


def score(trainer: Any, recipe: Recipe, questions: Sequence[Question]) -> dict[str, float]:
    """Return the exact rule's score of the student's greedy answer to each question."""
    found: dict[str, float] = {}
    size = recipe.eval.questions_per_batch
    for first in range(0, len(questions), size):
        part = questions[first : first + size]
        answers = trainer.sampler.sample(
            part, 1, settings=GREEDY, max_completion_length=recipe.eval.max_completion_length, seed=0
        )
        for question, (answer,) in zip(part, answers, strict=True):
            found[question.id] = float(rules.score(question.rule or "auto", question, answer.text) == 1.0)
    return found


def train(recipes: Sequence[Recipe], questions: Path, shared: Shared, regime: Regime, contender: Contender) -> None:
    """Train a cell as `ril train` does, score its student, and leave ``done.json`` with what it cost in CPU seconds.

    recipes: Run one after the other; the student of the last is scored.
    """
    cpu = wall = 0.0
    for recipe in recipes:
        last = recipe is recipes[-1]
        with ExitStack() as stack:
            stack.enter_context(shared.used())
            if not regime.changes_verdicts:
                stack.enter_context(patch.object(right_responses, "known_answers", lambda r: known(shared, r)))
            with ExitStack() as changed:
                for context in regime.contexts(contender.labels):
                    changed.enter_context(context)
                if contender.logits:
                    changed.enter_context(by_logits(recipe, contender.logits))
                trainer = stack.enter_context(train_stage.open_trainer(recipe, Console(quiet=True)))
                trainer.save = lambda step: None
                began, clock = time.process_time(), time.monotonic()
                trainer.train()
                cpu, wall = cpu + time.process_time() - began, wall + time.monotonic() - clock
            if not last:
                trainer.write_student(recipe.run_path / "student")
                continue
            for context in regime.scoring():
                stack.enter_context(context)
            scores = score(trainer, recipe, read_at(questions))
    steps = sum(recipe.train.max_steps for recipe in recipes)
    done = {"steps": steps, "cpu_seconds": cpu, "seconds": wall, "scores": scores}
    write_json(recipes[0].run_path / DONE, done)


def known(shared: Shared, recipe: Recipe) -> Any:
    """Return a function that scores cached responses by the rule, each once for all cells."""

    def scores(items: Sequence[tuple[Question, str]]) -> list[Any]:
        missing = [(q, text) for q, text in items if (q.id, text) not in shared.verdicts]
        rule = partial(score_answers, kind="rules", rule="auto", without_truth=recipe.rewards.answer.without_truth)
        for (q, text), answer in zip(missing, rule(missing), strict=True):
            shared.verdicts[q.id, text] = answer
        return [shared.verdicts[q.id, text] for q, text in items]

    return scores


_READ: dict[Path, list[Question]] = {}


def read_at(path: Path) -> list[Question]:
    """Return the questions of a file."""
    if path not in _READ:
        from openril.recipe.schema import DataConfig

        _READ[path] = read_questions(DataConfig(train=[str(path)]), "train")
    return _READ[path]


def measure(recipe: Recipe, questions: Path, done: Path) -> None:
    """Score a model as it is, without training."""
    with train_stage.open_trainer(recipe, Console(quiet=True)) as trainer:
        write_json(done, {"scores": score(trainer, recipe, read_at(questions))})


def warm(recipe: Recipe, files: Sequence[Path], shared: Shared) -> None:
    """Encode the questions of the files, and keep what the student's frozen tower makes of their pictures."""
    torch.set_num_threads(1)  # This runs in the process that is forked.
    with shared.used(), train_stage.open_trainer(recipe, Console(quiet=True)) as trainer:
        for path in files:
            questions = read_at(path)
            for first in range(0, len(questions), 100):
                part = questions[first : first + 100]
                trainer.sampler.sample(part, 1, settings=GREEDY, max_completion_length=1, seed=0)
