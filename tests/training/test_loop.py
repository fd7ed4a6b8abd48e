"""Algorithm 2 on tiny models of both architectures, in one process."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from openril.errors import StateError
from openril.models.packing import GroupTokens, pad_rows
from openril.records import Question
from openril.training.loop import permutation, total_steps
from support.loop import SubstringRewards, make_trainer, tiny_recipe


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in trainer.policy.unwrapped.state_dict().items()}


def test_a_step_changes_the_student_and_reports_everything(tiny_student: Path, tmp_path: Path):
    trainer = make_trainer(tiny_recipe(tmp_path / "run", tiny_student, train__max_steps=1), tmp_path / "data")
    before = weights(trainer)
    trainer.train()
    changed = {k for k, v in weights(trainer).items() if not torch.equal(v, before[k])}
    assert any("language_model" in k for k in changed)
    assert not any("visual.blocks" in k or "vision_tower" in k for k in changed)  # frozen by default
    [row] = trainer.folder.metrics()
    for name in (
        "discriminator/loss", "discriminator/accuracy_a", "discriminator/accuracy_b", "discriminator/accuracy_student",
        "discriminator/length_only_accuracy", "train/reward", "reward/teacher_similarity", "train/kl", "train/loss",
        "train/sampling/sampling_logp_difference/mean", "time/sampling", "time/update", "train/completions/mean_length",
    ):  # fmt: skip
        assert name in row
    assert row["train/ratio"] == pytest.approx(1.0)  # mu = 1: pi_old is pi_theta
    assert row["train/sampling/sampling_logp_difference/max"] < 1e-4
    rollouts = (trainer.folder.rollouts_path / "step_000001.jsonl").read_text().splitlines()
    assert len(rollouts) == 4 * (2 + 2)
    for rollout in map(json.loads, rollouts):  # all of them are in the update, which re-tokenizes the teachers' texts
        assert rollout["schema"] == 2 and 0 < rollout["learned"] == (rollout["tokens"] or rollout["learned"])
        assert len(rollout["image_hashes"]) == len(rollout["images"]) and None not in rollout["image_hashes"]


def test_discriminator_learns_before_it_rewards(tiny_qwen: Path, tmp_path: Path):
    rewards = SubstringRewards()
    recipe = tiny_recipe(tmp_path / "run", tiny_qwen, train__num_iterations=2)
    trainer = make_trainer(recipe, tmp_path / "data", rewards)
    assert trainer.discriminator is not None
    for name in ("update", "score"):
        original = getattr(trainer.discriminator, name)

        def noted(*arguments: Any, name: str = name, original: Any = original) -> Any:
            rewards.order.append(name)
            return original(*arguments)

        setattr(trainer.discriminator, name, noted)
    trainer.step(trainer.batch_at(0))
    assert rewards.order == ["begin", "update", "update", "score", "rewards"]


def test_rewards_come_from_the_updated_discriminator(tiny_qwen: Path, tmp_path: Path):
    """student_prob in the rollouts is the prediction of the discriminator after its update, not before."""
    trainer = make_trainer(
        tiny_recipe(tmp_path / "run", tiny_qwen, discriminator__optimizer={"learning_rate": 0.01}), tmp_path / "data"
    )
    assert trainer.discriminator is not None
    stale = copy.deepcopy(trainer.discriminator.network)
    groups, _ = trainer.step(trainer.batch_at(0))
    scores = [r.student_prob for g in groups for r in g.rollouts]
    trainer.discriminator.score(groups)
    assert [r.student_prob for g in groups for r in g.rollouts] == scores
    trainer.discriminator.network = stale
    trainer.discriminator.score(groups)
    assert [r.student_prob for g in groups for r in g.rollouts] != scores


def test_teacher_rows_use_the_students_pi_old(tiny_qwen: Path, tmp_path: Path):
    """With mu = 2 and KL off, the loss after the first step is Eq. 2 by hand with the student's first log-probabilities
    as pi_old for teacher rows too."""
    recipe = tiny_recipe(tmp_path / "run", tiny_qwen, train__num_iterations=2, train__beta=0.0, train__epsilon=0.05)
    recipe.train.optimizer.max_grad_norm = 0.0
    trainer = make_trainer(recipe, tmp_path / "data")
    batch = trainer.batch_at(0)
    groups = trainer.sample_groups(batch)
    assert trainer.discriminator is not None
    trainer.discriminator.score(groups)
    trainer.rewards.score(groups)
    trainer.set_advantages(groups)
    encoder, limit = trainer.policy.encoder, recipe.train.max_completion_length

    def logprobs() -> list[torch.Tensor]:
        out = []
        with torch.no_grad():
            for g in groups:
                tokens = GroupTokens(
                    encoder(g.question), [encoder.completion_ids(r.response, limit) for r in g.rollouts]
                )
                rows = pad_rows([tokens], encoder.pad_token_id)
                out += [lp[m] for lp, m in zip(trainer.policy.policy(rows), rows.mask, strict=True)]
        return out

    old = logprobs()
    first = copy.deepcopy(trainer.policy.unwrapped.state_dict())
    trainer.policy.settings.num_iterations = 1
    trainer.policy.update(groups, 0)
    between = logprobs()
    trainer.policy.unwrapped.load_state_dict(first)
    trainer.policy.optimizer.state.clear()
    trainer.policy.settings.num_iterations = 2
    metrics = trainer.policy.update(groups, 0)
    expected = 0.0
    flat = [r for g in groups for r in g.rollouts]
    for r, now, was in zip(flat, between, old, strict=True):
        ratio = (now - was).exp()
        terms = torch.minimum(ratio * r.advantage, ratio.clamp(0.95, 1.05) * r.advantage)
        expected -= float(terms.sum()) / (4 * limit) / len(groups)
    assert metrics["loss"] == pytest.approx(expected, abs=1e-6)
    assert metrics["ratio"] != pytest.approx(1.0, abs=1e-6)
    assert any(not r.response.from_student for r in flat)


def test_teacher_responses_can_stay_out_of_the_update(tiny_qwen: Path, tmp_path: Path):
    recipe = tiny_recipe(tmp_path / "run", tiny_qwen, train__teacher_responses_in_update=False)
    trainer = make_trainer(recipe, tmp_path / "data")
    groups, metrics = trainer.step(trainer.batch_at(0))
    assert metrics["discriminator/loss"] > 0  # they still train the discriminator
    for g in groups:
        assert len(g.teachers) == 2
        assert all(r.advantage == 0.0 for r in g.teachers)
        assert sum(r.advantage for r in g.students) == pytest.approx(0.0, abs=1e-9)  # their mean is their own
    lengths = sum(len(r.response.token_ids or ()) for g in groups for r in g.students)
    assert metrics["train/update_tokens"] == lengths


def test_unknown_rewards_do_not_teach(tiny_qwen: Path, tmp_path: Path):
    recipe = tiny_recipe(tmp_path / "run", tiny_qwen)
    trainer = make_trainer(
        recipe, tmp_path / "data", SubstringRewards(unknown=lambda r: r.from_student and r.index == 0)
    )
    groups, _ = trainer.step(trainer.batch_at(0))
    for g in groups:
        assert g.rollouts[0].reward is None and g.rollouts[0].advantage == 0.0
        assert sum(r.advantage for r in g.rollouts) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    "overrides",
    [
        {"train__algorithm": "grpo"},
        {"train__algorithm": "dr_grpo", "train__beta": 0.0},
        {"train__algorithm": "gail"},
        {"discriminator__mode": "fixed"},
        {"discriminator__mode": "none"},
        {"discriminator__inputs": "question"},
        {"discriminator__inputs": "image", "discriminator__loss": "bradley_terry"},
        {"student__gradient_checkpointing": True},
        {"train__precision": "bfloat16"},
        {"train__precision": "pure_bf16"},
        {"student__lora": {"enabled": True, "r": 2, "dropout": 0.1}},
        {"train__per_teacher": True, "train__num_teacher_responses": 2},
        {"train__teachers": ["b"], "train__num_teacher_responses": 1},
        {"student__freeze": ["vision_tower", "projector", "word_embeddings", "attention"]},
    ],
    ids=lambda o: "-".join(f"{k.split('__')[-1]}" for k in o),
)
def test_every_switch_runs(overrides: dict[str, Any], tiny_qwen: Path, tmp_path: Path):
    recipe = tiny_recipe(tmp_path / "run", tiny_qwen, **{"train__max_steps": 1, **overrides})
    trainer = make_trainer(recipe, tmp_path / "data")
    before = weights(trainer)
    trainer.train()
    assert any(not torch.equal(v, before[k]) for k, v in weights(trainer).items())
    [row] = trainer.folder.metrics()
    assert ("discriminator/accuracy" in row) == recipe.uses_discriminator
    assert ("discriminator/loss" in row) == (recipe.uses_discriminator and recipe.discriminator.mode == "updated")
    assert ("train/kl" in row) == (recipe.train.beta > 0)
    assert ("reward/teacher" in row) == (recipe.teacher_responses_per_question > 0)
    # Whatever is frozen stays as it was.
    frozen = {n for n, p in trainer.policy.unwrapped.named_parameters() if not p.requires_grad}
    after = weights(trainer)
    assert all(torch.equal(after[n], before[n]) for n in frozen)


def test_accumulation_is_the_whole_batch_at_once(tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Batch 1 x accumulation 8 = batch 8 x 1, for the student and for the discriminator.

    In float64: Adam divides a gradient by its own size, so in float32 the rounding noise of a gradient that is 0 in
    truth becomes a step of the learning rate's size, in whichever order the sum was taken.
    """
    monkeypatch.setattr("openril.training.setup.master_dtype", lambda recipe: torch.float64)
    results = []
    for name, tokens in (("one", 1), ("all", 100_000)):
        recipe = tiny_recipe(
            tmp_path / name,
            tiny_student,
            train__questions_per_step=8,
            train__max_tokens_per_micro_batch=tokens,
            train__max_steps=2,
            discriminator__max_tokens_per_micro_batch=tokens,
        )
        trainer = make_trainer(recipe, tmp_path / "data")
        trainer.train()
        assert trainer.discriminator is not None
        results.append(({**weights(trainer), **trainer.discriminator.network.state_dict()}, trainer.folder.metrics()))
    for key, value in results[0][0].items():
        assert torch.allclose(value, results[1][0][key], atol=1e-6), key
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert a["discriminator/loss"] == pytest.approx(b["discriminator/loss"], abs=1e-6)
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=1e-6)
        assert a["train/kl"] == pytest.approx(b["train/kl"], abs=1e-6)


