"""The rollout's entry points, backend beside backend: `make bench` shows them in one table a group.

Times of one table are comparable as far as the machine was steady; `python -m benchmarks.compare rollout`
interleaves the backends and gives ratios.
"""

import pytest
import torch

from mopo_fast import Actor, EnsembleDynamics, RolloutEngine

OBS_DIM, ACT_DIM = 17, 6
BACKENDS = ["cpu", "reference"]


@pytest.fixture(scope="module")
def ensemble():
    return EnsembleDynamics(OBS_DIM, ACT_DIM, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def policy():
    return Actor(OBS_DIM, ACT_DIM, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.benchmark(group="rollout, 50,000 starts, 5 steps")
def test_rollout(benchmark, ensemble, policy, backend):
    engine = RolloutEngine(ensemble, backend=backend)
    start = torch.randn(50_000, OBS_DIM, generator=torch.Generator().manual_seed(2))
    result = benchmark.pedantic(
        engine.rollout, args=(policy, start, 5), kwargs={"seed": 0}, rounds=3, warmup_rounds=1
    )
    assert len(result) == 250_000
    benchmark.extra_info["transitions/s"] = 250_000 / benchmark.stats["median"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 256, 10_000])
@pytest.mark.benchmark(group="step")
def test_step(benchmark, ensemble, backend, batch):
    benchmark.group = f"step, {batch} rows"
    engine = RolloutEngine(ensemble, backend=backend)
    generator = torch.Generator().manual_seed(2)
    observations = torch.randn(batch, OBS_DIM, generator=generator)
    actions = torch.rand(batch, ACT_DIM, generator=generator) * 2.0 - 1.0
    result = benchmark(engine.step, observations, actions, seed=0)
    assert len(result.rewards) == batch
