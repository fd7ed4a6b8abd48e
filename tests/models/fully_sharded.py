"""Run by test_fully_sharded.py on two processes: ``fully_sharded.py MODEL FOLDER``. Exits with 1 where numbers differ."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from openril.models.freezing import freeze
from openril.models.loading import load_model, load_processor
from openril.models.packing import GroupTokens, Policy, pack
from openril.models.prompts import PromptEncoder
from support.tiny import tiny_questions


def policy_of(checkpoint: str) -> Policy:
    model = load_model(checkpoint)
    freeze(model, ["vision_tower"])
    policy = Policy(model)
    policy.enable_packing()
    return policy


def loss_of(logprobs: Tensor) -> Tensor:
    return (logprobs * torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)).sum()


def main(checkpoint: str, folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    sharded, whole = policy_of(checkpoint), policy_of(checkpoint)
    encoder = PromptEncoder(load_processor(checkpoint), whole.model)
    torch.manual_seed(0)
    groups = [
        GroupTokens(encoder(q), [torch.randint(10, 200, (n,)) for n in (5, 1, 9)])
        for q in tiny_questions(folder / str(rank), 4)
    ]
    shares = [pack(groups[:2], encoder.pad_token_id), pack(groups[2:], encoder.pad_token_id)]
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)

    mine = sharded(shares[rank])
    loss_of(mine).backward()
    both = [whole(share) for share in shares]
    (sum(map(loss_of, both)) / 2).backward()

    assert torch.allclose(mine, both[rank], atol=1e-6)
    expected = dict(whole.named_parameters())
    size = max(float(p.grad.abs().max()) for p in expected.values() if p.grad is not None)
    compared = 0
    for name, parameter in sharded.named_parameters():
        if parameter.grad is not None:
            full = parameter.grad.full_tensor()
            assert torch.allclose(full, expected[name].grad, atol=1e-6 * size), name
            compared += 1
    assert compared == sum(p.grad is not None for p in expected.values()) > 20
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
