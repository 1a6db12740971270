"""Test means and intervals against values worked out by hand and against plain resampling."""

import math

import numpy as np
import pytest

from mopo_fast.utils.statistics import Estimate, estimate, estimate_curve, estimate_over_tasks, spearman


def test_few_runs_have_students_interval() -> None:
    # The standard deviation is 1, t of 2 degrees of freedom at 97.5 % is 4.30265.
    found = estimate([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert (found.kind, found.value, found.count) == ("mean", 2.0, 3)
    assert (found.low, found.high) == (pytest.approx(2 - half), pytest.approx(2 + half))
    # Two runs: s = 10 / sqrt(2), t of one degree of freedom is 12.7062, so half is 12.7062 * 5.
    two = estimate([0.0, 10.0])
    assert (two.value, two.low, two.high) == (
        5.0,
        pytest.approx(-58.531, abs=1e-3),
        pytest.approx(68.531, abs=1e-3),
    )


def test_one_run_has_no_interval() -> None:
    assert estimate([7.5]) == Estimate("mean", 7.5, None, None, 1)
    assert not estimate([7.5]).excludes_zero


def test_five_runs_have_the_interquartile_mean() -> None:
    # A quarter of five is one: the mean of the middle three, whatever the outlier.
    found = estimate([1.0, 2.0, 3.0, 4.0, 1000.0])
    assert (found.kind, found.value, found.count) == ("iqm", 3.0, 5)
    # The middle four of eight values count.
    assert estimate([8.0, 1, 2, 3, 4, 5, 6, 7]).value == 4.5


def test_the_bootstrap_equals_plain_resampling() -> None:
    values = np.array([3.0, 8.0, 9.5, 12.0, 20.0, 21.0, 40.0])
    rng = np.random.default_rng(5)
    drawn = np.sort(values[rng.integers(0, 7, (200_000, 7))], axis=1)[:, 1:-1].mean(1)
    found = estimate(values.tolist())
    assert [found.low, found.high] == pytest.approx(np.percentile(drawn, [2.5, 97.5]).tolist(), abs=0.25)
    assert estimate(values.tolist()) == found


def test_the_bootstrap_draws_each_task_on_its_own() -> None:
    """With equal runs in each task nothing varies; drawn together, the mean would."""
    found = estimate_over_tasks([[0.0] * 5, [100.0] * 5])
    assert (found.value, found.low, found.high, found.count) == (50.0, 50.0, 50.0, 10)
    # The middle half of 0, 0, 0, 0, 0, 6, 6, 6, 6, 6 without two at each end.
    assert estimate_over_tasks([[0.0] * 5, [6.0] * 5]).value == 3.0
    mixed = estimate_over_tasks([[1.0, 2, 3, 4, 5], [11.0, 12, 13, 14, 15, 16]])
    assert mixed.low is not None and mixed.high is not None
    # trim_mean takes 2 of 11 off each end: 3, 4, 5, 11, 12, 13, 14.
    assert mixed.value == pytest.approx(62 / 7) and mixed.low < mixed.value < mixed.high


@pytest.mark.parametrize("values", [[1.0, 1.0], [1.0, 1.0, 1.0], [2.0] * 5])
def test_equal_runs_have_an_interval_of_one_point(values: list[float]) -> None:
    found = estimate(values)
    assert found.low == found.high == found.value and found.excludes_zero


def test_zero_is_outside_or_not() -> None:
    assert estimate([9.0, 10.0, 11.0]).excludes_zero
    assert estimate([-9.0, -10.0, -11.0]).excludes_zero
    assert not estimate([0.0, 10.0]).excludes_zero


@pytest.mark.parametrize("runs", [2, 3, 6])
def test_a_point_of_a_curve_is_an_estimate_of_its_own(runs: int) -> None:
    curve = np.random.default_rng(runs).normal(size=(runs, 4))
    mean, low, high = estimate_curve(curve)
    for point in range(4):
        alone = estimate(curve[:, point].tolist())
        assert mean[point] == pytest.approx(alone.value)
        tolerance = 0.15 if runs > 4 else 1e-9
        assert (low[point], high[point]) == (
            pytest.approx(alone.low, abs=tolerance),
            pytest.approx(alone.high, abs=tolerance),
        )


def test_a_curve_of_one_run_has_no_band() -> None:
    mean, low, high = estimate_curve(np.array([[1.0, 2.0]]))
    assert mean.tolist() == [1.0, 2.0] and np.isnan(low).all() and np.isnan(high).all()


def test_spearman_against_known_values() -> None:
    x = np.arange(10.0)
    assert spearman(x, x**3) == pytest.approx(1.0)
    assert spearman(x, -np.exp(x)) == pytest.approx(-1.0)
    # Ties get their mean rank: (1, 2.5, 2.5, 4, 5) and (2, 1, 4.5, 4.5, 3) correlate by 3.75 / 9.5.
    assert spearman(np.array([1.0, 2, 2, 3, 5]), np.array([2.0, 1, 4, 4, 3])) == pytest.approx(3.75 / 9.5)
    assert math.isnan(spearman(x, np.ones(10)))
