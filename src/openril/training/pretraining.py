"""Pre-train the discriminator on the response cache (paper, section 3), before the loop."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from accelerate.utils import gather_object

from openril.discriminator.health import HealthWatch, Scored, health
from openril.recipe.schema import Recipe
from openril.records import STUDENT, Group, Question, Response, Rollout
from openril.responses.loaded import LoadedResponses
from openril.storage import stable_hash
from openril.training.checkpoint import Saver
from openril.training.discriminator_update import Discriminator
from openril.training.interrupts import Interrupted, stop_requests
from openril.training.loop import prefixed, question_at
from openril.training.optimization import learning_rate, set_learning_rate
from openril.training.run_folder import RunFolder


def split_held_out(questions: Sequence[Question], share: float, seed: int) -> tuple[list[Question], list[Question]]:
    """Split the questions into (train, held out) by their ids alone, so that more questions never move the others.

    Neither side is empty if there are two questions and share is above 0.
    """
    ranked = sorted(questions, key=lambda q: stable_hash(seed, "held out", q.id))
    held = {q.id for q in ranked if stable_hash(seed, "held out", q.id) / 2**63 < share}
    if share > 0 and len(ranked) > 1:
        held = held or {ranked[0].id}
        held -= {ranked[-1].id} if len(held) == len(ranked) else set()
    return [q for q in questions if q.id not in held], [q for q in questions if q.id in held]


def pretraining_steps(recipe: Recipe, num_questions: int) -> int:
    """Return the optimizer steps of pre-training over ``num_questions`` training questions."""
    settings = recipe.discriminator.pretraining
    return max(1, -int(-settings.epochs * num_questions // settings.questions_per_step))


@dataclass(eq=False, repr=False)
class DiscriminatorPretraining:
    """Trains a new discriminator on cached responses of the student and of every teacher, in whole groups."""

    recipe: Recipe
    questions: Sequence[Question]
    responses: LoadedResponses
    _: KW_ONLY
    discriminator: Discriminator
    folder: RunFolder
    saver: Saver
    step_number: int = 0
    report: Callable[[int, int, dict[str, Any]], None] = lambda step, total, row: None
    warn: Callable[[str], None] = lambda message: None

    def __post_init__(self) -> None:
        self.settings = self.recipe.discriminator.pretraining
        self.accelerator = self.discriminator.accelerator
        d = self.recipe.discriminator
        # Pre-training is for a saturated discriminator, so only one that stays at chance is worth a warning.
        self.watch = HealthWatch(d.health_window, d.at_chance_accuracy, saturated=1.0)
        share = self.settings.held_out_share
        self.questions, self.held_out = split_held_out(self.questions, share, self.recipe.seed)

    @property
    def total_steps(self) -> int:
        return pretraining_steps(self.recipe, len(self.questions))

    def group(self, question: Question, epoch: int) -> Group:
        """Return the question with all cached responses, or a seeded choice of responses_per_question of each side."""
        students = self.responses.responses_for(question.id, STUDENT)
        teachers: list[Response] = []
        limit = self.settings.responses_per_question
        names = self.recipe.teacher_names
        for number, name in enumerate(names):
            per_teacher = (limit + len(names) - 1 - number) // len(names) if limit else 0
            teachers += self._choose(self.responses.responses_for(question.id, name), per_teacher, epoch, limit > 0)
        students = self._choose(students, limit, epoch, limit > 0)
        return Group(question, [Rollout(r) for r in [*students, *teachers]])

    def _choose(self, responses: list[Response], count: int, epoch: int, choose: bool) -> list[Response]:
        if not choose or count >= len(responses):
            return responses
        if count == 0:
            return []
        first = responses[0]
        rng = random.Random(stable_hash(self.recipe.seed, "pretraining", first.question_id, first.source, epoch))
        return sorted(rng.sample(responses, count), key=lambda r: r.index)

    def batch_at(self, step: int) -> list[Group]:
        """Return this process's share of the step's groups."""
        size, seed = self.settings.questions_per_step, stable_hash(self.recipe.seed, "pretraining")
        share = size // self.accelerator.num_processes
        first = step * size + share * self.accelerator.process_index
        return [self.group(*question_at(self.questions, seed, position)) for position in range(first, first + share)]

    def train(self) -> dict[str, float]:
        """Run to the end from the current step; return the held-out measurement. Raises Interrupted after saving."""
        optimizer = self.settings.optimizer
        with stop_requests() as stop:
            while self.step_number < self.total_steps:
                rate = learning_rate(optimizer, self.step_number, self.total_steps)
                set_learning_rate(self.discriminator.optimizer, rate)
                when = f"pre-training step {self.step_number + 1}"
                metrics = self.discriminator.update(self.batch_at(self.step_number), when=when)
                self.step_number += 1
                step = self.step_number
                row = {"step": step, "learning_rate": rate, **prefixed("discriminator", metrics)}
                if self.accelerator.is_main_process:
                    self.folder.log_metrics(row)
                    self.report(step, self.total_steps, row)
                    if message := self.watch.see(metrics.get("balanced_accuracy")):
                        self.warn(message)
                stopping = any(gather_object([bool(stop)]))
                regular = self.settings.save_every and step % self.settings.save_every == 0
                if (stopping or regular) and step < self.total_steps:
                    self.saver.save(step)
                if stopping and step < self.total_steps:
                    raise Interrupted(f"stopped after step {step}; the same command continues")
        return self.measure()

    def measure(self) -> dict[str, float]:
        """Return the health on the held-out questions, of which every process takes an equal share."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        whole = len(self.held_out) // world * world
        mine = self.held_out[rank:whole:world]
        if not mine:
            return {}
        scored: list[Scored] = []
        for start in range(0, len(mine), self.settings.questions_per_step):
            groups = [self.group(q, 0) for q in mine[start : start + self.settings.questions_per_step]]
            self.discriminator.score(groups, "held-out measurement")
            scored += self.discriminator.scored(groups)
        return {"questions": float(whole), **health(gather_object(scored))}
