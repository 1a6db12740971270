"""Time rollouts with functions of the caller, and the model as an environment, with pytest-benchmark.

There is one table for each number of rollouts. `python -m benchmarks.pieces` interleaves the cases and
reports ratios.
"""

import functools

import pytest

from benchmarks.pieces import HORIZON, ROLLOUTS, make_contenders

contenders_of = functools.cache(make_contenders)


@pytest.mark.parametrize("name", make_contenders(1))
@pytest.mark.parametrize("count", ROLLOUTS)
@pytest.mark.benchmark
def test_steps(benchmark, count, name):
    benchmark.group = f"{HORIZON} steps of {count} rollouts"
    benchmark(contenders_of(count)[name])
    benchmark.extra_info["transitions/s"] = HORIZON * count / benchmark.stats["median"]
