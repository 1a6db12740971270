"""Test that episodes simulated in bulk equal gymnasium's to the bit, for every built-in MuJoCo task."""

from typing import Any

import gymnasium
import numpy as np
import pytest
from own_threads import count_threads

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
    count = len(plain.environments)
    running, lengths = list(range(count)), [0] * count
    for i in running:
        assert np.array_equal(bulk.reset(i, seed + i), plain.reset(i, seed + i))
        bulk._batch.qvel[i, 0] += kick
        plain.environments[i].unwrapped.data.qvel[0] += kick
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
        for name in ("qpos", "qvel", "time", "qacc_warmstart"):
            assert np.array_equal(bulk.physics(name)[running], plain.physics(name)[running]), name
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
        for environment in plain.environments:
            environment._max_episode_steps = 100
        assert run_both(bulk, plain, 0, kick=12.0, dtype=dtype) == [100] * 3
        assert bulk.physics("qpos")[:, 0].max() > 3.0


@pytest.mark.parametrize(("count", "threads"), [(1, 1), (1, 4), (2, 4), (7, 3)])
def test_any_numbers_of_episodes_and_threads(count: int, threads: int) -> None:
    before = count_threads()
    bulk, plain = both("Hopper-v4", count, threads)
    with bulk, plain:
        # The caller is one of the threads, and an episode is never shared out.
        assert count_threads() - before == min(count, threads) - 1
        for seed in (0, 50):
            lengths = run_both(bulk, plain, seed)
            assert count < 7 or len(set(lengths)) > 1
    assert count_threads() == before


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
            bulk._batch.qvel[i] = plain.environments[i].unwrapped.data.qvel[:] = 1e11
        actions = np.zeros((3, 8), np.float32)
        ours, theirs = bulk.step(actions, range(3)), plain.step(actions, range(3))
        assert np.array_equal(ours.observations, theirs.observations)
        assert np.array_equal(ours.rewards, theirs.rewards)
        assert np.array_equal(bulk.physics("time"), plain.physics("time"))


@pytest.mark.parametrize("env_id", ["Hopper-v4", "mopo_fast/AntAngle-v0"])
def test_rows_in_any_order_and_resets_between(env_id: str) -> None:
    """An episode that begins anew changes no other, and the order of the rows changes nothing."""
    bulk, plain = both(env_id)
    space, rng = bulk.environment.action_space, np.random.default_rng(0)
    with bulk, plain:
        bulk._limit = 2
        for environment in plain.environments:
            environment._max_episode_steps = 2
        for i in range(3):
            assert np.array_equal(bulk.reset(i, i), plain.reset(i, i))
        for seed, rows in enumerate([[2, 0, 1], [1], [], [2, 1], [0, 2], [1, 0]]):
            actions = rng.uniform(space.low, space.high, (3, *space.shape)).astype(np.float32)
            positions = bulk.physics("qpos")
            expected = positions.copy()
            ours, theirs = bulk.step(actions, rows), plain.step(actions, rows)
            assert np.array_equal(ours.observations, theirs.observations)
            assert np.array_equal(positions, expected)
            for name in ("rewards", "terminated", "truncated"):
                assert np.array_equal(getattr(ours, name)[rows], getattr(theirs, name)[rows]), name
            assert np.array_equal(bulk.reset(seed % 3, seed), plain.reset(seed % 3, seed))


def test_an_error_of_one_step_leaves_the_episodes() -> None:
    bulk, plain = both("Hopper-v4")
    with bulk, plain:
        for i in range(3):
            for episodes in (bulk, plain):
                episodes.reset(i, i)
        with pytest.raises(IndexError):
            bulk.step(np.zeros((4, 3), np.float32), [3])
        actions = np.full((3, 3), 0.5, np.float32)
        ours, theirs = bulk.step(actions, range(3)), plain.step(actions, range(3))
        assert np.array_equal(ours.observations, theirs.observations)


def test_before_mujoco_4_gymnasium_steps_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(simulation, "Batch", None)
    simulation._say_one_by_one.cache_clear()
    with caplog.at_level("INFO", logger="mopo_fast"):
        for _ in range(2):
            with make_episodes("Hopper-v4", 2, 2) as episodes:
                assert isinstance(episodes, GymnasiumEpisodes)
    (said,) = caplog.messages
    assert said.endswith("steps one episode after the other; MuJoCo 4 steps them side by side")


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
