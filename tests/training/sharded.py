"""Run by test_sharding.py, alone or under torchrun: trains tiny recipes one after the other, and writes what came out.

usage: sharded.py FOLDER CASE=CHECKPOINT ...
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import save_file

import openril.training.setup
from openril.storage import write_json
from openril.training.distributed import leave_process_group, release_memory
from openril.training.loop import RILTrainer, permutation
from openril.training.sharding import full_tensors
from support.loop import make_trainer, tiny_recipe

# In float32 Adam turns rounding noise into steps.
openril.training.setup.master_dtype = lambda recipe: torch.float64  # type: ignore[assignment]

CASES: dict[str, dict[str, Any]] = {
    # Text-only and image questions mix, and the projector trains: ranks see different questions.
    "mixed": {"student__freeze": ["vision_tower"]},
    "all": {"student__freeze": [], "discriminator__inputs": "image", "discriminator__freeze": []},
    "paper": {"student__freeze": ["vision_tower", "projector", "word_embeddings", "lm_head", "layer_norms"]},
    # 3 earlier groups, two for one process and one for the other, and small micro-batches: unequal numbers of passes.
    "replay": {
        "discriminator__inputs": "question",
        "discriminator__replay": 0.4,
        "discriminator__max_tokens_per_micro_batch": 60,
    },
    "lora": {"student__lora__enabled": True},
    "tied": {"student__freeze": ["vision_tower"]},
    "clipped": {
        "train__num_iterations": 2,
        "discriminator__mode": "fixed",
        "train__optimizer__max_grad_norm": 0.1,
        "student__gradient_checkpointing": True,
    },
    "bradley_terry": {"discriminator__loss": "bradley_terry"},
}


def trainer_of(folder: Path, checkpoint: Path, case: str, shard: bool, **overrides: Any) -> RILTrainer:
    settings: dict[str, Any] = {
        "train__max_steps": 2,
        "train__save_every": 1,
        "train__shard": shard,
        "train__max_tokens_per_micro_batch": 200,  # fewer micro-batches of text than of images
        "train__optimizer__max_grad_norm": 0.0,
        "discriminator__optimizer__max_grad_norm": 0.0,
        **CASES[case],
        **overrides,
    }
    trainer = make_trainer(tiny_recipe(folder, checkpoint, **settings), folder.parent / "data", count=12)
    # The first batch gives one rank nothing but text and the other nothing but images; the second mixes them.
    text = [q for q in trainer.questions if not q.images]
    images = [q for q in trainer.questions if q.images]
    arranged = [*text[:2], *images[:2], text[2], *images[2:4], text[3]]
    order = permutation(len(arranged), trainer.recipe.seed, 0)
    trainer.questions = [arranged[order.index(i)] for i in range(len(arranged))]
    return trainer


def weights(trainer: RILTrainer) -> dict[str, torch.Tensor]:
    state = {f"student.{k}": v for k, v in full_tensors(trainer.policy.unwrapped)}
    if trainer.discriminator is not None:
        network = trainer.accelerator.unwrap_model(trainer.discriminator.network)
        state |= {f"discriminator.{k}": v for k, v in full_tensors(network)}
    return {k: v.clone() for k, v in state.items()}


def main(folder: Path, cases: dict[str, Path]) -> None:
    for case, checkpoint in cases.items():
        for shard in (False, True):
            trainer = trainer_of(folder / f"{case}-{shard}", checkpoint, case, shard)
            trainer.train()
            state = weights(trainer)
            if trainer.accelerator.is_main_process:
                save_file(state, trainer.folder.path / "final.safetensors")
                write_json(trainer.folder.path / "packing.json", [trainer.policy.packing.state])
            single = trainer.accelerator.num_processes == 1
            trainer.accelerator.wait_for_everyone()
            del trainer, state
            release_memory()
            if single:
                break


if __name__ == "__main__":
    main(Path(sys.argv[1]), {case: Path(path) for case, path in (a.split("=") for a in sys.argv[2:])})
    leave_process_group()
