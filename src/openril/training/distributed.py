"""Processes and devices: the same accelerate setup for every stage."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, set_seed

from openril.errors import RecipeError
from openril.recipe.schema import Recipe


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Return an Accelerator with the recipe's precision, without the state that an earlier stage left.

    It also seeds the global generators, for reward functions of users; the library draws from separate streams.
    """
    AcceleratorState._reset_state()
    # torch 2.13 renamed this argument, and accelerate still passes the old name.
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
    """Begin a run in the trackers that the recipe names. Call this after everything that could refuse the run."""
    if recipe.train.log_to:
        accelerator.init_trackers("openril", config=flat(recipe.model_dump(mode="json")))


def one_process(command: str) -> None:
    """Raise RecipeError under a launcher of several processes, each of which would do all of the work."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(
            f"ril {command}: expected one process, got WORLD_SIZE {os.environ['WORLD_SIZE']}. Run it without a launcher."
            " Only sft, select, discriminator and train run in several:"
            " torchrun --nproc_per_node N -m openril.cli train RECIPE"
        )


def release_memory() -> None:
    """Free the models of a finished stage, which are in reference cycles that only the collector finds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def leave_process_group() -> None:
    """End the communication with other processes, if there was any. A command does this last."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def master_dtype(recipe: Recipe) -> torch.dtype:
    """Return the type of the weights during training."""
    return torch.bfloat16 if recipe.train.precision == "pure_bf16" else torch.float32


def sharded_by_launcher(accelerator: Accelerator) -> bool:
    """Return whether the launcher's settings ask for FSDP or DeepSpeed."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def compute_dtype(recipe: Recipe) -> torch.dtype | None:
    """Return the type in which sharded weights are gathered; None for that of the weights."""
    return torch.bfloat16 if recipe.train.precision == "bfloat16" else None


def shards(recipe: Recipe, accelerator: Accelerator, warn: Callable[[str], None] = lambda message: None) -> bool:
    """Return whether the models are sharded over the processes; say so if train.shard is set and they cannot be.

    Raises:
        RecipeError: Under the launcher's FSDP or DeepSpeed, which no stage supports.
    """
    if sharded_by_launcher(accelerator):
        raise RecipeError(
            f"train.shard: expected a launch without {accelerator.distributed_type.value}, which no stage supports. Launch"
            " with torchrun or recipes/accelerate/ddp.yaml, and set train.shard to true to shard the models."
        )
    if recipe.train.shard and accelerator.num_processes == 1:
        warn("train.shard: there is one process, so nothing is sharded")
    return recipe.train.shard and accelerator.num_processes > 1


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """Return nested settings as dotted keys with plain values, as trackers expect them."""
    out: dict[str, int | float | str | bool] = {}
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict):
            out |= flat(value, name)
        else:
            out[name] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return out
