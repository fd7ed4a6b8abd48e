"""The memory estimate against the memory that real runs take: allocations of torch on the CPU, and live tensors."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from openril.models.loading import load_model, load_processor
from openril.models.memory_estimate import checkpoint_parameters, shape_of, shape_of_model
from openril.models.stage_memory import Memory, stage_memory
from openril.testing.tiny_models import build_tiny_model
from support.loop import make_trainer, tiny_recipe

ESTIMATED = ("student: weights", "student: AdamW states", "reference: weights", "discriminator: weights")


@pytest.fixture(scope="module", params=["qwen2_5_vl", "internvl"])
def medium_student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a random model with 24M parameters, a third of them in embeddings and LM head."""
    folder = tmp_path_factory.mktemp("models")
    build_tiny_model(folder / "small", request.param, hidden_size=448, num_layers=8, num_heads=8)
    model: Any = load_model(str(folder / "small"))
    model.resize_token_embeddings(9000)
    model.save_pretrained(folder / "medium")
    load_processor(str(folder / "small")).save_pretrained(folder / "medium")
    shutil.rmtree(folder / "small")
    return folder / "medium"


def storages(tensors: Iterable[Any]) -> int:
    """Return the bytes of the storages of some tensors, each once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    return sum(found.values())


def states(optimizer: Any) -> int:
    return storages(v for state in optimizer.state.values() for v in state.values())


def peak_of(run: Any) -> int:
    """Return the highest number of bytes that ``run`` has allocated and not freed at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = highest = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    return highest


def test_explore(medium_student: Path, tmp_path: Path):
    import time
    for settings in (
        {"train__precision": "float32"}, {"train__precision": "bfloat16"}, {"train__precision": "pure_bf16"},
        {"train__precision": "bfloat16", "student__lora": {"enabled": True}},
        {"train__precision": "bfloat16", "student__gradient_checkpointing": True},
        {"train__precision": "float32", "train__packed": False},
    ):
        t0 = time.time()
        recipe = tiny_recipe(tmp_path / "run", medium_student, train__max_steps=2, train__questions_per_step=2, train__max_completion_length=24, **settings)
        trainer = make_trainer(recipe, tmp_path / "data", count=4)
        t1 = time.time()
        parts = trainer
        student, d = trainer.policy, trainer.discriminator
        trainer.step(trainer.batch_at(0))
        gc.collect()
        ref = student.reference
        got = {
            "student: weights": storages(student.unwrapped.parameters()),
            "student: AdamW states": states(student.optimizer),
            "reference: weights": storages(ref.parameters()) if ref else 0,
            "discriminator: weights": storages(d.network.parameters()),
            "discriminator: AdamW states": states(d.optimizer),
        }
        shape = shape_of_model(student.unwrapped.model)
        prompts = [student.encoder(q) for q in trainer.questions]
        longest = max(p.length for p in prompts)
        [memory] = stage_memory(recipe, shape, longest, 8)
        held = sum(got.values())
        batch = trainer.batch_at(1)
        groups = trainer.sample_groups(batch)
        peaks = {"sampling": peak_of(lambda: trainer.sample_groups(batch))}
        peaks["discriminator update"] = peak_of(lambda: d.update(groups))
        d.score(groups); trainer.rewards.score(groups); trainer.set_advantages(groups)
        peaks["student update"] = peak_of(lambda: student.update(groups, 1))
        import sys; print("\n##", medium_student.parent.name, settings, "setup %.1f all %.1f s" % (t1 - t0, time.time() - t0), "longest", longest)
        for k, v in got.items():
            print(f"  {k:40} {v/1e6:9.1f} {memory.held.get(k, 0)/1e6:9.1f}")
        for k, v in peaks.items():
            sys.stdout.flush(); print(f"  {k:40} {v/1e6:9.1f} {sum(memory.phases[k].values())/1e6:9.1f}", {a: round(b/1e6, 1) for a, b in memory.phases[k].items()})
        del trainer, student, d, ref
