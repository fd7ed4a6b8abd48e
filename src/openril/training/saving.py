"""Writing a run's checkpoint from all processes, and the final student."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from openril import __version__
from openril.discriminator.head import DiscriminatorModel
from openril.discriminator.replay import ReplayMemory
from openril.models.adapters import base_model, is_adapted
from openril.recipe.loading import load_recipe, save_recipe
from openril.recipe.schema import Recipe
from openril.records import Question
from openril.responses.identity import weights_fingerprint
from openril.storage import atomic_path, stable_hash, write_json
from openril.training.processes import is_sharded
from openril.training.state import (
    Checkpoints,
    load_optimiser,
    load_rng,
    recipe_differences,
    save_optimiser,
    save_rng,
    write_progress,
)

REPLAY_FILE = "replay.jsonl"

# Settings that may change when a run is continued: they decide what is measured, kept or waited for, not what is learnt.
_FREE = (
    "run_dir", "cache_dir", "teachers", "sft", "eval", "judge.base_urls", "judge.concurrency", "judge.timeout",
    "judge.max_retries", "judge.api_key_env", "judge.max_unknown_share", "data.train", "data.validation",
    "data.validation_split", "data.allow_urls", "student.model", "student.dtype", "discriminator.pretraining",
    "discriminator.init", "discriminator.asleep_accuracy", "discriminator.won_accuracy", "discriminator.health_window",
    "train.max_steps", "train.epochs", "train.save_every", "train.keep_checkpoints", "train.eval_every", "train.log_to",
    "train.log_rollouts_every", "train.max_tokens_per_micro_batch", "train.packed", "train.vision_cache_gib",
    "student.gradient_checkpointing",
    "data.max_prompt_length", "collect.student", "collect.max_completion_length", "collect.sampling", "collect.judge_responses",
    "collect.questions_per_batch", "collect.shard_size", "train.sampler.base_urls",
    "train.sampler.weights_dir", "train.sampler.api_key_env", "train.sampler.concurrency", "train.sampler.timeout",
    "train.sampler.max_logprob_difference", "train.questions_per_sampling_batch", "discriminator.max_tokens_per_micro_batch",
)  # fmt: skip


def changed_settings(saved_recipe: Path, recipe: Recipe) -> list[str]:
    """Keys in which ``recipe`` differs from a saved one in a way that would make a continued run another run."""

    def free(key: str) -> bool:
        return any(key == f or key.startswith(f + ".") for f in _FREE)

    saved = load_recipe(saved_recipe)
    keys = recipe_differences(saved.model_dump(mode="json"), recipe.model_dump(mode="json"), free)
    return keys + (["teachers (names)"] if saved.teacher_names != recipe.teacher_names else [])


def run_fingerprint(recipe: Recipe, questions: Sequence[Question]) -> dict[str, str]:
    """What a run's steps follow from besides its settings: its questions, and the student it starts from (which is also
    the reference model). Images are compared with the response cache, by content."""
    start = recipe.start_student
    return {
        "questions (data.train)": str(stable_hash([[q.id, q.question, q.answer] for q in questions])),
        "starting student (student.model, sft)": weights_fingerprint(Path(start)) or start,
    }


class Saver:
    """Saves and restores student, discriminator, optimisers and random states of a run, and what it replays.

    policy, network: the wrapped modules (network None without a discriminator). optimisers: by name.
    fingerprint: see ``run_fingerprint``; kept in state.json. replay: the discriminator's memory, where the run has one.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        accelerator: Accelerator,
        recipe: Recipe,
        *,
        policy: Any | None = None,
        processor: Any = None,
        network: Any | None = None,
        discriminator_processor: Any = None,
        optimisers: dict[str, Any] | None = None,
        fingerprint: dict[str, str] | None = None,
        replay: ReplayMemory | None = None,
    ) -> None:
        self.checkpoints = checkpoints
        self.accelerator = accelerator
        self.recipe = recipe
        self.policy = policy
        self.processor = processor
        self.network = network
        self.discriminator_processor = discriminator_processor
        self.optimisers = optimisers or {}
        self.fingerprint = fingerprint or {}
        self.replay = replay

    def save(self, step: int) -> None:
        """Write checkpoint ``step``; every process must call this."""
        accelerator = self.accelerator
        if accelerator.is_main_process:
            self.checkpoints.begin(step)
        accelerator.wait_for_everyone()
        folder = self.checkpoints.partial(step)
        if self.policy is not None:
            self.write_student(folder / "student")
            model = accelerator.unwrap_model(self.policy).model
            if is_adapted(model) and accelerator.is_main_process:
                model.save_pretrained(folder / "adapter")
        if self.network is not None:
            self.write_discriminator(folder / "discriminator")
        if is_sharded(accelerator):
            accelerator.save_state(str(folder / "engine"))
        elif accelerator.is_main_process:
            for name, optimiser in self.optimisers.items():
                save_optimiser(folder / f"optimiser_{name}.safetensors", optimiser)
        if self.replay is not None and accelerator.is_main_process:
            self.replay.save(folder / REPLAY_FILE)
        save_rng(folder, accelerator.process_index)
        if accelerator.is_main_process:
            save_recipe(self.recipe, folder / "recipe.yaml")
            versions = {"openril": __version__, "torch": torch.__version__}
            progress = {"step": step, "processes": accelerator.num_processes, "versions": versions}
            write_progress(folder, {**progress, "fingerprint": self.fingerprint})
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self.checkpoints.finish(step)
        accelerator.wait_for_everyone()

    def restore(self, folder: Path) -> None:
        """Optimisers, random states and what is replayed; the models were loaded from the checkpoint when they were made."""
        if is_sharded(self.accelerator):
            self.accelerator.load_state(str(folder / "engine"))
        else:
            for name, optimiser in self.optimisers.items():
                load_optimiser(folder / f"optimiser_{name}.safetensors", optimiser)
        if self.replay is not None:
            self.replay.load(folder / REPLAY_FILE)
        load_rng(folder, self.accelerator.process_index)

    def write_student(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """The student as an ordinary checkpoint with its processor; adapters are merged. Every process must call this."""
        state = self.accelerator.get_state_dict(self.policy)
        if not self.accelerator.is_main_process:
            return
        model = self.accelerator.unwrap_model(self.policy).model
        state = {k.removeprefix("model."): v for k, v in state.items()}
        write_checkpoint(model, state, self.processor, folder, dtype)

    def write_discriminator(self, folder: Path) -> None:
        """The discriminator as a checkpoint. Every process must call this."""
        state = self.accelerator.get_state_dict(self.network)
        if self.accelerator.is_main_process:
            network: DiscriminatorModel = self.accelerator.unwrap_model(self.network)
            network.save(folder, self.discriminator_processor, state)


def write_checkpoint(
    model: Any, state: dict[str, Tensor], processor: Any, folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Write ``state`` of ``model`` (adapters merged in) and the processor to ``folder``, atomically.

    dtype: convert floating weights to it, in the file and in its configuration.
    """
    base = base_model(model)
    if is_adapted(model):
        state = merged_state(model, state)
    # Tied weights are one tensor under two names, and must stay one through the move and the conversion.
    moved: dict[tuple[int, torch.Size], Tensor] = {}
    for key, value in state.items():
        place = (value.data_ptr(), value.shape)
        if place not in moved:
            moved[place] = value.to("cpu", dtype if dtype is not None and value.is_floating_point() else value.dtype)
        state[key] = moved[place]
    with atomic_path(folder) as temporary:
        base.save_pretrained(temporary, state_dict=state)
        if dtype is not None:
            _set_dtype(temporary / "config.json", str(dtype).removeprefix("torch."))
        processor.save_pretrained(temporary)


def _set_dtype(path: Path, name: str) -> None:
    """Name the weights' type in a configuration: ``save_pretrained`` writes that of the weights in memory."""

    def put(node: dict[str, Any]) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                put(value)
            elif key in ("dtype", "torch_dtype"):
                node[key] = name

    config = json.loads(path.read_text())
    put(config)
    write_json(path, config)


def merged_state(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the base with the adapters' updates added, without touching the model (merging in place and back
    would change its last bits)."""
    from peft.tuners.lora import LoraLayer

    prefix = "base_model.model."
    layers: dict[str, Any] = {
        name.removeprefix(prefix): module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }
    merged = {}
    for key, value in state.items():
        if "lora_" in key:
            continue
        name = key.removeprefix(prefix).replace(".base_layer.", ".")
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and layer in layers:
            # One layer's update at a time, and the sum in CPU memory: a second copy of the model would not fit.
            update = layers[layer].get_delta_weight(layers[layer].active_adapters[0])
            value = (value + update.to(value)).cpu()
        merged[name] = value
    return merged
