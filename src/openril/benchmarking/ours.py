"""Our two contenders: the loop as `ril train` builds it, with packing (ours) and without it (plain)."""

from __future__ import annotations

from dataclasses import replace
from multiprocessing.connection import Connection as Pipe
from typing import Any

from torch.utils._triton import has_triton

from openril.benchmarking.contender import BETA, EPSILON, LEARNING_RATE, MAX_GRAD_NORM, SAMPLING, Contender
from openril.benchmarking.measuring import give_back
from openril.benchmarking.shapes import QUESTIONS
from openril.benchmarking.worker import Command, Measurement, Spec, next_command
from openril.recipe.schema import Recipe
from openril.records import STUDENT, Group, Question, Response, Rollout
from openril.rewards.combine import RewardSystem
from openril.storage import stable_hash
from openril.training.distributed import make_accelerator
from openril.training.loop import RILTrainer
from openril.training.run_folder import RunFolder
from openril.training.setup import TrainingComponents

NO_TOKEN = -1
"""The only id that ends a response here. No token has it, so every response reaches the full length. The real
end-of-turn token is then banned like every other special token."""

TEACHER = "teacher"


def serve(pipe: Pipe, spec: Spec) -> None:
    """Set up, then measure until there are no more commands (``Finished``)."""
    contender = OurStep(spec)
    pipe.send(contender.about())
    while True:
        pipe.send(contender.measure(next_command(pipe)))


def bench_recipe(spec: Spec) -> Recipe:
    """Return the recipe of the measured step: the paper's settings, with G samples and G teacher responses."""
    shape = spec.shape
    adam = {"learning_rate": LEARNING_RATE, "weight_decay": 0.0, "max_grad_norm": MAX_GRAD_NORM}
    whole = bool({"step", "memory"} & set(spec.parts))
    return Recipe.model_validate(
        {
            "run_dir": str(spec.folder / "run"),
            "data": {"max_prompt_length": 32768},
            "student": {"model": str(spec.checkpoint), "freeze": ["vision_tower"]},
            "teachers": [{"name": TEACHER, "model_path": str(spec.checkpoint)}],
            "sft": {"enabled": False},
            "discriminator": {
                "mode": "updated" if whole else "none",
                "pretraining": {"enabled": False},
                "optimizer": adam,
            },
            "rewards": {"answer": {"kind": "rules", "rule": "contains"}},
            "train": {
                "num_generations": shape.group_size // 2,
                "questions_per_step": QUESTIONS,
                "max_completion_length": shape.response_tokens,
                "beta": BETA,
                "epsilon": EPSILON,
                "precision": spec.precision,
                "optimizer": adam,
                "save_every": 0,
                "packed": spec.name == "ours",
                "sampling": SAMPLING,
            },
        }
    )


