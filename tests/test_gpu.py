"""What a GPU computes differently from a CPU, against plain references. Each test also runs on the CPU, so that it cannot
become outdated unseen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openril.models.adapters import base_model
from openril.models.group_attention import GroupLayout
from openril.models.loading import load_model, load_processor
from openril.models.packing import GroupTokens, Policy, packing_difference
from openril.models.packing_probe import trial_group
from openril.models.prompts import PromptEncoder
from openril.recipe.schema import OptimizerConfig
from openril.records import Response
from openril.training.offload import Offload
from openril.training.optimization import CompensatedAdamW, build_optimizer, join
from support.tiny import tiny_questions

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])])

GROUPS = [(130, [40, 3, 17]), (9, [60])]
HEADS = {"4:1": (8, 2), "7:1": (14, 2), "8:1": (16, 2)}
"""Query and key-value heads of real models: InternVL3 and Qwen2.5-VL-7B have 7 : 1, Qwen2.5-VL-3B 8 : 1."""


def visible() -> Tensor:
    """bool [L, L]: whether the token of a row sees that of a column."""
    group, response = [], []
    for number, (prompt, lengths) in enumerate(GROUPS):
        for part, length in enumerate([prompt, *lengths]):
            group += [number] * length
            response += [part] * length  # 0: the prompt
    g, r = torch.tensor(group), torch.tensor(response)
    return ((g[:, None] == g) & ((r == 0) | (r[:, None] == r))).tril()


@DEVICES
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("ratio", HEADS)
def test_attention_forward_and_backward(ratio: str, size: int, device: str) -> None:
    """In bfloat16, as the packed pass of a 16-bit model runs it. On a GPU this is FlexAttention."""
    generator = torch.Generator().manual_seed(0)
    (heads, kv_heads), mask = HEADS[ratio], visible()
    inputs = [
        torch.randn(1, len(mask), h, size, generator=generator).bfloat16().transpose(1, 2)
        for h in (heads, kv_heads, kv_heads)
    ]
    weights = torch.randn(1, len(mask), heads, size, generator=generator).bfloat16()
    query, key, value = (x.to(device).requires_grad_() for x in inputs)
    layout = GroupLayout.of(GROUPS).to(torch.device(device))
    out = layout.attend(nn.Module(), query, key, value, size**-0.5)
    found = [out.detach(), *torch.autograd.grad((out * weights.to(device)).float().sum(), [query, key, value])]

    q, k, v = exact = [x.double().requires_grad_() for x in inputs]
    times = heads // kv_heads
    scores = (q @ k.repeat_interleave(times, 1).transpose(-1, -2) * size**-0.5).masked_fill(~mask, float("-inf"))
    dense = (scores.softmax(-1) @ v.repeat_interleave(times, 1)).transpose(1, 2)
    expected = [dense.detach(), *torch.autograd.grad((dense * weights.double()).sum(), exact)]
    for name, ours, theirs in zip(("output", "query", "key", "value"), found, expected, strict=True):
        assert float((ours.cpu().double() - theirs).norm() / theirs.norm()) < 0.02, name


@DEVICES
def test_adamw_in_one_fused_pass(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(300, 70, generator=generator) for _ in range(2))
    parameter = nn.Parameter(start.to(device, copy=True))
    optimizer = build_optimizer([parameter], OptimizerConfig(learning_rate=1e-3, weight_decay=0.1))
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]
    for _ in range(3):
        parameter.grad = gradient.to(device)
        optimizer.step()
    # With the same gradient in each step both bias-corrected moments are the gradient and its square.
    expected = start.double()
    for _ in range(3):
        expected = expected * (1 - 1e-3 * 0.1) - 1e-3 * gradient.double() / (gradient.double().abs() + 1e-8)
    assert torch.allclose(parameter.detach().cpu().double(), expected, rtol=0, atol=2e-6)


@DEVICES
def test_adamw_that_keeps_what_bfloat16_rounds_off(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(300, 70, generator=generator).bfloat16() for _ in range(2))
    parameter = nn.Parameter(start.to(device, copy=True))
    optimizer = build_optimizer([parameter], OptimizerConfig(learning_rate=1e-6))
    assert isinstance(optimizer, CompensatedAdamW)
    for _ in range(20):
        parameter.grad = gradient.to(device)
        optimizer.step()
    whole = join(parameter.detach(), optimizer.state[parameter]["remainder"]).cpu().double()
    expected = start.double() - 20e-6 * gradient.double().sign()
    # Float32 weights near 1 lie 1.2e-7 apart, and each of 20 steps rounds.
    assert torch.allclose(whole, expected, rtol=0, atol=20 * 2**-23)
    assert float((parameter.detach().cpu() == start).float().mean()) > 0.5  # bfloat16 alone would lose most steps


@DEVICES
def test_packing_of_bfloat16_weights(device: str, tiny_student: Path, tmp_path: Path) -> None:
    """The packed pass of a 16-bit model gives the log-probabilities of the plain pass within 16-bit rounding."""
    model: Any = load_model(str(tiny_student), dtype=torch.bfloat16).to(device)
    encoder = PromptEncoder(load_processor(str(tiny_student)), base_model(model))
    prompts = [encoder(q) for q in tiny_questions(tmp_path, 2)]
    answer = [encoder.completion_ids(Response("q", "a", 0, text), 8) for text in ("red", "It is a blue one")]
    groups = [trial_group(GroupTokens(prompt, answer)) for prompt in prompts]
    policy = Policy(model)
    policy.enable_packing()
    assert packing_difference(policy, groups, encoder.pad_token_id, torch.device(device)) < 0.05


@DEVICES
def test_models_take_turns_through_host_memory(device: str) -> None:
    """Parked weights and optimizer states leave the device, come back unchanged, and training goes on as without."""
    results, parked = [], []
    for mode in ("none", "swap"):
        torch.manual_seed(0)
        models = {name: nn.Linear(1024, 1024).to(device) for name in ("student", "discriminator")}
        optimizers = {
            n: build_optimizer(m.parameters(), OptimizerConfig(learning_rate=1e-3)) for n, m in models.items()
        }
        offload = Offload(mode, pin=device == "cuda")
        for name, model in models.items():
            offload.add(name, model, optimizers[name])
        for name in ("student", "discriminator", "student"):
            offload.use(name)
            models[name](torch.ones(8, 1024, device=device)).square().mean().backward()
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
        tensors = [*models["discriminator"].parameters()]
        tensors += [
            v for optimizer in optimizers.values() for s in optimizer.state.values() for v in s.values() if v.dim()
        ]
        parked.append(sum(t.untyped_storage().size() for t in tensors))
        if device == "cuda":
            torch.cuda.synchronize()
            held = sum(p.nbytes for p in models["student"].parameters())
            assert mode == "none" or torch.cuda.memory_allocated() < held + parked[0] // 4
        offload.use("student", "discriminator")
        results.append([p.detach().cpu() for model in models.values() for p in model.parameters()])
        del models, optimizers, offload, tensors, model
    assert parked[0] == 4 * 5 * (1024 * 1024 + 1024) and parked[1] == 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
