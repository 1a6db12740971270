"""Test Minari's data sets, including damaged ones."""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mopo_fast import InputError, load_dataset
from mopo_fast.data import minari
from mopo_fast.data.convert import convert

pytest.importorskip("minari")

NAME = "minari:mine/hopper-v0"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a data set of three episodes with three steps each, and return its data folder."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    made = arrays()
    minari.write(NAME, made, {"algorithm": "SAC"})
    assert len(load_dataset(NAME)) == len(made["rewards"])
    return tmp_path / "minari" / "mine" / "hopper-v0" / "data"


def arrays() -> dict[str, Any]:
    random, n = np.random.default_rng(0), 9
    made = {
        "observations": random.normal(size=(n, 2)).astype(np.float32),
        "next_observations": random.normal(size=(n, 2)).astype(np.float32),
        "actions": random.uniform(-1, 1, (n, 1)).astype(np.float32),
        "rewards": random.normal(size=n).astype(np.float32),
        "terminals": np.arange(n) % 3 == 2,
        "timeouts": np.zeros(n, bool),
    }
    made["next_observations"][np.arange(n) % 3 != 2] = made["observations"][1:][np.arange(n - 1) % 3 != 2]
    return made


def replaced(name: str, value: Any) -> Callable[[h5py.File], None]:
    """Return a change that replaces an array by a value, or by a group if the value is None."""

    def change(file: h5py.File) -> None:
        del file[name]
        if value is None:
            file.create_group(name)
        else:
            file[name] = value

    return change


def test_an_object_is_a_data_set(folder: Path) -> None:
    import minari as package

    data, named = load_dataset(package.load_dataset("mine/hopper-v0")), load_dataset(NAME)
    assert (data.name, data.info) == (named.name, named.info)
    for name, array in named.arrays().items():
        assert data.arrays()[name].equal(array)


def test_its_file_is_recognised(folder: Path) -> None:
    with pytest.raises(InputError, match=r"main_data\.hdf5 is a file of Minari's; .* minari:ID"):
        load_dataset(folder / "main_data.hdf5")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("episode_1/rewards", h5py.SoftLink("/episode_0/rewards")), "is a link"),
        (replaced("episode_1/rewards", h5py.ExternalLink("x.hdf5", "/a")), "is a link"),
        (replaced("episode_1", np.zeros(3)), "cannot be loaded"),
        (replaced("episode_1/rewards", None), "cannot be loaded"),
        (replaced("episode_1/rewards", np.zeros(2)), r"observations of episode 1 .* shape \(3, 2\), got"),
        (replaced("episode_1/rewards", np.zeros(0)), "episode 1 of minari:mine/hopper-v0 has no steps"),
        (replaced("episode_1/rewards", np.zeros((3, 1))), r"rewards of episode 1 .* numbers of shape \(3,\)"),
        (replaced("episode_1/rewards", np.zeros(3, "S2")), "rewards of episode 1 .* must be numbers"),
        (replaced("episode_1/rewards", np.zeros(3, complex)), "rewards of episode 1 .* got complex128"),
        (replaced("episode_1/observations", np.zeros((4, 3))), r"observations of episode 1 .* got float64"),
        (replaced("episode_1/actions", np.zeros((3, 2))), "actions of episode 1"),
        (replaced("episode_1/actions", h5py.Empty("f4")), "actions of episode 1 .* got Empty"),
        (replaced("episode_1/terminations", np.zeros(3)), "terminations of episode 1 .* must be flags"),
        (replaced("episode_1/truncations", np.zeros(4, bool)), "truncations of episode 1"),
        (replaced("episode_1/rewards", np.full(3, np.nan)), "rewards is not a finite .* at row 3"),
        (lambda file: file.pop("episode_1"), "cannot be loaded"),
    ],
)  # fmt: skip
def test_episodes(folder: Path, change: Callable[[h5py.File], None], message: str) -> None:
    with h5py.File(folder / "main_data.hdf5", "r+") as file:
        change(file)
    with pytest.raises(InputError, match=message):
        load_dataset(NAME)


