"""Time rollouts with and without a penalty, one table for each precision.

Without a penalty a member computes only the rows that have drawn it, so an ensemble of 32 takes about the
time of one of 7.
"""

import functools

import pytest

from mopo_fast.bench.measure import Contender, rollout_work

STARTS, HORIZON = 50_000, 5
CASES = {
    "7 members, penalised": {"penalty_coef": 1.0},
    "7 members": {"penalty_coef": 0.0, "elites": 7},
    "32 members": {"penalty_coef": 0.0, "members": 32, "elites": 32},
}


@functools.cache
def rollouts(dtype: str, case: str) -> Contender:
    work = rollout_work(backend="cpu", dtype=dtype, starts=STARTS, horizon=HORIZON, **CASES[case])
    return next(iter(work.contenders.values()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.benchmark
def test_rollout(benchmark, dtype, case):
    benchmark.group = f"rollout, {STARTS * HORIZON} transitions, {dtype}"
    benchmark.pedantic(rollouts(dtype, case), rounds=3, warmup_rounds=1)
    benchmark.extra_info["transitions/s"] = STARTS * HORIZON / benchmark.stats["median"]
