"""The trial that decides about packing: when it runs, what it compares, and in which precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openril.hf import AttentionInterface, AttentionMaskInterface
from openril.models.group_attention import CannotPack
from openril.models.packing_probe import PackingProbe, evaluating, full_precision
from openril.records import Group, Rollout
from support.loop import make_trainer, tiny_recipe


def probe_with(warnings: list[str], enabled: bool = True, **options: Any) -> PackingProbe:
    return PackingProbe(enabled, "student", warnings.append, **options)


def test_the_first_groups_and_the_first_images_are_tried():
    probe = probe_with([])
    assert probe.on is None and probe.due(images=False) and probe.due(images=True)
    probe.run(nn.Linear(1, 1), lambda: 0.0, images=False)
    assert probe.on is True and probe.state == "on for text"
    assert not probe.due(images=False) and probe.due(images=True)
    probe.run(nn.Linear(1, 1), lambda: 0.0, images=True)
    assert probe.on is True and probe.state == "on for images"
    assert not probe.due(images=False) and not probe.due(images=True)


def test_a_model_that_may_not_pack_is_never_tried():
    probe = probe_with([], enabled=False)
    assert probe.on is False and not probe.due(images=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_limit_depends_on_the_weights(dtype: torch.dtype):
    limit = {torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    for difference, packs in ((0.9 * limit, True), (1.1 * limit, False), (float("nan"), False)):
        warnings: list[str] = []
        probe = probe_with(warnings)
        probe.run(nn.Linear(1, 1, dtype=dtype), lambda d=difference: d, images=True)  # type: ignore[misc]
        assert probe.on is packs and len(warnings) == (not packs)


def test_a_refusal_names_model_and_reason_and_is_final():
    warnings: list[str] = []
    probe = probe_with(warnings)

    def refuse() -> float:
        raise CannotPack("it has attention dropout")

    probe.run(nn.Linear(1, 1), refuse, images=False)
    assert probe.on is False and not probe.due(images=True)
    [warning] = warnings
    assert warning.startswith("student: Linear ") and "it has attention dropout" in warning


def test_one_process_that_cannot_pack_decides_for_all():
    warnings: list[str] = []
    probe = probe_with(warnings, gather=lambda mine: [*mine, "another process's reason"])
    probe.run(nn.Linear(1, 1), lambda: 0.0, images=True)
    assert probe.on is False and "another process's reason" in warnings[0]


def test_a_trial_runs_in_evaluation_mode_without_gradients():
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    model[0].eval()
    seen: list[bool] = []
    probe_with([]).run(
        model, lambda: float(seen.append(model[1].training or torch.is_grad_enabled()) or 0), images=True
    )
    assert seen == [False]
    assert [m.training for m in (model, *model)] == [True, False, True]
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert [m.training for m in (model, *model)] == [True, False, True]


def test_a_trial_computes_in_full_precision_and_restores_the_callers():
    matmul: Any = torch.backends.cuda.matmul
    before, convolution = matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    try:
        matmul.fp32_precision = "tf32"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with full_precision(nn.Linear(1, 1)):
                assert matmul.fp32_precision == "ieee" and not torch.is_autocast_enabled("cpu")
                assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32
            assert torch.is_autocast_enabled("cpu")
        assert matmul.fp32_precision == "tf32"
        assert torch.backends.cudnn.conv.fp32_precision == convolution  # type: ignore[attr-defined]
    finally:
        matmul.fp32_precision = before


def test_flash_attention_takes_no_float32_so_a_trial_runs_without_it(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Under autocast, float32 weights meet flash attention in 16 bits; in a trial they stay what they are."""
    mapping = AttentionInterface._global_mapping
    dtypes: list[torch.dtype] = []

    def flash(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert module.config._attn_implementation == "flash_attention_2"  # the library loads the package of this name
        kind = query.device.type
        dtypes.append(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype)
        assert dtypes[-1] == torch.bfloat16, "FlashAttention only supports fp16 and bf16"
        return mapping["sdpa"](module, query, *args, **kwargs)

    monkeypatch.setattr(AttentionInterface, "_global_mapping", {**mapping, "flash_attention_2": flash})
    mapping = AttentionInterface._global_mapping
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "flash_attention_2", AttentionMaskInterface()["sdpa"])
    recipe = tiny_recipe(tmp_path / "run", tiny_student, train__precision="bfloat16", discriminator__mode="none")
    trainer = make_trainer(recipe, tmp_path / "data", count=4)
    warnings: list[str] = []
    trainer.policy.warn = warnings.append
    configs = {id(m.config): m.config for m in trainer.policy.unwrapped.modules() if hasattr(m, "config")}.values()
    for config in configs:
        config._attn_implementation = "flash_attention_2"
    trainer.policy.update(taught(trainer), 0)
    assert warnings == [] and trainer.policy.packing.on is True
    assert {c._attn_implementation for c in configs} == {"flash_attention_2"}
    calls = len(dtypes)
    trainer.policy.packing.state = "off"
    trainer.policy.update(taught(trainer), 1)
    assert len(dtypes) > calls


# ---- every family in every precision -----------------------------------------------------------------------------------


def taught(trainer: Any) -> list[Group]:
    """One group with an image, with its teachers' responses alone, ready for an update."""
    batch = [(q, v) for q, v in trainer.batch_at(0) if len(q.images) == 1][:1]
    groups = [Group(q, [Rollout(r) for r in trainer.teacher_responses(q, v)]) for q, v in batch]
    for rollout, advantage in zip(groups[0].rollouts, (-1.0, 1.0), strict=True):
        rollout.advantage = advantage
    return groups


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "pure_bf16"])
def test_packing_stays_on_after_images_were_cached(precision: str, tiny_family: Path, tmp_path: Path):
    """Sampling fills the cache in the run's precision before the trial; only Gemma 3 may fall back."""
    recipe = tiny_recipe(tmp_path / "run", tiny_family, train__precision=precision, discriminator__inputs="image")
    trainer = make_trainer(recipe, tmp_path / "data", count=4)
    warnings: list[str] = []
    policy, discriminator = trainer.policy, trainer.discriminator
    assert discriminator is not None
    policy.warn = discriminator.warn = warnings.append
    groups = taught(trainer)
    prompt = policy.encoder(groups[0].question)
    head, _ = discriminator.prompts.head(groups[0].question)
    network = discriminator.accelerator.unwrap_model(discriminator.network)
    network.enable_packing(discriminator.store)
    with torch.no_grad(), trainer.accelerator.autocast():
        policy.unwrapped.vision([prompt])
        network.vision([head])
    assert policy.unwrapped.vision.store.bytes > 0 and discriminator.store.bytes > 0
    packs = "gemma3" not in tiny_family.name
    policy.update(groups, 0)
    discriminator.score(groups)
    assert policy.packing.on is discriminator.packing.on is packs, warnings
    assert len(warnings) == (0 if packs else 2)
