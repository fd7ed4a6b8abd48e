"""Build the components of a run from a recipe: models, optimizers, wrapping, restoring. None of it is the method."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from openril.discriminator.network import DiscriminatorModel, load_discriminator_processor
from openril.errors import ModelError
from openril.models.adapters import add_adapters, base_model
from openril.models.freezing import freeze, round_products
from openril.models.loading import load_student, require_embedded_tokens, torch_dtype
from openril.models.packing import Policy
from openril.models.prompts import PromptEncoder
from openril.models.vision_features import FeatureCache, VisionFeatures
from openril.recipe.schema import OptimizerConfig, Recipe
from openril.recipe.validation import RENAMED_KEYS
from openril.records import Question
from openril.rewards.similarity import SimilarityGate
from openril.sampling.checkpoint_sampler import local_folder
from openril.sampling.synced import SyncedSampler, WeightsFolder
from openril.sampling.transformers_engine import TransformersSampler
from openril.sampling.vllm_engine import VLLMSampler
from openril.storage import refuse_changed, weights_fingerprint
from openril.training.checkpoint import (
    Checkpoints,
    Memory,
    Saver,
    read_progress,
    refuse_changed_length,
    refuse_changed_recipe,
    run_fingerprint,
)
from openril.training.discriminator_update import Discriminator
from openril.training.distributed import compute_dtype, master_dtype, shards
from openril.training.offload import Offload
from openril.training.optimization import build_optimizer
from openril.training.policy_update import PolicyUpdate
from openril.training.retries import RetryMemory
from openril.training.sharding import fill, in_float32, shard, share_vision, whole

_NEW_RUN = "set another run_dir for a new run"


class TrainingComponents:
    """The models of a run, wrapped, and restored if it is continued.

    ``step`` is the number of steps already done, ``resumed_from`` the checkpoint folder or None. questions: The loop's,
    which stay the same when a run is continued. probes: Questions with which new weights on vLLM servers are verified.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        checkpoints_folder: Path,
        questions: Sequence[Question] = (),
        probes: Sequence[Question] = (),
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.sharded = shards(recipe, accelerator, warn)
        self.warn = warn
        self.recipe = recipe
        self.accelerator = accelerator
        self.checkpoints = Checkpoints(checkpoints_folder, recipe.train.keep_checkpoints)
        if accelerator.is_main_process:
            self.checkpoints.sweep()
        self.resumed_from = self.checkpoints.latest()
        self.step = 0
        if self.resumed_from is not None:
            saved_recipe = self.resumed_from / "recipe.yaml"
            refuse_changed_recipe(self.resumed_from, saved_recipe, recipe, fix=_NEW_RUN)
            refuse_changed_length(self.resumed_from, saved_recipe, recipe, fix=_NEW_RUN)
            progress = read_progress(self.resumed_from)
            self.step = int(progress["step"])
        fingerprint = run_fingerprint(recipe, questions)
        if self.resumed_from is not None:
            refuse_changed(self.resumed_from, progress["fingerprint"], fingerprint, fix=_NEW_RUN)
        optimizers: dict[str, Any] = {}
        self.offload = make_offload(recipe, accelerator)
        self._build_student()
        optimizers["student"] = self.optimizer
        if not self.sharded:  # sharded models compare their vision sides, of which they then share one
            self.offload.use()  # the discriminator is built while the student is parked
        self.discriminator = self._build_discriminator() if recipe.uses_discriminator else None
        memories: dict[str, Memory] = {}
        if self.discriminator is not None:
            self.offload.add("discriminator", self.discriminator.network, self.discriminator.optimizer)
            if self.discriminator.optimizer is not None:
                optimizers["discriminator"] = self.discriminator.optimizer
                self.discriminator.ema_decay = recipe.discriminator.ema_decay  # not in pre-training
                self.discriminator.states = lambda: self.offload.states("discriminator")
            if recipe.uses_replay:
                memories["replay.jsonl"] = self.discriminator.replay
        self.gate = SimilarityGate(recipe.rewards.similarity.gate) if recipe.uses_gate else None
        if self.gate is not None:
            memories["gate.json"] = self.gate
        retries = recipe.train.retry.questions_per_step > 0
        self.retry = RetryMemory(recipe.train.retry, recipe.seed) if retries else None
        if self.retry is not None:
            memories["retry.jsonl"] = self.retry
        self.offload.use()
        self.saver = Saver(
            self.checkpoints,
            accelerator,
            recipe,
            policy=self.policy,
            processor=self.encoder.processor,
            network=self.discriminator.network if self.discriminator else None,
            discriminator_processor=self.discriminator.encoder.processor if self.discriminator else None,
            optimizers=optimizers,
            fingerprint=fingerprint,
            memories=memories,
            offload=self.offload,
        )
        if self.resumed_from is not None:
            self.saver.restore(self.resumed_from)
        self.sampler = self._build_sampler(probes)

    def _build_student(self) -> None:
        recipe, accelerator, train = self.recipe, self.accelerator, self.recipe.train
        lora = recipe.student.lora
        start = recipe.start_student
        resumed = self.resumed_from
        source = str(resumed / "student") if resumed is not None and not lora.enabled else start
        model, processor = load_student(recipe.student, source, master_dtype(recipe), meta=self.sharded)
        if lora.enabled:
            torch.manual_seed(recipe.seed)  # the adapters' first values
            # Dropout would make pi_theta differ from pi_old, and from what the sampler draws from, by chance.
            model = add_adapters(model, lora.model_copy(update={"dropout": 0.0}))
            if resumed is not None:
                _load_adapter(model, resumed / "adapter")
        else:
            freeze(model, recipe.student.freeze)
        if train.precision == "bfloat16":
            round_products(model, torch.bfloat16, lossless=True)
        if recipe.student.gradient_checkpointing:
            enable_checkpointing(model)
        self.encoder = make_encoder(recipe, processor, base_model(model))
        store = feature_store(recipe)
        self.vision = VisionFeatures(base_model(model), store)
        policy = Policy(model, train.sampling.temperature, self.vision)
        place(policy, model, recipe, accelerator.device, sharded=self.sharded)
        reference = None
        if train.beta and not lora.enabled:
            reference_model, _ = load_student(recipe.student, start, master_dtype(recipe), meta=self.sharded)
            reference_model.requires_grad_(False)
            if train.precision == "bfloat16":
                round_products(reference_model, torch.bfloat16)
            if self.vision.keep == "nothing":  # the student's tower moves away from the reference's
                vision = VisionFeatures(reference_model, feature_store(recipe))
            else:
                vision = VisionFeatures(reference_model, store, self.vision.keep)
            reference = Policy(reference_model, train.sampling.temperature, vision)
            place(reference, reference_model, recipe, accelerator.device, sharded=self.sharded)
            if self.sharded:
                share_vision(base_model(model).model, base_model(reference_model).model)
        self.policy, self.optimizer = policy, build_optimizer(policy.parameters(), train.optimizer)
        if not self.sharded:
            self.policy, self.optimizer = accelerator.prepare(self.policy, self.optimizer)
        self.offload.add("student", self.policy, self.optimizer)
        if reference is not None:
            self.offload.add("reference", reference)
        self.policy_update = PolicyUpdate(
            self.policy, reference, self.optimizer, self.encoder, accelerator, train, warn=self.warn
        )

    def _build_sampler(self, probes: Sequence[Question]) -> TransformersSampler | SyncedSampler:
        """Return a sampler: the student itself, or vLLM servers that receive its weights whenever they have changed."""
        recipe, settings = self.recipe, self.recipe.student.sampler
        if settings.engine == "transformers":
            model = self.accelerator.unwrap_model(self.policy).model
            size = recipe.train.questions_per_sampling_batch
            vision = self.vision if self.vision.available else None
            sampler = TransformersSampler(
                model,
                self.encoder,
                questions_per_batch=size,
                vision=vision,
                warn=self.warn,
                gathered=lambda: whole(self.policy),
            )
            sampler.packing.widen = lambda: in_float32(self.policy)
            return sampler
        dtype = torch_dtype(recipe.student.dtype)
        return SyncedSampler(
            VLLMSampler(settings, self.encoder, self.warn),
            folder=WeightsFolder(settings, recipe.run_path),
            write=lambda path: (
                self.saver.write_adapter(path) if settings.sync == "adapter" else self.saver.write_student(path, dtype)
            ),
            base=lambda: local_folder(recipe.start_student, recipe.student),
            tensors=lambda: self.saver.student_tensors(dtype),
            policy=self.policy,
            accelerator=self.accelerator,
            version=lambda: self.policy_update.updates,
            probes=probes,
        )

    def close(self) -> None:
        """Close connections to servers, and stop background work."""
        self.encoder.close()
        if isinstance(self.sampler, SyncedSampler):
            self.sampler.close()

    def _build_discriminator(self) -> Discriminator:
        recipe = self.recipe
        folder = self.resumed_from / "discriminator" if self.resumed_from is not None else recipe.discriminator_path
        optimizer = recipe.discriminator.optimizer if recipe.discriminator.mode == "updated" else None
        shared = base_model(self.accelerator.unwrap_model(self.policy).model).model if self.sharded else None
        if self.resumed_from is None and not recipe.discriminator.pretraining.enabled:
            return fresh_discriminator(recipe, self.accelerator, optimizer, self.warn, shared)
        if self.resumed_from is None:
            check_pretrained(recipe)
        return saved_discriminator(recipe, self.accelerator, folder, optimizer, self.warn, shared)


