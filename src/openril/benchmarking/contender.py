"""What the contenders share: settings, questions, given responses, and the description of a run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from openril.benchmarking.inputs import fixed_completions, questions_of
from openril.benchmarking.measuring import PeakMemory, Stopwatch, limit_memory
from openril.benchmarking.shapes import QUESTIONS
from openril.benchmarking.worker import Spec, exactly
from openril.records import Question

LEARNING_RATE, BETA, EPSILON = 1e-6, 0.01, 0.2
SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.05}
MAX_GRAD_NORM = 1.0


class Contender:
    """A contender in its process."""

    banned: Collection[int]
    """Special tokens, which no response contains."""

    def __init__(self, spec: Spec) -> None:
        if spec.device == "cpu":
            limit_memory()
        self.spec, self.shape = spec, spec.shape
        self.watch = Stopwatch(spec.device)
        self.memory = PeakMemory(spec.device)

    def questions(self, call: int) -> list[Question]:
        return questions_of(self.spec.pictures, call)

    def completions(self, call: int, number: int, count: int) -> list[list[int]]:
        """Return ``count`` given responses to question ``number`` of a call, equal for all contenders."""
        shape = self.shape
        return fixed_completions(QUESTIONS * call + number, count, shape.response_tokens, shape.size.vocab, self.banned)

    def check(self, lengths: Sequence[int], expected: int = 0) -> None:
        """Raise RuntimeError unless every response has the expected length, by default that of the shape."""
        exactly(lengths, expected or self.shape.response_tokens, self.spec.name)

    def describe(self, prompt_tokens: int, model: torch.nn.Module, optimizer: Any, **settings: Any) -> dict[str, Any]:
        """Return what the results repeat about this contender. optimizer: accelerate may have wrapped it."""
        return {
            "prompt_tokens": prompt_tokens,
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "threads": torch.get_num_threads(),
            "memory_source": self.memory.source,
            "settings": {
                **settings,
                "precision": self.spec.precision,
                "optimizer": type(getattr(optimizer, "optimizer", optimizer)).__name__,
            },
        }
