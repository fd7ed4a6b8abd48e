"""The sampling distribution worked by hand."""

import math

import pytest
import torch

from openril.recipe.schema import SamplingConfig
from openril.sampling.logits_processors import candidates, draw, penalize_repetition

P = torch.tensor([[0.5, 0.3, 0.15, 0.05]])


def plain(**settings: float) -> SamplingConfig:
    return SamplingConfig.model_validate({"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, **settings})


def probabilities(settings: SamplingConfig) -> list[float]:
    ids, p = candidates(P.log(), settings)
    out = [0.0] * 4
    for i, value in zip(ids[0].tolist(), p[0].tolist(), strict=True):
        out[i] = value
    return out


def test_unfiltered_is_the_model():
    assert probabilities(plain()) == pytest.approx(P[0].tolist())


def test_top_k_keeps_the_k_most_likely():
    assert probabilities(plain(top_k=2)) == pytest.approx([0.625, 0.375, 0, 0])


def test_top_p_keeps_tokens_until_the_sum_reaches_it():
    # 0.5 + 0.3 reach 0.8 only with the second token; 0.81 needs the third.
    assert probabilities(plain(top_p=0.79)) == pytest.approx([0.625, 0.375, 0, 0])
    assert probabilities(plain(top_p=0.81)) == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0])
    assert probabilities(plain(top_p=0.01)) == pytest.approx([1, 0, 0, 0])


def test_temperature_sharpens_before_top_p():
    squares = [p * p for p in P[0].tolist()]
    assert probabilities(plain(temperature=0.5)) == pytest.approx([s / sum(squares) for s in squares])


def test_repetition_penalty_divides_positive_and_multiplies_negative_scores():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[1, 0, 1]])
    assert penalize_repetition(logits, seen, 1.25)[0].tolist() == pytest.approx([1.6, -2.5, 2.0, -2.0])


def test_draw_inverts_the_cumulative_distribution():
    uniform = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 0.96, 0.999999], dtype=torch.float64)
    tokens = draw(P.log().expand(7, 4), plain(), uniform)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 3, 3]


def test_draw_never_leaves_the_kept_tokens():
    uniform = torch.linspace(0, 1 - 1e-12, 1001, dtype=torch.float64)
    tokens = draw(P.log().expand(1001, 4), plain(top_p=0.79), uniform)
    assert set(tokens.tolist()) == {0, 1}


def test_greedy_takes_the_most_likely():
    assert draw(P.log(), plain(temperature=0.0), torch.tensor([0.99], dtype=torch.float64)).tolist() == [0]


def test_matches_transformers_processors():
    """Our order of penalty, temperature, top-k and top-p is the one transformers' generate applies."""
    from openril.hf import transformers

    torch.manual_seed(0)
    logits = torch.randn(5, 200) * 3
    prompt = torch.randint(0, 200, (5, 20))
    expected = logits
    for processor in (
        transformers.RepetitionPenaltyLogitsProcessor(1.3),
        transformers.TemperatureLogitsWarper(0.7),
        transformers.TopKLogitsWarper(40),
        transformers.TopPLogitsWarper(0.8),
    ):
        expected = processor(prompt, expected)
    ids, p = candidates(penalize_repetition(logits, prompt, 1.3), SamplingConfig(temperature=0.7, top_k=40, top_p=0.8))
    ours = torch.zeros(5, 200).scatter_(1, ids, p)
    assert torch.allclose(ours, expected.softmax(-1), atol=1e-6)
    assert math.isclose(float(ours.sum()), 5.0, rel_tol=1e-5)
