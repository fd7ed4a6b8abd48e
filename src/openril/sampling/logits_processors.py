"""The sampling distribution: repetition penalty, temperature, top-k, top-p, in the order of transformers and vLLM."""

from __future__ import annotations

import torch
from torch import Tensor

from openril.recipe.schema import SamplingConfig


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return logits [R, V] with the scores of seen ids (int64 [R, S], repeats allowed) divided by ``penalty`` if positive
    and multiplied if negative (CTRL, arXiv 1909.05858, as in transformers)."""
    if penalty == 1.0:
        return logits.clone()
    scores = logits.gather(-1, seen)
    return logits.scatter(-1, seen, torch.where(scores > 0, scores / penalty, scores * penalty))


def candidates(logits: Tensor, settings: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Return the ids of the tokens that may be drawn, most likely first, and their float32 probabilities, both [R, K].

    Tokens outside top-p have probability 0; rows sum to 1. Temperature must be above 0. Top-p keeps every token whose
    predecessors sum to less than top_p, and so at least one.
    """
    k = logits.shape[-1] if settings.top_k == 0 else min(settings.top_k, logits.shape[-1])
    scores, ids = logits.topk(k, dim=-1)  # first, so that the rest runs on k tokens instead of the vocabulary
    probabilities = (scores.float() / settings.temperature).softmax(-1)
    if settings.top_p >= 1:
        return ids, probabilities
    before = probabilities.cumsum(-1) - probabilities
    probabilities = torch.where(before < settings.top_p, probabilities, 0.0)
    return ids, probabilities / probabilities.sum(-1, keepdim=True)


def draw(logits: Tensor, settings: SamplingConfig, uniform: Tensor) -> Tensor:
    """Draw one token per row, int64 [R], by inverting the cumulative distribution at ``uniform`` (float64 [R] in [0, 1)).

    Temperature 0 takes the most likely token.
    """
    if settings.temperature == 0:
        return logits.argmax(-1)
    ids, probabilities = candidates(logits, settings)
    cumulative = probabilities.double().cumsum(-1)
    # Rounding may leave the last sum slightly below 1: scale, so that a draw never exceeds the last candidate.
    chosen = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(-1, chosen.clamp(max=ids.shape[-1] - 1))[:, 0]
