"""The memory estimate against the memory that real runs take: allocations of torch on the CPU, and live tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from openril.models.loading import load_config, load_model, load_processor, torch_dtype
from openril.models.memory_estimate import Shape, Tower, checkpoint_parameters, shape_of, shape_of_model
from openril.models.stage_memory import stage_memory
from openril.recipe.schema import Recipe
from openril.records import Response
from openril.testing.tiny_models import build_tiny_model
from openril.training import discriminator_update, policy_update, sft
from openril.training.sft_examples import Example
from support.loop import make_trainer, tiny_recipe
from support.tiny import tiny_questions


def medium_model(folder: Path, architecture: Any, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random model with about 20M parameters, nearly half of them in embeddings and LM head."""
    small = build_tiny_model(folder / "small", architecture, hidden_size=448, num_layers=6, num_heads=8)
    model: Any = load_model(str(small))
    model.resize_token_embeddings(9000, mean_resizing=False)
    model.to(dtype).save_pretrained(folder / "medium")
    load_processor(str(small)).save_pretrained(folder / "medium")
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


# In a phase the estimate is at least the peak, and at most this much more: it adds the accumulated gradient and the
# activations of the largest micro-batch, and takes every response as long as it may be.
FACTOR = 2.0
LORA = {"student__lora": {"enabled": True}, "train__algorithm": "grpo"}  # no discriminator: the other cases have one


@pytest.mark.parametrize(
    ("architecture", "stored", "precision", "changes"),
    [
        ("qwen2_5_vl", "bfloat16", "bfloat16", {}),
        ("internvl", "float32", "pure_bf16", {}),
        ("internvl", "float32", "bfloat16", LORA),
        ("qwen2_5_vl", "bfloat16", "bfloat16", LORA),
        ("internvl", "bfloat16", "bfloat16", {"discriminator": {"mode": "fixed", "pretraining": {"enabled": False}}}),
    ],
)
def test_a_step_of_the_loop(
    architecture: str,
    stored: str,
    precision: str,
    changes: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = tiny_recipe(
        tmp_path / "run",
        medium_model(tmp_path, architecture, torch_dtype(stored)),
        train__precision=precision,
        train__questions_per_step=2,
        train__max_completion_length=8,
        train__max_tokens_per_micro_batch=1,  # each group alone, so that gradients are accumulated
        collect={"max_completion_length": 8},
        discriminator__max_tokens_per_micro_batch=1,
        discriminator__loss="bradley_terry",
        **changes,
    )
    trainer = make_trainer(recipe, tmp_path / "data", count=2)
    policy, discriminator = trainer.policy, trainer.discriminator
    gradients: list[int] = []
    for module in (policy_update, discriminator_update):

        def noted(
            accelerator: Any, optimizer: Any, parameters: Any, *arguments: Any, step: Any = module.take_step
        ) -> Any:
            gradients.append(storages(p.grad for p in parameters))
            return step(accelerator, optimizer, parameters, *arguments)

        monkeypatch.setattr(module, "take_step", noted)
    groups, _ = trainer.step(trainer.batch_at(0))  # afterwards the optimizers have their states
    shape = replace(shape_of_model(policy.unwrapped.model), stored=stored)
    [memory] = stage_memory(recipe, shape, policy.encoder.longest, 8)
    expected = memory.held | {k: n for phase in memory.phases.values() for k, n in phase.items() if "gradients" in k}
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
    assert set(found) == set(expected)
    assert found == {k: pytest.approx(n, rel=0.05) for k, n in expected.items()}
    for phase, run in runs.items():
        measured = peak_of(run)
        steps = memory.phases.get(phase.replace("update", "step"), {})
        estimated = max(sum(memory.phases[phase].values()), sum(steps.values()))
        assert measured <= estimated <= FACTOR * measured + 8 * 2**20, phase


def test_a_step_of_the_warm_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = tiny_questions(tmp_path / "data", 4)
    recipe = tiny_recipe(
        tmp_path / "run",
        medium_model(tmp_path, "qwen2_5_vl"),
        train__precision="bfloat16",
        train__max_completion_length=16,
        sft={"batch_size": 4, "micro_batch_size": 2, "max_steps": 2, "save_every": 0},
    )
    examples = [Example(q, Response(q.id, "data", 0, "The answer is red, as one can see.")) for q in questions]
    measured: list[int] = []
    step = sft._Trainer.training_step

    def watched(trainer: Any, model: Any, *arguments: Any) -> Any:
        held = storages(model.parameters()) + storages(p.grad for p in model.parameters())
        held += states(trainer.optimizer)
        results: list[Any] = []
        measured.append(held + peak_of(lambda: results.append(step(trainer, model, *arguments))))
        return results[0]

    monkeypatch.setattr(sft._Trainer, "training_step", watched)
    sft.train_sft(recipe, examples)
    shape = shape_of(load_config(recipe.student.model), checkpoint_parameters(Path(recipe.student.model)))
    memory = stage_memory(recipe, shape, 54, 8)[0]
    assert len(measured) == 4 and memory.stage == "sft"  # the last has states, and gradients of its step's first half
    assert max(measured) == measured[-1] <= memory.total <= FACTOR * measured[-1]


def test_gradients_under_ddp_count_once_and_stay(tmp_path: Path) -> None:
    network: Any = torch.nn.Linear(512, 512, bias=False)  # 1 MiB
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        wrapped: Any = torch.nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
        for _ in range(2):  # the first pass rebuilds the buckets
            wrapped(torch.ones(1, 512)).sum().backward()
            held = network.weight.grad.untyped_storage().nbytes()
            network.zero_grad(set_to_none=True)
        assert held == 2**20
        # A pass allocates no gradient that lasts, because it writes into the buckets.
        assert peak_of(lambda: wrapped(torch.ones(1, 512)).sum().backward()) < 1.1 * 2**20
        assert network.weight.grad.untyped_storage().nbytes() == 2**20
    finally:
        torch.distributed.destroy_process_group()


def test_only_the_questions_of_a_step_are_shared_by_processes() -> None:
    tower = Tower(hidden=1000, intermediate=4000, layers=10, query=1000, key_value=250)
    shape = Shape({"attention": 10**9, "lm_head": 10**8, "word_embeddings": 10**8}, tower, vocabulary=10**5)
    recipe = Recipe.model_validate({"teachers": [{"name": "a"}]})
    one, eight = (stage_memory(recipe, shape, 1000, processes=n) for n in (1, 8))
    assert [m.stage for m in one] == ["sft", "discriminator", "train"]
    for alone, shared in zip(one, eight, strict=True):
        assert alone.held.items() <= shared.held.items()
        gradients = {k for k in shared.held if k.endswith("gradients")}
        assert shared.held.keys() - alone.held.keys() == gradients and gradients
        # Those of the phases that follow each other are not added in one process, and always held in several.
        assert shared.total >= alone.total
    train = one[-1]
    assert train.total == sum(train.held.values()) + max(sum(p.values()) for p in train.phases.values())
