"""What the rest asks of a sampling engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from openril.recipe.schema import SamplingConfig
from openril.records import STUDENT, Question, Response


class Sampler(Protocol):
    """Draws responses from a model."""

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
        """``num_generations`` responses to each question, numbered from ``first_index``.

        Response ``i`` of a question follows from (seed, question id, i) alone: it is the same whatever else is in the
        call, so interrupted work continues where it stopped. Local engines fill token_ids and logprobs.
        """
        ...
