"""TRL's trainer on a model that ``sharding.shard`` sharded: what it would do with whole weights on one process."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from openril.models.adapters import is_adapted
from openril.models.loading import load_model
from openril.models.saving import full_tensor, write_model
from openril.training.distributed import master_dtype
from openril.training.shard_files import load_optimizer, save_optimizer
from openril.training.sharding import shard_like


class ShardedTraining:
    """Goes before the trainer in the bases of a class. ``recipe`` is the trainer's."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model._is_accelerate_prepared = True  # accelerate would wrap it in DDP

    def autocast_smart_context_manager(self: Any, cache_enabled: bool | None = True) -> AbstractContextManager[None]:
        return self.accelerator.autocast()  # which the wrapper would have brought

    def _get_grad_norm(self: Any, model: Any, grad_norm: Any = None) -> float:
        if grad_norm is None:
            grad_norm = self.accelerator.clip_grad_norm_(model.parameters(), float("inf"))
        return float(full_tensor(grad_norm))

    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        main = self.accelerator.is_main_process
        if is_adapted(self.model):
            state = {name: full_tensor(v) for name, v in self.model.state_dict().items() if "lora_" in name}
            if main:
                self._save(output_dir, state_dict=state)
        else:
            write_model(self.model, Path(output_dir or self.args.output_dir), self.processing_class, main=main)
        self.accelerator.wait_for_everyone()  # until the folder exists

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        accelerator = self.accelerator
        save_optimizer(Path(output_dir), "sft", self.optimizer, accelerator.process_index, accelerator.num_processes)

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        load_optimizer(Path(checkpoint), "sft", self.optimizer)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        step = int(checkpoint.rpartition("-")[2])
        now = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
        self.lr_scheduler.load_state_dict({**self.lr_scheduler.state_dict(), **now})

    @torch.no_grad()
    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        if is_adapted(self.model):
            from peft import load_peft_weights

            saved = load_peft_weights(resume_from_checkpoint, device="cpu")
            saved = {re.sub(r"(\.lora_[AB])\.", r"\1.default.", name): value for name, value in saved.items()}
        else:
            student = self.recipe.student
            saved = load_model(  # memory of the file, of which only this process's rows are read
                resume_from_checkpoint,
                dtype=master_dtype(self.recipe),
                trust_remote_code=student.trust_remote_code,
                attn_implementation=student.attn_implementation,
            ).state_dict()
        own = self.model.state_dict(keep_vars=True)
        for name, value in saved.items():
            own[name].copy_(shard_like(value, own[name]))
