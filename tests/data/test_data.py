"""Test files in D4RL's layout: the rules for successors, and the refusal of invalid files."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from garbled import check_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from mopo_fast.config import DataConfig
from mopo_fast.data import load_configured, load_dataset, load_file
from mopo_fast.data.files import MAX_EPISODE_STEPS, from_arrays
from mopo_fast.errors import InputError

Arrays = dict[str, Any]


def make_arrays(terminals: list[bool], timeouts: list[bool] | None = None, successors: bool = True) -> Arrays:
    """Make episodes whose observations number the states. No row holds the final state of an episode."""
    n = len(terminals)
    ends = np.array(terminals) | np.array(timeouts or [False] * n)
    states = np.arange(n) + np.r_[0, np.cumsum(ends)[:-1]]
    arrays: Arrays = {
        "observations": (states[:, None] + [0.0, 0.25]).astype(np.float32),
        "actions": np.linspace(-1, 1, 3 * n, dtype=np.float32).reshape(n, 3),
        "rewards": np.linspace(-5, 5, n, dtype=np.float32),
        "terminals": np.array(terminals),
    }
    if timeouts is not None:
        arrays["timeouts"] = np.array(timeouts)
    if successors:
        arrays["next_observations"] = arrays["observations"] + 1
    return arrays


def write(path: Path, arrays: Arrays) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for key, array in arrays.items():
                file[key] = array
    return path


def same(tensor: torch.Tensor, array: np.ndarray) -> bool:
    return tensor.numpy().dtype == array.dtype and np.array_equal(tensor.numpy(), array)


TERMINALS = [False, False, True, False, False, False, True, False]
TIMEOUTS = [False, False, False, False, True, False, False, False]


@pytest.mark.parametrize("suffix", [".hdf5", ".h5", ".npz"])
def test_stored_successors_keep_every_row(suffix: str, tmp_path: Path) -> None:
    arrays = make_arrays(TERMINALS, TIMEOUTS)
    data = load_file(write(tmp_path / f"hopper_mine{suffix}", arrays))
    for key in ("observations", "actions", "rewards", "next_observations", "terminals"):
        assert same(getattr(data, key), arrays[key]), key
    assert data.name == "hopper_mine"
    assert data.info["rows"] == 8
    assert data.info["successors"] == "next_observations"


def test_without_successors_only_true_ones_are_kept(tmp_path: Path) -> None:
    arrays = make_arrays(TERMINALS, TIMEOUTS, successors=False)
    data = load_file(write(tmp_path / "a.hdf5", arrays))
    kept = [0, 1, 3, 5]
    assert same(data.observations, arrays["observations"][kept])
    assert torch.equal(data.next_observations, data.observations + 1)
    assert same(data.actions, arrays["actions"][kept])
    assert same(data.rewards, arrays["rewards"][kept])
    assert not data.terminals.any()


def test_without_timeouts_the_step_limit_ends_an_episode(tmp_path: Path) -> None:
    terminals = [False] * 2500
    terminals[1199] = True
    data = load_file(write(tmp_path / "a.hdf5", make_arrays(terminals, successors=False)))
    gone = sorted(set(range(2500)) - set(data.observations[:, 0].int().tolist()))
    # The states after the terminal are numbered one higher than their rows.
    assert gone == [999, 1199, 1200, 2200]


def qlearning_oracle(arrays: Arrays, limit: int) -> Arrays:
    """Return the rows that the Q-learning loader of the D4RL package returns, one by one.

    A row's successor is the next row's observation, even across the end of an episode. The last row has no
    successor and is dropped. Rows that end by time are dropped: those flagged as timeouts or, in a file
    without flags, those at which a counter reaches `limit`. The counter is reset by the end of an episode
    and then advanced by each returned row, so it is one after a returned terminal.
    """
    rows = []
    counter = 0
    for row in range(len(arrays["rewards"]) - 1):
        by_time = arrays["timeouts"][row] if "timeouts" in arrays else counter == limit - 1
        if by_time:
            counter = 0
        else:
            counter = 1 if arrays["terminals"][row] else counter + 1
            rows.append(row)
    taken = {key: arrays[key][rows] for key in ("observations", "actions", "rewards", "terminals")}
    return {**taken, "next_observations": arrays["observations"][np.array(rows, int) + 1]}


@settings(deadline=None, max_examples=60)
@given(
    ends=st.lists(st.sampled_from(["", "", "", "terminal", "timeout", "both"]), min_size=3, max_size=60),
    flags=st.booleans(),
    limit=st.integers(2, 6),
)
def test_compat_is_the_qlearning_dataset(
    ends: list[str], flags: bool, limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    terminals = [end in ("terminal", "both") for end in ends]
    timeouts = [end in ("timeout", "both") for end in ends]
    arrays = make_arrays(terminals, timeouts if flags else None)
    expected = qlearning_oracle(arrays, limit)
    path = write(tmp_path_factory.mktemp("compat") / "a.npz", arrays)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mopo_fast.data.files.MAX_EPISODE_STEPS", limit)
        if len(expected["rewards"]) == 0:
            with pytest.raises(InputError, match="none of them with a successor"):
                load_file(path, compat="d4rl")
            return
        data = load_file(path, compat="d4rl")
    for key, array in expected.items():
        assert same(getattr(data, key), array), key


def test_step_limit_is_d4rls() -> None:
    assert MAX_EPISODE_STEPS == 1000


def test_other_dtypes_and_columns_are_taken(tmp_path: Path) -> None:
    arrays = make_arrays(TERMINALS, TIMEOUTS)
    wide = {
        "observations": arrays["observations"].astype(np.float64),
        "actions": (arrays["actions"] * 3).astype(np.int64),
        "rewards": arrays["rewards"][:, None],
        "terminals": arrays["terminals"][:, None].astype(np.float32),
        "timeouts": arrays["timeouts"].astype(np.uint8),
        "next_observations": arrays["next_observations"].astype(np.float16),
    }
    data = load_file(write(tmp_path / "a.hdf5", wide))
    assert same(data.observations, arrays["observations"])
    assert same(data.rewards, arrays["rewards"])
    assert same(data.terminals, arrays["terminals"])
    assert all(array.dtype == torch.float32 for key, array in data.arrays().items() if key != "terminals")


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observations": None}, "lacks 'observations', it has actions, next_observations, rewards"),
        ({"actions": None}, "lacks 'actions'"),
        ({"rewards": None}, "lacks 'rewards'"),
        ({"terminals": None}, "lacks 'terminals'"),
        ({"observations": np.zeros(8)}, r"observations must be \[n, dim\], got shape \(8,\)"),
        ({"observations": np.zeros((8, 0))}, r"observations must be \[n, dim\], got shape \(8, 0\)"),
        ({"observations": np.float32(1)}, r"observations must be \[n, dim\], got shape \(\)"),
        ({"actions": np.zeros((8, 3, 1))}, r"actions must be \[n, dim\], got shape \(8, 3, 1\)"),
        ({"actions": np.zeros((7, 3))}, "actions has 7 rows, observations 8"),
        ({"rewards": np.zeros((8, 2))}, r"rewards must be \[n\], got shape \(8, 2\)"),
        ({"rewards": np.zeros(9)}, "rewards has 9 rows, observations 8"),
        ({"terminals": np.zeros(3, bool)}, "terminals has 3 rows"),
        ({"timeouts": np.zeros(3, bool)}, "timeouts has 3 rows"),
        ({"terminals": np.full(8, 0.5)}, "terminals must be 0 or 1, got 0.5 at row 0"),
        ({"timeouts": np.array([0, 1, 0, 2, 0, 0, 0, 0])}, "timeouts must be 0 or 1, got 2 at row 3"),
        ({"next_observations": np.zeros((8, 3))}, "next_observations has 3 columns, observations 2"),
        ({"observations": np.zeros((8, 2), "S4")}, "observations must be numbers"),
        ({"actions": np.zeros((8, 3), complex)}, "actions must be numbers, got complex128"),
        ({"rewards": np.array([0, 1, 2, np.nan, 4, 5, 6, 7])}, "rewards is not a finite .* at row 3"),
        ({"actions": np.full((8, 3), -np.inf)}, "actions is not a finite .* at row 0"),
        ({"observations": np.full((8, 2), 1e300)}, "observations is not a finite float32 number at row 0"),
        (
            {key: np.zeros((0, *shape)) for key, shape in
             {"observations": (2,), "actions": (3,), "rewards": (), "terminals": (), "timeouts": (),
              "next_observations": (2,)}.items()},
            "has 0 rows",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(suffix: str, changes: Arrays, message: str, tmp_path: Path) -> None:
    arrays = {**make_arrays(TERMINALS, TIMEOUTS), **changes}
    path = write(tmp_path / f"a{suffix}", {key: array for key, array in arrays.items() if array is not None})
    with pytest.raises(InputError, match=message) as caught:
        load_file(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("compat", [None, "d4rl"])
def test_a_single_row_has_no_successor(compat: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5", make_arrays([False], successors=False))
    with pytest.raises(InputError, match="1 rows, none of them with a successor"):
        load_file(path, compat=compat)


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_truncated_files(suffix: str, share: float, tmp_path: Path) -> None:
    path = write(tmp_path / f"a{suffix}", make_arrays([False] * 500))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match=rf"a\{suffix} is not a whole (HDF5|npz) file"):
        load_file(path)


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
def test_damaged_files(suffix: str, tmp_path: Path) -> None:
    arrays = make_arrays([False] * 50)
    path = tmp_path / f"a{suffix}"
    if suffix == ".npz":
        np.savez_compressed(path, **arrays)
    else:
        write(path, {**arrays, "metadata/name": "a-local"})
    check_bytes(path, lambda: load_file(path))


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
@pytest.mark.parametrize("successors", [True, False])
def test_more_than_the_memory_holds(
    suffix: str, successors: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = make_arrays([False] * 1000, successors=successors)
    path = write(tmp_path / f"a{suffix}", {**arrays, "infos/large": np.zeros(10**6)})
    # Bytes of all float32 columns and the terminals, twice if rows are selected, and of the actions being
    # read.
    needed = 8 * 4000 + 1000 + 12_000 if successors else 2 * (6 * 4000 + 1000) + 12_000
    monkeypatch.setattr("mopo_fast.data.stored.available_memory", lambda: needed)
    assert len(load_file(path)) >= 999
    monkeypatch.setattr("mopo_fast.data.stored.available_memory", lambda: needed - 1)
    with pytest.raises(
        InputError, match=r"does not fit into memory: it takes [\d.]+ (bytes|KiB), .*--memory-map"
    ):
        load_file(path)


@pytest.mark.parametrize("name", ["a.hdf5", "a.npz"])
def test_foreign_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(InputError, match="not a whole"):
        load_file(path)


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


def test_no_pickle_is_ever_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arrays = {**make_arrays(TERMINALS), "rewards": np.array([Bomb()] * 8)}
    with pytest.raises(InputError, match="not a whole npz file"):
        load_file(write(tmp_path / "a.npz", arrays))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match="not a whole npz file"):
        load_file(tmp_path / "b.npz")
    assert not Path("exploded").exists()


def test_what_is_not_an_array(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file.create_group("observations")
    with h5py.File(tmp_path / "b.hdf5", "w") as file:
        file["observations"] = h5py.Empty("f4")
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("observations.npy", b"not an array")
    for path in tmp_path.iterdir():
        with pytest.raises(InputError, match=rf"{path.name}: observations is not an array"):
            load_file(path)


def offlinerl_kit(arrays: Arrays, limit: int) -> list[int]:
    """Return the rows that OfflineRL-Kit's loader keeps, by its loop over rows."""
    kept, step = [], 0
    for row in range(len(arrays["rewards"]) - 1):
        late = arrays["timeouts"][row] if "timeouts" in arrays else step == limit - 1
        ended = arrays["terminals"][row]
        if late or (ended and "next_observations" not in arrays):
            step = 0
            continue
        # A terminal row that is kept counts as the first step of the next episode.
        step = 1 if ended else step + 1
        kept.append(row)
    return kept


