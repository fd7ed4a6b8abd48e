"""The prompt of the discriminator, in the structure of the paper's prompt (its Figure 3) with a wording of this project."""

from __future__ import annotations

from typing import Any, Literal

import torch
from cachetools import LRUCache, cachedmethod
from torch import Tensor

from openril.data.question_text import question_text
from openril.data.sanitize import remove_tags
from openril.models.prompts import Prompt, PromptEncoder
from openril.records import IMAGE_MARKER, Question

SYSTEM = (
    "You are a discriminator. You read a response and decide who wrote it: a teacher model or a student model."
    " Judge by its reasoning, its accuracy and its style. Say 0 if a teacher wrote it and 1 if a student wrote it."
)
# The instruction comes before the response, so that all responses to a question share it and it runs once.
USER = (
    "{question}Who wrote the following response? Answer with 0 for teacher or 1 for student.\n"
    "<response>\n{response}\n</response>"
)
QUESTION = "<question>\n{question}\n</question>\n"

# Marks the place of the response while the chat template is filled in.
_PLACE = "RESPONSE-STANDS-HERE"

# Tags of the prompt. A response that holds one could end its part of the prompt early.
_OWN_TAGS = ("response", "question")


class DiscriminatorPrompts:
    """Builds prompts in two parts: what all responses to a question share, encoded once, and the rest.

    Args:
        inputs: What the prompt shows: the response alone (paper), with the question's text, or with its images too.
        max_response_tokens: A longer response keeps its first and last halves of that many tokens.
        keep: The number of questions whose encoded parts are kept.
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
        self._heads: LRUCache[Question | None, tuple[Prompt, str]] = LRUCache(keep)
        self._tails: LRUCache[tuple[str, str, int | None], Tensor] = LRUCache(64 * keep)
        self._lengths: LRUCache[str, int] = LRUCache(64 * keep)

    @cachedmethod(lambda self: self._heads, key=lambda self, question: None if self.inputs == "response" else question)
    def head(self, question: Question) -> tuple[Prompt, str]:
        """Return the prompt up to the response, images included, and the text that follows the response.

        With inputs = response it is the same object for all questions. Raises DataError for an unusable image.
        """
        encoder, asked = self.encoder, ""
        if self.inputs != "response":
            plain = question_text(question).replace(IMAGE_MARKER, "")
            asked = QUESTION.format(question=remove_tags(encoder.clean(plain), _OWN_TAGS).replace(_PLACE, ""))
        images = encoder.load_images(question) if self.inputs == "image" else []
        content: list[dict[str, Any]] = [{"type": "image"} for _ in images]
        content.append({"type": "text", "text": USER.format(question=asked, response=_PLACE)})
        messages = [
            {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
            {"role": "user", "content": content},
        ]
        before, _, after = encoder.render(messages).partition(_PLACE)
        name = f"discriminator prompt of question {question.id}"
        return encoder.encode_text(before, images, name=name, key=question.images if images else None), after

    @cachedmethod(lambda self: self._lengths)
    def length(self, response_text: str) -> int:
        """Return the number of tokens of the whole response."""
        return len(self._response_ids(response_text)[1])

    def _response_ids(self, response_text: str) -> tuple[str, list[int]]:
        text = remove_tags(self.encoder.clean(response_text), _OWN_TAGS)
        return text, self.encoder.tokenizer(text, add_special_tokens=False)["input_ids"]

    @cachedmethod(lambda self: self._tails)
    def tail(self, response_text: str, after: str, shown: int | None = None) -> Tensor:
        """Return int64 [T]: the ids of the response and of the text that follows it.

        shown: Use only the response's first tokens, exactly this many or all if there are fewer.
        """
        encoder = self.encoder
        text, ids = self._response_ids(response_text)
        if shown is not None:
            # Joined as ids: in one text, a token across the seam could show that the response was cut.
            return torch.tensor([*ids[:shown], *encoder.tokenizer(after, add_special_tokens=False)["input_ids"]])
        if len(ids) > self.max_response_tokens:
            half = self.max_response_tokens // 2
            text = f"{encoder.decode(ids[:half])}\n[...]\n{encoder.decode(ids[len(ids) - half :])}"
        return torch.tensor(encoder.tokenizer(text + after, add_special_tokens=False)["input_ids"])