def test_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mopo_fast.data.stored.available_memory", lambda: 300)
    with pytest.raises(InputError, match="data does not fit into memory"):
        load_dataset(NAME)


BOX = json.dumps({"type": "Box", "dtype": "float32", "shape": [2], "low": [0, 0], "high": [1, 1]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_format": None}, r"metadata\.json: data_format"),
        ({"data_format": 3}, r"metadata\.json: data_format"),
        ({"data_format": "tape"}, "cannot be loaded"),
        ({"total_episodes": "3"}, r"metadata\.json: total_episodes"),
        ({"total_episodes": 4}, "cannot be loaded"),
        ({"total_episodes": -1}, "has no episodes"),
        ({"total_steps": None}, r"metadata\.json: total_steps"),
        ({"observation_space": ["Box"]}, r"metadata\.json: observation_space"),
        ({"observation_space": "{"}, "cannot be loaded"),
        ({"observation_space": "[" * 100_000}, "cannot be loaded"),
        ({"action_space": BOX}, r"actions of episode 0 .* shape \(3, 2\), got float32 \(3, 1\)"),
        ({"action_space": None, "observation_space": None}, "cannot be loaded"),
        ({"mopo_fast": 1}, r"metadata\.json: mopo_fast"),
        ({"mopo_fast": "{"}, r"metadata\.json is not a whole JSON file"),
        ({"mopo_fast": "[1]"}, r"metadata\.json is not a whole JSON file"),
        ({"mopo_fast": "[" * 100_000}, r"metadata\.json is not a whole JSON file"),
    ],
)  # fmt: skip
def test_metadata(folder: Path, changes: dict[str, Any], message: str) -> None:
    path = folder / "metadata.json"
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
    with pytest.raises(InputError, match=message):
        load_dataset(NAME)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"total_steps": NaN}', b"[" * 100_000])
def test_broken_metadata(folder: Path, content: bytes) -> None:
    (folder / "metadata.json").write_bytes(content)
    with pytest.raises(InputError, match=r"metadata\.json"):
        load_dataset(NAME)
    (folder / "metadata.json").unlink()
    with pytest.raises(InputError, match=r"metadata\.json does not exist"):
        load_dataset(NAME)


def test_a_refused_conversion_makes_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    np.savez(tmp_path / "a.npz", observations=np.zeros((3, 2)))
    for target in (NAME, "minari:no version"):
        with pytest.raises(InputError, match="lacks 'actions'"):
            convert(str(tmp_path / "a.npz"), target)
    assert not (tmp_path / "minari").exists()


@pytest.mark.parametrize("kind", ["exchanged", "renamed"])
def test_overwriting(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "renamed":
        monkeypatch.setattr("mopo_fast.utils.atomic._exchange", lambda *_: False)
    for algorithm in ("TD3", "CQL"):
        minari.write(NAME, arrays(), {"algorithm": algorithm}, overwrite=True)
        assert load_dataset(NAME).info["metadata"]["algorithm"] == algorithm
    assert [path.name for path in folder.parents[2].iterdir()] == ["mine"]


def test_a_set_is_there_whenever_its_writer_dies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, made = os.replace, []

    def die(*paths: Any) -> None:
        made.append(paths)
        if len(made) == 2:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", die)
    with contextlib.suppress(KeyboardInterrupt):
        minari.write(NAME, arrays(), {}, overwrite=True)
    assert len(load_dataset(NAME)) == 9


def test_folders_of_dead_writers_are_removed(folder: Path) -> None:
    root = folder.parents[2]
    for name in (".new-dead", ".new-alive", ".new-between", ".new-between/.old", "elsewhere"):
        (root / name).mkdir()
    (root / ".new-dead" / "file").touch()
    (root / ".new-link").symlink_to(root / "elsewhere")
    handle = os.open(root / ".new-alive", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        minari.write("minari:other/hopper-v0", arrays(), {})
    finally:
        os.close(handle)
    left = {path.name for path in root.iterdir()}
    assert left == {"mine", "other", "elsewhere", ".new-alive", ".new-between", ".new-link"}
