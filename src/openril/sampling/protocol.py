"""The interface of sampling engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from openril.errors import PromptTooLongError
from openril.recipe.schema import SamplingConfig
from openril.records import STUDENT, Question, Response


class Sampler(Protocol):
    """Samples responses from a model."""

    def sample(
        self,
        questions: Sequence[Question],
        num_generations: int,
        *,
        settings: SamplingConfig,
        max_completion_length: int,
        seed: int,
        first_index: int = 0,
        source: str = STUDENT,
    ) -> list[list[Response]]:
        """Return ``num_generations`` responses to each question, numbered from ``first_index``.

        Response ``i`` of a question depends only on (seed, question id, i) and not on the rest of the call, so that
        interrupted work continues where it stopped. Local engines fill token_ids and logprobs.
        """
        ...


def gathered(sampler: Any) -> AbstractContextManager[None]:
    """Return the context in which every process may call ``sample`` as often as it needs.

    A sampler of sharded weights gathers them there, for which all processes must enter it together.
    """
    return getattr(sampler, "gathered", nullcontext)()


def sample_fitting(
    sampler: Sampler,
    questions: Sequence[Question],
    num_generations: int,
    too_long: Callable[[Question, int], None],
    **options: Any,
) -> list[list[Response]]:
    """Sample as ``sampler.sample`` does, with no response to a question whose prompt is too long.

    Args:
        too_long: Called with each such question and the tokens of its prompt.
    """
    fitting = list(questions)
    while True:
        try:
            drawn = sampler.sample(fitting, num_generations, **options)
        except PromptTooLongError as e:
            too_long(next(q for q in fitting if q.id == e.question_id), e.tokens)
            fitting = [q for q in fitting if q.id != e.question_id]
        else:
            found = {q.id: responses for q, responses in zip(fitting, drawn, strict=True)}
            return [found.get(q.id, []) for q in questions]
