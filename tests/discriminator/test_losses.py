"""Discriminator losses worked by hand: the student is one."""

import math

import pytest
import torch

from openril.discriminator.losses import (
    bce_loss,
    bce_terms,
    bradley_terry_loss,
    centered,
    length_only_accuracy,
)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_bce_is_equation_one():
    # D(student) = 0.8, 0.5; D(teacher) = 0.2: -(log 0.8 + log 0.5)/2 - log(1 - 0.2).
    student, teacher = torch.tensor([logit(0.8), logit(0.5)]), torch.tensor([logit(0.2)])
    expected = -(math.log(0.8) + math.log(0.5)) / 2 - math.log(0.8)
    assert float(bce_loss(student, teacher)) == pytest.approx(expected, rel=1e-6)


def test_bce_pushes_student_up_and_teacher_down():
    student, teacher = torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)
    bce_loss(student, teacher).backward()
    assert student.grad is not None and teacher.grad is not None
    assert student.grad.tolist() == pytest.approx([-0.25, -0.25])  # descent raises student_prob of the student
    assert teacher.grad.tolist() == pytest.approx([0.5])


def test_chance_costs_two_log_two():
    assert float(bce_loss(torch.zeros(3), torch.zeros(5))) == pytest.approx(2 * math.log(2))


def test_a_missing_side_adds_nothing():
    assert float(bce_loss(torch.zeros(2), torch.zeros(0))) == pytest.approx(math.log(2))
    assert float(bradley_terry_loss(torch.zeros(2), torch.zeros(0))) == 0.0


def test_bradley_terry_by_hand():
    # Differences student - teacher: 1 - 0 and 3 - 0.
    loss = bradley_terry_loss(torch.tensor([1.0, 3.0]), torch.tensor([0.0]))
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-3))) / 2
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_length_only_accuracy():
    student = torch.tensor([True, True, False, False])
    assert length_only_accuracy(torch.tensor([1.0, 2.0, 8.0, 9.0]), student) == 1.0  # students are short
    assert length_only_accuracy(torch.tensor([8.0, 9.0, 1.0, 2.0]), student) == 1.0  # or long
    assert length_only_accuracy(torch.tensor([5.0, 5.0, 5.0, 5.0]), student) == 0.5  # no cut between equals
    assert length_only_accuracy(torch.tensor([1.0, 8.0, 2.0, 9.0]), student) == 0.75


def test_weighted_terms_are_the_loss_however_they_are_split():
    logits = torch.tensor([0.3, -1.2, 2.0, 0.7, -0.4])
    student = torch.tensor([True, True, False, False, False])
    weights = torch.where(student, 1 / 2, 1 / 3)
    whole = float(bce_loss(logits[student], logits[~student]))
    parts = sum(float((weights[i : i + 2] * bce_terms(logits[i : i + 2], student[i : i + 2])).sum()) for i in (0, 2, 4))
    assert parts == pytest.approx(whole, rel=1e-6)


def test_centered_puts_zero_half_way_between_the_sides():
    # Means 5 and 1: zero moves to 3.
    logits = torch.tensor([4.0, 6.0, 1.0])
    assert centered(logits, torch.tensor([True, True, False])).tolist() == [1.0, 3.0, -2.0]
    assert centered(logits, torch.tensor([True, True, True])).tolist() == [4.0, 6.0, 1.0]  # one side only


def test_smoothed_labels_give_a_share_of_the_loss_to_the_other_label():
    # D(student) = 0.8 and D(teacher) = 0.2, both 0.8 right: each term is -(0.9 log 0.8 + 0.1 log 0.2).
    logits, student = torch.tensor([logit(0.8), logit(0.2)]), torch.tensor([True, False])
    expected = -(0.9 * math.log(0.8) + 0.1 * math.log(0.2))
    assert bce_terms(logits, student, 0.1).tolist() == pytest.approx([expected, expected], rel=1e-6)
    # The least loss is where the prediction is 0.9, so that sure predictions cost more.
    steps = [float(bce_terms(torch.tensor([logit(p)]), torch.tensor([True]), 0.1)) for p in (0.85, 0.9, 0.95)]
    assert min(steps) == steps[1]
    # A pair with the difference log(0.8 / 0.2) has the same terms.
    pair = bradley_terry_loss(torch.tensor([logit(0.8)]), torch.tensor([0.0]), smoothing=0.1)
    assert float(pair) == pytest.approx(expected, rel=1e-6)
