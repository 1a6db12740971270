"""Test the conversion of each format to each other by the command line."""

from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
import torch

from mopo_fast import InputError, load_dataset
from mopo_fast.cli import main
from mopo_fast.data.convert import convert


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write three episodes: the first terminates, the second is cut off, the third ends with the file."""
    path, random, n = tmp_path / "a.hdf5", np.random.default_rng(0), 12
    with h5py.File(path, "w") as file:
        states = random.normal(size=(n + 1, 2)).astype(np.float32)
        file["observations"], file["next_observations"] = states[:-1], states[1:].copy()
        file["next_observations"][4] = file["next_observations"][8] = 7.0
        file["actions"] = random.uniform(-1, 1, (n, 1)).astype(np.float32)
        file["rewards"] = random.normal(size=n).astype(np.float32)
        file["terminals"], file["timeouts"] = np.arange(n) == 4, np.arange(n) == 8
        file["infos/qpos"] = random.normal(size=(n, 3))
        file["metadata/name"], file["metadata/seed"] = "hopper-mine-local", 5
    return path


@pytest.fixture
def minari_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def assert_same(one: str | Path, other: str | Path, compat: bool = True) -> None:
    for option in (None, "d4rl") if compat else (None,):
        left, right = load_dataset(one, compat=option), load_dataset(other, compat=option)
        for name, array in left.arrays().items():
            assert torch.equal(array, right.arrays()[name]), name
        metadata = right.info["metadata"]
        assert {**metadata, **left.info["metadata"]} == metadata


def test_between_files(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there, back = tmp_path / "b.npz", tmp_path / "c.h5"
    assert main(["convert", str(source), str(there)]) == 0
    assert main(["convert", str(there), str(back)]) == 0
    assert capsys.readouterr().out == f"{there}: 12 rows\n{back}: 12 rows\n"
    assert_same(source, there)
    assert load_dataset(back).name == "hopper-mine-local"
    with h5py.File(source) as old, h5py.File(back) as new:
        for key in ("observations", "infos/qpos", "timeouts", "metadata/seed"):
            assert new[key].dtype == old[key].dtype
            assert np.array_equal(new[key][()], old[key][()]), key


def test_to_minari_and_back(source: Path, minari_folder: Path, tmp_path: Path) -> None:
    import minari

    assert main(["convert", str(source), "minari:mine/hopper-v0"]) == 0
    dataset = minari.load_dataset("mine/hopper-v0")
    assert [len(episode.rewards) for episode in dataset.iterate_episodes()] == [5, 4, 3]
    assert [bool(episode.terminations[-1]) for episode in dataset.iterate_episodes()] == [True, False, False]
    assert [bool(episode.truncations[-1]) for episode in dataset.iterate_episodes()] == [False, True, True]
    assert list(minari.list_local_datasets()) == ["mine/hopper-v0"]
    assert_same(source, "minari:mine/hopper-v0")
    assert main(["convert", "minari:mine/hopper-v0", str(tmp_path / "back.npz")]) == 0
    assert_same(source, tmp_path / "back.npz")
    assert main(["convert", str(source), "minari:mine/hopper-v0"]) == 2
    assert main(["convert", str(source), "minari:mine/hopper-v0", "--overwrite"]) == 0
    assert sorted(path.name for path in minari_folder.iterdir()) == ["mine"]


def test_to_minari_without_successors(source: Path, minari_folder: Path) -> None:
    with h5py.File(source, "r+") as file:
        del file["next_observations"]
    convert(str(source), "minari:hopper-v0")
    assert_same(source, "minari:hopper-v0", compat=False)
    with h5py.File(source, "r+") as file:
        del file["timeouts"]
    convert(str(source), "minari:hopper-v0", overwrite=True)
    assert_same(source, "minari:hopper-v0", compat=False)


def test_minaris_action_space(minari_folder: Path) -> None:
    import minari
    from minari.data_collector import EpisodeBuffer

    episode = EpisodeBuffer(
        observations=np.zeros((4, 2)),
        actions=np.array([[-2.0, 0.0], [2.0, 1.0], [0.0, 0.25]]),
        rewards=[1.0, 2.0, 3.0],
        terminations=[False] * 3,
        truncations=[False, False, True],
    )
    spaces = {
        "observation_space": gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64),
        "action_space": gymnasium.spaces.Box(np.array([-2.0, 0.0]), np.array([2.0, 1.0]), dtype=np.float64),
    }
    with pytest.warns(UserWarning):
        minari.create_dataset_from_buffers("mine-v0", [episode], data_format="hdf5", **spaces)
    assert load_dataset("minari:mine-v0").actions.tolist() == [[-1, -1], [1, 1], [0, -0.5]]
    spaces["action_space"] = gymnasium.spaces.Discrete(3)
    episode = EpisodeBuffer(
        observations=np.zeros((2, 2)),
        actions=np.array([1]),
        rewards=[1.0],
        terminations=[True],
        truncations=[False],
    )
    with pytest.warns(UserWarning):
        minari.create_dataset_from_buffers("discrete-v0", [episode], data_format="hdf5", **spaces)
    with pytest.raises(InputError, match=r"minari:discrete-v0: actions must be vectors, got Discrete\(3\)"):
        load_dataset("minari:discrete-v0")


def test_no_such_minari_set(minari_folder: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="minari:nowhere cannot be loaded"):
        load_dataset("minari:nowhere")
    assert main(["convert", str(source), "minari:no version"]) == 2
    assert "cannot write minari:no version (Malformed dataset ID" in capsys.readouterr().err
    assert not list(minari_folder.glob("*"))


def test_refusals(source: Path, tmp_path: Path) -> None:
    whole = (tmp_path / "b.npz", b"mine")
    whole[0].write_bytes(whole[1])
    with pytest.raises(InputError, match=r"b\.npz exists already; choose another file, or replace it"):
        convert(str(source), str(whole[0]))
    with pytest.raises(InputError, match=r"must end in \.hdf5, \.h5 or \.npz"):
        convert(str(source), str(tmp_path / "b.csv"))
    with pytest.raises(InputError, match="does not exist"):
        convert(str(tmp_path / "nowhere.hdf5"), str(whole[0]), overwrite=True)
    # An invalid source leaves the target unchanged.
    with h5py.File(source, "r+") as file:
        file["rewards"][3] = np.nan
    with pytest.raises(InputError, match="rewards is not a finite float32 number at row 3"):
        convert(str(source), str(whole[0]), overwrite=True)
    assert whole[0].read_bytes() == whole[1]