class OurStep(Contender):
    """Measure parts of our step."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.recipe = bench_recipe(spec)
        accelerator = make_accelerator(self.recipe)
        folder = RunFolder(self.recipe.run_path)
        self.fast_path_off: list[str] = []
        if spec.name == "ours" and spec.device == "cuda" and not has_triton():
            self.fast_path_off.append("Triton is missing, so attention runs over a dense mask")
        warn = self.fast_path_off.append
        self.built = TrainingComponents(self.recipe, accelerator, folder.checkpoints_path, warn=warn)
        self.encoder = self.built.encoder
        self.encoder.eos_token_ids = [NO_TOKEN]
        self.banned = self.encoder.special_token_ids
        self.trainer = RILTrainer(
            self.recipe,
            [],
            accelerator=accelerator,
            sampler=self.built.sampler,
            policy=self.built.policy_update,
            discriminator=self.built.discriminator,
            teacher_responses=lambda question, epoch: self._teachers[question.id],
            rewards=RewardSystem(self.recipe, None),
            folder=folder,
            save=lambda step: None,
        )
        update = self.built.policy_update
        self.watch.watch("optimizer", getattr(update.optimizer, "optimizer", update.optimizer), "step")
        self.watch.watch("reference", update.reference, "forward")
        self._call = 0
        self._teachers: dict[str, list[Response]] = {}  # in place of the cache: made before the clock starts

    def about(self) -> dict[str, Any]:
        prompt = self.encoder(self.questions(0)[0])
        return self.describe(
            prompt.length,
            self.built.policy_update.unwrapped,
            self.built.optimizer,
            packed=self.recipe.train.packed,
            discriminator=self.recipe.discriminator.mode,
            train=self.recipe.train.model_dump(mode="json"),
        )

    def measure(self, command: Command) -> Measurement:
        self._call = command.call
        size = command.group_size or self.shape.group_size
        questions = self.questions(command.call)
        if command.part == "update":
            measured = self._update(questions, size)
        elif command.part in ("sampling", "prefill"):
            length = 1 if command.part == "prefill" else self.shape.response_tokens
            measured = self._sampling(questions, size, length)
        else:
            measured = self._step(questions, with_memory=command.part == "memory")
        return replace(measured, fast_path_off=tuple(dict.fromkeys(self.fast_path_off)))

    def _update(self, questions: list[Question], group_size: int) -> Measurement:
        groups = [self._group(q, j, group_size) for j, q in enumerate(questions)]
        for q in questions:
            self.encoder(q)  # in a step the sampler has done this
        self.watch.seconds = {}
        started = self.watch.mark()
        self.built.policy_update.update(groups, self._call)
        seconds, cpu_seconds = self.watch.since(started)
        parts = dict(self.watch.seconds)
        parts["forward_backward"] = seconds - sum(parts.values())
        return Measurement(seconds, parts, QUESTIONS * group_size * self.shape.response_tokens, cpu_seconds)

    def _group(self, question: Question, number: int, size: int) -> Group:
        """Return a group of fixed responses, half the student's and half a teacher's, with advantages around 0."""
        rollouts = []
        for i, ids in enumerate(self.completions(self._call, number, size)):
            mine = i < size // 2
            response = Response(
                question.id,
                STUDENT if mine else TEACHER,
                i % (size // 2),
                self.encoder.decode(ids),
                token_ids=tuple(ids),
                logprobs=(0.0,) * len(ids) if mine else None,
            )
            rollouts.append(Rollout(response, reward=float(i % 2), advantage=i % 2 - 0.5))
        return Group(question, rollouts)

    def _sampling(self, questions: list[Question], count: int, length: int) -> Measurement:
        started = self.watch.mark()
        drawn = self.built.sampler.sample(
            questions,
            count,
            settings=self.recipe.train.sampling,
            max_completion_length=length,
            seed=stable_hash("bench", self._call),
        )
        seconds, cpu_seconds = self.watch.since(started)
        self.check([len(r.token_ids or ()) for each in drawn for r in each], length)
        return Measurement(seconds, {}, QUESTIONS * count * length, cpu_seconds)

    def _step(self, questions: list[Question], *, with_memory: bool) -> Measurement:
        self._teachers = {
            q.id: [r.response for r in self._group(q, j, self.shape.group_size).teachers]
            for j, q in enumerate(questions)
        }
        self.trainer.seconds, self.watch.seconds = {}, {}
        if with_memory:
            self.memory.start()
        started = self.watch.mark()
        groups, _ = self.trainer.step([(q, 0) for q in questions])
        seconds, cpu_seconds = self.watch.since(started)
        peak, held = (self.memory.peak(), self.memory.held) if with_memory else (None, None)
        if with_memory:
            give_back()
        self.trainer.step_number += 1
        self.check([len(r.response.token_ids or ()) for g in groups for r in g.rollouts])
        parts = dict(self.trainer.seconds)
        parts["other"] = seconds - sum(parts.values())
        parts |= {f"update/{k}": v for k, v in self.watch.seconds.items()}
        return Measurement(seconds, parts, self.shape.rows * self.shape.response_tokens, cpu_seconds, peak, held)
