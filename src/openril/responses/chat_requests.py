"""Requests to a teacher's server: chat messages with images, and sampling settings."""

from __future__ import annotations

from typing import Any

from openril.data.images import image_url_parts
from openril.data.question_text import interleave, question_text
from openril.recipe.schema import Recipe, TeacherConfig
from openril.records import IMAGE_MARKER, Question
from openril.storage import stable_hash


def chat_messages(
    question: Question, *, system_prompt: str = "", max_pixels: int, allow_urls: bool = False
) -> list[dict[str, Any]]:
    """Return the question as messages of the chat completions API.

    Images become data URLs at the ``<image>`` markers, or before the text if there are none. Without images the content
    is plain text.

    Raises:
        DataError: Naming the question, for an image that cannot be used.
    """
    images = image_url_parts(question, max_pixels=max_pixels, allow_urls=allow_urls)
    parts = interleave(question_text(question), images, _trimmed)
    content = parts if images else parts[0]["text"]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system_prompt:
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def _trimmed(text: str) -> str:
    return text.replace(IMAGE_MARKER, "").strip("\n") if text.strip() else ""


def request_settings(recipe: Recipe, teacher: TeacherConfig) -> dict[str, Any]:
    """Return the fields of every request to this teacher. Only the seed differs between requests."""
    sampling = recipe.collect.sampling
    settings: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    settings["max_tokens"] = recipe.collect.max_completion_length  # the client knows the field's name
    if teacher.send_vllm_fields:
        settings["extra_body"] = {
            "top_k": sampling.top_k or -1,  # vLLM's value for no limit
            "repetition_penalty": sampling.repetition_penalty,
        }
    return settings


def response_seed(recipe_seed: int, source: str, question_id: str, index: int) -> int:
    """Return the seed of one response, in the 31 bits that every server accepts."""
    return stable_hash(recipe_seed, source, question_id, index) % 2**31
