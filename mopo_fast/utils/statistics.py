"""Means over the runs of one setting, with 95 % confidence intervals, and rank correlations.

With five runs or more these are the interquartile mean and the stratified bootstrap of rliable, computed by
SciPy: the mean of the middle half of all values, and percentiles of it over resamples, for which the runs of
each task are drawn with replacement on their own. With fewer runs they are the mean and Student's t interval.
One run has no interval.

Source: Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice" (NeurIPS 2021).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

ENOUGH = 5
"""Least number of runs for an interquartile mean with a bootstrap interval."""
CONFIDENCE = 0.95
# rliable's default.
_RESAMPLES = 50_000
# The interval of each point of a curve is drawn, not read off.
_CURVE_RESAMPLES = 1_000
# Resamples that are held in memory at once.
_AT_ONCE = 1_000

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Estimate:
    """A mean over runs.

    Attributes:
        kind: "iqm" for the interquartile mean, or "mean".
        value: the mean.
        low: lower end of the 95 % interval, or None with one run.
        high: upper end of the interval, likewise.
        count: number of runs.
    """

    kind: Literal["iqm", "mean"]
    value: float
    low: float | None
    high: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        """True if there is an interval and 0 is not in it."""
        return self.low is not None and self.high is not None and not self.low <= 0.0 <= self.high


def estimate(values: Sequence[float]) -> Estimate:
    """Estimate the mean of the values of at least one run."""
    value, low, high = (each[0] for each in estimate_curve(np.asarray(values, float)[:, None], _RESAMPLES))
    if len(values) == 1:
        return Estimate("mean", float(value), None, None, 1)
    kind: Literal["iqm", "mean"] = "iqm" if len(values) >= ENOUGH else "mean"
    return Estimate(kind, float(value), float(low), float(high), len(values))


def estimate_over_tasks(values: Sequence[Sequence[float]]) -> Estimate:
    """Estimate the interquartile mean over the runs of several tasks.

    Args:
        values: for each task the values of its runs, at least `ENOUGH` of them.
    """
    samples = [np.asarray(some, float) for some in values]
    low, high = _bootstrap(samples, _RESAMPLES)
    value = _interquartile_mean(*samples, axis=0)
    return Estimate("iqm", float(value), float(low), float(high), sum(map(len, samples)))


def estimate_curve(values: Array, resamples: int = _CURVE_RESAMPLES) -> tuple[Array, Array, Array]:
    """Estimate the mean at each point of a learning curve.

    Args:
        values: [runs, points].
        resamples: number of bootstrap resamples, which five runs or more take.

    Returns:
        The means and the ends of their intervals, each [points]. With one run the ends are NaN.
    """
    count = len(values)
    if count >= ENOUGH:
        return (_interquartile_mean(values, axis=0), *_bootstrap([values], resamples))
    mean = values.mean(axis=0)
    if count == 1:
        nothing = np.full_like(mean, np.nan)
        return mean, nothing, nothing
    half = student_half(values)
    return mean, mean - half, mean + half


def student_half(values: Array) -> Array:
    """Return half of the length of Student's t interval of the mean of values [n, ...], n at least 2."""
    count = len(values)
    half: Array = stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1) * values.std(axis=0, ddof=1) / np.sqrt(count)
    return half


def student_interval(values: Sequence[float] | Array) -> tuple[float, float]:
    """Return the ends of Student's t interval of the mean of values [n], n at least 2."""
    numbers = np.asarray(values, float)
    mean, half = float(numbers.mean()), float(student_half(numbers))
    return mean - half, mean + half


def spearman(x: Sequence[float] | Array, y: Sequence[float] | Array) -> float:
    """Compute Spearman's rank correlation of two arrays [n]; NaN where one is constant."""
    if len(np.unique(x)) < 2 or len(np.unique(y)) < 2:
        return math.nan
    return float(stats.spearmanr(x, y).statistic)


def finite_or_none(value: float | None) -> float | None:
    """Return a number, or None where it is not finite, since JSON has no such numbers."""
    return value if value is not None and math.isfinite(value) else None


def _interquartile_mean(*samples: Array, axis: int) -> Array:
    mean: Array = stats.trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)
    return mean


def _bootstrap(samples: Sequence[Array], resamples: int) -> tuple[Array, Array]:
    """Return the ends of the interval; the first axis of each sample is that of the runs of a task."""
    # SciPy draws each sample on its own, which makes tasks the strata.
    interval = stats.bootstrap(
        samples,
        _interquartile_mean,
        n_resamples=resamples,
        batch=_AT_ONCE,
        vectorized=True,
        axis=0,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return interval.low, interval.high
