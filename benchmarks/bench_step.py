"""Time a step of the model with the caller's actions with pytest-benchmark, one table for each batch size.

`python -m benchmarks.step` interleaves the backends and reports ratios.
"""

import pytest
import torch

from benchmarks.step import ACT_DIM, BATCHES, OBS_DIM, one_step
from mopo_fast import EnsembleDynamics, RolloutEngine


@pytest.fixture(scope="module")
def ensemble():
    return EnsembleDynamics(OBS_DIM, ACT_DIM, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.benchmark
def test_step(benchmark, ensemble, backend, batch):
    benchmark.group = f"step, {batch} rows"
    result = benchmark(one_step(RolloutEngine(ensemble, backend=backend), batch))
    assert len(result.rewards) == batch
