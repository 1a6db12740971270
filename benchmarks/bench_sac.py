"""SAC updates, contender beside contender; ratios are `python -m benchmarks.compare sac`'s."""

import pytest

from benchmarks.compare import BASELINES
from mopo_fast.bench import sac_work


@pytest.fixture(scope="module")
def work():
    return sac_work(backend="cpu", updates=50, baselines=BASELINES["sac"])


@pytest.mark.parametrize("contender", ["cpu", "reference", *BASELINES["sac"]])
@pytest.mark.benchmark(group="SAC, 50 updates")
def test_sac(benchmark, work, contender):
    benchmark.pedantic(work.contenders[contender], rounds=3, warmup_rounds=1)
    benchmark.extra_info[work.unit] = work.amount / benchmark.stats["median"]