def test_batches_are_permutations_one_after_the_other(tiny_qwen: Path, tmp_path: Path):
    trainer = make_trainer(tiny_recipe(tmp_path / "run", tiny_qwen), tmp_path / "data", count=6)
    drawn: list[tuple[Question, int]] = [pair for step in range(3) for pair in trainer.batch_at(step)]
    assert [epoch for _, epoch in drawn] == [0] * 6 + [1] * 6
    assert len({q.id for q, epoch in drawn if epoch == 0}) == 6
    assert permutation(6, 0, 0) != permutation(6, 0, 1) or permutation(6, 0, 0) != permutation(6, 0, 2)


def test_number_of_steps(tmp_path: Path, tiny_qwen: Path):
    recipe = tiny_recipe(tmp_path, tiny_qwen, train__max_steps=0, train__epochs=1.0, train__questions_per_step=36)
    assert total_steps(recipe, 40_000) == 1112  # 40,000 / 36 = 1,111.1
    recipe.train.epochs = 0.5
    assert total_steps(recipe, 40_000) == 556


def test_a_gradient_that_is_not_finite_changes_nothing(tiny_qwen: Path, tmp_path: Path):
    class Infinite(SubstringRewards):
        def score(self, groups: Any) -> dict[str, float]:
            super().score(groups)
            groups[0].rollouts[0].reward = 1e38
            groups[0].rollouts[1].reward = -1e38
            return {}

    recipe = tiny_recipe(tmp_path / "run", tiny_qwen, train__max_completion_length=8)
    trainer = make_trainer(recipe, tmp_path / "data", Infinite())
    before = weights(trainer)
    with pytest.raises(StateError, match=r"gradient norm.* (inf|nan)"):
        trainer.train()
    assert all(torch.equal(v, before[k]) for k, v in weights(trainer).items())
    assert not list((tmp_path / "run/checkpoints").glob("step_*"))