def place(
    root: nn.Module, transformer: Any, recipe: Recipe, device: torch.device, *, sharded: bool, head: Any = None
) -> None:
    """Put a model, whose trained parameters are chosen, on the device: whole, or sharded and then read from disk."""
    if sharded:
        shard(root, transformer, compute=compute_dtype(recipe), head=head)
        base = base_model(transformer)
        fill(root, base.pending, device)
        del base.pending
        if recipe.train.precision == "bfloat16":  # what is whole is only known now
            round_products(base, torch.bfloat16, lossless=True)
    root.to(device)


def make_offload(recipe: Recipe, accelerator: Accelerator) -> Offload:
    return Offload(recipe.train.offload, pin=accelerator.device.type == "cuda")


def feature_store(recipe: Recipe) -> FeatureCache:
    return FeatureCache(int(recipe.train.vision_cache_gib * 2**30))


def fresh_discriminator(
    recipe: Recipe,
    accelerator: Accelerator,
    optimizer: OptimizerConfig | None,
    warn: Callable[[str], None] = lambda message: None,
    student: nn.Module | None = None,
) -> Discriminator:
    """Return a discriminator with the weights of the SFT student, or of discriminator.init, and a new head.

    student: See ``wrap_discriminator``.
    """
    start, sharded = recipe.discriminator.init or recipe.start_student, shards(recipe, accelerator)
    network = DiscriminatorModel.from_student(
        start, recipe.student, seed=recipe.seed, dtype=master_dtype(recipe), meta=sharded
    )
    processor = load_discriminator_processor(start, recipe.student, images=recipe.discriminator.inputs == "image")
    require_embedded_tokens(network.backbone, processor, "discriminator", start)
    return wrap_discriminator(recipe, accelerator, network, processor, optimizer, warn, student)


