"""Discriminator losses. Pure; logits are of student_prob, so sigmoid(logit) is the probability that a student wrote it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bce_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Eq. 1 of RIL for one question, as a loss: -(mean log D(student) + mean log(1 - D(teacher))). Label: student is one.

    student_logits [S], teacher_logits [T]; scalar in nats, 2 log 2 at chance. A side without responses adds 0.
    """
    loss = student_logits.sum() * 0.0 + teacher_logits.sum() * 0.0
    if student_logits.numel():
        loss = loss - logsigmoid(student_logits).mean()
    if teacher_logits.numel():
        loss = loss - logsigmoid(-teacher_logits).mean()
    return loss


def bce_terms(logits: Tensor, labels_student_is_one: Tensor) -> Tensor:
    """The terms of ``bce_loss`` one by one, [N] in nats: -log D for a student's response, -log(1 - D) for a teacher's.

    logits: [N]; labels: bool [N]. Summed with weights 1/S and 1/T they are ``bce_loss``, however they are batched.
    """
    return -logsigmoid(torch.where(labels_student_is_one, logits, -logits))


def centred(logits: Tensor, labels_student_is_one: Tensor) -> Tensor:
    """Logits of one question's responses with the zero half-way between the two sides' means, [N].

    Bradley-Terry learns differences alone: where its logits are zero means nothing until it is put somewhere. A side
    without responses leaves them as they are.
    """
    labels = labels_student_is_one
    if labels.all() or not labels.any():
        return logits
    return logits - (logits[labels].mean() + logits[~labels].mean()) / 2


def bradley_terry_loss(student_logits: Tensor, teacher_logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """-log sigmoid(z_student - z_teacher), the mean over all pairs of one question (GAD, arXiv 2511.10643).

    student_logits [S], teacher_logits [T]; weights [S, T] with sum 1: of the pairs, where not all count alike. Scalar in
    nats, log 2 at chance. 0 if either side is empty.
    """
    if not student_logits.numel() or not teacher_logits.numel():
        return student_logits.sum() * 0.0 + teacher_logits.sum() * 0.0
    terms = -logsigmoid(student_logits[:, None] - teacher_logits[None, :])
    return terms.mean() if weights is None else (weights * terms).sum()


def length_only_accuracy(lengths: Tensor, labels_student_is_one: Tensor) -> float:
    """Accuracy of the best single threshold on length, in either direction, on this very batch: what a discriminator
    that only looks at length could reach. lengths: [N], any unit; labels: bool [N]. NaN for an empty batch."""
    n = lengths.numel()
    if n == 0:
        return float("nan")
    order = lengths.argsort()
    sorted_lengths, labels = lengths[order], labels_student_is_one[order].long()
    # Cut after i shortest: those below called student and those above teacher, or the other way round.
    students_below = torch.cat([labels.new_zeros(1), labels.cumsum(0)])
    below = torch.arange(n + 1)
    correct = students_below + (n - below) - (labels.sum() - students_below)
    possible = torch.ones(n + 1, dtype=torch.bool)
    possible[1:n] = sorted_lengths[1:] != sorted_lengths[:-1]  # no cut between equal lengths
    correct = torch.maximum(correct, n - correct)[possible]
    return float(correct.max()) / n
