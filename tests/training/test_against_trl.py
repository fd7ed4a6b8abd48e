"""Our step against TRL's GRPOTrainer on the same batch: prompts, advantages, loss and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from openril.algorithm.advantages import group_advantages
from openril.algorithm.objective import response_weights, token_loss
from openril.models.loading import load_model, load_processor
from openril.models.packing import GroupTokens, Policy, pad_rows
from openril.models.prompts import PromptEncoder
from openril.training.distributed import AcceleratorState
from support.tiny import tiny_questions

EPSILON, BETA, LIMIT, GENERATIONS = 0.1, 0.3, 10, 4


def disturb(model: torch.nn.Module, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * size)


@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo"])
def test_same_loss_and_gradients_as_trl(loss_type: str, tiny_qwen: Path, tmp_path: Path):
    from datasets import Dataset

    from openril.hf import GRPOConfig, GRPOTrainer

    AcceleratorState._reset_state(reset_partial_state=True)
    questions = [tiny_questions(tmp_path / "data", 4)[i] for i in (0, 3)]  # one image each, as TRL needs
    rows: list[dict[str, Any]] = [
        {
            "prompt": [{"role": "user", "content": q.question}],
            "images": [Image.open(str(q.images[0].path)).convert("RGB")],
        }
        for q in questions
    ]
    rewards = [0.0, 1.0, 2.0, 1.0, 2.0, 0.0, 0.0, 0.0]

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return rewards[: len(completions)]

    trainer = GRPOTrainer(
        model=str(tiny_qwen),
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(tmp_path / "trl"),
            use_cpu=True,
            bf16=False,
            report_to="none",
            per_device_train_batch_size=2 * GENERATIONS,
            num_generations=GENERATIONS,
            max_completion_length=LIMIT,
            loss_type=loss_type,
            scale_rewards="group" if loss_type == "grpo" else "none",
            beta=BETA,
            epsilon=EPSILON,
            use_bias_correction_kl=False,  # TRL's default weighs the KL term by the ratio; Eq. 2 does not
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=Dataset.from_list([{"prompt": r["prompt"]} for r in rows]),
        processing_class=load_processor(str(tiny_qwen)),
    )
    model: Any = trainer.model
    model.train()
    disturb(model, 1, 0.02)  # away from the reference
    batch = trainer._generate_and_score_completions([row for row in rows for _ in range(GENERATIONS)])
    trainer.current_gradient_accumulation_steps = 1

    # The same batch as ours.
    encoder = PromptEncoder(load_processor(str(tiny_qwen)), model)
    prompts = [encoder(q) for q in questions]
    for i, prompt in enumerate(prompts):
        mask = batch["prompt_mask"][i * GENERATIONS].bool()
        assert batch["prompt_ids"][i * GENERATIONS][mask].tolist() == prompt.input_ids.tolist()
    completions = [
        ids[mask.bool()] for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    groups = [GroupTokens(p, completions[i * GENERATIONS : (i + 1) * GENERATIONS]) for i, p in enumerate(prompts)]
    layout = pad_rows(groups, encoder.pad_token_id)
    policy, reference = Policy(model), Policy(load_model(str(tiny_qwen)))
    advantages = group_advantages(torch.tensor(rewards).view(2, GENERATIONS), scale_by_std=loss_type == "grpo").view(-1)
    assert torch.allclose(batch["advantages"], advantages, atol=1e-6)

    # pi_old is the policy now; then the policy moves on, far enough to clip on both sides.
    with torch.no_grad():
        old, ref = policy(layout), reference(layout)
    width = batch["completion_ids"].shape[1]
    batch["old_per_token_logps"] = torch.nn.functional.pad(old, (0, width - old.shape[1]))
    disturb(model, 2, 0.05)
    model.zero_grad()
    theirs = trainer._compute_loss(model, batch)
    theirs.backward()
    their_gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    now = policy(layout)
    terms = token_loss(now, old, advantages, epsilon=EPSILON, ref_logprobs=ref, beta=BETA)
    weights = response_weights(
        layout.mask, torch.full((8,), GENERATIONS), per_length=loss_type == "grpo", max_completion_length=LIMIT
    )
    ours = (weights * (terms * layout.mask).sum(-1)).sum() / len(groups)
    ours.backward()
    ratio = (now - old).exp()[layout.mask]
    assert (ratio > 1 + EPSILON).any() and (ratio < 1 - EPSILON).any()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for name, p in model.named_parameters():
        if name in their_gradients:
            scale = their_gradients[name].abs().max()
            assert torch.allclose(p.grad, their_gradients[name], rtol=0, atol=1e-4 * float(scale) + 1e-9), name
