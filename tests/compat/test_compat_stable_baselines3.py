"""Test the adapter for Stable-Baselines3 against its DummyVecEnv, and train its agents in a model."""

from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from kernel_cases import make_ensemble
from linear_models import linear_ensemble
from one_row import OneRow

from mopo_fast.errors import InputError
from mopo_fast.model_env import ModelVectorEnv
from mopo_fast.rollout import RolloutEngine
from mopo_fast.tasks import make_box

pytest.importorskip("stable_baselines3", reason="needs the extra `agents`")

from stable_baselines3 import PPO, SAC
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

from mopo_fast.compat.stable_baselines3 import GymnasiumVecEnv

OBS, ACT = 5, 2
STARTS = np.random.default_rng(0).standard_normal((40, OBS)).astype(np.float32)


def environments(**options: Any) -> ModelVectorEnv:
    model = RolloutEngine(make_ensemble(OBS, ACT), termination=make_box(OBS, {0: (-1.5, 1.5)}), threads=1)
    settings = {"num_envs": 4, "horizon": 3, "seed": 0, "autoreset_mode": "SameStep"}
    return ModelVectorEnv(model, STARTS, **{**settings, **options})


def test_steps_are_those_of_a_list_of_environments() -> None:
    """Without noise and with one start state, single environments in DummyVecEnv give the same."""
    model = RolloutEngine(linear_ensemble(0.0, 1.0), termination=make_box(1, {0: (-1.5, 2.0)}), threads=1)
    starts, options = np.full((1, 1), 1.6, np.float32), {"horizon": 3, "seed": 0}
    ours = GymnasiumVecEnv(ModelVectorEnv(model, starts, num_envs=5, autoreset_mode="SameStep", **options))
    theirs = DummyVecEnv(
        [lambda: OneRow(ModelVectorEnv(model, starts, autoreset_mode="Disabled", **options))] * 5
    )
    np.testing.assert_array_equal(ours.reset(), theirs.reset())
    cut = set()
    for actions in np.random.default_rng(1).uniform(-1, 1, (20, 5, 1)).astype(np.float32):
        *got, infos = ours.step(actions)
        *expected, their_infos = theirs.step(actions)
        for one, other in zip(got, expected, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
        assert infos == their_infos
        cut |= {info["TimeLimit.truncated"] for info in infos if "terminal_observation" in info}
    assert cut == {True, False}


def test_a_replay_buffer_has_the_last_observations() -> None:
    envs = GymnasiumVecEnv(environments())
    agent = SAC("MlpPolicy", envs, learning_starts=1000, buffer_size=4000, seed=3).learn(120)
    buffer = agent.replay_buffer
    done, cut = (array[:30].astype(bool) for array in (buffer.dones, buffer.timeouts))
    assert (done & cut).any() and (done & ~cut).any() and not (cut & ~done).any()
    follows = (buffer.next_observations[:29] == buffer.observations[1:30]).all(-1)
    np.testing.assert_array_equal(follows, ~done[:29])
    # Only what lies outside of the termination box has ended without a time-out.
    outside = np.abs(buffer.next_observations[:30, :, 0]) > 1.5
    np.testing.assert_array_equal(outside, done & ~cut)
    starts = {row.tobytes() for row in STARTS}
    assert all(row.tobytes() in starts for row in buffer.observations[1:30][done[:29]])


def test_agents_train() -> None:
    envs = VecMonitor(GymnasiumVecEnv(environments()))
    settings = {"seed": 1, "device": "cpu"}
    sac = SAC("MlpPolicy", envs, learning_starts=40, buffer_size=4000, **settings).learn(120)
    assert len(sac.ep_info_buffer) > 10 and max(one["l"] for one in sac.ep_info_buffer) == 3
    mean, _ = evaluate_policy(sac, envs, n_eval_episodes=8)
    assert np.isfinite(mean)
    ppo = PPO("MlpPolicy", VecNormalize(envs), n_steps=16, batch_size=32, **settings).learn(128)
    assert ppo.num_timesteps == 128
    envs.close()
    assert envs.unwrapped.envs.closed


def test_the_seed_of_an_agent_repeats_the_environments() -> None:
    envs = GymnasiumVecEnv(environments())
    envs.seed(5)
    first, second = envs.reset(), envs.reset()
    assert not np.array_equal(first, second)
    assert envs.seed(5) == [5, 6, 7, 8]
    np.testing.assert_array_equal(envs.reset(), first)
    np.testing.assert_array_equal(environments().reset(seed=5)[0], first)


def test_options_reach_the_environments() -> None:
    envs = GymnasiumVecEnv(environments())
    envs.reset()
    envs.set_options({"mask": 1})
    with pytest.raises(InputError, match="unknown option 'mask'"):
        envs.reset()


def test_attributes() -> None:
    envs = GymnasiumVecEnv(environments())
    assert envs.get_attr("horizon") == [3] * 4 and envs.get_attr("horizon", [0, 2]) == [3] * 2
    assert envs.env_is_wrapped(object) == [False] * 4 and list(envs.get_images()) == [None] * 4
    with pytest.raises(InputError, match="there are no single environments; set horizon of the attribute"):
        envs.set_attr("horizon", 5)
    with pytest.raises(InputError, match="there are no single environments; call render of the attribute"):
        envs.env_method("render")


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_other_modes_are_refused(mode: AutoresetMode) -> None:
    with pytest.raises(
        InputError, match="Stable-Baselines3 needs environments with autoreset_mode SAME_STEP"
    ):
        GymnasiumVecEnv(environments(autoreset_mode=mode))


def test_something_else_is_refused() -> None:
    with pytest.raises(InputError, match=r"envs must be a gymnasium\.vector\.VectorEnv, got str"):
        GymnasiumVecEnv("Hopper-v4")
