"""The examples of the warm start, pairs of question and answer, and the collator that makes rows of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openril.errors import CacheError, DataError, PromptTooLongError
from openril.models.packing import Batch, GroupTokens, pad_rows
from openril.models.prompt_lengths import LeftOut
from openril.models.prompts import Prompt, PromptEncoder
from openril.recipe.schema import Recipe
from openril.records import Question, Response
from openril.responses.cache import ResponseCache
from openril.responses.loaded import LoadedResponses
from openril.rewards.answers import known_answers

IGNORED = -100
"""Label of a token without loss."""

UNCUT = 2**31
"""No limit on an answer's tokens: answers that do not fit are left out whole, never cut."""


_NO_ANSWER = ("refusal", "content_filter")


@dataclass(frozen=True)
class Example:
    """A question and the answer to learn. Its images are opened when its batch is built."""

    question: Question
    answer: Response


def sft_examples(
    recipe: Recipe,
    questions: Sequence[Question],
    inspect: Callable[[LoadedResponses], None] = lambda loaded: None,
) -> list[Example]:
    """Return the examples that ``recipe.sft.targets`` names, in the order of questions, sources and indices.

    Args:
        inspect: Receives the cached responses that the examples are made of.

    Raises:
        DataError: No question has an answer.
        CacheError: The cache lacks responses or verdicts.
    """
    if recipe.sft.targets == "answers":
        examples = [Example(q, Response(q.id, "answer", 0, q.answer)) for q in questions if q.answer.strip()]
        if not examples:
            raise DataError(
                "data.train: no question has an answer to learn. Add answers, map data.columns.answer to the column"
                " that holds them, or set sft.targets to teacher_responses."
            )
        return examples
    return _cached_examples(recipe, questions, inspect)


def _cached_examples(
    recipe: Recipe, questions: Sequence[Question], inspect: Callable[[LoadedResponses], None]
) -> list[Example]:
    judged = recipe.sft.targets == "judged_responses"
    limit = recipe.sft.responses_per_question or None
    sources = recipe.sft.sources or [t.name for t in recipe.teachers]
    loaded = ResponseCache.open(recipe.cache_path).load(questions, sources)
    inspect(loaded)
    score = known_answers(recipe) if judged else None
    examples: list[Example] = []
    asked = known = 0
    for question in questions:
        for source in sources:
            responses = loaded.responses_for(question.id, source)
            if score is not None:
                scores = score([(question, r.text) for r in responses])
                asked += sum(s.asked_judge for s in scores)
                known += sum(s.asked_judge and s.score is not None for s in scores)
                responses = [r for r, s in zip(responses, scores, strict=True) if s.score is not None and s.score >= 1]
            responses = [r for r in responses if r.text.strip() and r.finish_reason not in _NO_ANSWER]
            examples += [Example(question, r) for r in responses[:limit]]
    if asked and not known:
        raise CacheError(
            f"sft.targets: judged_responses needs verdicts, but {recipe.cache_path} holds none of this judge on responses"
            f" of {', '.join(sources)}. Set collect.judge_responses: true and run `ril collect`."
        )
    if not examples:
        what = "judged right" if judged else "with text"
        raise CacheError(
            f"{recipe.cache_path}: no response of {', '.join(sources)} is {what}, so there is nothing to learn."
        )
    return examples


def fingerprint(examples: Sequence[Example]) -> str:
    """Return a fingerprint of all question ids, sources, indices and answer texts, in order."""
    digest = hashlib.sha256()
    for e in examples:
        parts = [e.question.id, e.question.question, e.answer.source, e.answer.index, e.answer.text]
        digest.update(json.dumps(parts).encode())
    return f"{len(examples)} examples, {digest.hexdigest()[:16]}"


def labels_of(rows: Batch) -> Tensor:
    """Return int64 [R, L]: the response tokens at their positions, ``IGNORED`` for prompt, image and padding tokens."""
    labels = torch.full_like(rows.model_inputs["input_ids"], IGNORED)
    # ``index`` is the kept position from which a target is predicted, counted over all rows; the target is one further
    # to the right.
    place = rows.index % len(rows.keep) + rows.keep[0] + 1
    row = torch.arange(len(labels))[:, None].expand_as(place)
    labels[row[rows.mask], place[rows.mask]] = rows.targets[rows.mask]
    return labels


class SFTCollator:
    """Builds micro-batches of examples from dataset rows ``{"example": number}``, with the tokens that the loop uses.

    An example with more than ``max_prompt_length`` tokens in its prompt or ``max_length`` in all is left out and noted in
    ``left_out``, because cutting it could cut through an image. dummy: See models/dummy_image.py. Raises DataError
    for an image that cannot be used.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        encoder: PromptEncoder,
        *,
        max_prompt_length: int,
        max_length: int,
        left_out: LeftOut,
        dummy: Prompt | None = None,
    ) -> None:
        self.examples = examples
        self.encoder = encoder
        self.max_length = max_length
        self.left_out = left_out
        self.dummy = dummy
        encoder.max_prompt_length = UNCUT
        self.stand_in = encoder(Question("stand-in", "-"))
        encoder.max_prompt_length = max_prompt_length

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the model's inputs and ``labels`` [R, L].

        If all examples are left out, the micro-batch is one row without labels, so that all processes make the same steps.
        """
        groups = [g for row in rows if (g := self._tokens(self.examples[row["example"]])) is not None]
        learned = len(groups)
        if self.dummy is not None and not any(g.prompt.vision for g in groups):
            groups.append(self._filler(self.dummy))
        if not groups:
            groups.append(self._filler(self.stand_in))
        laid_out = pad_rows(groups, self.encoder.pad_token_id)
        labels = labels_of(laid_out)
        labels[learned:] = IGNORED
        return {**laid_out.model_inputs, "labels": labels}

    def _tokens(self, example: Example) -> GroupTokens | None:
        answer = self.encoder.completion_ids(example.answer, UNCUT)
        try:
            prompt = self.encoder(example.question)
        except PromptTooLongError as e:
            tokens = e.tokens
        else:
            if prompt.length + len(answer) <= self.max_length:
                return GroupTokens(prompt, [answer])
            tokens = prompt.length
        which = {"source": example.answer.source, "index": example.answer.index, "answer_tokens": len(answer)}
        self.left_out.add(example.question, tokens, **which)
        return None

    def _filler(self, prompt: Prompt) -> GroupTokens:
        return GroupTokens(prompt, [torch.tensor([self.encoder.eos_token_ids[0]])])
