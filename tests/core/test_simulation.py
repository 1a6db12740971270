"""Test that episodes simulated in bulk equal gymnasium's to the bit, for every built-in MuJoCo task."""

import threading
from typing import Any

import gymnasium
import mujoco
import numpy as np
import pytest

from mopo_fast import simulation
from mopo_fast.environments import make_environment
from mopo_fast.simulation import GymnasiumEpisodes, MujocoEpisodes, make_episodes
from mopo_fast.tasks import TASKS

MUJOCO_IDS = sorted(
    {
        env_id
        for task in TASKS.values()
        for env_id in (task.env_id, task.online_env_id)
        if env_id is not None and env_id != "Pendulum-v1"
    }
)
INFO = {env_id: ("x_velocity", "y_velocity") for env_id in MUJOCO_IDS if "Ant" in env_id}
# Widths of the random actions of the episodes; more episodes than threads, and not a multiple of them.
WIDTHS = (0.02, 1.0, 0.3)


def both(env_id: str, count: int = len(WIDTHS), threads: int = 2) -> tuple[MujocoEpisodes, GymnasiumEpisodes]:
    info = INFO.get(env_id, ())
    bulk = make_episodes(env_id, count, threads, info)
    assert isinstance(bulk, MujocoEpisodes)
    return bulk, GymnasiumEpisodes(make_environment(env_id), env_id, count, info)


def run_both(bulk: Any, plain: Any, seed: int, *, kick: float = 0.0, dtype: type = np.float32) -> list[int]:
    """Run episodes to their ends both ways, compare every step, and return the episodes' lengths."""
    count = len(bulk.data)
    running, lengths = list(range(count)), [0] * count
    for i in running:
        assert np.array_equal(bulk.reset(i, seed + i), plain.reset(i, seed + i))
        for episodes in (bulk, plain):
            episodes.data[i].qvel[0] += kick
    space, rng = bulk.environment.action_space, np.random.default_rng(seed)
    widths = np.resize(WIDTHS, (count, 1))
    while running:
        # The actions of episodes that have ended must change nothing.
        actions = (rng.uniform(-1.0, 1.0, (count, *space.shape)) * widths * space.high).astype(dtype)
        ours, theirs = bulk.step(actions, np.array(running)), plain.step(actions, running)
        assert np.array_equal(ours.observations, theirs.observations)
        for name in ("rewards", "terminated", "truncated"):
            assert np.array_equal(getattr(ours, name)[running], getattr(theirs, name)[running]), name
        for name, values in theirs.info.items():
            assert np.array_equal(ours.info[name][running], values[running]), name
        for i in running:
            lengths[i] += 1
            assert np.array_equal(bulk.data[i].qacc_warmstart, plain.data[i].qacc_warmstart)
        running = [i for i in running if not (ours.terminated | ours.truncated)[i]]
    return lengths


@pytest.mark.parametrize("env_id", MUJOCO_IDS)
def test_whole_episodes_equal_gymnasiums_to_the_bit(env_id: str) -> None:
    # An ant's physics takes ten times as long.
    bulk, plain = both(env_id, 2 if "Ant" in env_id else 3)
    with bulk, plain:
        first = run_both(bulk, plain, 0)
        if "Cheetah" in env_id:
            assert set(first) == {1000}
        else:
            assert len(set(first)) > 1
        if "Ant" in env_id:
            assert max(first) == 1000 > min(first)


@pytest.mark.parametrize("env_id", [env_id for env_id in MUJOCO_IDS if "Cheetah" in env_id])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fast_runs_are_rewarded_as_by_gymnasium(env_id: str, dtype: type) -> None:
    """Above 3 m/s the jump's reward is capped, and gymnasium's type of number changes."""
    bulk, plain = both(env_id)
    with bulk, plain:
        bulk._limit = 100
        for environment in plain._environments:
            environment._max_episode_steps = 100
        assert run_both(bulk, plain, 0, kick=12.0, dtype=dtype) == [100] * 3
        assert max(data.qpos[0] for data in bulk.data) > 3.0


@pytest.mark.parametrize(("count", "threads"), [(1, 1), (1, 4), (2, 4), (7, 3)])
def test_any_numbers_of_episodes_and_threads(count: int, threads: int) -> None:
    before = threading.active_count()
    bulk, plain = both("Hopper-v4", count, threads)
    with bulk, plain:
        # The caller is one of the threads, and an episode is never shared out.
        assert threading.active_count() - before == min(count, threads) - 1
        for seed in (0, 50):
            lengths = run_both(bulk, plain, seed)
            assert count < 7 or len(set(lengths)) > 1
    assert threading.active_count() == before


def test_an_unstable_simulation_is_reset_as_in_gymnasium(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # MuJoCo writes its log to the working directory.
    monkeypatch.chdir(tmp_path)
    bulk, plain = both("Ant-v4")
    with bulk, plain:
        for i in range(3):
            for episodes in (bulk, plain):
                episodes.reset(i, i)
                episodes.data[i].qvel[:] = 1e11
        actions = np.zeros((3, 8), np.float32)
        ours, theirs = bulk.step(actions, range(3)), plain.step(actions, range(3))
        assert np.array_equal(ours.observations, theirs.observations)
        assert np.array_equal(ours.rewards, theirs.rewards)
        assert [data.time for data in bulk.data] == [data.time for data in plain.data]


def test_an_error_in_a_thread_is_raised_and_the_threads_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with make_episodes("Hopper-v4", 4, 2) as episodes:
        for i in range(4):
            episodes.reset(i, i)
        main, waiting, step = threading.current_thread(), threading.Event(), mujoco.mj_step

        def fails(*arguments: Any, **options: Any) -> None:
            if threading.current_thread() is main:
                assert waiting.wait(20)
                return step(*arguments, **options)
            waiting.set()
            raise ValueError("no step")

        monkeypatch.setattr(simulation.mujoco, "mj_step", fails)
        with pytest.raises(ValueError, match="no step"):
            episodes.step(np.zeros((4, 3), np.float32), np.arange(4))
        monkeypatch.undo()
        assert len(episodes.step(np.zeros((4, 3), np.float32), np.arange(4)).rewards) == 4


class Doubled(gymnasium.RewardWrapper):
    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)

    def reward(self, reward: Any) -> float:
        return 2.0 * float(reward)


def test_other_environments_are_stepped_by_gymnasium(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same class with arguments or wrappers of its own is another environment."""
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    hopper = "gymnasium.envs.mujoco.hopper_v4:HopperEnv"
    gymnasium.register("Strict-v0", hopper, kwargs={"healthy_reward": 2.0}, max_episode_steps=9)
    gymnasium.register(
        "Doubled-v0",
        hopper,
        additional_wrappers=(gymnasium.envs.registration.WrapperSpec("Doubled", f"{__name__}:Doubled", {}),),
    )
    gymnasium.register("Function-v0", lambda **_: Doubled(gymnasium.make("Hopper-v4").unwrapped))
    for env_id in ("Strict-v0", "Doubled-v0", "Function-v0", "Pendulum-v1"):
        with make_episodes(env_id, 2, 2) as episodes:
            assert isinstance(episodes, GymnasiumEpisodes), env_id
    gymnasium.register("Short-v0", hopper, max_episode_steps=3)
    with make_episodes("Short-v0", 1, 1) as episodes:
        assert isinstance(episodes, MujocoEpisodes)
        episodes.reset(0, 0)
        ends = [episodes.step(np.zeros((1, 3), np.float32), [0]).truncated[0] for _ in range(3)]
    assert ends == [False, False, True]
