"""The packed and the plain pass train alike, and where packing would be wrong the plain pass takes over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openril.models.group_attention import GroupLayout
from openril.models.packing import Policy
from openril.models.vision_features import VisionFeatures
from openril.records import Group, Rollout
from openril.storage import read_jsonl
from support.loop import make_trainer, tiny_recipe


@pytest.fixture
def in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 Adam turns the rounding noise of a gradient that is 0 in truth into a step of full size."""
    monkeypatch.setattr("openril.training.setup.master_dtype", lambda recipe: torch.float64)


def build(checkpoint: Path, folder: Path, name: str, **overrides: Any) -> tuple[Any, list[str]]:
    """A trainer on eight questions with one image, two and none, and the warnings it will give."""
    trainer = make_trainer(tiny_recipe(folder / name, checkpoint, **overrides), folder / "data")
    warnings: list[str] = []
    trainer.policy.warn = warnings.append
    if trainer.discriminator is not None:
        trainer.discriminator.warn = warnings.append
    return trainer, warnings


def final_weights(trainer: Any) -> dict[str, Tensor]:
    state = {f"student.{k}": v for k, v in trainer.policy.unwrapped.state_dict().items()}
    if trainer.discriminator is not None:
        state |= {f"discriminator.{k}": v for k, v in trainer.discriminator.network.state_dict().items()}
    return {k: v.clone() for k, v in state.items()}


def responses_of(trainer: Any) -> list[tuple[str, str, str]]:
    files = sorted(trainer.folder.rollouts_path.glob("*.jsonl"))
    return [(r["question_id"], r["source"], r["text"]) for f in files for r in read_jsonl(f)]


def assert_same_run(a: Any, b: Any) -> None:
    """Every metric of every step within 1e-6, the same texts, the same weights within 1e-6."""
    left, right = a.folder.metrics(), b.folder.metrics()
    assert len(left) == len(right) == a.recipe.train.max_steps
    for one, other in zip(left, right, strict=True):
        names = {n for n in one if n.startswith(("train/", "reward/", "discriminator/"))}
        assert len(names) > 10 and names == {n for n in other if n.startswith(("train/", "reward/", "discriminator/"))}
        for name in names:
            assert one[name] == pytest.approx(other[name], abs=1e-6), f"{name}, step {one['step']}"
    assert responses_of(a) == responses_of(b) and responses_of(a)
    mine, theirs = final_weights(a), final_weights(b)
    for name, value in mine.items():
        assert torch.allclose(value, theirs[name], atol=1e-6, rtol=0), name


QWEN, INTERN, BOTH = ["tiny_qwen"], ["tiny_internvl"], ["tiny_qwen", "tiny_internvl"]
CURVES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "ril": (BOTH, {"train__max_steps": 3}),
    "mu 2": (BOTH, {"train__num_iterations": 2}),
    "checkpointing": (INTERN, {"student__gradient_checkpointing": True}),
    "dr_grpo": (QWEN, {"train__algorithm": "dr_grpo", "train__num_generations": 4}),
    "grpo": (INTERN, {"train__algorithm": "grpo", "train__num_generations": 4}),
    "beta 0 in micro-batches": (QWEN, {"train__beta": 0.0, "train__max_tokens_per_micro_batch": 150}),
    "all trains": (INTERN, {"student__freeze": [], "discriminator__inputs": "image", "discriminator__freeze": []}),
    "projector frozen": (QWEN, {"student__freeze": ["vision_tower", "projector"], "discriminator__inputs": "question"}),
    "lora": (QWEN, {"student__lora": {"enabled": True, "r": 2}}),
}


@pytest.mark.parametrize(("student", "name"), [(s, name) for name, (students, _) in CURVES.items() for s in students])
def test_same_curves(student: str, name: str, request: pytest.FixtureRequest, tmp_path: Path, in_double: None):
    overrides = {"train__max_steps": 2, **CURVES[name][1]}
    tiny_student = request.getfixturevalue(student)
    runs = []
    for packed in (True, False):
        trainer, warnings = build(tiny_student, tmp_path, f"packed {packed}", train__packed=packed, **overrides)
        start = final_weights(trainer)
        trainer.train()
        assert warnings == []
        assert trainer.policy.packing.on is packed
        assert any((v - start[k]).abs().max() > 1e-4 for k, v in final_weights(trainer).items() if "student" in k)
        runs.append(trainer)
    assert_same_run(*runs)
    rewards = [row["train/reward"] for row in runs[0].folder.metrics()]
    assert runs[0].policy.updates == len(rewards) * runs[0].recipe.train.num_iterations


