"""The supervised warm start with TRL's SFTTrainer, in the token layout of the loop. It continues exactly after a stop."""

from __future__ import annotations

import copy
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# isort: split
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset

from openril._version import __version__
from openril.errors import DataError, RecipeError, StateError
from openril.hf import PrinterCallback, SFTConfig, SFTTrainer, TrainerCallback, transformers_logging
from openril.models.adapters import add_adapters, base_model, is_adapted
from openril.models.dummy_image import dummy_image_prompt
from openril.models.freezing import freeze, round_products
from openril.models.loading import load_model, load_student, torch_dtype
from openril.models.prompt_lengths import LeftOut
from openril.models.saving import write_model
from openril.recipe.schema import OptimizerConfig, Recipe
from openril.recipe.validation import RENAMED_KEYS
from openril.storage import refuse_changed, remove, stable_hash, write_json, write_text
from openril.training.distributed import master_dtype, sharded_by_launcher
from openril.training.interrupts import Interrupted, stop_requests
from openril.training.optimization import build_optimizer, learning_rate
from openril.training.run_folder import RunFolder
from openril.training.setup import enable_checkpointing, make_encoder, place
from openril.training.sft_examples import Example, SFTCollator, fingerprint
from openril.training.sharded_sft import ShardedTraining
from openril.training.sharding import is_sharded

KEEP_CHECKPOINTS = 2
_WHOLE = "whole"
_FREE = ("sft.enabled", "sft.save_every", "sft.micro_batch_size", "student.gradient_checkpointing", "student.dtype")
"""Settings that may change when a run is continued, because what is learned does not depend on them."""


class SFTFolder(RunFolder):
    """``run_dir/sft``: ``student/`` (once the stage is done), ``metrics.jsonl``, ``settings.json``, and
    ``checkpoints/`` while it runs."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe.sft_student_path.parent)
        self.left_out = LeftOut(recipe, "sft")
        self.settings_path = self.path / "settings.json"

    @property
    def done(self) -> bool:
        return self.student_path.is_dir()

    def whole_checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, oldest first. A killed process leaves one without its mark."""
        found = [p for p in self.checkpoints_path.glob("checkpoint-*") if (p / _WHOLE).exists()]
        return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))

    def remove_torn_checkpoints(self) -> None:
        for path in self.checkpoints_path.glob("checkpoint-*"):
            if not (path / _WHOLE).exists():
                remove(path)


def sft_settings(recipe: Recipe, examples: Sequence[Example]) -> dict[str, Any]:
    """Return the settings that decide what the SFT student learns, as plain data."""
    return {
        "student": recipe.student.model_dump(mode="json", exclude={"sampler"}),
        "sft": recipe.sft.model_dump(mode="json"),
        "precision": recipe.train.precision,
        "max_prompt_length": recipe.data.max_prompt_length,
        "max_completion_length": recipe.train.max_completion_length,
        "seed": recipe.seed,
        "examples": fingerprint(examples),
    }


