"""A logit of the discriminator that is not finite stops the run before anything is learned from it or written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from openril.errors import StateError
from openril.records import STUDENT
from openril.responses.cache import ResponseCache
from openril.training.checkpoint import Checkpoints, Saver
from openril.training.discriminator_update import Discriminator
from openril.training.distributed import make_accelerator
from openril.training.pretraining import DiscriminatorPretraining
from openril.training.run_folder import RunFolder
from openril.training.setup import fresh_discriminator
from support.loop import make_trainer, tiny_recipe
from support.tiny import teacher_responses, tiny_questions


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def break_logits(d: Discriminator, value: float, when: Callable[[], bool]) -> None:
    """Make the first logit of every pass ``value`` while ``when`` is true."""
    logits = d._logits

    def broken(batch: Any) -> Any:
        (first, *rest), slopes = logits(batch)
        mask = torch.zeros_like(first)
        mask[0] = value if when() else 0.0
        return [first + mask, *rest], slopes

    d._logits = broken  # type: ignore[method-assign]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["update", "score"])
def test_the_loop_stops_before_the_student_learns(value: float, part: str, tiny_qwen: Path, tmp_path: Path):
    recipe = tiny_recipe(tmp_path / "run", tiny_qwen, train__max_steps=3, train__save_every=1)
    trainer = make_trainer(recipe, tmp_path / "data")
    d = trainer.discriminator
    assert d is not None
    # Scoring runs without gradients, an update with them.
    break_logits(d, value, lambda: trainer.step_number == 1 and torch.is_grad_enabled() == (part == "update"))
    before: dict[str, Any] = {}

    def remember(step: int, *_: Any) -> None:
        before.update(student=state(trainer.policy.unwrapped), discriminator=state(d.network))

    trainer.report = remember
    with pytest.raises(StateError, match=r"step 2: .*(nan|inf) for question '(q\d)'") as caught:
        trainer.train()
    assert any(f"'{q.id}'" in str(caught.value) for q, _ in trainer.batch_at(1))
    assert same(trainer.policy.unwrapped, before["student"])
    if part == "update":
        assert same(d.network, before["discriminator"])
        assert all(p.grad is None for p in d.trainable)
    assert [row["step"] for row in trainer.folder.metrics()] == [1]
    assert sorted(p.name for p in trainer.folder.rollouts_path.iterdir()) == ["step_000001.jsonl"]
    assert sorted(p.name for p in trainer.folder.checkpoints_path.iterdir()) == ["step_000001"]


def pretraining(recipe: Any, folder: Path) -> DiscriminatorPretraining:
    questions = tiny_questions(folder / "data", 8)
    cache = ResponseCache.create(folder / "cache")
    sources = [STUDENT, *recipe.teacher_names]
    responses = teacher_responses(questions, sources, 2)
    for source in sources:
        cache.register(source, model=source, revision=None, sampling={})
        with cache.writer(source) as writer:
            for q in questions:
                for r in responses[q.id]:
                    if r.source == source:
                        writer.append(q, r)
    accelerator = make_accelerator(recipe)
    d = fresh_discriminator(recipe, accelerator, recipe.discriminator.pretraining.optimizer)
    run = RunFolder(folder / "run/discriminator")
    saver = Saver(
        Checkpoints(run.checkpoints_path),
        accelerator,
        recipe,
        network=d.network,
        discriminator_processor=d.encoder.processor,
        optimizers={"discriminator": d.optimizer},
    )
    loaded = ResponseCache.open(folder / "cache").load(questions, sources)
    return DiscriminatorPretraining(recipe, questions, loaded, discriminator=d, folder=run, saver=saver)


@pytest.mark.parametrize("part", ["update", "score"])
def test_pre_training_and_its_held_out_measurement_stop(part: str, tiny_qwen: Path, tmp_path: Path):
    settings = {"questions_per_step": 2, "epochs": 1.0, "held_out_share": 0.3, "optimizer": {"learning_rate": 1e-3}}
    recipe = tiny_recipe(tmp_path / "run", tiny_qwen, discriminator__pretraining=settings)
    training = pretraining(recipe, tmp_path)
    assert training.total_steps >= 2 and training.held_out
    break_logits(
        training.discriminator,
        float("nan"),
        lambda: torch.is_grad_enabled() == (part == "update") and training.step_number >= 1,
    )
    where = "pre-training step 2" if part == "update" else "held-out measurement"
    with pytest.raises(StateError, match=rf"{where}: .*nan for question '(q\d)'") as caught:
        training.train()
    questions = training.questions if part == "update" else training.held_out
    assert any(f"'{q.id}'" in str(caught.value) for q in questions)
    done = 1 if part == "update" else training.total_steps
    assert [row["step"] for row in training.folder.metrics()] == list(range(1, done + 1))
    assert not training.folder.checkpoints_path.exists()
