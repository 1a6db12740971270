"""Time one step of the model with the caller's actions on every backend, one table for each batch size."""

import pytest
import torch

from mopo_fast import EnsembleDynamics, RolloutEngine

OBS_DIM, ACT_DIM = 17, 6


@pytest.fixture(scope="module")
def ensemble():
    return EnsembleDynamics(OBS_DIM, ACT_DIM, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("batch", [1, 256, 10_000])
@pytest.mark.benchmark
def test_step(benchmark, ensemble, backend, batch):
    benchmark.group = f"step, {batch} rows"
    engine = RolloutEngine(ensemble, backend=backend)
    generator = torch.Generator().manual_seed(2)
    observations = torch.randn(batch, OBS_DIM, generator=generator)
    actions = torch.rand(batch, ACT_DIM, generator=generator) * 2.0 - 1.0
    result = benchmark(engine.step, observations, actions, seed=0)
    assert len(result.rewards) == batch
