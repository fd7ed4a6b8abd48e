"""Checkpoints: everything a run needs to continue bit for bit, in files that other tools read, without pickle.

A checkpoint folder holds ``student/`` and ``discriminator/`` (Hugging Face form), ``optimizer_<name>.safetensors`` (in
parts where weights are sharded, see shard_files.py), ``rng_<process>.safetensors`` with ``rng_<process>.json``,
``state.json`` and ``recipe.yaml``, and one file for each memory that the run has (``replay.jsonl``: responses that are
replayed). It is written under another name and then renamed, so a killed run leaves the one before. Any number of
processes continues from it.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor

from openril._version import __version__
from openril.errors import StateError
from openril.models.adapters import is_adapted
from openril.models.saving import checkpoint_weights, full_tensor, write_model
from openril.recipe.loading import load_saved_recipe, save_recipe
from openril.recipe.schema import Recipe
from openril.records import Question
from openril.storage import atomic_path, refuse_changed, remove, stable_hash, weights_fingerprint, write_json
from openril.training.offload import Offload
from openril.training.shard_files import load_optimizer, save_optimizer

_NAME = re.compile(r"^step_(\d{6,})$")


class Checkpoints:
    """The ``checkpoints/`` folder of a run."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Return the steps that have a complete checkpoint, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [m and int(m[1]) for m in map(_NAME.match, os.listdir(self.folder))]
        return sorted(step for step in found if step is not None)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def latest(self) -> Path | None:
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def begin(self, step: int) -> Path:
        """Create the empty folder into which all processes write checkpoint ``step``."""
        partial = self.partial(step)
        remove(partial)
        partial.mkdir(parents=True)
        return partial

    def partial(self, step: int) -> Path:
        return self.folder / f".step_{step:06d}.partial"

    def finish(self, step: int) -> Path:
        """Rename the written folder to its final name, and remove all but the last ``keep`` checkpoints."""
        place = self.path(step)
        remove(place)  # the same step again, after a run was continued from its end
        os.replace(self.partial(step), place)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old))
        return place

    def sweep(self) -> None:
        """Remove what a killed process left."""
        for path in self.folder.glob(".step_*.partial"):
            shutil.rmtree(path)


def save_rng(folder: Path, process: int) -> None:
    """Write the random states of this process: Python, numpy, torch (CPU and every GPU)."""
    kind, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(numpy.asarray(keys).astype("int64"))}
    if torch.cuda.is_available():
        tensors |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    save_file(tensors, folder / f"rng_{process}.safetensors")
    python = random.getstate()
    write_json(
        folder / f"rng_{process}.json",
        {"python": [python[0], list(python[1]), python[2]], "numpy": [kind, position, has_gauss, gauss]},
    )


