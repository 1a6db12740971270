"""Test the paper's out-of-distribution tasks: environments, data, relabelling, and rewards of the user."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from small_online import SMALL, read

from mopo_fast.bulk.plan import run_settings
from mopo_fast.cli import main
from mopo_fast.collect import collect, online
from mopo_fast.data import load_dataset, load_file, relabel, relabel_file
from mopo_fast.environments import make_environment
from mopo_fast.errors import InputError
from mopo_fast.evaluate import evaluate
from mopo_fast.policy import Actor
from mopo_fast.tasks import TASKS, parse_dataset_name
from mopo_fast.utils.atomic import read_json
from mopo_fast.utils.seeds import ONLINE, derive_seed

COLLECTED = ("halfcheetah-jump", "ant-angle")
RIGHT_ANGLE = np.pi / 6


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOPO_FAST_DATA_DIR", str(folder))
        return {name: collect(name, online=SMALL, threads=1, quiet=True) for name in COLLECTED}


def test_relabel_is_a_function_and_no_module() -> None:
    """A module of this name would replace the function in `mopo_fast.data` when it is imported."""
    assert callable(relabel)
    assert importlib.util.find_spec("mopo_fast.data.relabel") is None


def roll(env: Any, steps: int) -> list[dict[str, Any]]:
    """Return steps by uniform actions, with the parts of their rewards."""
    env.reset(seed=0)
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(steps):
        action = generator.uniform(-1, 1, env.action_space.shape[0]).astype(np.float32)
        before = env.unwrapped.data.qpos.copy()
        observation, reward, _, _, info = env.step(action)
        rows.append(
            {"before": before, "action": action, "observation": observation, "reward": reward, **info}
        )
    return rows


def test_jump_rewards_height_and_speed_to_3() -> None:
    env = make_environment("mopo_fast/HalfCheetahJump-v0")
    slow = make_environment("mopo_fast/HalfCheetahSpeed3-v0")
    for row, other in zip(roll(env, 200), roll(slow, 200), strict=True):
        assert row["observation"].shape == (18,)
        assert np.array_equal(row["observation"], other["observation"])
        qpos1, height, velocity = row["observation"][0], row["observation"][8], row["x_velocity"]
        assert height == pytest.approx(0.7 + qpos1)
        expected = min(velocity, 3.0) - 0.1 * np.square(row["action"]).sum()
        assert other["reward"] == pytest.approx(expected, abs=1e-6)
        assert row["reward"] == pytest.approx(expected + 15 * (height - 0.7), abs=1e-6)
    # The body is thrown forward, faster than the cap on the rewarded velocity.
    for jumping in (env, slow):
        jumping.reset(seed=0)
        plain = jumping.unwrapped
        plain.set_state(plain.init_qpos, np.r_[10.0, np.zeros(8)])
        _, reward, _, _, info = jumping.step(np.zeros(6, np.float32))
        assert info["x_velocity"] > 5
        assert reward == pytest.approx(3.0 + plain.jump_weight * plain.data.qpos[1])
    # With all joints at rest, the torso is at the position that the observation gives.
    plain.set_state(plain.init_qpos, plain.init_qvel)
    assert plain._get_obs()[8] == pytest.approx(plain.data.body("torso").xpos[2])


def test_angle_rewards_the_velocity_at_30_degrees() -> None:
    env, forward = (make_environment(f"mopo_fast/{name}-v0") for name in ("AntAngle", "AntForward"))
    for row, other in zip(roll(env, 100), roll(forward, 100), strict=True):
        assert row["observation"].shape == (27,)
        cost = 0.5 * np.square(row["action"]).sum() - 1.0
        assert other["reward"] <= other["x_velocity"] - cost + 1e-6
        speed = row["x_velocity"] * np.sqrt(3) / 2 + row["y_velocity"] / 2
        assert row["reward"] - other["reward"] == pytest.approx(speed - row["x_velocity"], abs=1e-9)
    plain = env.unwrapped
    forces = np.clip(plain.data.cfrc_ext, -1, 1)
    expected = speed - cost - 0.5e-3 * np.square(forces).sum()
    assert row["reward"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", COLLECTED)
def test_collected_rewards_are_the_environments_own(name: str, sets: dict[str, Path]) -> None:
    data, task = read(sets[name]), TASKS[name]
    assert len(data["rewards"]) == 600
    assert data["metadata/relabelled"] == name.encode()
    assert data["metadata/trained_in"].decode() == task.online_env_id
    assert "metadata/score_mean" not in data
    env = make_environment(task.env_id)
    # First paths of epochs of 60 steps in 2 environments, one epoch without and one with an agent.
    for epoch, environment in ((1, 0), (1, 1), (4, 0)):
        observation, _ = env.reset(seed=derive_seed(0, ONLINE, online._RESET, epoch, environment))
        first = (epoch - 1) * 120 + environment * 60
        for row in range(first, first + 60):
            assert np.array_equal(data["observations"][row], observation.astype(np.float32))
            observation, reward, *_ = env.step(data["actions"][row])
            assert data["rewards"][row] == pytest.approx(reward, abs=1e-5)
            if data["terminals"][row]:
                break
        assert row > first + 10


def test_a_relabelled_halfcheetah_set_is_that_of_the_task(tmp_path: Path) -> None:
    plain = collect("halfcheetah-random", 1500, out=tmp_path, quiet=True)
    path = relabel_file(plain, "halfcheetah-jump", tmp_path / "jump.hdf5")
    before, after = read(plain), read(path)
    env = make_environment(TASKS["halfcheetah-jump"].env_id).unwrapped
    for row in range(0, 1000, 31):
        env.set_state(before["infos/qpos"][row], before["infos/qvel"][row])
        assert np.array_equal(
            env._get_obs().astype(np.float32)[[0, 7, 9, 17]], after["observations"][row][[0, 7, 9, 17]]
        )
        assert after["observations"][row] == pytest.approx(env._get_obs(), abs=1e-6)
        env.data.qacc_warmstart[:] = 0
        observation, reward, *_ = env.step(before["actions"][row])
        assert after["next_observations"][row] == pytest.approx(observation, abs=1e-3)
        assert after["rewards"][row] == pytest.approx(reward, abs=1e-3)
    for key in ("actions", "terminals", "timeouts", "infos/qpos", "metadata/seed", "metadata/steps"):
        assert np.array_equal(before[key], after[key]), key
    assert load_file(path).name == "halfcheetah-jump-local"
    with pytest.raises(InputError, match="relabelled already"):
        relabel_file(path, "halfcheetah-jump", tmp_path / "again.hdf5")
    with pytest.raises(InputError, match="exists already"):
        relabel_file(plain, "halfcheetah-jump", path)
    assert relabel_file(plain, "halfcheetah-jump", path, overwrite=True) == path


def test_a_height_measured_at_each_reset(tmp_path: Path) -> None:
    """The authors' later code measures z_init anew at the noisy reset of every episode."""
    plain = collect("halfcheetah-random", 2500, out=tmp_path, quiet=True)
    path = relabel_file(plain, "halfcheetah-jump", tmp_path / "jump.hdf5", z_init="episode")
    constant = read(relabel_file(plain, "halfcheetah-jump", tmp_path / "constant.hdf5"))
    before, after = read(plain), read(path)
    assert after["metadata/env_id"] == b"mopo_fast/HalfCheetahJumpMeasured-v0"
    assert constant["metadata/env_id"] == b"mopo_fast/HalfCheetahJump-v0"
    starts = before["infos/qpos"][::1000, 1]
    assert len(set(starts)) == 3 and 0.01 < abs(starts).max() <= 0.1
    difference = constant["rewards"] - after["rewards"]
    assert difference == pytest.approx(15 * np.repeat(starts, 1000)[:2500], abs=1e-5)
    # The environment of the evaluations has the same rewards, from the state that it was reset to.
    env = make_environment("mopo_fast/HalfCheetahJumpMeasured-v0")
    other = make_environment("mopo_fast/HalfCheetahJump-v0")
    for seed in (0, 1):
        env.reset(seed=seed), other.reset(seed=seed)
        height, action = env.unwrapped.data.qpos[1], np.full(6, 0.5, np.float32)
        for _ in range(3):
            one, two = env.step(action), other.step(action)
            assert np.array_equal(one[0], two[0])
            assert two[1] - one[1] == pytest.approx(15 * height, abs=1e-6)
    assert abs(height) > 0.001


