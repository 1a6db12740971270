"""Time ModelVectorEnv beside RolloutEngine with pytest-benchmark, one table for each number of environments.

All make the same number of transitions. `step` and `environment` take actions that are given; `rollout` and
`environment and policy` take those of an Actor, in the kernel and by PyTorch.
"""

import pytest
import torch

from mopo_fast import Actor, EnsembleDynamics, ModelVectorEnv, RolloutEngine

OBS_DIM, ACT_DIM, STEPS = 17, 6, 5
ENVIRONMENTS = (1, 64, 1024, 16384)
CONTENDERS = ("step", "environment", "rollout", "environment and policy")


@pytest.fixture(scope="module")
def engine():
    return RolloutEngine(EnsembleDynamics(OBS_DIM, ACT_DIM, generator=torch.Generator().manual_seed(0)))


def contender(name, engine, count):
    """Return a function that makes STEPS steps of `count` environments."""
    generator = torch.Generator().manual_seed(2)
    starts = torch.randn(10_000, OBS_DIM, generator=generator)
    observations = starts[:count].repeat(-(-count // len(starts)), 1)[:count].contiguous()
    actions = torch.rand(count, ACT_DIM, generator=generator) * 2.0 - 1.0
    actor = Actor(OBS_DIM, ACT_DIM, generator=generator)
    envs = ModelVectorEnv(engine, starts, num_envs=count, horizon=STEPS, seed=0, autoreset_mode="SameStep")
    latest, _ = envs.reset()

    def step():
        now = observations
        for t in range(STEPS):
            now = engine.step(now, actions, seed=0, step=t).next_observations

    def rollout():
        assert len(engine.rollout(actor, observations, STEPS, seed=0)) == count * STEPS

    given = actions.numpy()

    def environment():
        for _ in range(STEPS):
            envs.step(given)

    def environment_and_policy():
        nonlocal latest
        for _ in range(STEPS):
            latest, *_ = envs.step(actor.predict(latest, deterministic=False))

    return {
        "step": step,
        "environment": environment,
        "rollout": rollout,
        "environment and policy": environment_and_policy,
    }[name]


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("count", ENVIRONMENTS)
@pytest.mark.benchmark
def test_steps(benchmark, engine, count, name):
    benchmark.group = f"{STEPS} steps of {count} environments"
    benchmark(contender(name, engine, count))
    benchmark.extra_info["transitions/s"] = STEPS * count / benchmark.stats["median"]