def refuse_changed_sft(folder: SFTFolder, settings: dict[str, Any]) -> None:
    """Raise StateError if the folder was begun with other settings."""
    try:
        saved = json.loads(folder.settings_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    for old, new in RENAMED_KEYS.items():
        if old.startswith("sft.") and old.removeprefix("sft.") in saved:
            saved[new.removeprefix("sft.")] = saved.pop(old.removeprefix("sft."))
    saved.pop("versions", None)
    fix = f"remove {folder.path} to begin again"
    refuse_changed(folder.path, saved, settings, ignored=lambda key: key in _FREE, fix=fix)


def train_sft(
    recipe: Recipe,
    examples: Sequence[Example],
    *,
    report: Callable[[int, int, dict[str, Any]], None] = lambda step, total, row: None,
    warn: Callable[[str], None] = lambda message: None,
) -> Path:
    """Train ``recipe.student.model`` on the examples and write ``run_dir/sft/student``; return that folder.

    The loss is the mean negative log-probability in nats over the answer tokens of a batch on all processes, end of turn
    included. After a stop of any kind, the next call continues from the newest complete checkpoint to the same weights.

    ``report`` receives steps done, steps in all and the row of metrics, on the first process.

    Raises Interrupted after saving if a signal asks to stop, RecipeError if batch sizes do not divide, StateError if the
    folder was begun with other settings or the loss is not finite, and DataError if every example is too long.
    """
    folder = SFTFolder(recipe)
    if folder.done:
        return folder.student_path
    with own_accelerate_state(), quiet_transformers(), stop_requests() as stop:
        trainer = _build_trainer(recipe, examples, folder, stop, report)
        accelerator = trainer.accelerator
        checkpoint = _prepare_folder(folder, recipe, examples, accelerator)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        step, total = trainer.state.global_step, trainer.state.max_steps
        if step < total:
            raise Interrupted(f"stopped after step {step}; the same command continues")
        left_out = sum("source" in row for row in folder.left_out.rows().values())
        if left_out >= len(examples):
            raise DataError(
                f"data.max_prompt_length: all {left_out} examples are longer than {recipe.data.max_prompt_length} allows"
                f" (see {folder.left_out.path}). Raise it or lower student.max_pixels."
            )
        if left_out and accelerator.is_main_process:
            warn(
                f"{left_out} of {len(examples)} examples were too long and left out; {folder.left_out.path} lists them"
            )
        model = accelerator.unwrap_model(trainer.model_wrapped)
        base = base_model(model)
        base.config, base.generation_config = trainer.configs
        dtype, main = torch_dtype(recipe.student.dtype), accelerator.is_main_process
        widen = recipe.train.precision == "bfloat16"
        write_model(model, folder.student_path, trainer.processing_class, dtype=dtype, widen=widen, main=main)
        if main:
            remove(folder.checkpoints_path)
        accelerator.wait_for_everyone()
    return folder.student_path


def micro_batches(recipe: Recipe, num_processes: int) -> tuple[int, int]:
    """Return (examples per forward pass, passes per step) of one process. Raises RecipeError if they do not divide."""
    sft = recipe.sft
    micro = min(sft.micro_batch_size, max(1, sft.batch_size // num_processes))
    accumulation, rest = divmod(sft.batch_size, micro * num_processes)
    if rest:
        raise RecipeError(
            f"sft.batch_size: expected a multiple of micro_batch_size {micro} x {num_processes} processes, got"
            f" {sft.batch_size}. Set it to {micro * num_processes * (accumulation + 1)} or change sft.micro_batch_size."
        )
    return micro, accumulation


def _prepare_folder(folder: SFTFolder, recipe: Recipe, examples: Sequence[Example], accelerator: Any) -> Path | None:
    """Prepare the folder, and return the checkpoint to continue from or None. The first process decides for all."""
    outcome: list[Any] = [None, ""]
    if accelerator.is_main_process:
        settings = sft_settings(recipe, examples)
        folder.remove_torn_checkpoints()
        whole = folder.whole_checkpoints()
        try:
            if whole:
                refuse_changed_sft(folder, settings)
        except StateError as e:
            outcome[1] = str(e)
        else:
            outcome[0] = whole[-1] if whole else None
            versions = {"openril": __version__, "torch": torch.__version__}
            write_json(folder.settings_path, {**settings, "versions": versions})
            folder.cut_after(int(whole[-1].name.rpartition("-")[2]) if whole else 0)
            if not whole:
                folder.left_out.clear()
    broadcast_object_list(outcome)
    if outcome[1]:
        raise StateError(outcome[1])
    return outcome[0]


def _build_trainer(
    recipe: Recipe,
    examples: Sequence[Example],
    folder: SFTFolder,
    stop: list[int],
    report: Callable[[int, int, dict[str, Any]], None],
) -> _Trainer:
    cuda = torch.cuda.is_available()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    micro, accumulation = micro_batches(recipe, processes)
    sft = recipe.sft
    settings: dict[str, Any] = {
        "output_dir": str(folder.checkpoints_path),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": sft.epochs,
        "max_steps": sft.max_steps or -1,
        "learning_rate": sft.optimizer.learning_rate,
        "max_grad_norm": sft.optimizer.max_grad_norm,
        "bf16": recipe.train.precision == "bfloat16",
        "fp16": False,
        "use_cpu": not cuda,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "gradient_checkpointing": False,  # switched on below
        "save_strategy": "steps" if sft.save_every else "no",
        "save_steps": sft.save_every or 500,
        "save_total_limit": KEEP_CHECKPOINTS,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        # Our collator builds the rows, so that TRL prepares and truncates nothing.
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        # Workers decode and resize the images of the next micro-batches while the GPU works.
        "dataloader_num_workers": min(4, max(0, (os.cpu_count() or 1) // processes - 1)) if cuda else 0,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about the new name of a setting, which older versions lack
        args = SFTConfig(**settings)
    args._n_gpu = min(1, args.n_gpu)  # one process drives one device, as in every other stage
    model: Any
    sharded = recipe.train.shard and processes > 1
    model, processor = load_student(recipe.student, recipe.student.model, master_dtype(recipe), meta=sharded)
    configs = copy.deepcopy((model.config, model.generation_config))
    if recipe.student.lora.enabled:
        torch.manual_seed(stable_hash(recipe.seed, "adapters"))
        model = add_adapters(model, recipe.student.lora)
    else:
        freeze(model, recipe.student.freeze)
    if recipe.train.precision == "bfloat16":
        round_products(model, torch.bfloat16, lossless=True)
    if recipe.student.gradient_checkpointing:
        enable_checkpointing(model)
    encoder = make_encoder(recipe, processor, base_model(model), keep=0)
    collator = SFTCollator(
        examples,
        encoder,
        max_prompt_length=recipe.data.max_prompt_length,
        max_length=recipe.data.max_prompt_length + recipe.train.max_completion_length,
        left_out=folder.left_out,
        dummy=dummy_image_prompt(encoder, model, processes),
    )
    if sharded:
        place(model, model, recipe, args.device, sharded=True)
    trainer = (_ShardedTrainer if sharded else _Trainer)(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=Dataset.from_dict({"example": list(range(len(examples)))}),
        processing_class=processor,
    )
    # Some models declare that their loss cannot be divided by the tokens of all accumulated micro-batches. The loss here
    # is TRL's, which can. Without this, each micro-batch would have the same weight however few tokens it has.
    trainer.model_accepts_loss_kwargs = True
    if (handler := trainer.accelerator.ddp_handler) is not None:
        handler.gradient_as_bucket_view = True  # as in the loop: no second copy of the gradients
    trainer.recipe = recipe
    trainer.settings = sft.optimizer
    trainer.configs = configs
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Steps(trainer, folder, stop, report))
    return trainer


class _Trainer(SFTTrainer):
    """TRL's trainer with the optimizer and the learning rate of the loop."""

    recipe: Recipe
    settings: OptimizerConfig
    configs: tuple[Any, Any]
    """The model's configurations before training, because the trainer writes token ids and ``use_cache`` into them."""
    learned_tokens: Any = None

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            self.optimizer = build_optimizer(trained.parameters(), self.settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            settings, trained = self.settings, optimizer or self.optimizer
            assert trained is not None
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                trained,
                lambda step: learning_rate(settings, step, num_training_steps) / settings.learning_rate,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self.learned_tokens = num_items_in_batch
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # Vision-language models are saved under other names than they have in memory, and the trainer's loading skips
        # names it does not know: it would continue with the weights the run began with. from_pretrained knows both.
        model = self.model if model is None else model
        if is_adapted(model) or sharded_by_launcher(self.accelerator):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        student = self.recipe.student
        saved = load_model(
            resume_from_checkpoint,
            dtype=master_dtype(self.recipe),
            trust_remote_code=student.trust_remote_code,
            attn_implementation=student.attn_implementation,
        )
        model.load_state_dict(saved.state_dict())

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none, because these checkpoints are temporary."""


class _ShardedTrainer(ShardedTraining, _Trainer):
    """The same for a sharded model."""


@dataclass(eq=False, repr=False)
class _Steps(TrainerCallback):
    """Writes metrics, handles requests to stop, and marks complete checkpoints."""

    trainer: _Trainer
    folder: SFTFolder
    stop: list[int]
    report: Callable[[int, int, dict[str, Any]], None]
    started: float = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A part that no example of the batch used (the projector, in a batch of text) has no gradient, but with several
        # processes it has zeros. The optimizer must do the same in both cases.
        if self.trainer.accelerator.num_processes == 1 or is_sharded(self.trainer.model):
            model: Any = self.trainer.model
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if any(gather_object([bool(self.stop)])) and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        step, loss = state.global_step, float(logs["loss"])
        if not math.isfinite(loss):
            raise StateError(
                f"the SFT loss of step {step}: expected a finite number, got {loss}. Lower sft.optimizer.learning_rate or"
                " set train.precision to float32, then run the same command: it continues from the last checkpoint."
            )
        if not state.is_world_process_zero:
            return
        row = {
            "step": step,
            "loss": loss,
            "learning_rate": learning_rate(self.trainer.settings, step - 1, state.max_steps),
            "tokens": int(self.trainer.learned_tokens) if self.trainer.learned_tokens is not None else None,
            "mean_token_accuracy": logs.get("mean_token_accuracy"),
            "entropy": logs.get("entropy"),
            "grad_norm": logs.get("grad_norm"),
            "seconds": time.perf_counter() - self.started,
        }
        row = {k: v for k, v in row.items() if v is not None}
        self.folder.log_metrics(row)
        self.report(step, state.max_steps, row)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()  # until every process has written its random state
        if state.is_world_process_zero:
            path = self.folder.checkpoints_path / f"checkpoint-{state.global_step}" / _WHOLE
            write_text(path, f"step {state.global_step}\n")


@contextmanager
def own_accelerate_state() -> Iterator[None]:
    """Isolate accelerate's settings, which are global, from those of the other stages of this process."""
    before = {k: v for k, v in os.environ.items() if k.startswith("ACCELERATE_")}
    AcceleratorState._reset_state(True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(True)
        for key in [k for k in os.environ if k.startswith("ACCELERATE_") and k not in before]:
            del os.environ[key]
        os.environ.update(before)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turn the trainer's messages and progress bars off inside, because the stage has its own display."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        transformers_logging.disable_progress_bar()  # the trainer turns it on
