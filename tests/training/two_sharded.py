"""Run by test_shard_files.py on two processes: ``two_sharded.py MODEL TIED_MODEL FOLDER``.

Models and optimizers that ``fully_shard`` splits, next to the same ones whole: equal files, and equal steps with swaps.
"""

from __future__ import annotations

import json
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from openril.models import saving
from openril.models.adapters import add_adapters
from openril.models.freezing import freeze, module_group
from openril.models.loading import load_model, load_processor
from openril.models.packing import GroupTokens, Policy, pack
from openril.models.prompts import PromptEncoder
from openril.recipe.schema import LoraConfig, OptimizerConfig
from openril.training.offload import Offload
from openril.training.optimization import build_optimizer
from openril.training.shard_files import load_optimizer, rows, save_optimizer
from support.tiny import tiny_questions

SETTINGS = OptimizerConfig(learning_rate=1e-3)
LIMIT = 100_000


def build(checkpoint: str, kind: str, sharded: bool, wrap: Any = lambda model: model) -> Any:
    model: Any = load_model(checkpoint, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    if kind == "lora":
        torch.manual_seed(0)
        model = add_adapters(model, LoraConfig(enabled=True, r=3))
    else:
        freeze(model, ["vision_tower"])
    inner, model = model.get_base_model() if kind == "lora" else model, wrap(model)
    if sharded:
        for layer in inner.model.language_model.layers:
            fully_shard(layer)
        frozen = {p for n, p in model.named_parameters() if not p.requires_grad and module_group(n) == "vision_tower"}
        fully_shard(model, ignored_params=frozen)
    return model


def step(model: nn.Module, optimizer: Any, seed: int) -> None:
    """Take a step with made-up gradients, the same ones for a whole model and a sharded one."""
    for number, p in enumerate(p for p in model.parameters() if p.requires_grad):
        gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * seed + number)).to(p.dtype)
        sharded = isinstance(p, DTensor)
        p.grad = distribute_tensor(gradient, p.device_mesh, p.placements) if sharded else gradient
    optimizer.step()
    optimizer.zero_grad()


def equal_states(a: Any, b: Any) -> None:
    """Compare the state of a whole model's optimizer with that of a whole or a sharded one."""
    left, right = a.state_dict(), b.state_dict()
    assert len(left["state"]) == len(right["state"]) > 4
    assert json.dumps(left["param_groups"]) == json.dumps(right["param_groups"])
    for number, entries in left["state"].items():
        for key, value in entries.items():
            other = right["state"][number][key]
            if isinstance(other, DTensor):
                value, other = value[rows(other).start : rows(other).stop], other.to_local()
            assert torch.equal(value, other) and value.dtype == other.dtype, (number, key)


def check_files(checkpoint: str, folder: Path, kind: str) -> None:
    rank = dist.get_rank()
    whole, sharded = build(checkpoint, kind, False), build(checkpoint, kind, True)
    first, second = (build_optimizer(m.parameters(), SETTINGS) for m in (whole, sharded))
    for seed in (1, 2):
        step(whole, first, seed)
        step(sharded, second, seed)
    equal_states(first, second)

    # Optimizers: parts of two processes and the file of one hold the same, and each is read by both.
    save_optimizer(folder, f"{kind}_two", second, rank, 2)
    save_optimizer(folder, f"{kind}_one", first, rank)
    dist.barrier()
    for source in ("one", "two"):
        for reads in (whole, sharded):
            loaded = build_optimizer(reads.parameters(), SETTINGS)
            load_optimizer(folder, f"{kind}_{source}", loaded)
            equal_states(first, loaded)

    # Weights: the files of a stream hold what save_pretrained writes of the whole model.
    alive: list[weakref.ref[Tensor]] = []
    peak = 0

    def gathered(value: Tensor) -> Tensor:
        nonlocal peak
        result = value.full_tensor() if isinstance(value, DTensor) else value.clone()
        alive.append(weakref.ref(result))
        peak = max(peak, sum(t.nbytes for ref in alive if (t := ref()) is not None))
        return result

    saving.full_tensor, exact = gathered, saving.full_tensor
    processor = load_processor(checkpoint)
    saving.write_model(sharded, folder / f"{kind}_stream", processor, main=rank == 0, max_bytes=LIMIT)
    saving.full_tensor = exact
    largest = max(p.nbytes for p in whole.parameters())
    total = sum(p.nbytes for p in whole.parameters())
    assert peak < LIMIT + 2 * largest < total, (peak, largest, total)
    if rank == 0:
        saving.write_model(whole, folder / f"{kind}_whole", processor)
    dist.barrier()


