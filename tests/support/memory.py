"""Measure the memory of a run: live tensors, and torch's allocations on the CPU."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from openril.models.loading import load_model, load_processor
from openril.models.stage_memory import Memory
from openril.testing.tiny_models import build_tiny_model
from openril.training import discriminator_update, policy_update


def medium_model(folder: Path, architecture: Any, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random model with about 20M parameters, nearly half of them in embeddings and LM head."""
    small = build_tiny_model(folder / "small", architecture, hidden_size=448, num_layers=6, num_heads=8)
    model: Any = load_model(str(small))
    model.resize_token_embeddings(9000, mean_resizing=False)
    model.to(dtype).save_pretrained(folder / "medium")
    load_processor(str(small)).save_pretrained(folder / "medium")
    return folder / "medium"


def storages(tensors: Iterable[Any]) -> int:
    """Return the bytes of the storages of some tensors, each once; of sharded ones those of this process."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if isinstance(t, Tensor)]
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}
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


def measured_step(trainer: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Run a step of the loop, and return the bytes that it holds by the names of the estimate, and peaks of its phases."""
    policy, discriminator = trainer.policy, trainer.discriminator
    gradients: list[int] = []
    take_step = policy_update.take_step

    def noted(accelerator: Any, optimizer: Any, parameters: Any, *arguments: Any) -> Any:
        gradients.append(storages(p.grad for p in parameters))
        return take_step(accelerator, optimizer, parameters, *arguments)

    with (
        mock.patch.object(policy_update, "take_step", noted),
        mock.patch.object(discriminator_update, "take_step", noted),
    ):
        groups, _ = trainer.step(trainer.batch_at(0))  # afterwards the optimizers have their states
    found = {
        "student: weights": storages(policy.unwrapped.parameters()),
        "student: AdamW states": states(policy.optimizer),
        "student: gradients": gradients[-1],
    }
    runs = {
        "sampling": lambda: trainer.sample_groups(trainer.batch_at(0)),
        "student update": lambda: policy.update(groups, 1),
    }
    if discriminator is not None:
        found["discriminator: weights"] = storages(discriminator.network.parameters())
        if discriminator.optimizer is not None:
            found["discriminator: AdamW states"] = states(discriminator.optimizer)
            found["discriminator: gradients"] = gradients[0]
            runs["discriminator update"] = lambda: discriminator.update(groups)
    if policy.reference is not None:
        found["reference: weights"] = storages(policy.reference.parameters())
    return found, {phase: peak_of(run) for phase, run in runs.items()}


def estimated(memory: Memory, phase: str) -> int:
    """Return the estimate of a phase above what is held, the ends of its backward pass and its step included."""
    return max(
        sum(memory.phases.get(phase.replace("update", end), {}).values()) for end in ("update", "reduction", "step")
    )
