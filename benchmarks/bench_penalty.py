"""Time rollouts with and without a penalty with pytest-benchmark, one table for each precision.

`python -m benchmarks.penalty` interleaves the cases and reports ratios.
"""

import functools

import pytest

from benchmarks.penalty import CASES, DTYPES, HORIZON, STARTS, rollouts

case_of = functools.cache(rollouts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.benchmark
def test_rollout(benchmark, dtype, case):
    benchmark.group = f"rollout, {STARTS * HORIZON} transitions, {dtype}"
    benchmark.pedantic(case_of(case, dtype), rounds=3, warmup_rounds=1)
    benchmark.extra_info["transitions/s"] = STARTS * HORIZON / benchmark.stats["median"]
