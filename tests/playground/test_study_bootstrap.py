"""Means over skills, intervals, and paired differences, with numbers worked by hand."""

import numpy as np
import pytest

from playground.study.bootstrap import Estimate, Resampling, paired


def test_every_skill_counts_the_same():
    # three questions of one skill, one of the other: (2/3 + 1) / 2, not 3/4
    e = Resampling(["a", "a", "a", "b"], 100).mean(np.array([[1.0, 1.0, 0.0, 1.0]]))
    assert e.value == pytest.approx(5 / 6)


def test_mean_is_over_seeds_and_by_skill():
    r = Resampling(["a", "b"], 100)
    means = r.skill_means(np.array([[1.0, 0.0], [0.0, 0.0]]))
    assert means["a"].value == 0.5
    assert means["b"].value == 0.0


def test_draws_take_one_fewer_than_there_are():
    r = Resampling(["a"] * 5, 50)
    counts = r.drawn * 4  # each draw holds four of five questions, as weights of a quarter
    assert np.allclose(counts, np.round(counts))
    assert np.allclose(counts.sum(1), 4)
    assert set(np.unique(r.seed_draws(2))) == {0.0, 1.0}  # one of two seeds


def test_two_seeds_that_disagree_span_both():
    # one question: the drawn mean is the first seed's or the second's, so the interval is [0, 1]
    e = Resampling(["a"], 500).mean(np.array([[0.0], [1.0]]))
    assert (e.value, e.low, e.high, e.seeds) == (0.5, 0.0, 1.0, 2)


def test_spread_of_the_draws_is_that_of_the_mean():
    # 16 of 40 right: the unbiased variance of the mean is .4 x .6 / 39 = 0.006154, its root 0.0784
    r = Resampling(["a"] * 40, 20000)
    values = np.array([[1.0] * 16 + [0.0] * 24])
    assert r.drawn_by_skill(values)[:, 0].std() == pytest.approx(0.0784, abs=0.002)


def test_seeds_spread_without_being_understated():
    # seed means 0, .5, 1 on questions that do not differ: variance of their mean is .25 / 3, its root .2887
    r = Resampling(["a"] * 4, 20000)
    values = np.repeat([[0.0], [0.5], [1.0]], 4, axis=1)
    assert r.drawn_by_skill(values)[:, 0].std() == pytest.approx(0.2887, abs=0.005)


def test_a_difference_is_paired():
    # Both are right on half of very unlike questions; b is right on one more of ten. Unpaired, the interval of either
    # mean is far wider than that; paired, only the one question varies.
    a = np.array([[1.0] * 5 + [0.0] * 5])
    b = np.array([[1.0] * 6 + [0.0] * 4])
    r = Resampling(["a"] * 10, 4000)
    values, _ = paired(a, b, [0], [0])
    difference = r.mean(values)
    assert difference.value == pytest.approx(0.1)
    assert difference.low == 0.0
    assert difference.high <= 0.4
    assert r.mean(b).high - r.mean(b).low > 0.5


def test_drawn_differences_are_the_differences_of_the_draws():
    rng = np.random.default_rng(1)
    a, b = (rng.integers(0, 2, (3, 8)).astype(float) for _ in range(2))
    r = Resampling(["a", "a", "a", "a", "b", "b", "b", "b"], 200)
    assert np.allclose(r.drawn_by_skill(b - a), r.drawn_by_skill(b) - r.drawn_by_skill(a))


def test_only_common_seeds_are_paired():
    a = np.array([[1.0], [2.0], [3.0]])
    b = np.array([[10.0], [30.0]])
    values, seeds = paired(a, b, [0, 1, 2], [0, 2])
    assert seeds == [0, 2]
    assert values.tolist() == [[9.0], [27.0]]


def test_what_has_no_seed_is_paired_with_every_seed():
    start, trained = np.array([[1.0]]), np.array([[2.0], [4.0]])
    assert paired(start, trained, [None], [0, 1])[0].tolist() == [[1.0], [3.0]]
    values, seeds = paired(trained, start, [0, 1], [None])
    assert (values.tolist(), seeds) == ([[-1.0], [-3.0]], [0, 1])


def test_interval_above_zero_excludes_it():
    assert Estimate(0.1, 0.01, 0.2).above_zero
    assert not Estimate(0.1, 0.0, 0.2).above_zero
