"""Steps of the fit, contender beside contender; ratios are `python -m benchmarks.compare fit`'s."""

import pytest

from benchmarks.compare import BASELINES
from mopo_fast.bench import fit_work


@pytest.fixture(scope="module")
def work():
    return fit_work(backend="cpu", steps=16, baselines=BASELINES["fit"])


@pytest.mark.parametrize("contender", ["cpu", "reference", *BASELINES["fit"]])
@pytest.mark.benchmark(group="fit, 16 steps")
def test_fit(benchmark, work, contender):
    benchmark.pedantic(work.contenders[contender], rounds=3, warmup_rounds=1)
    benchmark.extra_info[work.unit] = work.amount / benchmark.stats["median"]
