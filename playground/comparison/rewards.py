"""Reward functions of the controls (``rewards.functions``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WORDS = 6
"""Number of words from which a response counts as long, which tells derivations from bare answers."""


def long_enough(completions: Sequence[str], **columns: Any) -> list[float]:
    """Return 1 for every response of at least ``WORDS`` words, otherwise 0."""
    return [float(len(text.split()) >= WORDS) for text in completions]


def one(completions: Sequence[str], **columns: Any) -> list[float]:
    """Return 1 for every response, so that all of them are imitated alike."""
    return [1.0 for _ in completions]
