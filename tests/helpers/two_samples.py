"""Statistical tests of whether two samples come from the same distribution."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def differences(ours: Array, theirs: Array) -> list[str]:
    """Return the columns of [n, dims] and [m, dims] whose means, spreads or shapes differ, as sentences.

    Means and log standard deviations may differ by 5 standard errors. The Kolmogorov-Smirnov distance may
    reach a value that equal distributions exceed once in a million cases.
    """
    found = []
    for column, (x, y) in enumerate(zip(ours.T.astype(float), theirs.T.astype(float), strict=True)):
        n, m = len(x), len(y)
        if abs(x.mean() - y.mean()) > 5.0 * np.sqrt(x.var() / n + y.var() / m):
            found.append(f"mean of {column}: {x.mean():.4g}, {y.mean():.4g}")
        # Standard error of a normal sample's log standard deviation: sqrt(1 / 2n); less for flatter ones.
        if abs(np.log(x.std() / y.std())) > 5.0 * np.sqrt(0.5 / n + 0.5 / m):
            found.append(f"spread of {column}: {x.std():.4g}, {y.std():.4g}")
        values = np.sort(np.concatenate([x, y]))
        steps = [np.searchsorted(np.sort(z), values, side="right") / len(z) for z in (x, y)]
        if np.abs(steps[0] - steps[1]).max() > np.sqrt(-0.5 * np.log(0.5e-6) * (n + m) / (n * m)):
            found.append(f"shape of {column}")
    return found


def kolmogorov_smirnov(one: Any, other: Any) -> float:
    """Return the scaled Kolmogorov-Smirnov distance; equal distributions exceed 1.95 once in 1000 cases."""
    values = np.concatenate((one, other))
    below = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (one, other)]
    size = len(one) * len(other) / (len(one) + len(other))
    return float(np.abs(below[0] - below[1]).max() * np.sqrt(size))


def _normal(one: Any, other: Any) -> float:
    variance = one.var() / one.size + other.var() / other.size
    return float((one.mean() - other.mean()) / np.sqrt(variance))


def second_moments(one: Any, other: Any) -> float:
    """Return the difference of mean squares in standard errors; equal ones exceed 3.3 once in 1000 cases."""
    return _normal(np.square(one), np.square(other))


def shares(one: Any, other: Any) -> float:
    """Return the difference of the shares of true values in standard errors."""
    return _normal(one.astype(float), other.astype(float))