@pytest.mark.parametrize("successors", [True, False])
@pytest.mark.parametrize("timeouts", [TIMEOUTS, None])
def test_offlinerl_kit(successors: bool, timeouts: list[bool] | None, tmp_path: Path) -> None:
    arrays = make_arrays(TERMINALS, timeouts, successors)
    data = load_dataset(write(tmp_path / "a.hdf5", arrays), compat="offlinerl-kit")
    kept = offlinerl_kit(arrays, MAX_EPISODE_STEPS)
    assert len(kept) in range(3, 8)
    for key in ("observations", "actions", "rewards", "terminals"):
        assert same(getattr(data, key), arrays[key][kept]), key
    assert torch.equal(data.next_observations, data.observations + 1)


@given(st.lists(st.booleans(), min_size=4, max_size=60), st.integers(2, 6), st.booleans())
def test_offlinerl_kit_without_timeouts(terminals: list[bool], limit: int, successors: bool) -> None:
    arrays = make_arrays(terminals, successors=successors)
    kept = offlinerl_kit(arrays, limit)
    if kept:
        data = from_arrays(arrays, compat="offlinerl-kit", max_episode_steps=limit)
        assert same(data.observations, arrays["observations"][kept])


@pytest.mark.parametrize("compat", [None, "d4rl", "offlinerl-kit"])
def test_the_last_rows_are_kept(compat: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5", make_arrays(TERMINALS, TIMEOUTS))
    whole = load_dataset(path, compat=compat)
    last = load_dataset(path, compat=compat, max_transitions=3)
    for name, array in last.arrays().items():
        assert array.equal(whole.arrays()[name][-3:]), name
    assert last.info["earlier_left_out"] == len(whole) - 3
    assert "earlier_left_out" not in load_dataset(path, compat=compat, max_transitions=len(whole)).info
    with pytest.raises(InputError, match="max_transitions must be at least 1, got 0"):
        load_dataset(path, max_transitions=0)


def test_rows_that_do_not_follow_one_another_have_no_next_row(tmp_path: Path) -> None:
    arrays = make_arrays([False] * 40)
    order = np.random.default_rng(0).permutation(40)
    path = write(tmp_path / "a.hdf5", {key: array[order] for key, array in arrays.items()})
    assert len(load_configured(path, DataConfig())) == 40
    with pytest.raises(
        InputError, match=r"a has \d+ rows whose successor is not the next row's .*; leave out --data\.compat"
    ):
        load_configured(path, DataConfig("d4rl", max_transitions=5))
    write(tmp_path / "b.hdf5", make_arrays(TERMINALS, TIMEOUTS))
    assert load_configured(tmp_path / "b.hdf5", DataConfig("d4rl")).info["contradicted"] == 0


def test_missing_file_folder_and_bad_compat(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.hdf5 does not exist"):
        load_dataset(tmp_path / "nowhere.hdf5")
    with pytest.raises(InputError, match="is a folder without shards"):
        load_dataset(tmp_path)
    path = write(tmp_path / "a.hdf5", make_arrays(TERMINALS))
    with pytest.raises(InputError, match=r"compat must be None or one of d4rl, .*, got 'D4RL'"):
        load_dataset(path, compat="D4RL")  # type: ignore[arg-type]


def test_metadata_names_only_local_sets(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5", {**make_arrays(TERMINALS), "metadata/name": "hopper-medium-v2"})
    assert load_file(path).name == "a"
    path = write(tmp_path / "b.hdf5", {**make_arrays(TERMINALS), "metadata/name": "hopper-random-local"})
    assert load_file(path).name == "hopper-random-local"
    assert load_file(path, name="mine").name == "mine"


@pytest.mark.parametrize("kind", [str, Path])
def test_load_dataset_takes_paths(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = make_arrays(TERMINALS, TIMEOUTS)
    path = write(tmp_path / "a.h5", arrays)
    assert len(load_dataset(kind(path))) == 8
    assert len(load_dataset(kind(path), compat="d4rl")) == 6
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_dataset(kind("~/a.h5"))) == 8


def test_unknown_names_say_what_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPO_FAST_DATA_DIR", str(tmp_path))
    with pytest.raises(
        InputError, match=r"did you mean hopper-medium-v2 or .*none yet, see `mopo-fast collect`"
    ):
        load_dataset("hoper-medium-v2")
    write(tmp_path / "walker2d_random-local.hdf5", make_arrays(TERMINALS))
    with pytest.raises(InputError, match=r"unknown data set 'zzz'. Known are D4RL's.*walker2d-random-local"):
        load_dataset("zzz")
    with pytest.raises(InputError, match="did you mean walker2d-random-local"):
        load_dataset("walker2d-random-lokal")
    assert load_dataset("walker2d-random-local").name == "walker2d-random-local"
