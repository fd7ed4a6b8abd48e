"""The memory estimate against the memory that real runs take: allocations of torch on the CPU, and live tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from openril.models.loading import load_config, torch_dtype
from openril.models.memory_estimate import Shape, Tower, checkpoint_parameters, shape_of, shape_of_model
from openril.models.stage_memory import Memory, stage_memory
from openril.recipe.schema import Recipe
from openril.records import Response
from openril.training import sft
from openril.training.sft_examples import Example
from support.launch import launch
from support.loop import make_trainer, tiny_recipe
from support.memory import estimated, measured_step, medium_model, peak_of, states, storages
from support.tiny import tiny_questions

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
    found, peaks = measured_step(trainer)
    shape = replace(shape_of_model(trainer.policy.unwrapped.model), stored=stored)
    [memory] = stage_memory(recipe, shape, trainer.policy.encoder.longest, 8)
    expected = memory.held | {
        k: n for phase in memory.phases.values() for k, n in phase.items() if k.endswith("gradients")
    }
    assert set(found) == set(expected)
    assert found == {k: pytest.approx(n, rel=0.05) for k, n in expected.items()}
    for phase, measured in peaks.items():
        assert measured <= estimated(memory, phase) <= FACTOR * measured + 8 * 2**20, phase


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


# ---- sharded and parked ------------------------------------------------------------------------------------------------

SHARDED = Shape(
    {"vision_tower": 60, "projector": 12, "word_embeddings": 300, "lm_head": 300, "attention": 120, "mlp_up": 480},
    Tower(hidden=30, intermediate=40, layers=4, query=30, key_value=10),
    vocabulary=10,
)


def sharded_memory(processes: int = 3, **changes: Any) -> Memory:
    train = {"shard": True, "precision": "float32", **changes.pop("train", {})}
    recipe = Recipe.model_validate({"teachers": [{"name": "a"}], "train": train, **changes})
    return stage_memory(recipe, SHARDED, 15, processes=processes)[-1]


def test_a_process_holds_its_share_and_the_frozen_vision_side() -> None:
    memory = sharded_memory()
    # 1,272 values, of which the tower's 60 are frozen and whole; 1,212 are divided by 3 = 404.
    assert memory.held["student: weights"] == 4 * (404 + 60)
    assert memory.held["student: AdamW states"] == 8 * 404
    assert memory.phases["student update"]["student: gradients"] == 4 * 404
    # All of the reference's vision side is frozen: 72, and 1,200 / 3.
    assert memory.held["reference: weights"] == 4 * (400 + 72)
    # The discriminator has no LM head and never runs its vision side: 900 / 3.
    assert memory.held["discriminator: weights"] == 4 * (300 + 72)
    assert memory.held["discriminator: AdamW states"] == 8 * 300


def test_a_pass_gathers_the_root_unit_and_three_layers() -> None:
    memory = sharded_memory()
    # Root: embeddings, head and the projector that trains, 612. A layer: 600 / 4 = 150.
    assert memory.phases["student update"]["student: gathered weights"] == 4 * (612 + 3 * 150)
    # At the end of the backward pass: the root's gradient, and its copy that is reduced.
    reduction = memory.phases["student reduction"]
    assert (
        reduction["student: gradients of gathered weights"]
        == reduction["student: gradients that are reduced"]
        == 4 * 612
    )
    assert memory.phases["discriminator update"]["discriminator: gathered weights"] == 4 * (300 + 3 * 150)
    # Under bfloat16 weights are gathered in two bytes, and autocast keeps no copies.
    mixed = sharded_memory(train={"precision": "bfloat16"}).phases["student update"]
    assert mixed["student: gathered weights"] == 2 * (612 + 3 * 150)
    assert not [name for name in mixed if "autocast" in name]
    # Two layers' gradients in two bytes are on their way to four.
    assert mixed["student: gradients that are reduced"] == 4 * 2 * 150
    # The sampler of this process has all of them.
    sampling = sharded_memory(student={"sampler": {"engine": "transformers"}}).phases["sampling"]
    assert sampling["student: gathered weights"] == 4 * (2 * 612 + 600)


def test_one_process_shards_nothing() -> None:
    assert sharded_memory(processes=1) == sharded_memory(processes=1, train={"shard": False})


@pytest.mark.parametrize("lora", [False, True])
def test_parked_parts_are_on_the_device_where_they_are_used(lora: bool) -> None:
    student = {"lora": {"enabled": lora}}
    none, optimizer, swap = (
        sharded_memory(student=student, train={"offload": mode}) for mode in ("none", "optimizer", "swap")
    )
    states = {name for name in none.held if name.endswith("AdamW states")}
    assert set(none.held) - set(optimizer.held) == states == set(optimizer.parked) and len(states) == 2
    assert optimizer.phases["student step"]["student: AdamW states"] == none.held["student: AdamW states"]
    assert not states & set(optimizer.phases["student update"])
    # With swap, nothing is held, and each phase has the models that it uses.
    assert swap.held == {} and set(swap.parked) == set(none.held)
    users = {"student update": {"student", "reference"}, "discriminator update": {"discriminator"}}
    for phase, models in users.items():
        weights = {name.split(":")[0] for name in swap.phases[phase] if name.endswith(": weights")}
        assert weights == models - ({"reference"} if lora else set())
    assert swap.host["parked by train.offload"] == sum(none.held.values())
    assert swap.total <= optimizer.total <= none.total


def test_without_sharding_parked_gradient_buckets_leave_the_device_too() -> None:
    memory = sharded_memory(train={"shard": False, "offload": "swap"})
    assert "student: gradients" not in memory.phases["discriminator update"] and not memory.held
    assert memory.phases["student update"]["student: gradients"] == 4 * 1212


def test_what_is_on_the_device_in_each_phase_of_a_run_that_swaps(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", tiny_qwen, train__offload="swap", train__max_steps=2)
    trainer = make_trainer(recipe, tmp_path / "data")
    policy, discriminator = trainer.policy, trainer.discriminator
    assert discriminator is not None and policy.reference is not None
    [memory] = stage_memory(recipe, shape_of_model(policy.unwrapped.model), policy.encoder.longest, 8)
    seen: dict[str, dict[str, int]] = {}

    def look(phase: str) -> None:
        assert policy.reference is not None
        seen[phase] = {
            "student: weights": storages(policy.unwrapped.parameters()),
            "reference: weights": storages(policy.reference.parameters()),
            "discriminator: weights": storages(discriminator.network.parameters()),
            "student: AdamW states": states(policy.optimizer),
            "discriminator: AdamW states": states(discriminator.optimizer),
        }

    def watch(phase: str, owner: Any, method: str) -> None:
        inner = getattr(owner, method)

        def watched(*arguments: Any, **settings: Any) -> Any:
            look(phase)
            return inner(*arguments, **settings)

        setattr(owner, method, watched)

    watch("sampling", trainer.sampler, "sample")
    watch("discriminator update", discriminator, "update")
    watch("student update", policy, "update")
    for name, optimizer in (("student", policy.optimizer), ("discriminator", discriminator.optimizer)):
        optimizer.optimizer.register_step_pre_hook(lambda *_, phase=f"{name} step": look(phase))
    trainer.train()
    assert len(seen) == 5
    for phase, found in seen.items():  # those of the second step
        expected = {name: memory.held.get(name, 0) + memory.phases[phase].get(name, 0) for name in found}
        assert found == {name: pytest.approx(size, rel=0.05, abs=200) for name, size in expected.items()}, phase


@pytest.fixture(scope="module")
def sharded_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    medium_model(folder, "qwen2_5_vl", torch.bfloat16)
    done = launch(2, Path(__file__).with_name("sharded_memory.py"), folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("case", ["full", "lora"])
def test_two_sharded_processes_hold_what_is_estimated(case: str, sharded_runs: Path) -> None:
    for rank in (0, 1):
        row = json.loads((sharded_runs / f"{case}-{rank}.json").read_text())
        assert set(row["found"]) == set(row["held"])
        assert row["found"] == {k: pytest.approx(n, rel=0.05) for k, n in row["held"].items()}
        for phase, measured in row["peaks"].items():
            expected = row["estimated"][phase]
            assert measured <= expected + row["of gloo"][phase], (phase, rank)
            assert expected <= FACTOR * measured + 8 * 2**20, (phase, rank)
