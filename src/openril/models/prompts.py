"""Encode questions for a model: chat template, images, token ids and positions."""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from cachetools import LRUCache
from PIL import Image
from torch import Tensor, nn

from openril.data.images import load_image
from openril.data.preflight import REFUSALS, refusal
from openril.data.question_text import interleave, question_text
from openril.data.sanitize import strip_special
from openril.errors import DataError, ModelError, PromptTooLongError
from openril.records import Question, Response

_TILE_MARK = re.compile(r"<row_\d+_col_\d+>")


@dataclass
class Prompt:
    """A prompt ready for the model; P is its length in tokens, including image tokens."""

    input_ids: Tensor
    """int64 [P]."""
    vision: dict[str, Tensor]
    """The processor's image tensors (pixel values, grids). ``collate_vision_inputs`` joins those of several prompts."""
    token_types: Tensor | None
    """int64 [P], or None if the processor returns none."""
    position_ids: Tensor
    """int64 [C, P], with C = 3 for M-RoPE and 1 otherwise."""
    next_position: int
    """Position of the first token after the prompt."""
    token_type_key: str = "mm_token_type_ids"
    """Name of ``token_types`` in the model's arguments; Gemma 3 uses another than Qwen2.5-VL."""
    images_key: Hashable = None
    """Identifies the images, so that results computed from them can be kept; None if unknown."""

    @property
    def length(self) -> int:
        return int(self.input_ids.shape[0])


