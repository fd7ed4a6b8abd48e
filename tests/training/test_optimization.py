"""AdamW on bfloat16 weights: small steps are not lost, and a restored optimizer goes on exactly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openril.recipe.schema import OptimizerConfig
from openril.training.optimization import CompensatedAdamW, build_optimizer, join, split
from openril.training.shard_files import load_optimizer, save_optimizer

STEPS = 1000


def start() -> Tensor:
    return (torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()


def gradients(seed: int = 1, steps: int = STEPS) -> Iterator[Tensor]:
    """Yield a separate direction for every weight with noise: as in training, the mean step is a part of the rate."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(64, 32, generator=generator)
    for _ in range(steps):
        yield (direction + torch.randn(64, 32, generator=generator)).bfloat16()


def train(parameter: nn.Parameter, optimizer: Any, steps: int = STEPS) -> None:
    for gradient in gradients(steps=steps):
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def whole(parameter: nn.Parameter, optimizer: Any) -> Tensor:
    return join(parameter.detach(), optimizer.state[parameter]["remainder"])


def test_a_thousand_steps_of_1e_6_follow_float32_weights_which_plain_bfloat16_does_not():
    settings = OptimizerConfig(learning_rate=1e-6, weight_decay=0.1)
    exact, kept, plain = (nn.Parameter(start().to(t)) for t in (torch.float32, torch.bfloat16, torch.bfloat16))
    optimizer = build_optimizer([kept], settings)
    assert isinstance(optimizer, CompensatedAdamW)
    train(exact, build_optimizer([exact], settings))
    train(kept, optimizer)
    train(plain, torch.optim.AdamW([plain], lr=1e-6, betas=settings.betas, weight_decay=0.1))
    moved = exact.detach() - start().float()
    error = whole(kept, optimizer) - exact.detach()
    assert float(error.norm() / moved.norm()) < 0.01
    # What the model computes with is that weight, rounded once.
    assert float((kept.detach().float() - exact.detach()).abs().max() / exact.detach().abs().max()) < 2**-8
    # Plain bfloat16: most weights never move, and the sum of all moves is far from the correct one.
    still = (plain.float() == start().float()).float().mean()
    assert float(still) > 0.5
    assert float((plain.float() - exact.detach()).norm() / moved.norm()) > 0.5


def test_a_float32_parameter_is_updated_as_torch_does():
    settings = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1)
    exact, ours = nn.Parameter(start().float()), nn.Parameter(start().float())
    train(exact, build_optimizer([exact], settings), steps=50)
    train(ours, CompensatedAdamW([ours], lr=1e-3, betas=settings.betas, weight_decay=0.1), steps=50)
    assert torch.allclose(exact, ours, atol=1e-7)


def test_large_parameters_are_updated_in_chunks(monkeypatch: pytest.MonkeyPatch):
    results = []
    for chunk in (2**24, 100):  # 100 values are three rows of 32
        monkeypatch.setattr("openril.training.optimization._CHUNK", chunk)
        parameter = nn.Parameter(start())
        optimizer = build_optimizer([parameter], OptimizerConfig(learning_rate=1e-6))
        train(parameter, optimizer, steps=5)
        results.append(whole(parameter, optimizer))
    assert torch.equal(*results)


def test_saved_and_restored_it_goes_on_exactly(tmp_path: Path):
    settings = OptimizerConfig(learning_rate=1e-5)
    a, b = nn.Parameter(start()), nn.Parameter(start())
    first = build_optimizer([a], settings)
    train(a, first, steps=20)
    save_optimizer(tmp_path, "student", first)
    with torch.no_grad():
        b.copy_(a)
    second = build_optimizer([b], settings)
    load_optimizer(tmp_path, "student", second)
    for key, value in first.state[a].items():
        assert torch.equal(value, second.state[b][key]) and value.dtype == second.state[b][key].dtype, key
    for parameter, optimizer in ((a, first), (b, second)):
        train(parameter, optimizer, steps=20)
    assert torch.equal(whole(a, first), whole(b, second)) and torch.equal(a, b)


def test_split_is_exact_rounding():
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(3))
    # 1 + 2^-8 is exactly between two bfloat16 values, where the remainder is at the end of its range.
    values = torch.cat([values, torch.tensor([0.0, -0.0, 1 + 2**-8, -1 - 2**-8, 1e-30, -3e38])])
    rounded, remainder = split(values)
    assert torch.equal(join(rounded, remainder), values)
    assert torch.equal(rounded[:-6], values[:-6].bfloat16())  # no ties among the random ones
