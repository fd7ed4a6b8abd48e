"""The sampling distribution: repetition penalty, temperature, top-k, top-p, in transformers' and vLLM's order. Pure."""

from __future__ import annotations

import torch
from torch import Tensor

from openril.recipe.schema import SamplingConfig


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """A copy of logits [R, V] with the scores of seen ids (int64 [R, S], repeats allowed) divided by ``penalty`` where
    positive and multiplied where negative (CTRL, arXiv 1909.05858, as transformers does it)."""
    if penalty == 1.0:
        return logits.clone()
    scores = logits.gather(-1, seen)
    return logits.scatter(-1, seen, torch.where(scores > 0, scores / penalty, scores * penalty))


def candidates(logits: Tensor, settings: SamplingConfig) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn and their probabilities, most likely first: ids and float32 probabilities [R, K].

    Tokens outside top-p have probability 0; rows sum to 1. Temperature must be above 0. Top-p keeps every token whose
    predecessors sum to less than top_p, so at least one.
    """
    k = logits.shape[-1] if settings.top_k == 0 else min(settings.top_k, logits.shape[-1])
    scores, ids = logits.topk(k, dim=-1)  # before anything else: the rest looks at k tokens, not at the vocabulary
    probabilities = (scores.float() / settings.temperature).softmax(-1)
    if settings.top_p >= 1:
        return ids, probabilities
    before = probabilities.cumsum(-1) - probabilities
    probabilities = torch.where(before < settings.top_p, probabilities, 0.0)
    return ids, probabilities / probabilities.sum(-1, keepdim=True)


def draw(logits: Tensor, settings: SamplingConfig, uniform: Tensor) -> Tensor:
    """int64 [R]: one token a row by inverting the cumulative distribution at ``uniform`` (float64 [R] in [0, 1)).

    Temperature 0 takes the most likely token.
    """
    if settings.temperature == 0:
        return logits.argmax(-1)
    ids, probabilities = candidates(logits, settings)
    cumulative = probabilities.double().cumsum(-1)
    # Rounding may leave the last sum a hair below 1: scale, so that the draw never falls behind the last candidate.
    chosen = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(-1, chosen.clamp(max=ids.shape[-1] - 1))[:, 0]
