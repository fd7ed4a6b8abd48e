"""The interface of sampling engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

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
