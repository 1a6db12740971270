"""Whether two samples are of one distribution: statistics whose size does not depend on the samples'."""

from typing import Any

import numpy as np


def kolmogorov_smirnov(one: Any, other: Any) -> float:
    """The largest distance of the distribution functions, scaled: above 1.95 once in 1000 times."""
    values = np.concatenate((one, other))
    below = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (one, other)]
    size = len(one) * len(other) / (len(one) + len(other))
    return float(np.abs(below[0] - below[1]).max() * np.sqrt(size))


def _normal(one: Any, other: Any) -> float:
    variance = one.var() / one.size + other.var() / other.size
    return float((one.mean() - other.mean()) / np.sqrt(variance))


def second_moments(one: Any, other: Any) -> float:
    """The difference of the mean squares in standard errors: beyond 3.3 once in 1000 times."""
    return _normal(np.square(one), np.square(other))


def shares(one: Any, other: Any) -> float:
    """The difference of how often something is true, in standard errors likewise."""
    return _normal(one.astype(float), other.astype(float))
