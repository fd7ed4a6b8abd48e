"""Run by test_two_processes.py, alone or in two processes: trains tiny recipes one after the other.

usage: two_processes.py FOLDER packed|plain NAME:KIND=CHECKPOINT ...

Each case reads FOLDER/NAME/data, and writes FOLDER/NAME/run1 or run2, by the number of processes.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import save_file

import openril.training.setup
from openril.records import Group
from openril.stages.train import cached_teacher_responses
from openril.training.distributed import leave_process_group, release_memory
from openril.training.loop import permutation
from support.loop import SubstringRewards, make_trainer, tiny_recipe

# See test_accumulation_is_the_whole_batch_at_once: in float32 Adam turns rounding noise into steps.
openril.training.setup.master_dtype = lambda recipe: torch.float64  # type: ignore[assignment]

CASES: dict[str, dict[str, Any]] = {
    # Text-only and image questions mix, and the projector trains: ranks see different questions.
    "mixed": {"student__freeze": ["vision_tower"]},
    "all": {"student__freeze": [], "discriminator__inputs": "image", "discriminator__freeze": []},
    # 4 x 0.4 / 0.6 = 3 earlier groups: two for one process and one for the other.
    # With everything else that regularizes the discriminator.
    "replay": {
        "discriminator__inputs": "question",
        "discriminator__replay": 0.4,
        "discriminator__ema_decay": 0.5,
        "discriminator__gradient_penalty": 0.1,
        "discriminator__label_smoothing": 0.1,
        "rewards__similarity__gate": {"enabled": True, "closed_below": 0.0, "open_above": 1.0},
    },
    # Two questions are asked again, one by each of two processes.
    "retry": {"train__algorithm": "dr_grpo", "train__retry": {"questions_per_step": 2}},
    # Unequal numbers, teacher responses that are judged right, and every switch on advantages and teacher tokens.
    "switches": {
        "collect__num_responses": 6,
        "rewards__answer": {"kind": "rules"},
        "train__num_generations": 3,
        "train__num_teacher_responses": 2,
        "train__teacher_draw": "judged_right",
        "train__baseline": "students",
        "train__negative_scale": 0.5,
        "train__teacher_advantages": "positive",
        "train__teacher_weight": "shaped",
        "train__kl_rows": "student",
    },
    # Groups that teach nothing have no pass, and samples of image questions are right often enough without teachers.
    "skipped": {
        "train__beta": 0.0,
        "train__negative_scale": 0.5,
        "train__teacher_responses_below": 0.5,
        "discriminator__mode": "none",
        "rewards__similarity": {"weight": 0.0},
    },
}


class HalfRight(SubstringRewards):
    """Of an image question's samples the first is right; all responses to text alone earn the same."""

    def score(self, groups: Sequence[Group]) -> dict[str, float]:
        counts = super().score(groups)
        for group in groups:
            for rollout in group.rollouts:
                if not group.question.images:
                    rollout.reward = 1.0
                elif rollout.response.from_student:
                    rollout.verdict = float(rollout.response.index == 0)
        return counts


def train(folder: Path, checkpoint: Path, kind: str, passes: str) -> None:
    run, data, overrides = folder / f"run{os.environ.get('WORLD_SIZE', '1')}", folder / "data", dict(CASES[kind])
    if kind == "switches":
        overrides["cache_dir"] = str(data / "cache")
    recipe = tiny_recipe(
        run,
        checkpoint,
        train__max_steps=2,
        train__save_every=1,
        train__packed=passes == "packed",
        train__max_tokens_per_micro_batch=200,  # fewer micro-batches of text than of images
        **overrides,
    )
    trainer = make_trainer(recipe, data, HalfRight() if kind == "skipped" else None, count=12)
    # The first batch gives one rank nothing but text and the other nothing but images; the second mixes them.
    text = [q for q in trainer.questions if not q.images]
    images = [q for q in trainer.questions if q.images]
    arranged = [*text[:2], *images[:2], text[2], *images[2:4], text[3]]
    order = permutation(len(arranged), recipe.seed, 0)
    trainer.questions = [arranged[order.index(i)] for i in range(len(arranged))]
    if trainer.retry is not None:
        trainer.retry.questions = {q.id: q for q in trainer.questions}
        trainer.retry.right = lambda question: [f"The answer is {question.answer}."]
    first = [q for q, _ in trainer.batch_at(0)]
    assert trainer.accelerator.num_processes == 1 or len({bool(q.images) for q in first}) == 1
    if kind == "switches":  # the main process writes what is right, and the other waits for it
        main, wait = trainer.accelerator.is_main_process, trainer.accelerator.wait_for_everyone
        trainer.teacher_responses = cached_teacher_responses(recipe, trainer.questions, check=main, wait=wait)
    trainer.train()
    assert trainer.policy.packing.on is (
        passes == "packed" and trainer.policy.unwrapped.model.config.model_type != "gemma3"
    )
    if trainer.accelerator.is_main_process:
        state = {f"student.{k}": v for k, v in trainer.policy.unwrapped.state_dict().items()}
        if trainer.discriminator is not None:
            network = trainer.accelerator.unwrap_model(trainer.discriminator.network)
            state |= {f"discriminator.{k}": v for k, v in network.state_dict().items()}
        save_file({k: v.clone() for k, v in state.items()}, run / "final.safetensors")
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    place, way = Path(sys.argv[1]), sys.argv[2]
    for argument in sys.argv[3:]:
        case, _, model = argument.partition("=")
        name, _, kind = case.partition(":")
        train(place / name, Path(model), kind, way)
        release_memory()
    leave_process_group()
