"""A sampler for a checkpoint of the student, as collection and evaluation need it, with the recipe's engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from openril.models.loading import load_student, torch_dtype
from openril.models.packing import Policy
from openril.models.prompts import PromptEncoder
from openril.recipe.schema import Recipe, StudentConfig
from openril.records import Question
from openril.sampling.protocol import Sampler
from openril.sampling.synced import WeightsFolder
from openril.sampling.transformers_engine import TransformersSampler
from openril.sampling.vllm_engine import VLLMSampler


@contextmanager
def open_sampler(
    recipe: Recipe,
    checkpoint: str,
    questions: Sequence[Question],
    questions_per_batch: int,
    student: StudentConfig | None = None,
) -> Iterator[Sampler]:
    """Load a checkpoint with transformers, or give it to the vLLM servers of ``student.sampler``.

    Servers are verified like those of the loop: the checkpoint is loaded once in this process, for the log-probabilities
    of short samples for the first question with images and the first without.

    Args:
        checkpoint: A folder or the name of a model on the hub.
        student: Settings of another model than the recipe's student, which transformers then runs.

    Raises:
        EndpointError: Another process uses the servers, or they do not compute with the checkpoint's weights.
    """
    limits = {key: getattr(recipe.data, key) for key in ("max_prompt_length", "max_image_pixels", "allow_urls")}
    settings = student or recipe.student
    if settings.sampler.engine == "transformers":
        yield TransformersSampler.from_checkpoint(
            checkpoint, settings, questions_per_batch=questions_per_batch, **limits
        )
        return
    with ExitStack() as stack:
        weights = WeightsFolder(settings.sampler, recipe.run_path)
        stack.callback(weights.close)
        weights.hold()
        folder = local_folder(checkpoint, settings)
        device, dtype = place_for(folder, settings)
        model, processor = load_student(settings, checkpoint, dtype)
        encoder = PromptEncoder(processor, model, system_prompt=settings.system_prompt, keep=0, **limits)
        sampler = VLLMSampler(settings.sampler, encoder)
        stack.callback(sampler.close)
        sampler.sync(folder if settings.sampler.sync in ("nccl", "ipc") else weights.put(folder))
        sampler.verify(Policy(model.to(device)), questions)
        model.to("meta")  # The encoder needs the model's configuration only.
        if device == "cuda":
            torch.cuda.empty_cache()
        yield sampler


def local_folder(checkpoint: str, student: StudentConfig) -> Path:
    """Return the folder of a checkpoint, which is the local copy of one on the hub."""
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    revision = student.revision if checkpoint == student.model else None
    return Path(snapshot_download(checkpoint, revision=revision, allow_patterns=["*.safetensors", "*.json"]))


def place_for(folder: Path, student: StudentConfig) -> tuple[str, torch.dtype]:
    """Return device and type for a few short passes: the GPU if there is one with enough free memory, else the CPU."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.5 * size:
        return "cuda", torch_dtype(student.dtype)
    return "cpu", torch.float32
