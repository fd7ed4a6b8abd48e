"""What the discriminator reads: own wording in the structure of the paper's prompt (its Figure 3)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from PIL import Image

from openril.data.images import load_image
from openril.data.wording import question_text
from openril.models.prompts import Prompt, PromptEncoder
from openril.records import IMAGE_MARKER, Question

SYSTEM = (
    "You are a discriminator. You read a response and decide who wrote it: a teacher model or a student model."
    " Judge by its reasoning, its accuracy and its style. Say 0 if a teacher wrote it and 1 if a student wrote it."
)
USER = "{question}<response>\n{response}\n</response>\nWho wrote this response? Answer with 0 for teacher or 1 for student."
QUESTION = "<question>\n{question}\n</question>\n"

# The prompt's own marks in a response could end it early.
_OWN_TAGS = re.compile(r"<\s*/?\s*(response|question)\s*>", re.IGNORECASE)


def strip_own_tags(text: str) -> str:
    """Remove the prompt's own tags, again and again, so that none can be put together from what is left."""
    while (shorter := _OWN_TAGS.sub("", text)) != text:
        text = shorter
    return text


def encode_discriminator_prompt(
    encoder: PromptEncoder,
    question: Question,
    response_text: str,
    *,
    sees: Literal["response", "question", "image"] = "response",
    images: Sequence[Image.Image] | None = None,
    max_response_tokens: int = 1024,
) -> Prompt:
    """The prompt for one response. sees: the response alone (paper), with the question's text, or with images too.

    images: the question's, where they are loaded already (``load_question_images``). A response longer than
    max_response_tokens keeps its first and last halves of that many tokens.
    """
    text = strip_own_tags(encoder.clean(response_text))
    ids = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) > max_response_tokens:
        half = max_response_tokens // 2
        text = f"{encoder.decode(ids[:half])}\n[...]\n{encoder.decode(ids[len(ids) - half :])}"
    asked = ""
    if sees != "response":
        plain = question_text(question).replace(IMAGE_MARKER, "")
        asked = QUESTION.format(question=strip_own_tags(encoder.clean(plain)))
    content: list[dict[str, Any]] = []
    if sees != "image":
        images = []
    elif images is None:
        images = load_question_images(encoder, question)
    content += [{"type": "image"} for _ in images]
    content.append({"type": "text", "text": USER.format(question=asked, response=text)})
    messages = [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
        {"role": "user", "content": content},
    ]
    return encoder.encode(messages, images, name=f"discriminator prompt of question {question.id}")


def load_question_images(encoder: PromptEncoder, question: Question) -> list[Image.Image]:
    """The question's images, decoded. Raises DataError for one that cannot be used."""
    return [load_image(s, max_pixels=encoder.max_image_pixels, allow_urls=encoder.allow_urls) for s in question.images]
