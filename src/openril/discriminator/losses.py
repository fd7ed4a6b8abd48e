"""Discriminator losses as pure functions. Logits are of student_prob: sigmoid(logit) = P(the student wrote it)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bce_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return Eq. 1 of RIL for one question as a loss: -(mean log D(student) + mean log(1 - D(teacher))).

    The label of a student response is one. Logits: [S], [T]. The scalar is in nats, 2 log 2 at chance; a side without
    responses adds 0.
    """
    sides = (student_logits, -teacher_logits)
    return -sum((logsigmoid(side).mean() if side.numel() else side.sum() for side in sides), torch.zeros(()))


def bce_terms(logits: Tensor, labels_student_is_one: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the terms of ``bce_loss``: -log D for a student response, -log(1 - D) for a teacher response.

    Logits: [N]; labels: bool [N]; terms: [N] in nats. Their sum with weights 1/S and 1/T is ``bce_loss``, however the
    responses are batched. smoothing: The share of each term with the other label.
    """
    return _smoothed(torch.where(labels_student_is_one, logits, -logits), smoothing)


def _smoothed(signed: Tensor, smoothing: float) -> Tensor:
    """Return -(1 - s) log sigmoid(z) - s log sigmoid(-z), which is least where z = log((1 - s) / s)."""
    right = -logsigmoid(signed)
    return right if smoothing == 0.0 else (1 - smoothing) * right - smoothing * logsigmoid(-signed)


def chance_loss(loss: str, has_student: bool, has_teacher: bool) -> float:
    """Return the loss of one question, in nats, when every logit is 0: 2 log 2 for ``bce``, log 2 for ``bradley_terry``.

    Without responses of one side, Eq. 1 has one term and Bradley-Terry none.
    """
    sides = has_student + has_teacher
    return math.log(2) * (sides if loss == "bce" else sides // 2)


def centered(logits: Tensor, labels_student_is_one: Tensor) -> Tensor:
    """Return the logits [N] of one question, shifted so that zero is halfway between the means of the two sides.

    Bradley-Terry learns differences alone, so the zero of its logits is arbitrary. If one side has no responses, the
    logits are returned as they are.
    """
    labels = labels_student_is_one
    if labels.all() or not labels.any():
        return logits
    return logits - (logits[labels].mean() + logits[~labels].mean()) / 2


def bradley_terry_loss(
    student_logits: Tensor, teacher_logits: Tensor, weights: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Return -log sigmoid(z_student - z_teacher), averaged over the pairs of one question (GAD, arXiv 2511.10643).

    Logits: [S], [T]; weights: [S, T] with sum 1, where not all pairs count alike. smoothing: The share of each pair with
    its sides exchanged. The scalar is in nats, log 2 at chance, 0 if one side is empty.
    """
    if not student_logits.numel() or not teacher_logits.numel():
        return student_logits.sum() * 0.0 + teacher_logits.sum() * 0.0
    terms = _smoothed(student_logits[:, None] - teacher_logits[None, :], smoothing)
    return terms.mean() if weights is None else (weights * terms).sum()


def length_only_accuracy(lengths: Tensor, labels_student_is_one: Tensor) -> float:
    """Return the accuracy of the best threshold on length, in either direction, on this batch.

    A discriminator that looks at nothing but length could reach it. Lengths: [N], in any unit; labels: bool [N]. NaN for
    an empty batch.
    """
    n = lengths.numel()
    if n == 0:
        return float("nan")
    order = lengths.argsort()
    sorted_lengths, labels = lengths[order], labels_student_is_one[order].long()
    # A cut after the i shortest calls those below student and those above teacher, or the reverse.
    students_below = torch.cat([labels.new_zeros(1), labels.cumsum(0)])
    below = torch.arange(n + 1)
    correct = students_below + (n - below) - (labels.sum() - students_below)
    possible = torch.ones(n + 1, dtype=torch.bool)
    possible[1:n] = sorted_lengths[1:] != sorted_lengths[:-1]  # no cut between equal lengths
    correct = torch.maximum(correct, n - correct)[possible]
    return float(correct.max()) / n
