"""A RIL run in one process without files of other stages: made-up teachers, rewards by substring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from openril.recipe.schema import Recipe
from openril.records import Group, Question, Response
from openril.training.distributed import make_accelerator
from openril.training.loop import RILTrainer
from openril.training.run_folder import RunFolder
from openril.training.setup import TrainingComponents
from support.tiny import teacher_text, tiny_questions


class SubstringRewards:
    """similarity from student_prob < 0.5; answer 1 if the ground truth is in the text."""

    def __init__(self, unknown: Callable[[Response], bool] = lambda response: False) -> None:
        self.unknown = unknown
        self.order: list[str] = []
        self.weights = {"similarity": 1.0, "answer": 1.0}

    def begin(self, groups: Sequence[Group]) -> None:
        self.order.append("begin")

    def score(self, groups: Sequence[Group]) -> dict[str, float]:
        self.order.append("rewards")
        for g in groups:
            for r in g.rollouts:
                r.similarity = None if r.student_prob is None else float(r.student_prob < 0.5)
                r.verdict = None if self.unknown(r.response) else float(g.question.answer in r.response.text)
                # A random model is hardly ever right: let its length decide too, so that groups are not flat.
                varied = (len(r.response.text) % 7) / 7 if r.response.from_student else 0.0
                r.reward = None if r.verdict is None else (r.similarity or 0.0) + r.verdict + varied
        return {}


def tiny_recipe(run_dir: Path, checkpoint: Path, **overrides: Any) -> Recipe:
    """A fast recipe; overrides are dotted keys with double underscores: train__beta=0.1."""
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "student": {"model": str(checkpoint), "dtype": "float32", "freeze": ["vision_tower"]},
        "teachers": [{"name": "a", "model_path": "unused"}, {"name": "b", "model_path": "unused"}],
        "sft": {"enabled": False},
        "discriminator": {"pretraining": {"enabled": False}, "optimizer": {"learning_rate": 1e-3}},
        "train": {
            "num_generations": 2,
            "questions_per_step": 4,
            "max_steps": 3,
            "max_completion_length": 8,
            "precision": "float32",
            "optimizer": {"learning_rate": 1e-3},
            "save_every": 0,
        },
    }
    for key, value in overrides.items():
        *path, last = key.split("__")
        node = values
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return Recipe.model_validate(values)


def made_up_teachers(recipe: Recipe) -> Callable[[Question, int], list[Response]]:
    """Teacher responses without a cache: each teacher gives its share, other texts in each epoch."""

    def responses(question: Question, epoch: int) -> list[Response]:
        count = recipe.teacher_responses_per_question
        names = recipe.teacher_names
        out = []
        for n, name in enumerate(names):
            share = count // len(names) + (n < count % len(names))
            for i in range(share):
                out.append(Response(question.id, name, i, teacher_text(question, name, epoch + i)))
        return out

    return responses


def make_trainer(recipe: Recipe, data: Path, rewards: Any = None, count: int = 8, **options: Any) -> RILTrainer:
    """A trainer on tiny questions; continues the recipe's run folder if it holds a checkpoint."""
    accelerator = make_accelerator(recipe)
    folder = RunFolder(recipe.run_path)
    parts = TrainingComponents(recipe, accelerator, folder.checkpoints_path)
    folder.cut_after(parts.step)
    return RILTrainer(
        recipe,
        tiny_questions(data, count),
        accelerator=accelerator,
        sampler=parts.sampler,
        policy=parts.policy_update,
        discriminator=parts.discriminator,
        teacher_responses=made_up_teachers(recipe),
        rewards=rewards or SubstringRewards(),
        folder=folder,
        save=parts.saver.save,
        offload=parts.offload,
        gate=parts.gate,
        retry=parts.retry,
        first_step=parts.step,
        **options,
    )
