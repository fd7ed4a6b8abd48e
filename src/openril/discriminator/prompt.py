"""What the discriminator reads: own wording in the structure of the paper's prompt (its Figure 3)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from openril.data.images import load_image
from openril.data.question_text import question_text
from openril.data.sanitize import remove_tags
from openril.models.prompts import Prompt, PromptEncoder
from openril.records import IMAGE_MARKER, Question

SYSTEM = (
    "You are a discriminator. You read a response and decide who wrote it: a teacher model or a student model."
    " Judge by its reasoning, its accuracy and its style. Say 0 if a teacher wrote it and 1 if a student wrote it."
)
# What is asked stands before the response: all of it is then shared by the responses, and runs once for them.
USER = (
    "{question}Who wrote the following response? Answer with 0 for teacher or 1 for student.\n"
    "<response>\n{response}\n</response>"
)
QUESTION = "<question>\n{question}\n</question>\n"

# Stands for the response while the chat template is filled in.
_PLACE = "RESPONSE-STANDS-HERE"

# Tags of the prompt. A response that holds one could end its part of the prompt early.
_OWN_TAGS = ("response", "question")


class DiscriminatorPrompts:
    """Prompts of a discriminator in two parts: what all responses to a question share, encoded once, and the rest.

    inputs: the response alone (paper), with the question's text, or with its images too. A response longer than
    max_response_tokens keeps its first and last halves of that many tokens.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        *,
        inputs: Literal["response", "question", "image"] = "response",
        max_response_tokens: int = 1024,
        keep: int = 64,
    ) -> None:
        self.encoder = encoder
        self.inputs = inputs
        self.max_response_tokens = max_response_tokens
        self._keep = keep
        self._heads: OrderedDict[Question | None, tuple[Prompt, str]] = OrderedDict()
        self._tails: OrderedDict[tuple[str, str, int | None], Tensor] = OrderedDict()
        self._lengths: OrderedDict[str, int] = OrderedDict()

    def head(self, question: Question) -> tuple[Prompt, str]:
        """The prompt up to the response, images included, and the text that follows the response.

        With inputs = response it is one and the same object for all questions. Raises DataError for an unusable image.
        """
        key = None if self.inputs == "response" else question
        if key not in self._heads:
            self._heads[key] = self._encode_head(question)
            if len(self._heads) > self._keep:
                self._heads.popitem(last=False)
        self._heads.move_to_end(key)
        return self._heads[key]

    def _encode_head(self, question: Question) -> tuple[Prompt, str]:
        encoder, asked = self.encoder, ""
        if self.inputs != "response":
            plain = question_text(question).replace(IMAGE_MARKER, "")
            asked = QUESTION.format(question=remove_tags(encoder.clean(plain), _OWN_TAGS).replace(_PLACE, ""))
        images = load_question_images(encoder, question) if self.inputs == "image" else []
        content: list[dict[str, Any]] = [{"type": "image"} for _ in images]
        content.append({"type": "text", "text": USER.format(question=asked, response=_PLACE)})
        messages = [
            {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
            {"role": "user", "content": content},
        ]
        before, _, after = encoder.render(messages).partition(_PLACE)
        name = f"discriminator prompt of question {question.id}"
        return encoder.encode_text(before, images, name=name, key=question.images if images else None), after

    def tail(self, response_text: str, after: str, shown: int | None = None) -> Tensor:
        """int64 [T]: ids of the response and of the text that follows it.

        shown: only the response's first tokens, exactly this many (or all, if there are fewer).
        """
        key = (response_text, after, shown)
        if key not in self._tails:
            self._tails[key] = self._encode_tail(response_text, after, shown)
            if len(self._tails) > 64 * self._keep:
                self._tails.popitem(last=False)
        self._tails.move_to_end(key)
        return self._tails[key]

    def length(self, response_text: str) -> int:
        """Tokens of a response, whole."""
        if response_text not in self._lengths:
            self._lengths[response_text] = len(self._response_ids(response_text)[1])
            if len(self._lengths) > 64 * self._keep:
                self._lengths.popitem(last=False)
        self._lengths.move_to_end(response_text)
        return self._lengths[response_text]

    def _response_ids(self, response_text: str) -> tuple[str, list[int]]:
        text = remove_tags(self.encoder.clean(response_text), _OWN_TAGS)
        return text, self.encoder.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _encode_tail(self, response_text: str, after: str, shown: int | None) -> Tensor:
        encoder = self.encoder
        text, ids = self._response_ids(response_text)
        if shown is not None:
            # Put together as ids: read as one text, a token across the seam could betray that one was cut.
            return torch.tensor([*ids[:shown], *encoder.tokenizer(after, add_special_tokens=False)["input_ids"]])
        if len(ids) > self.max_response_tokens:
            half = self.max_response_tokens // 2
            text = f"{encoder.decode(ids[:half])}\n[...]\n{encoder.decode(ids[len(ids) - half :])}"
        return torch.tensor(encoder.tokenizer(text + after, add_special_tokens=False)["input_ids"])


def load_question_images(encoder: PromptEncoder, question: Question) -> list[Image.Image]:
    """The question's images, decoded. Raises DataError for one that cannot be used."""
    return [load_image(s, max_pixels=encoder.max_image_pixels, allow_urls=encoder.allow_urls) for s in question.images]