def saved_discriminator(
    recipe: Recipe,
    accelerator: Accelerator,
    folder: Path,
    optimizer: OptimizerConfig | None,
    warn: Callable[[str], None] = lambda message: None,
    student: nn.Module | None = None,
) -> Discriminator:
    """Return the discriminator that a checkpoint or `ril discriminator` wrote. student: See ``wrap_discriminator``."""
    network = DiscriminatorModel.from_checkpoint(
        folder, recipe.student, dtype=master_dtype(recipe), meta=shards(recipe, accelerator)
    )
    processor = load_discriminator_processor(folder, recipe.student, images=recipe.discriminator.inputs == "image")
    return wrap_discriminator(recipe, accelerator, network, processor, optimizer, warn, student)


def wrap_discriminator(
    recipe: Recipe,
    accelerator: Accelerator,
    network: DiscriminatorModel,
    processor: Any,
    optimizer: OptimizerConfig | None,
    warn: Callable[[str], None] = lambda message: None,
    student: nn.Module | None = None,
) -> Discriminator:
    """Freeze, place and wrap the network. Without an optimizer the discriminator is fixed.

    student: The model whose frozen vision side a sharded network uses too where it has an equal one.
    """
    settings = recipe.discriminator
    if recipe.student.gradient_checkpointing and optimizer is not None:
        enable_checkpointing(network.backbone)
    # The prompt is the question, a response and the instruction, each of which is bounded elsewhere.
    longest = recipe.data.max_prompt_length + 2 * settings.max_response_tokens + 1024
    encoder = make_encoder(recipe, processor, network.backbone, keep=0, max_prompt_length=longest)
    shared: dict[str, Any] = {"packed": recipe.train.packed, "store": feature_store(recipe), "warn": warn}
    sharded = shards(recipe, accelerator)

    def finish() -> None:
        if recipe.train.precision == "bfloat16":
            round_products(network.backbone, torch.bfloat16, lossless=optimizer is not None)
        place(network, network.backbone, recipe, accelerator.device, sharded=sharded, head=network.head)
        if student is not None:
            share_vision(student, network.backbone)

    if optimizer is None:
        network.requires_grad_(False)
        finish()
        return Discriminator(network, encoder, accelerator, settings, optimizer=None, **shared)
    groups = {g for g in settings.freeze if g != "lm_head"}
    if settings.inputs != "image":
        groups |= {"vision_tower", "projector"}  # it never runs, so there is nothing to train
    freeze(network, groups)
    finish()
    wrapped, built = network, build_optimizer(network.parameters(), optimizer)
    if not sharded:
        wrapped, built = accelerator.prepare(wrapped, built)
    return Discriminator(
        wrapped, encoder, accelerator, settings, optimizer=built, max_grad_norm=optimizer.max_grad_norm, **shared
    )


