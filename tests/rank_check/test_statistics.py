"""Kendall's τ-b, its bootstrap interval and regret, against hand-computed values and SciPy's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from nas_kd.rank_check.statistics import (
    agreement,
    allowing_for_damage,
    allowing_for_size,
    kendall_tau,
    tau_difference,
    tau_interval,
    top_regret,
)

TRUTH = [0.80, 0.82, 0.84, 0.86, 0.88]


@pytest.mark.parametrize(
    ("scores", "tau"),
    [
        ([1, 2, 3, 4, 5], 1.0),
        ([5, 4, 3, 2, 1], -1.0),
        ([2, 1, 3, 4, 5], 0.8),  # one of ten pairs is the wrong way round
        ([1, 1, 3, 4, 5], 9 / math.sqrt(9 * 10)),  # τ-b: nine pairs not tied in the scores, ten in the truth
    ],
)
def test_tau_of_known_orders(scores: list[float], tau: float) -> None:
    assert kendall_tau(scores, TRUTH) == pytest.approx(tau)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=30))
def test_tau_is_scipys(pairs: list[tuple[int, int]]) -> None:
    scores, truth = zip(*pairs, strict=True)
    if len(set(scores)) > 1 and len(set(truth)) > 1:
        assert kendall_tau(scores, truth) == pytest.approx(kendalltau(scores, truth).statistic)
    else:
        assert math.isnan(kendall_tau(scores, truth))


def test_a_score_that_is_not_finite_is_the_worst() -> None:
    assert kendall_tau([math.nan, 2, 3, 4, 5], TRUTH) == 1
    assert kendall_tau([1, 2, 3, 4, -math.inf], TRUTH) == pytest.approx(0.2)
    assert top_regret([1, 2, 3, 4, math.nan], TRUTH, 1) == pytest.approx(0.02)
    assert math.isnan(kendall_tau([math.nan] * 5, TRUTH))


def test_the_interval_holds_tau_and_narrows_with_more_genotypes() -> None:
    generator = np.random.default_rng(0)
    widths = []
    for count in (10, 40, 160):
        truth = generator.normal(size=count)
        scores = truth + generator.normal(size=count)
        low, high = tau_interval(scores, truth, seed=0)
        assert -1 <= low < kendall_tau(scores, truth) < high <= 1
        widths.append(high - low)
    assert widths[0] > widths[1] > widths[2]


def test_the_interval_is_that_of_resampling_one_by_one() -> None:
    generator = np.random.default_rng(1)
    truth = generator.normal(size=20)
    scores = truth + generator.normal(size=20)
    drawn = (generator.integers(20, size=20) for _ in range(2000))
    taus = [kendalltau(scores[rows], truth[rows]).statistic for rows in drawn]
    expected = np.quantile(taus, [0.05, 0.95])
    assert tau_interval(scores, truth, seed=3) == pytest.approx(expected, abs=0.04)


def test_one_seed_gives_one_interval() -> None:
    truth = np.random.default_rng(0).normal(size=40)
    scores = truth + np.random.default_rng(1).normal(size=40)
    assert tau_interval(scores, truth, seed=4) == tau_interval(scores, truth, seed=4)
    assert tau_interval(scores, truth, seed=4) != tau_interval(scores, truth, seed=5)


def test_regret_of_a_known_table() -> None:
    scores = [4, 5, 1, 2, 3]  # the first two are the worst
    assert top_regret(scores, TRUTH, 1) == pytest.approx(0.06)
    assert top_regret(scores, TRUTH, 3) == 0  # 0.82, 0.80 and 0.88 come first
    assert top_regret([5, 4, 3, 2, 1], TRUTH, 3) == pytest.approx(0.04)


def test_ties_count_against_a_score() -> None:
    assert top_regret([1, 1, 1, 1, 1], TRUTH, 1) == pytest.approx(0.08)
    assert top_regret([0, 1, 0, 0, 1], TRUTH, 1) == pytest.approx(0.06)


def test_agreement_puts_all_together() -> None:
    scores = [4, 5, 1, 2, 3]
    agreed = agreement(scores, TRUTH, seed=0)
    assert agreed.tau == pytest.approx(kendall_tau(scores, TRUTH))
    assert (agreed.low, agreed.high) == tau_interval(scores, TRUTH, seed=0)
    assert agreed.regrets == (top_regret(scores, TRUTH, 1), top_regret(scores, TRUTH, 3))


def test_a_better_score_is_told_from_a_worse_one() -> None:
    generator = np.random.default_rng(2)
    truth = generator.normal(size=30)
    good, bad = truth + 0.1 * generator.normal(size=30), generator.normal(size=30)
    assert tau_difference(good, bad, truth, seed=0)[0] > 0
    assert tau_difference(good, good, truth, seed=0) == (0, 0)
    assert all(math.isnan(end) for end in tau_difference(np.ones(30), bad, truth, seed=0))


def test_a_small_student_must_be_ahead_by_a_power_of_its_size() -> None:
    assert allowing_for_size(0.3, 20_000) > allowing_for_size(0.3, 40_000)
    # twice the size makes up for 2^0.15 of the loss, whatever the loss
    for loss in (3.0, 0.01):
        assert allowing_for_size(loss * 2**0.15, 40_000) == pytest.approx(allowing_for_size(loss, 20_000))
        assert allowing_for_size(loss * 1.12, 40_000) > allowing_for_size(loss, 20_000)


def test_of_two_equal_errors_the_less_damaged_comes_first() -> None:
    assert allowing_for_damage(0.3, 0.1) < allowing_for_damage(0.3, 0.2)
    # 32 times the damage is as bad as twice the error
    assert allowing_for_damage(0.3, 3.2) == pytest.approx(allowing_for_damage(0.6, 0.1))
    assert allowing_for_damage(0.3, -1e-9) == 0  # a sum of squares that rounding made negative
