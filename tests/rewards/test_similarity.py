"""Similarity reward, worked by hand."""

import pytest

from openril.rewards.similarity import similarity_reward


@pytest.mark.parametrize(("student_prob", "reward"), [(0.0, 1.0), (0.49, 1.0), (0.5, 0.0), (0.51, 0.0), (1.0, 0.0)])
def test_binary_pays_what_the_discriminator_takes_for_a_teacher(student_prob, reward):
    assert similarity_reward(student_prob, "binary") == reward


def test_continuous_is_the_teacher_probability():
    assert similarity_reward(0.2, "continuous") == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("student_prob", "levels", "reward"),
    [
        (0.32, 11, 0.7),  # 0.68 -> 0.7
        (0.38, 11, 0.6),  # 0.62 -> 0.6
        (0.30, 3, 0.5),  # 0.70 lies nearer to 0.5 than to 1
        (0.20, 3, 1.0),  # 0.80 -> 1
        (0.25, 3, 0.5),  # 0.75, a tie: the lower value
        (0.75, 3, 0.0),  # 0.25, a tie: the lower value
        (0.0, 11, 1.0),
        (1.0, 11, 0.0),
    ],
)
def test_levels_round_to_the_nearest_value(student_prob, levels, reward):
    assert similarity_reward(student_prob, "levels", levels) == pytest.approx(reward)


@pytest.mark.parametrize("student_prob", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_two_levels_are_the_binary_reward(student_prob):
    assert similarity_reward(student_prob, "levels", 2) == similarity_reward(student_prob, "binary")


@pytest.mark.parametrize("broken", [float("nan"), -0.1, 1.1, float("inf")])
def test_what_is_no_probability_is_an_error(broken):
    with pytest.raises(ValueError, match="student_prob"):
        similarity_reward(broken, "binary")