class PromptEncoder:
    """Encode questions for one model, and keep the last prompts so that a step processes its images once.

    A prompt longer than max_prompt_length raises PromptTooLongError; it is not cut, because cutting breaks image tokens.

    Args:
        model: The unwrapped model, which computes M-RoPE positions if it uses them.
        keep: Number of prompts that are kept.
    """

    def __init__(
        self,
        processor: Any,
        model: nn.Module,
        *,
        system_prompt: str = "",
        max_prompt_length: int = 4096,
        max_image_pixels: int = 50_000_000,
        allow_urls: bool = False,
        keep: int = 64,
    ) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if getattr(processor, "chat_template", None) is None and self.tokenizer.chat_template is None:
            raise ModelError("the checkpoint has no chat template. Add chat_template.jinja to its folder.")
        base = getattr(model, "model", model)
        self._rope_index = getattr(base, "get_rope_index", None)
        self.system_prompt = system_prompt
        self.max_prompt_length = max_prompt_length
        self.max_image_pixels = max_image_pixels
        self.allow_urls = allow_urls
        self.eos_token_ids = eos_token_ids(model, self.tokenizer, self._template)
        self.special_token_ids = special_token_ids(self.tokenizer) | image_token_ids(model, processor)
        self._special_texts = [self.tokenizer.convert_ids_to_tokens(i) for i in sorted(self.special_token_ids)]
        self.longest = 0  # tokens of the longest prompt so far
        self._keep = keep
        self._kept: LRUCache[Question, Prompt] = LRUCache(keep)
        self._coming: dict[Question, Future[Prompt]] = {}
        self._background: tuple[ThreadPoolExecutor, PromptEncoder] | None = None

    @property
    def _template(self) -> Any:
        """The object with the chat template: the processor, or its tokenizer."""
        return self.processor if getattr(self.processor, "chat_template", None) else self.tokenizer

    @property
    def pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.eos_token_ids[0])

    def clean(self, text: str) -> str:
        """Remove everything that this tokenizer would read as a special token from text of data or other models."""
        return strip_special(text, extra=self._special_texts)

    def __call__(self, question: Question) -> Prompt:
        """Return the prompt of a question, up to and including the header of the assistant's turn."""
        kept = self._kept.get(question)
        if kept is not None:
            return kept
        coming = self._coming.pop(question, None)
        prompt = coming.result() if coming is not None else self._encode_question(question)
        self.longest = max(self.longest, prompt.length)
        if self._keep:
            self._kept[question] = prompt
        return prompt

    def prefetch(self, questions: Iterable[Question]) -> None:
        """Encode questions in the background. A later call for one returns its prompt, or raises its error.

        At most as many wait as are kept; the oldest that were not asked for are dropped.
        """
        missing = [q for q in dict.fromkeys(questions) if q not in self._kept and q not in self._coming]
        if not missing:
            return
        if self._background is None:
            # With a separate processor, because two threads must not share a tokenizer.
            twin = copy.copy(self)
            twin.processor = copy.deepcopy(self.processor)
            twin.tokenizer = getattr(twin.processor, "tokenizer", twin.processor)
            self._background = (ThreadPoolExecutor(1, thread_name_prefix="prompts"), twin)
        pool, twin = self._background
        for question in missing:
            self._coming[question] = pool.submit(twin._encode_question, question)
        while len(self._coming) > self._keep:
            self._coming.pop(next(iter(self._coming))).cancel()

    def close(self) -> None:
        """Stop encoding in the background."""
        if self._background is not None:
            self._background[0].shutdown(wait=False, cancel_futures=True)
        self._background, self._coming = None, {}

    def load_images(self, question: Question) -> list[Image.Image]:
        """Return the question's images, decoded. Raises DataError for one that cannot be used."""
        return [load_image(s, max_pixels=self.max_image_pixels, allow_urls=self.allow_urls) for s in question.images]

    def _encode_question(self, question: Question) -> Prompt:
        name = f"question {question.id} ({question.origin})"
        try:
            images = self.load_images(question)
        except DataError as e:
            raise DataError(f"{name}: {e}") from e
        messages = question_messages(question, self.system_prompt, self.clean)
        try:
            return self.encode(messages, images, name=name, key=question.images)
        except PromptTooLongError as e:
            e.question_id = question.id
            raise
        except ModelError:
            raise
        except REFUSALS as e:
            raise DataError(f"{name}: {refusal(question, [i.size for i in images], e)}") from e

    def encode(
        self,
        messages: list[dict[str, Any]],
        images: Sequence[Image.Image],
        *,
        name: str = "prompt",
        key: Hashable = None,
    ) -> Prompt:
        """Encode any chat that ends in a user turn, with its images in order.

        Args:
            name: The prompt's name in errors.
            key: The prompt's ``images_key``.
        """
        return self.encode_text(self.render(messages), images, name=name, key=key)

    def render(self, messages: list[dict[str, Any]]) -> str:
        """Return a chat in the model's format, ending in the header of the assistant's turn."""
        return self._template.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def encode_text(
        self, text: str, images: Sequence[Image.Image], *, name: str = "prompt", key: Hashable = None
    ) -> Prompt:
        """Encode a rendered chat, or its beginning, with its images in order."""
        inputs = process(self.processor, text, images)
        input_ids = inputs["input_ids"][0]
        length = input_ids.shape[0]
        if length > self.max_prompt_length:
            raise PromptTooLongError(
                f"{name}: expected at most data.max_prompt_length {self.max_prompt_length} tokens, got {length}."
                " Increase it, lower student.max_pixels, or leave the question out.",
                length,
            )
        vision: dict[str, Tensor] = {}
        token_types, token_type_key = None, "mm_token_type_ids"
        for part, value in inputs.items():
            if part in ("input_ids", "attention_mask"):
                continue
            if value.shape == (1, length):
                token_types, token_type_key = value[0], part
            else:
                vision[part] = value
        position_ids = self._positions(inputs, length)
        next_position = int(position_ids.max()) + 1
        return Prompt(input_ids, vision, token_types, position_ids, next_position, token_type_key, key)

    def _positions(self, inputs: Any, length: int) -> Tensor:
        if self._rope_index is None:
            return torch.arange(length)[None]
        if "image_grid_thw" not in inputs:
            return torch.arange(length)[None].expand(3, -1)
        positions, _ = self._rope_index(
            inputs["input_ids"],
            **{k: inputs[k] for k in ("image_grid_thw", "mm_token_type_ids") if k in inputs},
            attention_mask=inputs["attention_mask"],
        )
        return positions[:, 0]

    def completion_ids(self, response: Response, max_completion_length: int) -> Tensor:
        """Return the ids of a response, int64 [T].

        These are the sampler's ids if it kept them. Otherwise they are the ids of the text, with the end-of-turn token
        if the response ended by itself, cut at max_completion_length.
        """
        if response.token_ids is not None:
            return torch.tensor(response.token_ids, dtype=torch.long)
        ids = self.tokenizer(self.clean(response.text), add_special_tokens=False)["input_ids"]
        if response.finish_reason == "stop":
            ids = [*ids, self.eos_token_ids[0]]
        return torch.tensor(ids[:max_completion_length] or [self.eos_token_ids[0]], dtype=torch.long)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def process(processor: Any, text: str, images: Sequence[Image.Image]) -> Any:
    """Return the processor's tensors for a rendered chat with its images in order."""
    # A template that writes the first token itself must not get a second one from the tokenizer.
    bos = getattr(processor, "tokenizer", processor).bos_token
    once = {"add_special_tokens": False} if not images or (bos and text.startswith(bos)) else {}
    with_images = {"images": [list(images)]} if images else {}
    return processor(text=[text], **with_images, return_tensors="pt", **once)


