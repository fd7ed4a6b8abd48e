"""The RIL loop. ``RILTrainer.step`` is Algorithm 2 of the paper (arXiv 2510.19307), line by line.

Its main departures from the text of the paper (docs/algorithm.md lists all):
1. Ratios are per token; sums over a group are divided by the constant (members) x max_completion_length.
2. KL is the k3 estimator per token.
3. With several teachers, G teacher responses in all, balanced, drawn without replacement.
4. A response whose reward is unknown has advantage 0 and is outside its group's mean.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from openril.algorithm.advantages import decoupled_advantages, group_advantages, shaped_advantages
from openril.discriminator.health import HealthWatch
from openril.errors import PromptTooLongError
from openril.recipe.schema import Recipe
from openril.records import Group, ImageSource, Question, Response, Rollout
from openril.rewards.similarity import SimilarityGate
from openril.sampling.protocol import Sampler, gathered
from openril.storage import stable_hash
from openril.training.discriminator_update import Discriminator
from openril.training.group_tables import log_groups
from openril.training.interrupts import Interrupted, stop_requests
from openril.training.metrics import reward_metrics
from openril.training.offload import Offload
from openril.training.optimization import learning_rate, set_learning_rate
from openril.training.policy_update import PolicyUpdate
from openril.training.retries import Retry, RetryMemory, guard_against_copies
from openril.training.run_folder import RunFolder
from openril.training.student_watch import AdvantageWatch, EntropyWatch

TeacherResponses = Callable[[Question, int], list[Response]]
"""(question, epoch) -> teacher responses for its group; epoch counts how often the question was used before."""


class RewardModel(Protocol):
    """What gives the rollouts their rewards."""

    gate: float
    """Factor of the similarity reward's weight."""

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every reward, by its name in ``Rollout.rewards``; read for ``rewards.combine: per_reward``."""
        ...

    def begin(self, groups: Sequence[Group]) -> None:
        """Start what does not need the discriminator: the judge's requests run while the discriminator trains."""

    def score(self, groups: Sequence[Group]) -> dict[str, float]:
        """Set reward, verdict and similarity of every rollout; return counts and seconds of the whole step by name."""
        ...


