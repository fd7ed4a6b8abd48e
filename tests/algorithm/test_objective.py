"""The clipped objective worked by hand."""

import math

import pytest
import torch

from openril.algorithm.objective import k3, objective_stats, response_weights, token_loss


def logs(*ratios: float) -> torch.Tensor:
    return torch.tensor([[math.log(r) for r in ratios]], dtype=torch.float64)


ZERO = torch.zeros(1, 3, dtype=torch.float64)
STUDENT = torch.tensor([True])


def test_positive_advantage_is_clipped_above():
    # A = 2, eps = 0.2: ratio 1.5 counts as 1.2, ratios 1 and 0.5 count as they are.
    loss = token_loss(logs(1.5, 1.0, 0.5), ZERO, torch.tensor([2.0]), epsilon=0.2)
    assert loss[0].tolist() == pytest.approx([-2.4, -2.0, -1.0])


def test_negative_advantage_is_clipped_below():
    # A = -2: min(r A, clip(r) A) takes 1.5 as it is (-3), and 0.5 as 0.8 (-1.6).
    loss = token_loss(logs(1.5, 1.0, 0.5), ZERO, torch.tensor([-2.0]), epsilon=0.2)
    assert loss[0].tolist() == pytest.approx([3.0, 2.0, 1.6])


def test_no_gradient_flows_through_a_clipped_token():
    logprobs = logs(1.5, 1.0, 0.5).requires_grad_()
    token_loss(logprobs, ZERO, torch.tensor([1.0]), epsilon=0.2).sum().backward()
    # d(-r A)/d log r = -r A for tokens that are not clipped.
    assert logprobs.grad is not None
    assert logprobs.grad[0].tolist() == pytest.approx([0.0, -1.0, -0.5])


def test_k3_by_hand():
    # d = log pi_ref - log pi_theta = log 2: exp(d) - d - 1 = 2 - 0.693147 - 1.
    value = k3(torch.tensor([[math.log(0.25)]]), torch.tensor([[math.log(0.5)]]))
    assert float(value) == pytest.approx(1 - math.log(2), rel=1e-6)
    assert float(k3(torch.tensor([[-1.0]]), torch.tensor([[-1.0]]))) == 0.0


def test_k3_is_unbiased():
    # E_pi[exp(d) - d - 1] = KL(pi || ref): sum over the four tokens of a distribution.
    pi = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    ref = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    estimate = (pi * k3(pi.log(), ref.log())).sum()
    assert float(estimate) == pytest.approx(float((pi * (pi / ref).log()).sum()))


def test_kl_is_added_with_beta():
    loss = token_loss(ZERO, ZERO, torch.tensor([0.0]), epsilon=0.2, ref_logprobs=ZERO + math.log(2), beta=0.5)
    assert loss[0].tolist() == pytest.approx([0.5 * (1 - math.log(2))] * 3)


def test_kl_can_be_left_to_student_rows():
    # The second response is a teacher's: it keeps its policy term (-r A = -1 at ratio 1) and loses its KL term.
    zero = torch.zeros(2, 1, dtype=torch.float64)
    options = {"epsilon": 0.2, "ref_logprobs": zero + math.log(2), "beta": 0.5}
    student = torch.tensor([True, False])
    loss = token_loss(zero, zero, torch.tensor([1.0, 1.0]), kl_rows=student, **options)
    assert loss[:, 0].tolist() == pytest.approx([-1 + 0.5 * (1 - math.log(2)), -1.0])
    everyone = token_loss(zero, zero, torch.tensor([1.0, 1.0]), **options)
    assert everyone[:, 0].tolist() == pytest.approx([-1 + 0.5 * (1 - math.log(2))] * 2)


def test_a_teacher_response_can_go_without_the_upper_clip():
    # eps = 0.2. Rows: student A = 2, teacher A = 2, teacher A = -2; ratios 1.5 and 0.5 in each.
    logprobs = logs(1.5, 0.5).repeat(3, 1).requires_grad_()
    zero, advantages = torch.zeros(3, 2, dtype=torch.float64), torch.tensor([2.0, 2.0, -2.0])
    teacher = torch.tensor([False, True, True])
    loss = token_loss(logprobs, zero, advantages, epsilon=0.2, unclipped_above=teacher)
    # The student's 1.5 counts as 1.2, the teacher's as it is; at a negative advantage 1.5 counts anyway, and 0.5 as 0.8.
    assert loss.tolist() == [pytest.approx(row) for row in ([-2.4, -1.0], [-3.0, -1.0], [3.0, 1.6])]
    loss.sum().backward()
    assert logprobs.grad is not None  # -r A where nothing is clipped
    assert logprobs.grad.tolist() == [pytest.approx(row) for row in ([0.0, -1.0], [-3.0, -1.0], [3.0, 0.0])]