def pretraining_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings, besides its length, that pre-training and a loop which uses its result must share."""
    d = recipe.discriminator
    start = d.init or recipe.start_student
    return {
        "discriminator.inputs": d.inputs,
        "discriminator.loss": d.loss,
        "discriminator.max_response_tokens": d.max_response_tokens,
        "discriminator.match_length": d.match_length,
        "teachers (names)": recipe.teacher_names,
        "starting student (student.model, sft, discriminator.init)": weights_fingerprint(Path(start)) or start,
    }


def pretraining_settings_file(recipe: Recipe) -> Path:
    return recipe.discriminator_path.parent / "settings.json"


def check_pretrained(recipe: Recipe) -> None:
    """Raise StateError if the run folder's discriminator was pre-trained with other settings."""
    path = pretraining_settings_file(recipe)
    if not path.exists():
        return
    saved = {RENAMED_KEYS.get(key, key): value for key, value in json.loads(path.read_text()).items()}
    was = {"discriminator.match_length": False, **saved}  # files from before the setting
    fix = f"remove {path.parent} and run `ril discriminator` again"
    refuse_changed(recipe.discriminator_path, was, pretraining_settings(recipe), fix=fix)


def make_encoder(
    recipe: Recipe, processor: Any, model: nn.Module, keep: int | None = None, max_prompt_length: int = 0
) -> PromptEncoder:
    """Return the recipe's encoder. keep: The prompts kept; None for two steps. max_prompt_length: 0 for the recipe's."""
    return PromptEncoder(
        processor,
        model,
        system_prompt=recipe.student.system_prompt,
        max_prompt_length=max_prompt_length or recipe.data.max_prompt_length,
        max_image_pixels=recipe.data.max_image_pixels,
        allow_urls=recipe.data.allow_urls,
        keep=max(64, 2 * recipe.train.questions_per_step) if keep is None else keep,
    )


def enable_checkpointing(model: Any) -> None:
    """Turn gradient checkpointing on."""
    # Reentrant checkpointing would lose the gradient where the embeddings are frozen, and is not exact under DDP.
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _load_adapter(model: Any, folder: Path) -> None:
    from peft import load_peft_weights, set_peft_model_state_dict

    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder}: expected an adapter, but the checkpoint was made without LoRA.")
    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
