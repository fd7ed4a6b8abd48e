"""The models part of `ril check`: whether each checkpoint can be used, without loading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openril.data.preflight import CountTokens
from openril.discriminator.network import load_discriminator_processor
from openril.errors import OpenRILError
from openril.models import memory_estimate as estimate
from openril.models.loading import (
    load_config,
    load_model,
    load_processor,
    require_embedded_tokens,
    require_vision_language,
    sampling_note,
)
from openril.models.prompt_lengths import TokenCounter
from openril.models.published_shapes import published_shape
from openril.recipe.schema import EndpointConfig, JudgeConfig, Recipe
from openril.report.page import Page
from openril.rewards.local_judge import load_judge


def check_student(recipe: Recipe, page: Page) -> tuple[estimate.Shape | None, CountTokens | None]:
    student = recipe.student
    if not student.model:
        page.error("student.model: expected a folder or hub name, got nothing. Lengths and memory cannot be estimated.")
        return None, None
    shape, counter = None, None
    try:
        config = load_config(student.model, revision=student.revision, trust_remote_code=student.trust_remote_code)
        require_vision_language(config, student.model)
        parameters = _parameters(student.model, student.revision)
        if parameters is None:
            shape = published_shape(student.model)
            known = "they are from the list of published sizes" if shape else "so there is no memory estimate"
            page.warn(f"student: cannot read the sizes of the weights of {student.model}; {known}")
        else:
            shape = estimate.shape_of(config, parameters)
        size = f", {count(shape.total)} parameters" if shape is not None else ""
        page.good(f"student: {student.model} ({config.model_type}{size})")
    except OpenRILError as e:
        page.error(str(e))
        shape = published_shape(student.model)
        if shape is not None:
            page.plain(f"student: {count(shape.total)} parameters, from the list of published sizes")
    try:
        processor = load_processor(
            student.model,
            revision=student.revision,
            trust_remote_code=student.trust_remote_code,
            min_pixels=student.min_pixels,
            max_pixels=student.max_pixels,
        )
        counter = TokenCounter(processor, student.system_prompt)
        page.good(f"student: {type(processor).__name__} with a chat template")
        _check_weights(recipe, student.model, "student", processor)
        if note := sampling_note(student.model):
            page.plain(note)
    except OpenRILError as e:
        page.error(str(e))
    return shape, counter


def check_discriminator(recipe: Recipe, start: str, page: Page) -> None:
    try:
        _check_weights(
            recipe,
            start,
            "discriminator.init",
            load_discriminator_processor(start, recipe.student, images=recipe.discriminator.inputs == "image"),
        )
        page.good(f"discriminator.init: {start}")
    except OpenRILError as e:
        page.error(str(e))


def _check_weights(recipe: Recipe, checkpoint: str, what: str, processor: Any) -> None:
    """Compare names and shapes of all weights of a folder, and its tokenizer, with its configuration, without loading."""
    if Path(checkpoint).expanduser().is_dir():  # weights on the hub would be downloaded
        trust = recipe.student.trust_remote_code
        model = load_model(checkpoint, what=what, trust_remote_code=trust, meta=True, only_check=True)
        require_embedded_tokens(model, processor, what, checkpoint)


def _parameters(model: str, revision: str | None) -> dict[str, int] | None:
    """Return the parameters of a folder or hub model by module group, or None if the hub does not report them."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return estimate.checkpoint_parameters(folder)
    from huggingface_hub import get_safetensors_metadata

    try:
        metadata = get_safetensors_metadata(model, revision=revision)
    except Exception as e:  # offline, gated, renamed or without safetensors: all mean that nothing is known
        import logging

        logging.getLogger(__name__).info("no safetensors metadata of %s: %s", model, e)
        return None
    tensors = {n: t.parameter_count for f in metadata.files_metadata.values() for n, t in f.tensors.items()}
    return estimate.by_group(tensors)


def check_local(recipe: Recipe, endpoint: EndpointConfig, what: str, page: Page) -> int:
    """Check a model that runs in this process, and return the number of its parameters, or 0 if it is unknown."""
    path = endpoint.model_path
    where: dict[str, Any] = {"revision": endpoint.revision, "trust_remote_code": endpoint.trust_remote_code}
    try:
        config = load_config(path, what=what, trained=what != "judge", **where)
        parameters = _parameters(path, endpoint.revision)
        if isinstance(endpoint, JudgeConfig) and Path(path).expanduser().is_dir():
            load_judge(endpoint, "auto", meta=True)
        elif not isinstance(endpoint, JudgeConfig):
            _check_weights(recipe, path, what, load_processor(path, what=what, **where))
    except OpenRILError as e:
        page.error(str(e))
        return 0
    size = f", {count(sum(parameters.values()))} parameters" if parameters else ""
    page.good(f"{what}: {endpoint.model_path} ({config.model_type}{size}), in this process")
    return sum(parameters.values()) if parameters else 0


def count(number: int) -> str:
    """Write a number of parameters in millions or billions."""
    return f"{number / 1e9:.2f}B" if number >= 1e8 else f"{number / 1e6:.2f}M"