def test_a_collected_set_has_the_measured_height(
    tmp_path: Path, sets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOPO_FAST_DATA_DIR", str(sets["halfcheetah-jump"].parent))
    out = tmp_path / "jump.hdf5"
    collect("halfcheetah-jump", online=SMALL, threads=1, quiet=True, z_init="episode", out=out)
    constant, measured = read(sets["halfcheetah-jump"]), read(out)
    # Paths of this training have 60 steps.
    starts = measured["infos/qpos"][::60, 1]
    assert len(set(starts)) == 10
    difference = constant["rewards"] - measured["rewards"]
    assert difference == pytest.approx(15 * np.repeat(starts, 60), abs=1e-5)
    assert np.array_equal(constant["observations"], measured["observations"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["collect", "hopper-random"], "z_init belongs to halfcheetah-jump, not to hopper-random"),
        (["relabel", "a.hdf5", "--task", "ant-angle", "--out", "b.hdf5"], "not to ant-angle; leave it out"),
    ],
)
def test_a_height_of_other_tasks(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.hdf5").touch()
    assert main([*arguments, "--z-init", "episode"]) == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_relabelled(tmp_path: Path, hopper_data: Path) -> None:
    ant = collect("ant-random", 50, out=tmp_path, quiet=True)
    out = tmp_path / "out.hdf5"
    for arguments, message in (
        ((hopper_data, "halfcheetah-jump", out), "11 observation and 3 action dimensions, .* 17 or 18 and 6"),
        (
            (hopper_data, "hopper", out),
            "cannot relabel for 'hopper'; choose one of halfcheetah-jump, ant-angle",
        ),
        ((ant, "ant-angle", out), "lacks infos/x_velocity"),
        ((ant, "ant-angle", tmp_path / "out.npz"), "out must end in"),
        ((tmp_path / "none.hdf5", "ant-angle", out), "does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            relabel_file(*arguments)
    assert not out.exists()


def test_ant_rewards_turn_by_30_degrees(tmp_path: Path, sets: dict[str, Path]) -> None:
    turned = read(sets["ant-angle"])
    x, y = turned["infos/x_velocity"], turned["infos/y_velocity"]
    original = turned["rewards"] - (np.cos(RIGHT_ANGLE) * x + np.sin(RIGHT_ANGLE) * y) + x
    with h5py.File(tmp_path / "ant.hdf5", "w") as file:
        for key, array in turned.items():
            if not key.startswith("metadata"):
                file[key] = original.astype(np.float32) if key == "rewards" else array
    path = relabel_file(tmp_path / "ant.hdf5", "ant-angle", tmp_path / "out.hdf5")
    assert read(path)["rewards"] == pytest.approx(turned["rewards"], abs=1e-5)


def test_a_users_own_reward(hopper_data: Path) -> None:
    data = load_file(hopper_data)
    again = relabel(data, lambda observations, actions, successors: successors[:, 0] - actions[:, 0])
    assert torch.equal(again.rewards, data.next_observations[:, 0] - data.actions[:, 0])
    assert again.observations is data.observations and not torch.equal(again.rewards, data.rewards)
    with pytest.raises(InputError, match=r"must return shape \(600,\), got \(600, 1\)"):
        relabel(data, lambda observations, actions, successors: successors[:, :1])
    with pytest.raises(InputError, match="rewards is not finite at row 0"):
        relabel(data, lambda observations, actions, successors: successors[:, 0] / 0.0)


@pytest.mark.parametrize("name", COLLECTED)
def test_tasks_are_found_by_name_and_evaluated_in_raw_return(name: str) -> None:
    task = TASKS[name]
    assert parse_dataset_name(f"{name}-local") == (name, None)
    assert parse_dataset_name(name.replace("-", "_")) == (name, None)
    assert task.tuned_for(None) == (5, 1.0)
    result = evaluate(Actor(task.obs_dim, task.act_dim, hidden=(8,)), task, episodes=1, seed=0)
    assert (result.score_mean, len(result.returns)) == (None, 1)


def test_load_by_name(sets: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPO_FAST_DATA_DIR", str(sets["ant-angle"].parent))
    data = load_dataset("halfcheetah-jump-local")
    assert (data.obs_dim, len(data)) == (18, 600)
    with pytest.raises(InputError, match="halfcheetah-jump contains every stored transition"):
        collect("halfcheetah-jump", 10, overwrite=True)
    with pytest.raises(InputError, match=r"config\.epochs = 5, not 6"):
        collect("ant-angle", online=dataclasses.replace(SMALL, epochs=6), overwrite=True)


def test_the_command_and_a_run_on_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = collect("halfcheetah-random", 1200, out=tmp_path, quiet=True)
    out = tmp_path / "halfcheetah_jump-local.hdf5"
    arguments = [
        "relabel",
        str(plain),
        "--task",
        "halfcheetah-jump",
        "--out",
        str(out),
        "--z-init",
        "episode",
    ]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    small = ["--dynamics.members", "2", "--dynamics.elites", "1", "--dynamics.hidden", "8", "8"]
    small += [
        "--dynamics.weight-decay",
        "0",
        "0",
        "0",
        "--dynamics.max-epochs",
        "1",
        "--rollout.batch-size",
        "50",
    ]
    small += [
        "--rollout.interval",
        "10",
        "--steps",
        "10",
        "--sac.hidden",
        "8",
        "8",
        "--evaluation.episodes",
        "1",
    ]
    assert main(["train", str(out), "--out", str(tmp_path / "run"), "--quiet", *small]) == 0
    assert capsys.readouterr().out.startswith("return ")
    config = read_json(tmp_path / "run" / "config.json")
    summary = read_json(tmp_path / "run" / "summary.json")
    assert (config["task"], config["rollout"]["horizon"]) == ("halfcheetah-jump", 5)
    assert summary["score_mean"] is None and summary["return_mean"] is not None
    assert config["env_id"] == "mopo_fast/HalfCheetahJumpMeasured-v0"
    assert run_settings(tmp_path / "run")[0].env_id == "mopo_fast/HalfCheetahJumpMeasured-v0"