def load_rng(folder: Path, process: int) -> None:
    """Restore what ``save_rng`` wrote. A process that the checkpoint does not have keeps its state."""
    path = folder / f"rng_{process}.safetensors"
    if not path.exists():
        return
    tensors = load_file(path)
    plain = json.loads((folder / f"rng_{process}.json").read_text())
    version, state, gauss = plain["python"]
    random.setstate((version, tuple(state), gauss))
    kind, position, has_gauss, cached = plain["numpy"]
    numpy.random.set_state((kind, tensors["numpy"].numpy().astype("uint32"), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda{i}"], i)


def read_progress(folder: Path) -> dict[str, Any]:
    """Return the contents of ``state.json``. Raises StateError if the file is missing or unreadable."""
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as e:
        raise StateError(f"{folder}: expected a checkpoint ({e}). Remove it to continue from the one before it.") from e


# Settings that may change when a run is continued, because what is learned does not depend on them.
_FREE = (
    "run_dir", "cache_dir", "teachers", "sft", "eval", "export", "judge.base_urls", "judge.concurrency", "judge.timeout",
    "judge.max_retries", "judge.api_key_env", "judge.max_unknown_share", "data.train", "data.validation",
    "data.validation_split", "data.allow_urls", "student.model", "student.dtype", "discriminator.pretraining",
    "discriminator.init", "discriminator.at_chance_accuracy", "discriminator.saturated_accuracy", "discriminator.health_window",
    "train.max_steps", "train.epochs", "train.save_every", "train.keep_checkpoints", "train.eval_every", "train.log_to",
    "train.eval_suite", "train.log_groups_every",
    "train.log_rollouts_every", "train.max_tokens_per_micro_batch", "train.packed", "train.shard", "train.offload",
    "train.vision_cache_gib", "train.report_every",
    "student.gradient_checkpointing",
    "data.max_prompt_length", "collect.student", "collect.max_completion_length", "collect.sampling", "collect.judge_responses",
    "collect.questions_per_batch", "collect.shard_size", "student.sampler.base_urls", "student.sampler.sync",
    "student.sampler.weights_dir", "student.sampler.api_key_env", "student.sampler.concurrency", "student.sampler.timeout",
    "student.sampler.max_logprob_difference", "train.questions_per_sampling_batch", "discriminator.max_tokens_per_micro_batch",
)  # fmt: skip


def refuse_changed_recipe(path: Path, saved_recipe: Path, recipe: Recipe, *, fix: str) -> None:
    """Raise StateError if ``recipe`` differs from the saved one in a setting that decides what is learned.

    Args:
        path: The run or checkpoint folder that the message names.
        saved_recipe: The recipe file that was saved in it.
        fix: See ``storage.refuse_changed``.
    """

    def free(key: str) -> bool:
        return any(key == f or key.startswith(f + ".") for f in _FREE)

    def plain(r: Recipe) -> dict[str, Any]:
        return {**r.model_dump(mode="json"), "teachers (names)": r.teacher_names}

    refuse_changed(path, plain(load_saved_recipe(saved_recipe)), plain(recipe), ignored=free, fix=fix)


def refuse_changed_length(path: Path, saved_recipe: Path, recipe: Recipe, *, fix: str) -> None:
    """Raise StateError if the number of steps has changed although a learning rate of the loop depends on it.

    Args: As for ``refuse_changed_recipe``.
    """
    optimizers = {"train": recipe.train.optimizer}
    if recipe.uses_discriminator and recipe.discriminator.mode == "updated":
        optimizers["discriminator"] = recipe.discriminator.optimizer
    falling = [f"{k}.optimizer.schedule is {o.schedule}" for k, o in optimizers.items() if o.schedule != "constant"]

    def length(r: Recipe) -> dict[str, float]:
        epochs = {} if recipe.train.max_steps else {"train.epochs": r.train.epochs}
        return {"train.max_steps": r.train.max_steps, **epochs}

    if falling:
        reason = f"{fix}, because {' and '.join(falling)}, so that every step's learning rate depends on it"
        refuse_changed(path, length(load_saved_recipe(saved_recipe)), length(recipe), fix=reason)


def run_fingerprint(recipe: Recipe, questions: Sequence[Question]) -> dict[str, str]:
    """Return what decides a run besides its settings: questions (the cache compares images), and the first student."""
    start = recipe.start_student
    return {
        "questions (data.train)": str(stable_hash([[q.id, q.question, *q.answers] for q in questions])),
        "starting student (student.model, sft)": weights_fingerprint(Path(start)) or start,
    }


class Memory(Protocol):
    """What a run remembers of earlier steps, equal in all processes."""

    def save(self, path: Path) -> None: ...

    def load(self, path: Path) -> None: ...


@dataclass
class Saver:
    """Saves and restores the student, the discriminator, their optimizers, random states and memories."""

    checkpoints: Checkpoints
    accelerator: Accelerator
    recipe: Recipe
    policy: Any | None = None
    """The wrapped student; None in pre-training."""
    processor: Any = None
    network: Any | None = None
    """The wrapped discriminator; None without one."""
    discriminator_processor: Any = None
    optimizers: dict[str, Any] = field(default_factory=dict)
    fingerprint: dict[str, str] = field(default_factory=dict)
    """See ``run_fingerprint``; kept in state.json."""
    memories: dict[str, Memory] = field(default_factory=dict)
    """What the run remembers, by the name of its file."""
    offload: Offload = field(default_factory=Offload)

    def save(self, step: int) -> None:
        """Write checkpoint ``step``. Every process must call this."""
        accelerator = self.accelerator
        if accelerator.is_main_process:
            self.checkpoints.begin(step)
        accelerator.wait_for_everyone()
        folder = self.checkpoints.partial(step)
        if not all(gather_object([folder.is_dir()])):
            raise StateError(
                f"run_dir: expected a folder that all machines share, but not all see {folder}. Set one on a shared disk."
            )
        if self.policy is not None:
            self.write_student(folder / "student")
            if is_adapted(accelerator.unwrap_model(self.policy).model):
                self.write_adapter(folder / "adapter")
            self._write_optimizer(folder, "student")
        if self.network is not None:
            self.write_discriminator(folder / "discriminator")
            self._write_optimizer(folder, "discriminator")
        if accelerator.is_main_process:
            for name, memory in self.memories.items():
                memory.save(folder / name)
        save_rng(folder, accelerator.process_index)
        if accelerator.is_main_process:
            save_recipe(self.recipe, folder / "recipe.yaml")
            versions = {"openril": __version__, "torch": torch.__version__}
            progress = {"step": step, "processes": accelerator.num_processes, "versions": versions}
            write_json(folder / "state.json", {**progress, "fingerprint": self.fingerprint})
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self.checkpoints.finish(step)
        accelerator.wait_for_everyone()

    def restore(self, folder: Path) -> None:
        """Restore optimizers, random states and memories; models are built from the checkpoint already."""
        for name, optimizer in self.optimizers.items():
            load_optimizer(folder, name, optimizer)
            self.offload.park_states(name)
        for name, memory in self.memories.items():
            memory.load(folder / name)
        load_rng(folder, self.accelerator.process_index)

    def write_student(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write the student as an ordinary checkpoint with its processor, adapters merged. Every process must call this."""
        self.offload.use("student")
        model = self.accelerator.unwrap_model(self.policy).model
        write_model(model, folder, self.processor, dtype=dtype, **self._writing)

    def student_tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield the student's weights under the names of its checkpoint, whole, with adapters merged, tied weights once.

        Every process must take all of them.
        """
        self.offload.use("student")
        for name, value in checkpoint_weights(self.accelerator.unwrap_model(self.policy).model):
            yield name, value.to(dtype) if value.is_floating_point() else value

    def write_adapter(self, folder: Path) -> None:
        """Write the student's adapter alone, in peft's form. Every process must call this."""
        self.offload.use("student")
        model = self.accelerator.unwrap_model(self.policy).model
        state = {k: full_tensor(v) for k, v in model.state_dict().items() if "lora_" in k}
        if self.accelerator.is_main_process:
            with atomic_path(folder) as temporary:
                model.save_pretrained(temporary, state_dict=state)

    def write_discriminator(self, folder: Path) -> None:
        """Write the discriminator as a checkpoint. Every process must call this."""
        self.offload.use("discriminator")
        network = self.accelerator.unwrap_model(self.network)
        network.save(folder, self.discriminator_processor, **self._writing)

    @property
    def _writing(self) -> dict[str, Any]:
        # Under bfloat16 the models may hold frozen weights in bfloat16 (``freezing.round_products``).
        return {"widen": self.recipe.train.precision == "bfloat16", "main": self.accelerator.is_main_process}

    def _write_optimizer(self, folder: Path, name: str) -> None:
        if name not in self.optimizers:
            return
        with self.offload.states(name):
            process, processes = self.accelerator.process_index, self.accelerator.num_processes
            save_optimizer(folder, name, self.optimizers[name], process, processes)
