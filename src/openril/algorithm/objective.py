"""The clipped objective with its KL term (RIL, Eq. 2), as a loss to minimize. Pure; shapes: R responses, T tokens.

Departures from the equation as printed: ratios are per token, and the sum over a group is divided by a constant,
(members of the group) x (max_completion_length), as in the code of the Dr.GRPO authors, without length normalization.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHAPING = 0.1
"""gamma in LUFFY's p / (p + gamma). Its gradient, gamma p / (p + gamma)^2 of that of log p, is largest at p = gamma."""


@dataclass(frozen=True)
class ObjectiveStats:
    """Sums over response tokens. Add up micro-batches and processes, then divide by the number of tokens."""

    tokens: float
    teacher_tokens: float
    """The part of ``tokens`` that is in teacher responses."""
    kl: float
    """k3 in nats over the tokens of student responses."""
    kl_teacher: float
    """k3 in nats over the tokens of teacher responses: no estimate of a KL divergence."""
    clipped_low: float
    """Tokens whose clipped term was taken because the ratio is below 1 - epsilon at a negative advantage."""
    clipped_high: float
    """Tokens whose clipped term was taken because the ratio is above 1 + epsilon at a positive advantage."""
    ratio: float
    logprob: float


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return exp(d) - d - 1 per token [R, T], with d = log pi_ref - log pi_theta.

    It is never negative. For tokens drawn from pi_theta it is an unbiased estimator of KL(pi_theta || pi_ref) (Schulman,
    "Approximating KL divergence"). For a teacher's tokens it is only a distance between the two log-probabilities.
    """
    difference = ref_logprobs - logprobs
    return difference.exp() - difference - 1


def token_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    epsilon: float,
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
    kl_rows: Tensor | None = None,
    unclipped_above: Tensor | None = None,
    shaped: Tensor | None = None,
) -> Tensor:
    """Return -(min(r A, clip(r, 1 - epsilon, 1 + epsilon) A) - beta k3) per token.

    Gradients flow through ``logprobs`` alone.

    Args:
        logprobs, old_logprobs, ref_logprobs: [R, T] in nats.
        advantages: [R].
        kl_rows: bool [R], the responses that have a KL term; None for all (Eq. 2).
        unclipped_above: bool [R], the responses whose ratio may exceed 1 + epsilon; None for none (Eq. 2).
        shaped: bool [R], the responses whose policy term is p / (p + 0.1) A with p = pi_theta, without ratio and clip
            (LUFFY, 2504.14945, for responses that no known policy drew); None for none (Eq. 2).
    """
    ratio = (logprobs - old_logprobs).exp()
    a = advantages[:, None]
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    if unclipped_above is not None:
        clipped = torch.where(unclipped_above[:, None], ratio.clamp(min=1 - epsilon), clipped)
    loss = -torch.minimum(ratio * a, clipped * a)
    if shaped is not None:
        p = logprobs.exp()
        loss = torch.where(shaped[:, None], -p / (p + SHAPING) * a, loss)
    if beta:
        assert ref_logprobs is not None
        kl = beta * k3(logprobs, ref_logprobs)
        loss = loss + (kl if kl_rows is None else kl * kl_rows[:, None])
    return loss


def response_weights(mask: Tensor, group_sizes: Tensor, *, per_length: bool, max_completion_length: int) -> Tensor:
    """Return the weight [R] that the tokens of a response have in the loss of its group.

    Dr.GRPO and RIL: 1 / (members x max_completion_length), the same for every response. GRPO (per_length): 1 / (members x
    tokens of the response). mask: bool [R, T]; group_sizes: int [R], the members in the group of each response.
    """
    if per_length:
        return 1.0 / (group_sizes * mask.sum(-1).clamp(min=1))
    return 1.0 / (group_sizes * max_completion_length)


def objective_stats(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    from_student: Tensor,
    *,
    epsilon: float,
    ref_logprobs: Tensor | None,
    unclipped_above: Tensor | None = None,
    shaped: Tensor | None = None,
) -> ObjectiveStats:
    """Return the sums for the metrics of one micro-batch.

    mask: bool [R, T], the tokens that count; from_student: bool [R]; the others as in ``token_loss``.
    """
    with torch.no_grad():
        ratio = (logprobs - old_logprobs).exp()
        a = advantages[:, None]
        low, high = (ratio < 1 - epsilon) & (a < 0), (ratio > 1 + epsilon) & (a > 0)
        if unclipped_above is not None:
            high = high & ~unclipped_above[:, None]
        if shaped is not None:
            low, high = low & ~shaped[:, None], high & ~shaped[:, None]
        kl = k3(logprobs, ref_logprobs) if ref_logprobs is not None else torch.zeros_like(logprobs)
        m = mask.float()
        of_student = m * from_student[:, None]
        return ObjectiveStats(
            tokens=float(m.sum()),
            teacher_tokens=float((m - of_student).sum()),
            kl=float((kl * of_student).sum()),
            kl_teacher=float((kl * (m - of_student)).sum()),
            clipped_low=float((low * m).sum()),
            clipped_high=float((high * m).sum()),
            ratio=float((ratio * m).sum()),
            logprob=float((logprobs * m).sum()),
        )