def question_messages(
    question: Question, system_prompt: str, clean: Any = strip_special, images: Sequence[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Return the chat of a question in transformers' form, its images at the ``<image>`` markers or before the text.

    Args:
        images: Parts of the message to use for the images; None uses ``{"type": "image"}``.
    """
    content = interleave(question_text(question), images or [{"type": "image"} for _ in question.images], clean)
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system_prompt:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system_prompt}]})
    return messages


def eos_token_ids(model: nn.Module, tokenizer: Any, template: Any = None) -> list[int]:
    """Return end-of-sequence ids; the first ends an assistant's turn in the chat template.

    Args:
        template: The object with the chat template; None puts the tokenizer's own id first.

    Raises:
        ModelError: There is none.
    """
    config = getattr(model, "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    if tokenizer.eos_token_id is not None:
        ids = [tokenizer.eos_token_id, *ids]
    if not ids:
        raise ModelError("the checkpoint names no end-of-sequence token. Set eos_token in its tokenizer.")
    ids = list(dict.fromkeys(int(i) for i in ids))
    if template is not None and len(ids) > 1:
        chat = [{"role": role, "content": [{"type": "text", "text": "x"}]} for role in ("user", "assistant")]
        written = tokenizer(template.apply_chat_template(chat, tokenize=False), add_special_tokens=False)["input_ids"]
        last = {i: n for n, i in enumerate(written)}
        ids.sort(key=lambda i: -last.get(i, -1))  # a stable sort: ids that the template does not write keep their order
    return ids


def image_token_ids(model: nn.Module, processor: Any = None) -> set[int]:
    """Return ids used for and around images and videos in this model's prompts, special to the tokenizer or not."""
    config = getattr(model, "config", None)
    marks = ("image", "video", "boi", "eoi", "vision_start", "vision_end")
    named = (getattr(config, f"{mark}_token_{ending}", None) for mark in marks for ending in ("id", "index"))
    ids = {value for value in named if isinstance(value, int) and value >= 0}
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is not None:
        # Some checkpoints add SmolVLM's tile marks as ordinary tokens.
        written = {value for name, value in vars(processor).items() if name.endswith("_token") and value}
        added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        ids |= {i for token, i in added.items() if token in written or _TILE_MARK.fullmatch(token)}
    return ids


def special_token_ids(tokenizer: Any) -> set[int]:
    """Return ids of special tokens: turn marks, image placeholders, padding."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)
