"""Time all contenders of every kernel with pytest-benchmark, one table for each kernel.

Times of a table can be compared if the machine was steady. `python -m benchmarks.compare` interleaves the
contenders and reports ratios.
"""

import functools

import pytest

from benchmarks.compare import BASELINES
from mopo_fast.backends import cpu
from mopo_fast.bench.measure import WORKS, Work

SIZES = {
    "rollout": {"dtype": "bfloat16", "starts": 10_000},
    "sac": {"dtype": "bfloat16", "updates": 50},
    "fit": {"dtype": "bfloat16", "steps": 16},
}
HIGH = ["cpu bfloat16x3"] if cpu.isa() in cpu.WITH_BFLOAT16 else []
CONTENDERS = [
    (kernel, name)
    for kernel, baselines in BASELINES.items()
    for name in ["cpu bfloat16", *HIGH, "cpu", "reference", *baselines]
]


@functools.cache
def work(kernel: str) -> Work:
    return WORKS[kernel](backend="cpu", baselines=BASELINES[kernel], **SIZES[kernel])


@pytest.mark.parametrize(("kernel", "contender"), CONTENDERS)
@pytest.mark.benchmark
def test_kernel(benchmark, kernel, contender):
    measured = work(kernel)
    benchmark.group = f"{kernel}: {measured.amount} {measured.unit.removesuffix('/s')}"
    benchmark.pedantic(measured.contenders[contender], rounds=3, warmup_rounds=1)
    benchmark.extra_info[measured.unit] = measured.amount / benchmark.stats["median"]
