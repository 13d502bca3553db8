"""Statistics against values that are known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest

from agentic_r_plugin.evaluation.statistics import bootstrap_interval, paired_difference, wilson_interval


def test_the_interval_of_a_share_is_the_normal_approximations() -> None:
    values = [1.0] * 300 + [0.0] * 700
    interval = bootstrap_interval(values)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert interval.mean == pytest.approx(0.3)
    assert interval.low == pytest.approx(0.3 - half, abs=0.002)
    assert interval.high == pytest.approx(0.3 + half, abs=0.002)


def test_the_interval_of_many_distinct_values_is_the_normal_approximations() -> None:
    values = np.random.default_rng(0).normal(2.0, 3.0, size=2000)
    interval = bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.01)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.01)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    intervals = [bootstrap_interval(rng.random(200) < 0.4, resamples=1000, seed=i) for i in range(300)]
    covered = sum(interval.low <= 0.4 <= interval.high for interval in intervals)
    assert 0.91 <= covered / 300 <= 0.98


def test_figures_are_the_same_again_with_the_same_seed_only() -> None:
    values = np.random.default_rng(2).random(100)
    assert bootstrap_interval(values, seed=5) == bootstrap_interval(values, seed=5)
    assert bootstrap_interval(values, seed=5).low != bootstrap_interval(values, seed=6).low


def test_constant_values_have_an_interval_of_one_point() -> None:
    interval = bootstrap_interval([1.0] * 10)
    assert (interval.mean, interval.low, interval.high) == (1.0, 1.0, 1.0)


def test_the_permutation_test_agrees_with_the_exact_sign_test() -> None:
    """12 questions change, 10 of them for the better: exact two-sided sign test 2 * 79 / 4096."""
    first = [0.0] * 10 + [1.0] * 2 + [1.0] * 88
    second = [1.0] * 10 + [0.0] * 2 + [1.0] * 88
    result = paired_difference(first, second, resamples=100_000)
    assert result.difference == pytest.approx(0.08)
    assert result.p_value == pytest.approx(2 * 79 / 4096, abs=0.003)
    assert result.beyond_chance and 0.01 < result.low < result.high < 0.16


def test_equal_runs_differ_by_nothing() -> None:
    result = paired_difference([0.0, 1.0, 1.0], [0.0, 1.0, 1.0])
    assert (result.difference, result.low, result.high, result.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert not result.beyond_chance


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]]])
def test_values_that_are_no_scores_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one score"):
        bootstrap_interval(values)


def test_runs_on_different_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="same questions"):
        paired_difference([1.0], [1.0, 0.0])


@pytest.mark.parametrize(("successes", "total"), [(3, 0), (4, 3), (-1, 3)])
def test_impossible_shares_are_refused(successes: int, total: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, total)


def test_wilson_at_the_ends_stays_inside_zero_and_one() -> None:
    assert wilson_interval(0, 20)[0] == 0.0
    assert wilson_interval(20, 20)[1] == 1.0
    assert wilson_interval(0, 20)[1] == pytest.approx(0.1611, abs=1e-4)