def test_no_pass_is_wasted(tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Calls of a Policy in an update of 4 questions, a micro-batch each: forward for pi_theta, reference under beta."""
    calls: list[str] = []
    original = Policy.forward

    def counted(self: Policy, rows: Any, **options: Any) -> Any:
        calls.append("policy" if any(p.requires_grad for p in self.parameters()) else "reference")
        assert rows.layout is not None
        return original(self, rows, **options)

    for beta, mu, expected in [
        (0.0, 1, {"policy": 4}),
        (0.01, 1, {"policy": 4, "reference": 4}),
        (0.01, 3, {"policy": 12, "reference": 4}),
        (0.0, 2, {"policy": 8}),
    ]:
        trainer, _ = build(
            tiny_qwen,
            tmp_path,
            f"{beta} {mu}",
            train__beta=beta,
            train__num_iterations=mu,
            train__max_tokens_per_micro_batch=1,
        )
        groups, _ = trainer.step(trainer.batch_at(0))  # the first use tries packing out
        monkeypatch.setattr(Policy, "forward", counted)
        calls.clear()
        trainer.policy.update(groups, 1)
        monkeypatch.setattr(Policy, "forward", original)
        assert {kind: calls.count(kind) for kind in calls} == expected, (beta, mu)


def test_adapters_reference_is_one_pass_too(tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer, _ = build(tiny_qwen, tmp_path, "run", student__lora={"enabled": True, "r": 2})
    groups, _ = trainer.step(trainer.batch_at(0))
    calls: list[bool] = []
    original = Policy.forward

    def counted(self: Policy, rows: Any, **options: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return original(self, rows, **options)

    monkeypatch.setattr(Policy, "forward", counted)
    trainer.policy.update(groups, 1)
    assert calls == [False, True]  # one micro-batch


@pytest.mark.parametrize("frozen", [["vision_tower"], ["vision_tower", "projector"]], ids=["tower", "vision side"])
def test_the_tower_runs_once_for_policy_reference_and_later_epochs(
    frozen: list[str], tiny_student: Path, tmp_path: Path
):
    trainer, _ = build(tiny_student, tmp_path, "run", student__freeze=frozen, train__num_iterations=2)
    groups = taught(trainer)
    images = sum(bool(g.question.images) for g in groups)
    calls = count_tower_calls(trainer)
    trainer.policy.update(groups, 0)
    assert images > 2 and len(calls) == images + 1  # the plain pass of the first use's comparison ran it once more
    trainer.policy.update(groups, 1)
    assert len(calls) == images + 1


def test_a_tower_that_trains_runs_every_time(tiny_qwen: Path, tmp_path: Path):
    """The reference's tower is another one, which stays as it was: its features are kept."""
    trainer, _ = build(tiny_qwen, tmp_path, "run", student__freeze=[])
    groups = taught(trainer)
    images = sum(bool(g.question.images) for g in groups)
    trainer.policy.update(groups, 0)
    calls = count_tower_calls(trainer)
    trainer.policy.update(groups, 1)
    assert len(calls) == images
    assert trainer.policy.unwrapped.vision.store.bytes == 0
    assert trainer.policy.reference.vision.store.bytes > 0


def taught(trainer: Any) -> list[Group]:
    """Groups of the first batch with their teachers' responses alone, ready for an update."""
    groups = [Group(q, [Rollout(r) for r in trainer.teacher_responses(q, v)]) for q, v in trainer.batch_at(0)]
    for g in groups:
        for i, rollout in enumerate(g.rollouts):
            rollout.advantage = i - (len(g.rollouts) - 1) / 2
    return groups


def count_tower_calls(trainer: Any) -> list[None]:
    calls: list[None] = []
    for policy in (trainer.policy.unwrapped, trainer.policy.reference):
        tower = VisionFeatures(policy.model).tower
        assert tower is not None
        embedding = next(m for n, m in tower.named_modules() if "patch_embed" in n.rsplit(".", 1)[-1])
        embedding.register_forward_pre_hook(lambda *_: calls.append(None))
    return calls


# ---- where packing would be wrong --------------------------------------------------------------------------------------


def forgetful(self: GroupLayout, module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention over the whole row, as if it were one text."""
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(query, key, value, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)


def compare_with_plain(checkpoint: Path, tmp_path: Path, reason: str, name: str) -> None:
    falling, warnings = build(checkpoint, tmp_path, "falls back", train__max_steps=2)
    falling.train()
    student = [w for w in warnings if not w.startswith("discriminator")]
    assert len(student) == 1 and name in student[0] and reason in student[0]
    assert falling.policy.packing.on is False
    plain, silent = build(checkpoint, tmp_path, "plain", train__max_steps=2, train__packed=False)
    plain.train()
    assert silent == []
    assert_same_run(falling, plain)


def test_sliding_windows_fall_back(tiny_gemma3: Path, tmp_path: Path, in_double: None):
    compare_with_plain(tiny_gemma3, tmp_path, "sliding_window", "Gemma3ForConditionalGeneration")


def test_attention_within_images_falls_back(tiny_gemma3_full_attention: Path, tmp_path: Path, in_double: None):
    compare_with_plain(tiny_gemma3_full_attention, tmp_path, "nats a token", "Gemma3ForConditionalGeneration")


def test_attention_that_forgets_the_groups_falls_back(
    tiny_qwen: Path, tmp_path: Path, in_double: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(GroupLayout, "attend", forgetful)
    compare_with_plain(tiny_qwen, tmp_path, "nats a token", "Qwen2_5_VLForConditionalGeneration")


def test_short_responses_prove_nothing_about_longer_ones(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Responses of one token have nothing in the row that could be seen by others."""
    monkeypatch.setattr(GroupLayout, "attend", forgetful)
    trainer, warnings = build(tiny_qwen, tmp_path, "run", discriminator__mode="none")
    groups = taught(trainer)
    for g in groups:
        g.rollouts = [
            Rollout(replace(r.response, token_ids=(60 + i,)), advantage=r.advantage) for i, r in enumerate(g.rollouts)
        ]
    trainer.policy.update(groups, 0)
    assert trainer.policy.packing.on is False and len(warnings) == 1


def test_a_model_without_ready_features_falls_back(
    tiny_qwen: Path, tmp_path: Path, in_double: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(VisionFeatures, "available", False)
    compare_with_plain(tiny_qwen, tmp_path, "takes no ready image features", "Qwen2_5_VLForConditionalGeneration")


def test_text_alone_proves_nothing_about_images(tiny_gemma3_full_attention: Path, tmp_path: Path):
    """A first step without images must not settle the matter for later ones, nor for the sampler."""
    trainer, warnings = build(tiny_gemma3_full_attention, tmp_path, "run", discriminator__mode="none")
    assert trainer.sampler.packing.on is None
    text = [q for q in trainer.questions if not q.images][:2]
    images = [q for q in trainer.questions if q.images][:2]
    assert len(text) == len(images) == 2
    trainer.step([(q, 0) for q in text])
    assert warnings == [] and trainer.policy.packing.on is True  # exact, for these
    _, metrics = trainer.step([(q, 0) for q in images])
    assert trainer.policy.packing.on is trainer.sampler.packing.on is False
    assert metrics["train/sampling/sampling_logp_difference/max"] < 1e-4
    assert len(warnings) == 1
    trainer.step([(q, 0) for q in images])
    assert len(warnings) == 1


def test_bfloat16_packs_too(tiny_student: Path, tmp_path: Path):
    """Autocast rounds, and the comparison at first use must not take that for an error."""
    trainer, warnings = build(tiny_student, tmp_path, "run", train__precision="bfloat16", train__max_steps=1)
    trainer.train()
    assert warnings == [] and trainer.policy.packing.on is True
    assert trainer.discriminator is not None and trainer.discriminator.packing.on is True


def test_a_refused_probe_leaves_the_mode_of_training(tiny_gemma3: Path, tmp_path: Path):
    trainer, _ = build(tiny_gemma3, tmp_path, "run", discriminator__mode="none")
    trainer.step(trainer.batch_at(0))
    assert trainer.policy.packing.on is False and trainer.policy.policy.training