class RILTrainer:
    """Runs Algorithm 2 (or, with the recipe's switches, Algorithm 1 and the ablations between them).

    All processes run the same steps on their own share of each batch. training/setup.py builds the components:
    ``sampler`` draws from the student's current weights, ``policy`` updates them, ``teacher_responses`` draws from the
    cache, ``save(step)`` writes a checkpoint, and ``report`` receives step, number of steps and row of metrics.
    """

    def __init__(
        self,
        recipe: Recipe,
        questions: Sequence[Question],
        *,
        accelerator: Accelerator,
        sampler: Sampler,
        policy: PolicyUpdate,
        discriminator: Discriminator | None,
        teacher_responses: TeacherResponses,
        rewards: RewardModel,
        folder: RunFolder,
        save: Callable[[int], None],
        write_student: Callable[..., None] | None = None,
        evaluate: Callable[[int], dict[str, float]] | None = None,
        offload: Offload | None = None,
        gate: SimilarityGate | None = None,
        retry: RetryMemory | None = None,
        first_step: int = 0,
        report: Callable[[int, int, dict[str, Any]], None] = lambda step, total, row: None,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.recipe = recipe
        self.questions = list(questions)
        self.by_id = {q.id: q for q in self.questions}
        self.accelerator = accelerator
        self.sampler = sampler
        self.policy = policy
        self.discriminator = discriminator
        self.teacher_responses = teacher_responses
        self.rewards = rewards
        self.folder = folder
        self.save = save
        self._write_student = write_student
        self.evaluate = evaluate
        self.offload = offload or Offload()
        self.gate = gate
        self.retry = retry
        if retry is not None:
            retry.questions = {q.id: q for q in self.questions}
        self.step_number = first_step
        self.report = report
        self.warn = warn
        d = recipe.discriminator
        self.watch = HealthWatch(d.health_window, d.at_chance_accuracy, d.saturated_accuracy)
        self.entropy_watch = EntropyWatch()
        self.advantage_watch = AdvantageWatch()
        self.seconds: dict[str, float] = {}
        self._warned_of_length = False

    # ---- Algorithm 2 ------------------------------------------------------------------------------------------------

    def step(self, batch: Sequence[tuple[Question, int]]) -> tuple[list[Group], dict[str, float]]:
        """Train on this process's share of a batch of (question, epoch); return its groups and the metrics."""
        metrics: dict[str, float] = {}
        when = f"step {self.step_number + 1}"
        with self.timed("sampling", "student"):  # G responses from pi_old, G of the teachers from the cache
            groups = self.sample_groups(batch)
            self.retries = self.sample_retries()  # none in the paper
        if self.recipe.teacher_responses_per_question:
            counts = sum(map(Counter, gather_object([dict(self.policy.too_long)])), Counter[str]())
            metrics["train/teacher_too_long"] = float(counts.total())
            metrics |= {f"train/teacher_too_long_{name}": float(count) for name, count in sorted(counts.items())}
        judged = [*groups, *(r.scored for r in self.retries)]
        self.rewards.begin(judged)
        if self.discriminator is not None:
            with self.timed(
                "discriminator", "discriminator"
            ):  # D learns from these 2G responses first, then judges them
                metrics |= self.discriminate(self.discriminator, groups, when)
        with self.timed("rewards"):  # similarity and answer, for all 2G
            metrics |= prefixed("reward", self.rewards.score(judged))
            guard_against_copies(self.retries, self.recipe.rewards.answer.weight)
        metrics |= self.leave_out_teachers(groups)
        self.set_advantages(judged)
        with self.timed("update", "student", "reference"):  # mu steps on Eq. 2
            learned = [*groups, *(r.learned for r in self.retries)]
            metrics |= prefixed("train", self.policy.update(learned, self.step_number))
        return groups, metrics

    def sample_groups(self, batch: Sequence[tuple[Question, int]]) -> list[Group]:
        """Return the groups of the batch: the student's samples first, then the teachers' cached responses."""
        self.policy.too_long.clear()
        samples: dict[tuple[str, int], list[Response]] = {}
        # Where one epoch ends and the next begins, a question may come up twice; it is then sampled twice.
        with self.accelerator.autocast(), gathered(self.sampler):
            for epoch in sorted({epoch for _, epoch in batch}):
                questions = [q for q, v in batch if v == epoch]
                drawn = self._sample(questions, "sample", self.step_number, epoch)
                samples |= {(q.id, epoch): mine for q, mine in zip(questions, drawn, strict=True)}
        return [
            Group(q, [Rollout(r) for r in [*samples[q.id, epoch], *self.teacher_responses(q, epoch)]])
            for q, epoch in batch
        ]

    def sample_retries(self) -> list[Retry]:
        """Return this process's share of the questions about answers, with the student's samples."""
        if self.retry is None:
            return []
        drawn = self.retry.draw(self.recipe.train.retry.questions_per_step, self.step_number, self._prompt_fits)
        share = len(drawn) // self.accelerator.num_processes  # equally many for each, so that groups weigh the same
        mine = drawn[share * self.accelerator.process_index :][:share]
        if mine:
            with self.accelerator.autocast(), gathered(self.sampler):
                sampled = self._sample([r.asked for r in mine], "retry", self.step_number)
            for retry, responses in zip(mine, sampled, strict=True):
                retry.rollouts = [Rollout(response) for response in responses]
        return mine

    def _sample(self, questions: Sequence[Question], *what: str | int) -> list[list[Response]]:
        train = self.recipe.train
        if not train.num_generations:
            return [[] for _ in questions]
        return self.sampler.sample(
            questions,
            train.num_generations,
            settings=train.sampling,
            max_completion_length=train.max_completion_length,
            seed=stable_hash(self.recipe.seed, *what),
        )

    def _prompt_fits(self, question: Question) -> bool:
        try:
            self.policy.encoder(question)
        except PromptTooLongError:
            return False
        return True

    def discriminate(self, discriminator: Discriminator, groups: Sequence[Group], when: str) -> dict[str, float]:
        """Update D as often as the recipe says, then score the groups. Return its health on them before it learned."""
        d, health = self.recipe.discriminator, {}
        learns = d.mode == "updated"
        # An update returns the health of the predictions it starts from; those of averaged weights are others.
        if not learns or d.update_below is not None or (self.gate is not None and d.ema_decay):
            discriminator.score(groups, when)
            health = discriminator.measure(groups)
        if d.update_below is not None:
            learns &= health.get("balanced_accuracy", 0.0) < d.update_below
            health["updated"] = float(learns)
        if learns:
            for iteration in range(d.num_iterations or self.recipe.train.num_iterations):
                replayed = self.replayed_groups(iteration)  # none in the paper
                updated = discriminator.update(groups, replayed, when)
                if iteration == 0:  # its health is that of predictions on groups it has not learned from
                    health = updated | health
            discriminator.score(groups, when)
        metrics = prefixed("discriminator", health)
        if self.gate is not None:
            self.gate.see(health.get("balanced_accuracy"))
            self.rewards.gate = self.gate.factor
            metrics["reward/similarity_gate"] = self.gate.factor
        return metrics

    def replayed_groups(self, iteration: int) -> list[Group]:
        """Return this process's share of the earlier groups that the discriminator's update repeats."""
        if self.discriminator is None or not self.recipe.uses_replay:
            return []
        seed = stable_hash(self.recipe.seed, "replay", self.step_number, iteration)
        drawn = self.discriminator.replay.draw(self.recipe.train.questions_per_step, seed)
        groups = []
        for position, students in drawn[self.accelerator.process_index :: self.accelerator.num_processes]:
            question, epoch = question_at(self.questions, self.recipe.seed, position)
            groups.append(Group(question, [Rollout(r) for r in [*students, *self.teacher_responses(question, epoch)]]))
        return groups

    def leave_out_teachers(self, groups: Sequence[Group]) -> dict[str, float]:
        """Leave teacher responses out of the groups whose student samples do well enough without."""
        below = self.recipe.train.teacher_responses_below
        if below is None:  # the paper
            return {}
        for group in groups:
            share = group.right_share
            group.without_teachers = share is not None and share >= below
        everyone = [left_out for part in gather_object([[g.without_teachers for g in groups]]) for left_out in part]
        return {"train/teacher_groups": 1 - sum(everyone) / len(everyone)}

    def set_advantages(self, groups: Sequence[Group]) -> None:
        """Set A_i = R_i - mean over the group's members in the update, without those whose reward is unknown.

        ``train.baseline``, ``train.negative_scale``, ``train.teacher_advantages`` and ``rewards.combine`` change it.
        """
        train, per_reward = self.recipe.train, self.recipe.rewards.combine == "per_reward"
        weights = {name: w for name, w in self.rewards.weights.items() if w} if per_reward else {}
        positive = train.teacher_advantages == "positive"
        for group in groups:
            members = self.policy.members(group)
            student = torch.tensor([[r.response.from_student for r in members]], dtype=torch.bool)
            baseline = student if train.baseline == "students" else None
            if per_reward:
                rewards = torch.tensor(
                    [[[_number(r.rewards[n]) for r in members]] for n in weights], dtype=torch.float64
                )
                found = decoupled_advantages(rewards, list(weights.values()), baseline=baseline)
            else:
                rewards = torch.tensor([[_number(r.reward) for r in members]], dtype=torch.float64)
                scale = train.algorithm == "grpo"
                found = group_advantages(rewards, scale_by_std=scale, baseline=baseline)
                found = rewards.nan_to_num(0.0) if train.baseline == "none" else found
            found = shaped_advantages(found, student, negative_scale=train.negative_scale, positive_teachers=positive)
            for rollout, advantage in zip(members, found[0].tolist(), strict=True):
                rollout.advantage = advantage

    # ---- steps and logging --------------------------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        return total_steps(self.recipe, len(self.questions))

    def batch_at(self, step: int) -> list[tuple[Question, int]]:
        """Return this process's share of the batch of ``step``.

        Shares are contiguous, so that any number of processes sees the same batch. Batches are consecutive parts of an
        endless sequence of seeded permutations; the epoch is the number of the permutation.
        """
        size = self.recipe.train.questions_per_step
        share = size // self.accelerator.num_processes
        first = step * size + share * self.accelerator.process_index
        return [question_at(self.questions, self.recipe.seed, position) for position in range(first, first + share)]

    def train(self) -> None:
        """Run to the last step from the current one. Raises Interrupted after saving if a signal asks to stop."""
        train = self.recipe.train
        saved = self.step_number
        for row in self.folder.metrics():  # of a run that is continued
            self._watch_student(row)
        with stop_requests() as stop:
            while self.step_number < self.total_steps:
                started = time.perf_counter()
                self.seconds = {}
                rate = learning_rate(train.optimizer, self.step_number, self.total_steps)
                set_learning_rate(self.policy.optimizer, rate)
                if self.discriminator is not None and self.discriminator.optimizer is not None:
                    d_settings = self.recipe.discriminator.optimizer
                    d_rate = learning_rate(d_settings, self.step_number, self.total_steps)
                    set_learning_rate(self.discriminator.optimizer, d_rate)
                if self.step_number + 1 < self.total_steps:  # the images of the next step are prepared during this one
                    self.policy.encoder.prefetch(q for q, _ in self.batch_at(self.step_number + 1))
                groups, metrics = self.step(self.batch_at(self.step_number))
                self.step_number += 1
                step = self.step_number
                everyone = [
                    Group(*g) for g in gather_object([(without_images(g.question), g.rollouts) for g in groups])
                ]
                if self.discriminator is not None and self.recipe.uses_replay:
                    self.discriminator.replay.keep((step - 1) * train.questions_per_step, everyone)
                metrics |= reward_metrics(everyone)
                retries = gather_object([replace(r, asked=without_images(r.asked)) for r in self.retries])
                if self.retry is not None:
                    metrics |= prefixed("retry", self.retry.remember(everyone, retries))
                metrics["train/learning_rate"] = rate
                if self.evaluate is not None and train.eval_every and step % train.eval_every == 0:
                    with self.timed("eval", "student"):
                        metrics |= prefixed("eval", self.evaluate(step))
                self.seconds["step"] = time.perf_counter() - started
                if self.offload.mode != "none":
                    self.seconds["offload"], self.offload.seconds = self.offload.seconds, 0.0
                metrics |= prefixed("time", self.seconds)
                metrics |= memory_metrics()
                self._log(step, [*everyone, *(r.learned for r in retries)], metrics)
                stopping = any(gather_object([bool(stop)]))
                if stopping or step == self.total_steps or (train.save_every and step % train.save_every == 0):
                    self.save(step)
                    saved = step
                if stopping and step < self.total_steps:
                    raise Interrupted(f"stopped after step {saved}; the same command continues")

    def write_student(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write the student as an ordinary checkpoint of type ``dtype``, adapters merged. Every process must call this."""
        assert self._write_student is not None, "this trainer was built without write_student"
        self._write_student(folder, dtype)

    def _log(self, step: int, groups: list[Group], metrics: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        row: dict[str, Any] = {"step": step, **metrics}
        self.folder.log_metrics(row)
        if step % self.recipe.train.log_rollouts_every == 0:
            self.folder.log_rollouts(step, groups, self.by_id, self.recipe.rewards.answer.rule)
        if self.accelerator.trackers:
            self.accelerator.log(metrics, step=step)
        if (every := self.recipe.train.log_groups_every) and step % every == 0:
            log_groups(self.accelerator.trackers, step, groups, self.by_id)
        self.report(step, self.total_steps, row)
        if message := self.watch.see(metrics.get("discriminator/balanced_accuracy")):
            self.warn(message)
        for message in self._watch_student(metrics):
            self.warn(message)
        if (too_long := metrics.get("train/teacher_too_long")) and not self._warned_of_length:
            self._warned_of_length = True
            self.warn(
                f"train.max_completion_length: {too_long:.0f} cached teacher responses to the questions of step {step} are"
                f" longer than {self.recipe.train.max_completion_length} tokens of the student and join no group. Raise it,"
                " or collect shorter responses. The metric train/teacher_too_long counts them in every step."
            )

    def _watch_student(self, metrics: dict[str, float]) -> list[str]:
        """Let the watches see a step, and return what they warn of."""
        gate, unparsed = metrics.get("reward/similarity_gate"), metrics.get("reward/unparsed")
        found = (
            self.entropy_watch.see(metrics.get("train/entropy")),
            self.advantage_watch.see(metrics.get("train/advantage_abs"), gate, unparsed),
        )
        return [message for message in found if message]

    @contextmanager
    def timed(self, part: str, *models: str) -> Iterator[None]:
        """Measure a part of the step. If it names models, those are on the device inside (``train.offload``)."""
        if models:
            self.offload.use(*models)
        started = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started


def _number(reward: float | None) -> float:
    return float("nan") if reward is None else reward


def total_steps(recipe: Recipe, num_questions: int) -> int:
    """Return the steps of a whole run: train.max_steps, or those of train.epochs, rounded up."""
    if recipe.train.max_steps:
        return recipe.train.max_steps
    return max(1, -int(-recipe.train.epochs * num_questions // recipe.train.questions_per_step))


@lru_cache(maxsize=8)
def permutation(n: int, seed: int, epoch: int) -> list[int]:
    """Return the order of ``n`` questions in an epoch."""
    generator = torch.Generator().manual_seed(stable_hash(seed, "order", epoch))
    return torch.randperm(n, generator=generator).tolist()


def question_at(questions: Sequence[Question], seed: int, position: int) -> tuple[Question, int]:
    """Return the question at a position of the endless sequence of seeded permutations, and its epoch."""
    epoch, place = divmod(position, len(questions))
    return questions[permutation(len(questions), seed, epoch)[place]], epoch


def prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{k}": v for k, v in metrics.items()}


def without_images(question: Question) -> Question:
    """Return the question with the names of its images alone, which is all that rollout files need."""
    return replace(question, images=tuple(ImageSource(url=image.name) for image in question.images))


def memory_metrics() -> dict[str, float]:
    """Return the peak memory in GiB: this process's resident set, and the device's if there is one."""
    import resource

    out = {"memory/peak_resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if torch.cuda.is_available():
        out["memory/peak_device_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return out
