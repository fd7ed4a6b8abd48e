"""Run by test_sharding.py, alone or under torchrun: trains tiny recipes one after the other, and writes what came out.

usage: sharded.py FOLDER CASE=CHECKPOINT ...
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

import openril.training.setup
from openril.errors import DataError
from openril.models.freezing import module_group
from openril.models.packing import GroupTokens, pack
from openril.models.saving import full_tensor
from openril.records import Group
from openril.storage import write_json
from openril.training.distributed import leave_process_group, release_memory
from openril.training.loop import RILTrainer, permutation
from openril.training.sharding import decoder_layers, frozen_vision
from support.loop import SubstringRewards, make_trainer, tiny_recipe

# In float32 Adam turns rounding noise into steps.
openril.training.setup.master_dtype = lambda recipe: (  # type: ignore[assignment]
    torch.float64 if recipe.train.precision == "float32" else torch.float32
)

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
        "discriminator__label_smoothing": 0.1,
        "discriminator__update_below": 1.0,
    },
    # With averaged weights of the discriminator, which are sharded and saved with its optimizer.
    "lora": {"student__lora__enabled": True, "discriminator__ema_decay": 0.5},
    "tied": {"student__freeze": ["vision_tower"]},
    "clipped": {
        "train__num_iterations": 2,
        "discriminator__mode": "fixed",
        "train__optimizer__max_grad_norm": 0.1,
        "student__gradient_checkpointing": True,
    },
    "bradley_terry": {"discriminator__loss": "bradley_terry"},
    "bfloat16": {"train__precision": "bfloat16", "student__freeze": ["vision_tower"]},
    "failing": {},
}
WITH_DDP = ("mixed", "all", "lora", "bradley_terry")
"""Cases that also run with whole models on every process."""


class FailingRewards(SubstringRewards):
    """The last process raises in the first step, and the others do not know of it."""

    def score(self, groups: Sequence[Group]) -> dict[str, float]:
        if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            raise DataError("questions.jsonl:7: no such image")
        return super().score(groups)


def trainer_of(folder: Path, checkpoint: Path, case: str, shard: bool, **overrides: Any) -> RILTrainer:
    settings: dict[str, Any] = {
        "train__max_steps": 2,
        "train__shard": shard,
        "train__max_tokens_per_micro_batch": 200,  # fewer micro-batches of text than of images
        "train__optimizer__max_grad_norm": 0.0,
        "discriminator__optimizer__max_grad_norm": 0.0,
        **CASES[case],
        **overrides,
    }
    rewards = FailingRewards() if case == "failing" else None
    trainer = make_trainer(tiny_recipe(folder, checkpoint, **settings), folder.parent / "data", rewards, count=12)
    # The first batch gives one rank nothing but text and the other nothing but images; the second mixes them.
    text = [q for q in trainer.questions if not q.images]
    images = [q for q in trainer.questions if q.images]
    arranged = [*text[:2], *images[:2], text[2], *images[2:4], text[3]]
    order = permutation(len(arranged), trainer.recipe.seed, 0)
    trainer.questions = [arranged[order.index(i)] for i in range(len(arranged))]
    return trainer


def weights(trainer: RILTrainer) -> dict[str, torch.Tensor]:
    state = {f"student.{k}": full_tensor(v) for k, v in trainer.policy.unwrapped.state_dict().items()}
    if trainer.discriminator is not None:
        network = trainer.accelerator.unwrap_model(trainer.discriminator.network)
        state |= {f"discriminator.{k}": full_tensor(v) for k, v in network.state_dict().items()}
    return {k: v.clone() for k, v in state.items()}


def check_pass(trainer: RILTrainer) -> dict[str, Any]:
    """Look at one pass of the student, and at what is sharded."""
    assert trainer.discriminator is not None and trainer.policy.reference is not None
    trainer.policy.policy.train()
    question = next(q for q in trainer.questions if q.images)
    encoder = trainer.policy.encoder
    group = GroupTokens(encoder(question), [torch.arange(40, 45), torch.arange(50, 57)])
    seen: list[tuple[int, torch.dtype]] = []

    def look(layer: Any, args: Any, kwargs: Any) -> None:
        seen.append((id(kwargs["group_layout"]), layer.mlp.down_proj.weight.dtype))

    layers = decoder_layers(trainer.policy.unwrapped.model)
    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    with trainer.accelerator.autocast():
        trainer.policy.policy(pack([group], encoder.pad_token_id)).sum().backward()
    for hook in hooks:
        hook.remove()
    parameters = dict(trainer.policy.unwrapped.named_parameters())
    inner = trainer.policy.unwrapped.model.model
    others = [trainer.policy.reference.model.model, trainer.discriminator.network.backbone]
    towers = [{id(p) for p in frozen_vision(m)} for m in (inner, *others)]
    trained = {n: p for n, p in parameters.items() if p.requires_grad}
    head = trainer.discriminator.network.head
    kept = []
    hook = head.register_forward_pre_hook(lambda module, args: kept.append(module.weight.dtype))
    trainer.discriminator.score(trainer.sample_groups(trainer.batch_at(0)))
    hook.remove()
    found = {
        "layouts": len({layout for layout, _ in seen}),
        "layers": len(seen),
        "gathered": sorted({str(dtype) for _, dtype in seen}),
        "head": sorted({str(dtype) for dtype in kept}),
        "whole": sorted({str(module_group(n)) for n, p in parameters.items() if not isinstance(p, DTensor)}),
        "shared": [len(towers[0] & tower) for tower in towers],
        "sharded gradients": all(isinstance(p.grad, DTensor) for p in trained.values()),
        "rows": {n: p.to_local().shape[0] for n, p in trained.items() if n.endswith("down_proj.weight")},
    }
    trainer.policy.optimizer.zero_grad(set_to_none=True)
    return found


def main(folder: Path, cases: dict[str, Path]) -> None:
    for case, checkpoint in cases.items():
        for shard in (False, True):
            if not shard and case not in WITH_DDP and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                continue
            trainer = trainer_of(folder / f"{case}-{shard}", checkpoint, case, shard)
            trainer.train()
            state = weights(trainer)
            found = check_pass(trainer) if shard and case in ("mixed", "bfloat16") else {}
            if trainer.accelerator.is_main_process:
                save_file(state, trainer.folder.path / "final.safetensors")
                samplers: Any = trainer.sampler
                probes = [trainer.policy.packing, samplers.packing, getattr(trainer.discriminator, "packing", None)]
                states = [p.state for p in probes if p is not None]
                write_json(trainer.folder.path / "found.json", {**found, "packing": states})
            alone = trainer.accelerator.num_processes == 1
            trainer.accelerator.wait_for_everyone()
            del trainer, state
            release_memory()
            if alone:
                break


if __name__ == "__main__":
    main(Path(sys.argv[1]), {case: Path(path) for case, path in (a.split("=") for a in sys.argv[2:])})
    leave_process_group()
