"""Advantages worked by hand."""

import math

import pytest
import torch

from openril.algorithm.advantages import group_advantages

NAN = float("nan")


def test_mean_runs_over_student_and_teacher_rewards():
    # Two student samples (0, 1) and two teacher responses (2, 1): the mean is 4 / 4 = 1.
    rewards = torch.tensor([[0.0, 1.0, 2.0, 1.0]])
    assert group_advantages(rewards).tolist() == [[-1.0, 0.0, 1.0, 0.0]]


def test_unknown_verdict_is_outside_the_mean_and_has_no_advantage():
    # Known rewards 0, 2, 1: mean 1. The unknown one neither moves the mean nor learns.
    rewards = torch.tensor([[0.0, NAN, 2.0, 1.0]])
    assert group_advantages(rewards).tolist() == [[-1.0, 0.0, 1.0, 0.0]]


def test_grpo_divides_by_the_unbiased_deviation():
    # Rewards 0, 0, 1, 1: mean 1/2, unbiased variance 4 * 1/4 / 3 = 1/3.
    advantages = group_advantages(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), scale_by_std=True)
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert advantages[0].tolist() == pytest.approx([-expected, -expected, expected, expected])


def test_grpo_deviation_ignores_unknown_members():
    # Known rewards 0, 2: mean 1, unbiased variance 2.
    advantages = group_advantages(torch.tensor([[0.0, NAN, 2.0]]), scale_by_std=True)
    expected = 1 / (math.sqrt(2) + 1e-4)
    assert advantages[0].tolist() == pytest.approx([-expected, 0.0, expected])


@pytest.mark.parametrize("scale", [False, True])
def test_groups_without_a_difference_teach_nothing(scale: bool):
    rewards = torch.tensor([[1.0, 1.0, 1.0], [NAN, 2.0, NAN], [NAN, NAN, NAN]])
    assert group_advantages(rewards, scale_by_std=scale).tolist() == [[0.0] * 3] * 3


def test_groups_do_not_mix():
    rewards = torch.tensor([[0.0, 1.0], [10.0, 20.0]])
    assert group_advantages(rewards).tolist() == [[-0.5, 0.5], [-5.0, 5.0]]
