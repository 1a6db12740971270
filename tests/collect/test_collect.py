"""Test collected data against gymnasium, and the layout of the file."""

import itertools
import resource
import sys
from pathlib import Path
from typing import Any

import h5py
import mujoco
import numpy as np
import pytest

from mopo_fast.collect import collect
from mopo_fast.collect.uniform import FIRST_ROLL, MAX_PATH, RULES, _Collector, _Episode
from mopo_fast.data import load_dataset
from mopo_fast.environments import make_environment
from mopo_fast.errors import InputError
from mopo_fast.tasks import TASKS
from mopo_fast.utils.seeds import COLLECT, derive_seed

ROWS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
INFOS = ("infos/qpos", "infos/qvel", "infos/action_log_probs")


def read(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        return {key: file[key][...] for key in (*ROWS, *INFOS)}


@pytest.mark.parametrize(("task", "steps"), [("halfcheetah", 1200), ("hopper", 1500), ("walker2d", 1500)])
def test_equals_gymnasium_exactly(task: str, steps: int, tmp_path: Path) -> None:
    data = read(collect(f"{task}-random", steps, seed=3, out=tmp_path, quiet=True))
    env = make_environment(TASKS[task].env_id)
    row, episode = 0, 0
    while row < steps:
        observation, _ = env.reset(seed=derive_seed(3, COLLECT, episode))
        ended = False
        while row < steps and not ended:
            assert np.array_equal(data["infos/qpos"][row], env.unwrapped.data.qpos)
            assert np.array_equal(data["infos/qvel"][row], env.unwrapped.data.qvel)
            assert np.array_equal(data["observations"][row], observation.astype(np.float32))
            observation, reward, terminal, timeout, _ = env.step(data["actions"][row])
            assert np.array_equal(data["next_observations"][row], observation.astype(np.float32))
            assert data["rewards"][row] == np.float32(reward)
            assert (data["terminals"][row], data["timeouts"][row]) == (terminal, timeout)
            ended = terminal or timeout
            row += 1
        episode += 1
    assert episode == 2 if task == "halfcheetah" else episode > 30


def test_replay_from_the_stored_state(tmp_path: Path) -> None:
    data = read(collect("hopper-random", 300, out=tmp_path, quiet=True))
    env = make_environment("Hopper-v4").unwrapped
    starts = np.flatnonzero(np.r_[True, data["terminals"][:-1]])
    for start, end in itertools.pairwise(starts[:6]):
        mujoco.mj_resetData(env.model, env.data)
        env.set_state(data["infos/qpos"][start], data["infos/qvel"][start])
        for row in range(start, end):
            observation, reward, *_ = env.step(data["actions"][row])
            assert np.array_equal(data["next_observations"][row], observation.astype(np.float32))
            assert data["rewards"][row] == np.float32(reward)


def test_same_file_for_any_thread_count_and_roll(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [collect("walker2d-random", 500, out=tmp_path / "1", threads=1, quiet=True)]
    files.append(collect("walker2d-random", 500, out=tmp_path / "3", threads=3, quiet=True))
    # Long episodes are simulated again with twice the steps, which must not change the result.
    monkeypatch.setitem(FIRST_ROLL, "walker2d", 7)
    files.append(collect("walker2d-random", 500, out=tmp_path / "7", threads=2, quiet=True))
    first, *others = [file.read_bytes() for file in files]
    assert all(other == first for other in others)


def test_more_steps_begin_alike_and_seeds_differ(tmp_path: Path) -> None:
    short = read(collect("hopper-random", 400, out=tmp_path / "a", quiet=True))
    long = read(collect("hopper-random", 900, out=tmp_path / "b", quiet=True))
    other = read(collect("hopper-random", 400, seed=1, out=tmp_path / "c", quiet=True))
    for key in (*ROWS, *INFOS):
        assert np.array_equal(short[key], long[key][:400]), key
    assert not np.isin(other["actions"][:, 0], short["actions"][:, 0]).any()


def test_layout_and_metadata(tmp_path: Path) -> None:
    path = collect("halfcheetah-random", 2100, seed=5, out=tmp_path, quiet=True)
    assert path == tmp_path / "halfcheetah_random-local.hdf5"
    assert list(tmp_path.iterdir()) == [path]
    data = read(path)
    types = {key: (array.dtype, array.shape) for key, array in data.items()}
    assert types == {
        "observations": (np.float32, (2100, 17)),
        "actions": (np.float32, (2100, 6)),
        "rewards": (np.float32, (2100,)),
        "next_observations": (np.float32, (2100, 17)),
        "terminals": (np.bool_, (2100,)),
        "timeouts": (np.bool_, (2100,)),
        "infos/qpos": (np.float64, (2100, 9)),
        "infos/qvel": (np.float64, (2100, 9)),
        "infos/action_log_probs": (np.float32, (2100,)),
    }
    assert np.flatnonzero(data["timeouts"]).tolist() == [999, 1999]
    assert not data["terminals"].any()
    assert np.all(data["infos/action_log_probs"] == np.float32(6 * np.log(0.5)))
    with h5py.File(path) as file:
        metadata = {key: item[()] for key, item in file["metadata"].items()}
    assert metadata["name"] == b"halfcheetah-random-local"
    assert metadata["env_id"] == b"HalfCheetah-v4"
    assert metadata["mujoco"].decode() == mujoco.__version__
    assert (metadata["seed"], metadata["steps"]) == (5, 2100)
    assert {"mopo_fast", "gymnasium", "policy"} <= metadata.keys()


def test_actions_are_uniform(tmp_path: Path) -> None:
    actions = read(collect("halfcheetah-random", 4000, out=tmp_path, quiet=True))["actions"]
    assert np.abs(actions).max() <= 1
    counts = np.histogram(actions, bins=20, range=(-1, 1))[0]
    expected = actions.size / 20
    # With 19 degrees of freedom, chi-square exceeds 50 for one seed in 10,000. The seed is fixed.
    assert ((counts - expected) ** 2 / expected).sum() < 50


def test_a_fall_at_the_limit_is_a_time_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = read(collect("hopper-random", 500, out=tmp_path / "free", quiet=True))
    lengths = np.diff(np.r_[-1, np.flatnonzero(free["terminals"])])
    first = int(np.flatnonzero(lengths > 24)[0])
    limit, row = int(lengths[first]), int(lengths[: first + 1].sum()) - 1
    monkeypatch.setattr(sys.modules["mopo_fast.collect.uniform"], "MAX_PATH", limit)
    data = read(collect("hopper-random", 500, out=tmp_path / "limited", quiet=True))
    assert data["timeouts"][row] and not data["terminals"][row]
    ends = np.flatnonzero(data["timeouts"] | data["terminals"])
    assert np.diff(np.r_[-1, ends]).max() == limit
    assert not (data["timeouts"] & data["terminals"]).any()


def test_healthy_intervals_are_open() -> None:
    def healthy(task: str, states: np.ndarray) -> list[bool]:
        half = states.shape[1] // 2
        return RULES[task].healthy({"qpos": states[:, :half], "qvel": states[:, half:]}).tolist()

    hopper = np.zeros((5, 12))
    hopper[:, 1] = 1.0
    hopper[0, 1] = 0.7
    hopper[1, 2] = 0.2
    hopper[2, 11] = 100.0
    hopper[3, 0] = np.inf
    assert healthy("hopper", hopper) == [False, False, False, True, True]
    walker = np.zeros((3, 18))
    walker[:, 1] = [2.0, 0.8, 1.0]
    assert healthy("walker2d", walker) == [False, False, True]
    assert healthy("halfcheetah", np.full((1, 18), np.nan)) == [True]


@pytest.mark.parametrize("task", RULES)
def test_observations_at_high_speed(task: str) -> None:
    with _Collector(task, 0, 1) as collector:
        env = collector.env
        env.reset(seed=0)
        env.set_state(env.init_qpos + 0.3, np.linspace(-30, 30, env.model.nv))
        state = np.concatenate([env.data.qpos, env.data.qvel])
        expected = env._get_obs().astype(np.float32)
        episode = _Episode(np.stack([state, state]), np.zeros((1, env.model.nu), np.float32), False)
        arrays = collector.transitions([episode])
    assert np.array_equal(arrays["observations"][0], expected)
    assert np.array_equal(arrays["next_observations"][0], expected)


def test_unstable_simulation_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # MuJoCo writes its log to the working directory.
    monkeypatch.chdir(tmp_path)
    with _Collector("halfcheetah", 0, 1) as collector:
        # Joint springs this stiff blow up within a few steps.
        collector.model.jnt_stiffness[:] = 1e9
        with pytest.raises(InputError, match="episode 0 became unstable"):
            next(collector.batches(MAX_PATH))


@pytest.mark.parametrize("task", RULES)
def test_calls_of_mujoco_are_short(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are short because an interrupt waits for the end of the current call."""
    steps = []
    with _Collector(task, 0, 2) as collector:
        rollout, limit = collector.pool.rollout, 2 * max(1 << 12, MAX_PATH * collector.env.frame_skip)

        def counted(model: Any, data: Any, starts: Any, controls: Any, **options: Any) -> Any:
            steps.append(controls.shape[0] * controls.shape[1])
            return rollout(model, data, starts, controls, **options)

        monkeypatch.setattr(collector.pool, "rollout", counted)
        for _ in collector.batches(20 * MAX_PATH):
            pass
    assert 0 < max(steps) <= limit


def test_existing_file_is_kept_unless_overwritten(tmp_path: Path) -> None:
    path = collect("hopper-random", 50, out=tmp_path / "mine.h5", quiet=True)
    assert path == tmp_path / "mine.h5"
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"mine\.h5 exists already.*--overwrite"):
        collect("hopper-random", 60, out=path, quiet=True)
    assert path.read_bytes() == before
    collect("hopper-random", 60, out=path, overwrite=True, quiet=True)
    assert len(read(path)["rewards"]) == 60


def test_default_folder_and_load_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPO_FAST_DATA_DIR", str(tmp_path / "sets"))
    with pytest.raises(InputError, match="mopo-fast collect hopper-random"):
        load_dataset("hopper-random-local")
    # The name of the data set may also be the one of the file that is made.
    path = collect("hopper-random-local", 200, quiet=True)
    assert path.parent == tmp_path / "sets"
    data = load_dataset("hopper-random-local")
    assert (len(data), data.obs_dim, data.act_dim, data.name) == (200, 11, 3, "hopper-random-local")
    assert load_dataset(path).name == "hopper-random-local"
    assert data.info["metadata"]["env_id"] == "Hopper-v4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "hoper-random"}, "cannot collect 'hoper-random'.*halfcheetah, hopper,.*random, medium,"),
        ({"name": "hopper-mixed"}, "cannot collect 'hopper-mixed'"),
        ({"name": "pendulum-random"}, "cannot collect"),
        ({"name": "hopper"}, "cannot collect"),
        ({"name": ""}, "cannot collect"),
        ({"name": "hopper-medium-replay"}, "contains every stored transition; leave out steps, got 10"),
        ({"name": "hopper-expert", "seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": 1.5}, "steps must be"),
        ({"steps": True}, "steps must be"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"threads": 0}, "threads must be a whole number, 1 <= threads < [0-9]+, got 0"),
        ({"out": "/dev/null/folder"}, "/dev/null/folder"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str, tmp_path: Path) -> None:
    good = {"name": "hopper-random", "steps": 10, "out": tmp_path}
    with pytest.raises(InputError, match=message):
        collect(**{**good, **arguments}, quiet=True)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*hopper_random-local\.hdf5"):
            collect("hopper-random", 3000, out=tmp_path, quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == []


def test_environments_are_made_quietly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_environment("HalfCheetah-v4").close()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert mujoco.get_mju_user_warning() is None
