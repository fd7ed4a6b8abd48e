"""Run by test_two_processes.py, alone or under torchrun: trains the tiny recipe and writes what came out.

usage: two_processes.py CHECKPOINT RUN_DIR DATA_DIR KIND
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import save_file

import openril.training.setup
from openril.training.processes import leave_process_group
from support.loop import make_trainer, tiny_recipe

# See test_accumulation_is_the_whole_batch_at_once: in float32 Adam turns rounding noise into steps.
openril.training.setup.master_dtype = lambda recipe: torch.float64  # type: ignore[assignment]

checkpoint, run, data, kind = sys.argv[1:]
overrides = {
    # Text-only and image questions mix, and the projector trains: ranks see unlike questions.
    "mixed": {"student__freeze": ["vision_tower"]},
    "all": {"student__freeze": [], "discriminator__sees": "image", "discriminator__freeze": []},
}[kind]
recipe = tiny_recipe(Path(run), Path(checkpoint), train__max_steps=2, train__save_every=1, **overrides)
trainer = make_trainer(recipe, Path(data), count=6)
trainer.train()
if trainer.accelerator.is_main_process:
    assert trainer.discriminator is not None
    network = trainer.accelerator.unwrap_model(trainer.discriminator.network)
    state = {f"student.{k}": v for k, v in trainer.policy.unwrapped.state_dict().items()}
    state |= {f"discriminator.{k}": v for k, v in network.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, Path(run) / "final.safetensors")
trainer.accelerator.wait_for_everyone()
leave_process_group()
