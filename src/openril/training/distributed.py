"""Processes and devices: accelerate, set up the same way for every stage."""

from __future__ import annotations

import gc
import os
import warnings
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, set_seed

from openril.errors import RecipeError
from openril.recipe.schema import Recipe


def make_accelerator(recipe: Recipe) -> Accelerator:
    """An Accelerator with the recipe's precision. Stages of one process may differ in it, so earlier state is dropped.

    Seeds the global generators too (for user reward functions); everything of ours draws from streams of its own.
    """
    AcceleratorState._reset_state()
    # torch 2.13 has a new name for it, which accelerate does not pass on yet.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    accelerator = Accelerator(
        mixed_precision="bf16" if recipe.train.precision == "bfloat16" else "no",
        cpu=not torch.cuda.is_available(),
        log_with=list(recipe.train.log_to) or None,
        project_dir=str(recipe.run_path),
        step_scheduler_with_optimizer=False,
        # Buffers are constants (rotary frequencies), so they need not be sent before every forward pass. Gradients that
        # are views into DDP's buckets need no second copy of their memory.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    set_seed((recipe.seed + accelerator.process_index) % 2**32)
    return accelerator


def start_trackers(accelerator: Accelerator, recipe: Recipe) -> None:
    """Begin a run in the trackers the recipe names, once nothing is left that could be refused."""
    if recipe.train.log_to:
        accelerator.init_trackers("openril", config=flat(recipe.model_dump(mode="json")))


def one_process(command: str) -> None:
    """Raises RecipeError under a launcher of several processes, each of which would do all of the work."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(
            f"ril {command} is one process; give it without a launcher. What is launched on several is"
            " sft, discriminator and train: torchrun --nproc_per_node N -m openril.cli train RECIPE"
        )


def release_memory() -> None:
    """Give back what a finished stage's models held: they are in reference cycles, which wait for the collector."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def leave_process_group() -> None:
    """End the communication with other processes, if there was any: the last thing a command does."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def master_dtype(recipe: Recipe) -> torch.dtype:
    """Type of the weights while training."""
    return torch.bfloat16 if recipe.train.precision == "pure_bf16" else torch.float32


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether weights and optimizer states are spread over processes (FSDP, ZeRO)."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """Nested settings as dotted keys with plain values: what trackers take."""
    out: dict[str, int | float | str | bool] = {}
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict):
            out |= flat(value, name)
        else:
            out[name] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return out
