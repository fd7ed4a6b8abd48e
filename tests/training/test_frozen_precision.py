"""Under autocast, frozen weights are held in the precision of the products; nothing that is learned or saved changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from openril.models import packing
from openril.models.loading import load_model, load_processor
from support.loop import make_trainer, tiny_recipe


@pytest.fixture
def published(tiny_student: Path, tmp_path: Path) -> Path:
    """A checkpoint whose values bfloat16 holds exactly, as the published ones."""
    model: Any = load_model(str(tiny_student)).bfloat16()
    model.save_pretrained(tmp_path / "published")
    load_processor(str(tiny_student)).save_pretrained(tmp_path / "published")
    return tmp_path / "published"


def linear_types(model: Any, *, trains: bool) -> set[torch.dtype]:
    layers = (m for m in model.modules() if type(m) is nn.Linear)
    return {m.weight.dtype for m in layers if m.weight.requires_grad == trains}


CASES: dict[str, dict[str, Any]] = {
    "tower": {},
    "vision side, fixed discriminator": {
        "student__freeze": ["vision_tower", "projector"],
        "discriminator__mode": "fixed",
    },
    "adapters": {"student__lora": {"enabled": True}},
}


@pytest.mark.parametrize("name", list(CASES))
def test_a_run_is_the_same_with_less_memory(
    name: str, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for rounded in (True, False):
        with monkeypatch.context() as patch:
            if not rounded:
                patch.setattr("openril.training.setup.round_products", lambda *args, **kwargs: None)
            recipe = tiny_recipe(
                tmp_path / f"run_{rounded}", published, train__precision="bfloat16", train__max_steps=2, **CASES[name]
            )
            trainer = make_trainer(recipe, tmp_path / "data", warn=lambda message: pytest.fail(message))
            trainer.train()
        model = trainer.policy.unwrapped.model
        assert linear_types(model, trains=False) == {torch.bfloat16 if rounded else torch.float32}
        assert linear_types(model, trains=True) == {torch.float32}
        assert trainer.discriminator is not None and trainer.policy.packing.on and trainer.discriminator.packing.on
        if recipe.discriminator.mode == "fixed":
            backbone = trainer.accelerator.unwrap_model(trainer.discriminator.network).backbone
            assert linear_types(backbone, trains=False) == {torch.bfloat16 if rounded else torch.float32}
        saved = recipe.run_path / "checkpoints" / "step_000002"
        results.append({part: load_file(saved / part / "model.safetensors") for part in ("student", "discriminator")})
    for part, weights in results[0].items():
        assert {w.dtype for w in weights.values()} == {torch.float32}
        assert weights.keys() == results[1][part].keys()
        assert [k for k, w in weights.items() if not torch.equal(w, results[1][part][k])] == []


def test_values_that_bfloat16_cannot_hold_stay(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", tiny_qwen, train__precision="bfloat16")
    trainer = make_trainer(recipe, tmp_path / "data")
    assert linear_types(trainer.policy.unwrapped.model, trains=False) == {torch.float32}
    assert trainer.policy.reference is not None  # it is never saved
    assert linear_types(trainer.policy.reference, trains=False) == {torch.bfloat16}


class Casts(TorchDispatchMode):
    """Counts conversions of tensors of one shape to bfloat16."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and tuple(args[0].shape) == self.shape:
            self.count += (kwargs or {}).get("dtype") == torch.bfloat16
        return func(*args, **(kwargs or {}))


class AnotherHead(nn.Linear):
    """Of any class but nn.Linear, the product is autocast's own."""


@pytest.mark.parametrize("parts", [1, 5])
def test_the_lm_head_is_cast_once(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients are those of autocast, bit for bit; over several parts the matrix's gradient is nearer to the
    exact one, because parts are added in float32."""
    torch.manual_seed(0)
    states, targets = torch.randn(20, 16, requires_grad=True), torch.randint(50, (20,))
    weight = torch.randn(50, 16)
    monkeypatch.setattr(packing, "LOGITS_BYTES", 4 * 50 * 20 // parts)
    results, counts = [], []
    for head in (nn.Linear(16, 50, bias=False), AnotherHead(16, 50, bias=False)):
        head.weight.data, states.grad = weight.clone(), None
        with Casts((50, 16)) as casts:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = packing.token_logprobs(states, torch.arange(20), targets, head, 1.0)
            (found * torch.arange(20)).sum().backward()
        assert states.grad is not None and head.weight.grad is not None
        results.append((found.detach(), states.grad.clone(), head.weight.grad.clone()))
        counts.append(casts.count)
    ours, autocasts = results
    assert torch.equal(ours[0], autocasts[0]) and torch.equal(ours[1], autocasts[1])
    if parts == 1:
        assert torch.equal(ours[2], autocasts[2])
    exact = weight.double().requires_grad_()
    logprobs = (states.detach().double() @ exact.T).log_softmax(-1)[torch.arange(20), targets]
    (logprobs * torch.arange(20)).sum().backward()
    assert exact.grad is not None
    error, autocasts_error = (float((g - exact.grad).abs().mean()) for g in (ours[2], autocasts[2]))
    assert error <= autocasts_error < 0.1
    assert counts == [1, 1 if parts == 1 else 1 + parts]
