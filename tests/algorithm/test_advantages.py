"""Advantages worked by hand."""

import math

import pytest
import torch

from openril.algorithm.advantages import decoupled_advantages, group_advantages, shaped_advantages

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


def test_the_students_mean_can_be_the_baseline():
    # Students 0, 1 and one unknown: mean 1/2. Teachers 2 and 1 are compared with it, and move it by nothing.
    student = torch.tensor([[True, True, True, False, False]])
    rewards = torch.tensor([[0.0, 1.0, NAN, 2.0, 1.0]])
    assert group_advantages(rewards, baseline=student).tolist() == [[-0.5, 0.5, 0.0, 1.5, 0.5]]
    # No known student reward: nothing to compare with.
    assert group_advantages(torch.tensor([[NAN, NAN, NAN, 2.0, 1.0]]), baseline=student).tolist() == [[0.0] * 5]


def test_the_deviation_is_the_whole_groups_whatever_the_baseline():
    # Rewards 1, 1 (students), 0, 0: unbiased variance 1/3 as above; the students' own would be 0.
    student = torch.tensor([[True, True, False, False]])
    found = group_advantages(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), scale_by_std=True, baseline=student)
    expected = -1 / (math.sqrt(1 / 3) + 1e-4)
    assert found[0].tolist() == pytest.approx([0.0, 0.0, expected, expected])


def test_each_reward_is_normalized_in_its_group_before_they_are_added():
    # Similarity 1, 0, 0, 1 and answer 0, 0, 0, 1, weights 1 and 2. Similarity: mean 1/2, unbiased variance 1/3.
    # Answer: mean 1/4, deviations -1/4 (three times) and 3/4, unbiased variance (3/16 + 9/16) / 3 = 1/4.
    rewards = torch.tensor([[[1.0, 0.0, 0.0, 1.0]], [[0.0, 0.0, 0.0, 1.0]]], dtype=torch.float64)
    s, a = math.sqrt(1 / 3) + 1e-4, 0.5 + 1e-4
    found = decoupled_advantages(rewards, [1.0, 2.0])
    expected = [0.5 / s - 0.5 / a, -0.5 / s - 0.5 / a, -0.5 / s - 0.5 / a, 0.5 / s + 1.5 / a]
    assert found[0].tolist() == pytest.approx(expected)


def test_a_member_with_one_unknown_reward_is_in_no_mean():
    # Without the third, similarity is 1, 0 (variance 1/2) and the answers are equal.
    rewards = torch.tensor([[[1.0, 0.0, 1.0]], [[1.0, 1.0, NAN]]], dtype=torch.float64)
    expected = 0.5 / (math.sqrt(1 / 2) + 1e-4)
    assert decoupled_advantages(rewards, [1.0, 1.0])[0].tolist() == pytest.approx([expected, -expected, 0.0])


def test_shaping_scales_negative_students_and_drops_negative_teachers():
    student = torch.tensor([[True, True, False, False]])
    advantages = torch.tensor([[-1.0, 1.0, -2.0, 2.0]])
    assert shaped_advantages(advantages, student).tolist() == advantages.tolist()
    assert shaped_advantages(advantages, student, negative_scale=0.5).tolist() == [[-0.5, 1.0, -2.0, 2.0]]
    assert shaped_advantages(advantages, student, positive_teachers=True).tolist() == [[-1.0, 1.0, 0.0, 2.0]]
