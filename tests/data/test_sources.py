"""Test other sources of data: dictionaries, environments, NeoRL, pickled trajectories."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from garbled import check_bytes

from mopo_fast import InputError, Transitions, load_dataset
from mopo_fast.data.convert import convert
from mopo_fast.data.files import MAX_EPISODE_STEPS

Arrays = dict[str, Any]


def trajectory(length: int, first: int = 0, terminal: bool = True) -> Arrays:
    numbers = np.arange(first, first + length + 1, dtype=np.float32)
    states = np.stack([numbers, -numbers], 1)
    return {
        "observations": states[:-1],
        "next_observations": states[1:],
        "actions": np.sin(numbers[:-1, None]).astype(np.float32),
        "rewards": numbers[:-1] / 8,
        "terminals": np.arange(length) == (length - 1 if terminal else length),
    }


def joined(*parts: Arrays) -> Arrays:
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def assert_equal(data: Transitions, arrays: Arrays) -> None:
    for key, array in arrays.items():
        expected = torch.as_tensor(array)
        found = getattr(data, key)
        assert found.dtype == expected.dtype, key
        assert torch.equal(found, expected), key


def test_a_dictionary() -> None:
    arrays = joined(trajectory(4), trajectory(3, 10))
    data = load_dataset({**arrays, "metadata/algorithm": "SAC", "infos/qpos": np.zeros((7, 3))})
    assert_equal(data, arrays)
    assert data.info["metadata"] == {"algorithm": "SAC"}
    assert len(load_dataset(arrays, compat="d4rl")) == 6
    with pytest.raises(InputError, match="the data set lacks 'rewards'"):
        load_dataset({key: array for key, array in arrays.items() if key != "rewards"})
    # The loaded data are a copy, so the caller's arrays do not change.
    data.observations.zero_()
    assert arrays["observations"].any()


def test_an_environment() -> None:
    arrays = joined(trajectory(6, terminal=False), trajectory(3, 10))
    del arrays["next_observations"]
    environment = SimpleNamespace(
        spec=SimpleNamespace(id="hopper-mine-v0"), _max_episode_steps=6, get_dataset=lambda: arrays
    )
    data = load_dataset(environment)
    assert data.name == "hopper-mine-v0"
    assert data.observations[:, 0].tolist() == [0, 1, 2, 3, 4, 10, 11]
    with pytest.raises(InputError, match=r"environment with get_dataset\(\), got int"):
        load_dataset(3)  # type: ignore[arg-type]
    arrays["actions"] = arrays["actions"][1:]
    with pytest.raises(InputError, match="data set of hopper-mine-v0: actions has 8 rows, observations 9"):
        load_dataset(environment)


def neorl(*parts: Arrays) -> Arrays:
    arrays = joined(*parts)
    return {
        "obs": arrays["observations"],
        "action": arrays["actions"],
        "reward": arrays["rewards"][:, None],
        "next_obs": arrays["next_observations"],
        "done": arrays["terminals"][:, None].astype(np.float32),
        "index": np.cumsum([0, *(len(part["rewards"]) for part in parts[:-1])]),
    }


def test_neorl(tmp_path: Path) -> None:
    # The second trajectory ends by the step limit; the third ends neither by that nor by a terminal.
    parts = trajectory(4), trajectory(MAX_EPISODE_STEPS, 10), trajectory(3, terminal=False)
    np.savez(tmp_path / "a.npz", **neorl(*parts))
    expected = joined(*parts)
    expected["terminals"] = np.arange(MAX_EPISODE_STEPS + 7) == 3
    assert_equal(load_dataset(tmp_path / "a.npz"), expected)
    rows = load_dataset(tmp_path / "a.npz", compat="d4rl").observations[:, 0]
    assert len(rows) == 4 + (MAX_EPISODE_STEPS - 1) + 2


@pytest.mark.parametrize("index", [[1, 4], [0, 4, 4], [0, 99], [0.5]])
def test_neorl_with_a_bad_index(index: list[float], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{**neorl(trajectory(4), trajectory(3)), "index": np.array(index)})
    with pytest.raises(InputError, match="index must hold the first row of each trajectory"):
        load_dataset(tmp_path / "a.npz")


NATURAL = [
    ("obs", "actions", "rewards", "next_obs", "dones"),
    ("obs", "action", "reward", "next_obs", "done"),
    ("observations", "actions", "rewards", "next_observations", "terminations"),
]
OURS = ("observations", "actions", "rewards", "next_observations", "terminals")


@pytest.mark.parametrize("names", NATURAL)
def test_other_names(names: tuple[str, ...], tmp_path: Path) -> None:
    """Files of every kind, and dictionaries, take the same names."""
    arrays = joined(trajectory(4), trajectory(3, 10))
    named = {theirs: arrays[ours] for theirs, ours in zip(names, OURS, strict=True)}
    np.savez(tmp_path / "a.npz", **named)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for name, array in named.items():
            file[name] = array
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([named]))
    for source in (named, *(tmp_path / f"a.{kind}" for kind in ("npz", "hdf5", "pkl"))):
        assert_equal(load_dataset(source), arrays)
    assert_equal(load_dataset(tmp_path / "a.hdf5", memory_map=True), arrays)
    convert(str(tmp_path / "a.npz"), str(tmp_path / "b.npz"))
    assert set(np.load(tmp_path / "b.npz")) == set(OURS)


def test_done_at_a_time_out_is_no_terminal() -> None:
    arrays = joined(trajectory(4), trajectory(3, 10))
    cut = np.arange(7) == 3
    named = {key: array for key, array in arrays.items() if key != "terminals"}
    data = load_dataset(named | {"dones": arrays["terminals"], "truncations": cut})
    assert_equal(data, arrays | {"terminals": arrays["terminals"] & ~cut, "timeouts": cut})


def test_names_that_are_missing_or_not_clear(tmp_path: Path) -> None:
    arrays = joined(trajectory(4))
    named = {"obs": arrays["observations"], "next_obs": arrays["next_observations"], "a": arrays["actions"]}
    np.savez(tmp_path / "a.npz", **named)
    with pytest.raises(
        InputError, match="lacks 'actions', it has a, next_obs, obs; name it 'actions' or 'ac"
    ):
        load_dataset(tmp_path / "a.npz")
    with pytest.raises(InputError, match="both 'dones' and 'done'; name the one that is meant 'terminals'"):
        load_dataset({**named, "done": arrays["terminals"], "dones": arrays["terminals"]})


def test_lists_and_tensors() -> None:
    arrays = joined(trajectory(4), trajectory(3, 10))
    assert_equal(load_dataset({key: array.tolist() for key, array in arrays.items()}), arrays)
    tensors: Arrays = {key: torch.from_numpy(array) for key, array in arrays.items()}
    tensors["rewards"].requires_grad_()
    assert_equal(load_dataset(tensors), arrays)
    with pytest.raises(InputError, match="the data set: rewards is not an array"):
        load_dataset({**arrays, "rewards": [[1.0], [2.0, 3.0]]})


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_trajectories(protocol: int, tmp_path: Path) -> None:
    parts = [trajectory(4), trajectory(5, 10, terminal=False), trajectory(1, 20)]
    parts[1]["rewards"] = list(parts[1]["rewards"])  # numpy scalars, not an array
    parts[2]["observations"] = np.asfortranarray(parts[2]["observations"])
    (tmp_path / "hopper-mine.pkl").write_bytes(pickle.dumps(parts, protocol))
    data = load_dataset(tmp_path / "hopper-mine.pkl")
    assert_equal(data, joined(*parts))
    assert data.name == "hopper-mine"
    for part in parts:
        part["dones"] = part.pop("terminals")
        del part["next_observations"]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(parts, protocol))
    assert load_dataset(tmp_path / "a.pkl").observations[:, 0].tolist() == [0, 1, 2, 10, 11, 12, 13]


class Runs:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    ("evil", "asks"),
    [
        (Runs(exec, "open('ran', 'w')"), r"(builtins|__builtin__)\.exec"),
        (Runs(Path.touch, Path("ran")), r"(pathlib|builtins|__builtin__)\.\S+"),
        (Runs(np.save, "ran", 0), r"numpy\.save"),
        (Runs(eval, "open('ran', 'w')"), r"(builtins|__builtin__)\.eval"),
        (SimpleNamespace(a=1), r"types\.SimpleNamespace"),
    ],
)
def test_no_pickle_runs(
    protocol: int, evil: Any, asks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asks = rf"asks for {asks}; only numpy arrays"
    hidden = {**trajectory(3), "rewards": np.array([evil], object)}
    for content, why in ([evil], asks), ([{"infos": evil}], asks), ([hidden], "holds an array of object"):
        Path("a.pkl").write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(InputError, match=rf"a\.pkl: the pickle {why}"):
            load_dataset("a.pkl")
    assert not list(tmp_path.glob("ran*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must hold a list of trajectories"),
        ({"observations": np.zeros((3, 2))}, "must hold a list of trajectories"),
        ([np.zeros(3)], "must hold a list of trajectories"),
        ([{**trajectory(3), "rewards": np.zeros(2)}], r"trajectory 0 have \[2, 3\] rows"),
        ([trajectory(3), {"observations": np.zeros((3, 2))}], "actions of trajectory 1 is not an array"),
        ([{**trajectory(3), "actions": np.array(["a"] * 3)}], "the pickle holds an array of <U1"),
        ([{**trajectory(3), "actions": np.array([None] * 3)}], "the pickle holds an array of object"),
        ([{**trajectory(3), "rewards": None}], "rewards of trajectory 0 is not an array of numbers"),
        ([{"observations": np.zeros((3, 2)), "dones": np.zeros(3)}], "lacks 'actions'"),
        ([trajectory(3), {**trajectory(2), "actions": np.zeros((2, 9))}], "not a whole pickle file"),
        ([{**trajectory(3), "actions": np.zeros((3, 1), complex)}], "holds an array of complex128"),
        ([{**trajectory(3), "actions": [[0.0], [1.0, 2.0], [3.0]]}], "actions of trajectory 0 is not"),
        ([{**trajectory(3), "actions": {"a": 1}}], "actions of trajectory 0 is not an array of numbers"),
        ([{**trajectory(3), "rewards": np.float32(1)}], "rewards of trajectory 0 is not an array of numbers"),
        ([{**trajectory(3), "rewards": np.zeros((3, 2))}], r"rewards must be \[n\], got shape \(3, 2\)"),
        ([{**trajectory(3), "rewards": np.full(3, 1e300)}], "rewards is not a finite .* at row 0"),
        ([{**trajectory(3), "terminals": np.zeros((3, 0))}], r"must be \[n\], got shape \(3, 0\)"),
        ([{**trajectory(3), "terminals": np.full(3, np.nan)}], "terminals must be 0 or 1, got nan at row 0"),
        ([{**trajectory(3), "terminals": [10**30] * 3}], "terminals of trajectory 0 is not an array"),
        ([trajectory(3), {**trajectory(3), "next_observations": "no"}], "next_observations of trajectory 1"),
    ],
)  # fmt: skip
def test_pickles_that_do_not_fit(content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=message):
        load_dataset(tmp_path / "a.pkl")


def test_pickles_larger_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps([trajectory(100)]))
    monkeypatch.setattr("mopo_fast.data.stored.available_memory", lambda: 2 * path.stat().st_size - 1)
    with pytest.raises(InputError, match=r"a\.pkl does not fit into memory"):
        load_dataset(path)


def test_damaged_pickles(tmp_path: Path) -> None:
    path, whole = tmp_path / "a.pkl", pickle.dumps([trajectory(20), trajectory(9)])
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"a\.pkl is not a whole pickle file"):
            load_dataset(path)
    path.write_bytes(whole)
    check_bytes(path, lambda: load_dataset(path))