def test_dr_grpo_denominator_is_constant():
    # 2G = 4 members, at most 10 tokens: 1/40 whatever the response's length.
    mask = torch.tensor([[True, True, False], [True, True, True]])
    weights = response_weights(mask, torch.tensor([4, 4]), per_length=False, max_completion_length=10)
    assert weights.tolist() == pytest.approx([1 / 40, 1 / 40])


def test_grpo_divides_by_each_length():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    weights = response_weights(mask, torch.tensor([4, 4]), per_length=True, max_completion_length=10)
    assert weights.tolist() == pytest.approx([1 / 8, 1 / 12])


def test_stats_count_tokens_whose_clipped_term_was_taken():
    mask = torch.tensor([[True, True, True]])
    up = objective_stats(logs(1.5, 1.0, 0.5), ZERO, torch.tensor([1.0]), mask, STUDENT, epsilon=0.2, ref_logprobs=None)
    down = objective_stats(
        logs(1.5, 1.0, 0.5), ZERO, torch.tensor([-1.0]), mask, STUDENT, epsilon=0.2, ref_logprobs=None
    )
    assert (up.clipped_low, up.clipped_high, up.tokens) == (0.0, 1.0, 3.0)
    assert (down.clipped_low, down.clipped_high) == (1.0, 0.0)
    assert up.ratio == pytest.approx(3.0)


def test_stats_keep_student_and_teacher_tokens_apart():
    # d = log 2 everywhere: k3 is 1 - log 2 a token; the student's row has two tokens, the teacher's one.
    zero = torch.zeros(2, 2, dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    ratios = torch.cat([logs(1.5, 1.0), logs(1.5, 1.0)])
    student, ones = torch.tensor([True, False]), torch.tensor([1.0, 1.0])
    stats = objective_stats(ratios, zero, ones, mask, student, epsilon=0.2, ref_logprobs=ratios + math.log(2))
    assert (stats.tokens, stats.teacher_tokens) == (3.0, 1.0)
    assert stats.kl == pytest.approx(2 * (1 - math.log(2)), rel=1e-6)
    assert stats.kl_teacher == pytest.approx(1 - math.log(2), rel=1e-6)
    assert stats.clipped_high == 2.0
    free = objective_stats(ratios, zero, ones, mask, student, epsilon=0.2, ref_logprobs=None, unclipped_above=~student)
    assert free.clipped_high == 1.0


def test_a_teachers_token_can_be_weighted_by_its_shaped_probability():
    # Probabilities 0.4 and 0.1, A = 2: the student's ratio is 1 (-2); the teacher's terms are -2 x 0.4/0.5 and -2 x 0.1/0.2.
    logprobs = torch.tensor([[math.log(0.4), math.log(0.1)]] * 2, dtype=torch.float64).requires_grad_()
    teacher, advantages = torch.tensor([False, True]), torch.tensor([2.0, 2.0], dtype=torch.float64)
    loss = token_loss(logprobs, logprobs.detach(), advantages, epsilon=0.2, shaped=teacher)
    assert loss.tolist() == [pytest.approx([-2.0, -2.0]), pytest.approx([-1.6, -1.0])]
    loss.sum().backward()
    assert logprobs.grad is not None
    # d/d log p of -A p / (p + 0.1) is -A 0.1 p / (p + 0.1)^2: 2 x 0.04 / 0.25 and 2 x 0.01 / 0.04.
    assert logprobs.grad[0].tolist() == pytest.approx([-2.0, -2.0])
    assert logprobs.grad[1].tolist() == pytest.approx([-0.32, -0.5])


def test_a_shaped_token_is_never_clipped():
    # Ratio 1.5 at A = 1 would be; the second row counts no clipped token and its term does not depend on pi_old.
    logprobs = torch.full((2, 1), math.log(0.3), dtype=torch.float64)
    old, ones = logprobs - math.log(1.5), torch.tensor([1.0, 1.0])
    teacher, mask = torch.tensor([False, True]), torch.ones(2, 1, dtype=torch.bool)
    stats = objective_stats(logprobs, old, ones, mask, ~teacher, epsilon=0.2, ref_logprobs=None, shaped=teacher)
    assert (stats.clipped_high, stats.tokens) == (1.0, 2.0)
    loss = token_loss(logprobs, old, ones, epsilon=0.2, shaped=teacher)
    assert loss[:, 0].tolist() == pytest.approx([-1.2, -0.75])