def test_a_question_that_comes_up_twice_in_a_step_is_sampled_twice(tiny_qwen: Path, tmp_path: Path):
    """Where one pass over three questions ends and the next begins."""
    recipe = tiny_recipe(tmp_path / "run", tiny_qwen, train__questions_per_step=4)
    trainer = make_trainer(recipe, tmp_path / "data", count=3)
    batch = trainer.batch_at(0)
    assert [epoch for _, epoch in batch] == [0, 0, 0, 1]
    groups = trainer.sample_groups(batch)
    [twin] = [g for g in groups[:3] if g.question.id == groups[3].question.id]
    assert [r.response.token_ids for r in twin.students] != [r.response.token_ids for r in groups[3].students]


def test_the_switches_reach_the_update(tiny_qwen: Path, tmp_path: Path):
    """mu = 4 at a high learning rate, so that ratios leave the clip range and the student leaves the reference."""
    found = {}
    for name, switch in (
        ("paper", {}),
        ("kl", {"train__kl_rows": "student"}),
        ("clip", {"train__clip_teacher_upper": False}),
    ):
        recipe = tiny_recipe(
            tmp_path / name, tiny_qwen, train__num_iterations=4, train__max_steps=1, train__beta=0.1,
            train__optimizer={"learning_rate": 1e-2}, **switch,
        )  # fmt: skip
        trainer = make_trainer(recipe, tmp_path / "data")
        trainer.train()
        found[name] = (weights(trainer), trainer.folder.metrics()[-1])
    row = found["paper"][1]
    assert row["train/kl"] > 0 and row["train/kl_teacher"] > 0 and row["train/kl"] != row["train/kl_teacher"]
    for name in ("kl", "clip"):
        assert any(not torch.equal(v, found["paper"][0][k]) for k, v in found[name][0].items()), name


def test_dropout_of_adapters_is_off_in_the_loop(tiny_qwen: Path, tmp_path: Path):
    """With it, the ratio would differ from 1 in a pass after the first although the weights have not changed."""
    recipe = tiny_recipe(
        tmp_path / "run", tiny_qwen, train__num_iterations=2, student__lora={"enabled": True, "r": 2, "dropout": 0.5}
    )
    trainer = make_trainer(recipe, tmp_path / "data")
    groups = trainer.sample_groups(trainer.batch_at(0))
    for g in groups:
        for n, r in enumerate(g.rollouts):
            r.advantage = float(n % 2)
    trainer.policy.optimizer.param_groups[0]["lr"] = 0.0  # the weights stay: both passes must agree
    metrics = trainer.policy.update(groups, 0)
    assert metrics["ratio"] == 1.0
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4