def loss(policy: Any, batch: Any) -> Tensor:
    logprobs = policy(batch)
    return (logprobs * torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)).sum()


def train(checkpoint: str, folder: Path, wrapping: str, mode: Any) -> dict[str, Tensor]:
    """Two models take three turns each; return their weights. While one has its turn, the other has no memory."""
    rank = dist.get_rank()
    models: dict[str, Any] = {n: build(checkpoint, "full", wrapping == "sharded", Policy) for n in ("student", "other")}
    encoder = PromptEncoder(load_processor(checkpoint), models["student"].model)
    questions = tiny_questions(folder / f"{rank}", 2)
    batch = pack([GroupTokens(encoder(q), [torch.tensor([9, 8, 7])]) for q in questions], encoder.pad_token_id)
    if wrapping == "ddp":
        models = {n: DistributedDataParallel(m, gradient_as_bucket_view=True) for n, m in models.items()}
    optimizers = {n: build_optimizer(m.parameters(), SETTINGS) for n, m in models.items()}
    offload = Offload(mode)
    for name, model in models.items():
        offload.add(name, model, optimizers[name])

    def sizes(name: str) -> int:
        weights = [t.to_local() if isinstance(t, DTensor) else t for t in models[name].parameters()]
        return sum(t.untyped_storage().size() for t in weights)

    for turn in range(7):
        name, other = ("student", "other") if turn % 2 == 0 else ("other", "student")
        offload.use(name)
        assert sizes(name) > 0 and (sizes(other) == 0) == (mode == "swap")
        buckets = offload._buckets.get(other, {})
        assert len(buckets) > 0 or wrapping == "sharded" or turn < 5 or mode == "none"
        assert all(b.size() == 0 for b in buckets.values()) or mode != "swap"
        with torch.no_grad():
            loss(models[name], batch)  # leaves the root unit gathered
        loss(models[name], batch).backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
        states = [v for s in optimizers[name].state.values() for v in s.values() if v.dim()]
        held = [t.to_local() if isinstance(t, DTensor) else t for t in states]
        assert (sum(t.untyped_storage().size() for t in held) == 0) == (mode != "none")
    assert (offload.seconds > 0) == (mode != "none")
    offload.use("student", "other")
    return {
        f"{n}.{k.removeprefix('module.')}": saving.full_tensor(v).clone()
        for n, m in models.items()
        for k, v in m.state_dict().items()
    }


def main(checkpoint: str, tied: str, folder: Path) -> None:
    dist.init_process_group("gloo")
    init_device_mesh("cpu", (2,))
    for kind in ("full", "bfloat16", "lora"):
        check_files(tied if kind == "bfloat16" else checkpoint, folder, kind)
    for wrapping in ("sharded", "ddp"):
        results = [train(checkpoint, folder, wrapping, mode) for mode in ("none", "swap")]
        start = load_model(checkpoint).state_dict()
        moved = [k for k, v in start.items() if not torch.equal(v, results[0][f"student.model.{k}"])]
        assert len(moved) > 10
        assert results[0].keys() == results[1].keys()
        assert all(torch.equal(v, results[0][k]) for k, v in results[1].items()), wrapping
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:3], Path(sys.argv[3]))
