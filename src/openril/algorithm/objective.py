"""The clipped objective with its KL term (RIL, Eq. 2), as a loss to minimise. Pure; shapes: R responses, T tokens.

Departures from the equation as printed: ratios are per token, and the sum over a group is divided by a constant,
(members of the group) x (max_completion_length), as the Dr.GRPO authors' code does; no length normalisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ObjectiveStats:
    """Sums over response tokens, to be divided by ``tokens`` after adding up micro-batches and processes.

    kl: k3 estimate in nats. clipped_low, clipped_high: tokens whose clipped term was taken because the ratio was below
    1 - epsilon at a negative advantage, or above 1 + epsilon at a positive one. ratio: probability ratios.
    """

    tokens: float
    kl: float
    clipped_low: float
    clipped_high: float
    ratio: float
    logprob: float


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The k3 estimator of KL(pi_theta || pi_ref) per token: exp(d) - d - 1 with d = log pi_ref - log pi_theta.

    Non-negative and unbiased for tokens drawn from pi_theta (Schulman, "Approximating KL divergence"). [R, T].
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
) -> Tensor:
    """-(min(r A, clip(r, 1 - epsilon, 1 + epsilon) A) - beta k3) per token, [R, T].

    logprobs, old_logprobs, ref_logprobs: [R, T] in nats; advantages: [R]. Gradients flow through logprobs alone.
    """
    ratio = (logprobs - old_logprobs).exp()
    a = advantages[:, None]
    loss = -torch.minimum(ratio * a, ratio.clamp(1 - epsilon, 1 + epsilon) * a)
    if beta:
        assert ref_logprobs is not None
        loss = loss + beta * k3(logprobs, ref_logprobs)
    return loss


def response_weights(mask: Tensor, group_sizes: Tensor, *, per_length: bool, max_completion_length: int) -> Tensor:
    """Weight of a response's tokens in the loss of its group, [R].

    mask: bool [R, T]. group_sizes: int [R], members in the response's group. Dr.GRPO and RIL: 1 / (members x
    max_completion_length), the same for every response. GRPO (per_length): 1 / (members x tokens of the response).
    """
    if per_length:
        return 1.0 / (group_sizes * mask.sum(-1).clamp(min=1))
    return 1.0 / (group_sizes * max_completion_length)


def objective_stats(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    epsilon: float,
    ref_logprobs: Tensor | None,
) -> ObjectiveStats:
    """Sums for the metrics of one micro-batch; shapes as in ``token_loss``."""
    with torch.no_grad():
        ratio = (logprobs - old_logprobs).exp()
        a = advantages[:, None]
        low, high = (ratio < 1 - epsilon) & (a < 0), (ratio > 1 + epsilon) & (a > 0)
        kl = k3(logprobs, ref_logprobs) if ref_logprobs is not None else torch.zeros_like(logprobs)
        m = mask.float()
        return ObjectiveStats(
            tokens=float(m.sum()),
            kl=float((kl * m).sum()),
            clipped_low=float((low * m).sum()),
            clipped_high=float((high * m).sum()),
            ratio=float((ratio * m).sum()),
            logprob=float((logprobs * m).sum()),
        )
