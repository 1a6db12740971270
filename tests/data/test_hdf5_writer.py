"""Test HDF5 files written in place: their layout, and full disks."""

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mopo_fast import InputError
from mopo_fast.bulk.files import write_file
from mopo_fast.collect import collect
from mopo_fast.data import load_file, relabel_file
from mopo_fast.data.hdf5_writer import new_file
from mopo_fast.data.write import write_arrays

Arrays = dict[str, Any]


def arrays(rows: int = 3000) -> Arrays:
    random = np.random.default_rng(0)
    return {
        "observations": random.normal(size=(rows, 3)).astype(np.float32),
        "next_observations": random.normal(size=(rows, 3)).astype(np.float32),
        "actions": random.uniform(-1, 1, (rows, 2)).astype(np.float32),
        "rewards": random.normal(size=rows).astype(np.float32),
        "terminals": random.random(rows) < 0.1,
        "infos/qpos": random.normal(size=(rows, 2)),
    }


METADATA: Arrays = {"name": "mine-local", "seed": 3, "µ": "µ", "empty": "", "returns": np.arange(3.0)}


def read(path: Path) -> Arrays:
    found: Arrays = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda key, item: found.update({key: item[()]}) if isinstance(item, h5py.Dataset) else None
        )
    return found


def test_rows_by_rows_and_at_once(tmp_path: Path) -> None:
    """Rows in parts and all at once give the same bytes, with aligned arrays and texts of fixed length."""
    whole = arrays(1001)
    with new_file(tmp_path / "rows.hdf5", 1001, METADATA) as file:
        for first in range(0, 1200, 100):
            written = file.append({key: array[first : first + 100] for key, array in whole.items()})
            assert written == min(100, max(0, 1001 - first))
    metadata = {f"metadata/{key}": value for key, value in (METADATA | {"steps": 1001}).items()}
    write_arrays(tmp_path / "whole.hdf5", whole | metadata)
    for path in (tmp_path / "rows.hdf5", tmp_path / "whole.hdf5"):
        found = read(path)
        for key, array in whole.items():
            assert found[key].dtype == array.dtype and np.array_equal(found[key], array), key
        assert found.keys() == (whole | metadata).keys()
        assert found["metadata/µ"].decode() == "µ" and found["metadata/empty"] == b""
        assert np.array_equal(found["metadata/returns"], np.arange(3.0))
        with h5py.File(path) as opened:
            assert all(opened[key].id.get_offset() % 64 == 0 for key in whole)
            assert not opened["metadata/name"].id.get_type().is_variable_str()
        assert load_file(path, memory_map=True).name == "mine-local"
    again = tmp_path / "again.hdf5"
    write_arrays(again, whole | metadata)
    assert again.read_bytes() == (tmp_path / "whole.hdf5").read_bytes()


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = arrays()
    for suffix in (".hdf5", ".npz"):
        write_arrays(tmp_path / f"a{suffix}", contents)
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: whole(handle, data[:999], offset))
    for suffix in (".hdf5", ".npz"):
        write_arrays(tmp_path / f"b{suffix}", contents)
        for key, array in contents.items():
            found = read(tmp_path / "b.hdf5") if suffix == ".hdf5" else np.load(tmp_path / "b.npz")
            assert np.array_equal(found[key], array)
    assert (tmp_path / "a.hdf5").read_bytes() == (tmp_path / "b.hdf5").read_bytes()


def of_collect(folder: Path, source: Path) -> None:
    collect("hopper-random", 600, out=folder, quiet=True, overwrite=True, threads=1)


def of_hdf5(folder: Path, source: Path) -> None:
    write_arrays(folder / "a.hdf5", arrays() | {"metadata/name": "mine"})


def of_npz(folder: Path, source: Path) -> None:
    write_arrays(folder / "a.npz", arrays() | {"metadata/name": "mine"})


def of_relabel(folder: Path, source: Path) -> None:
    relabel_file(source, "halfcheetah-jump", folder / "a.hdf5", overwrite=True)


def of_shards(folder: Path, source: Path) -> None:
    write_file(folder / "a.hdf5", arrays(), {"seed": 3}, "none")


def of_compressed_shards(folder: Path, source: Path) -> None:
    write_file(folder / "a.hdf5", arrays(), {"seed": 3}, "gzip")


WRITERS = [of_collect, of_hdf5, of_npz, of_relabel, of_shards, of_compressed_shards]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return collect("halfcheetah-random", 700, out=tmp_path_factory.mktemp("source"), quiet=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(params=[True, False], ids=["reserved", "unreserved"])
def reserves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test also a file system that reserves no space, on which any write may fail."""

    def refuse(handle: int, offset: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    if not request.param:
        monkeypatch.setattr(os, "posix_fallocate", refuse)


@pytest.mark.usefixtures("reserves")
@pytest.mark.parametrize("work", WRITERS)
def test_a_full_disk(work: Callable[[Path, Path], None], disk: Path, source: Path) -> None:
    work(disk, source)
    (made,) = disk.iterdir()
    needed = made.stat().st_size
    made.unlink()
    refused = 0
    # Vary the free space from none to enough.
    for free in range(0, needed + 70_000, needed // 9):
        filler = disk / "filler"
        filler.write_bytes(bytes(2**20 - 4096 - free // 4096 * 4096))
        try:
            work(disk, source)
            made.unlink()
        except InputError as error:
            refused += 1
            assert "cannot write" in str(error) and "No space left" in str(error)
        assert list(disk.iterdir()) == [filler]
    assert 7 <= refused <= 10


@pytest.mark.usefixtures("reserves")
@pytest.mark.parametrize("work", WRITERS)
def test_a_limit_of_the_file(work: Callable[[Path, Path], None], tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    work(folder, source)
    (made,) = folder.iterdir()
    old, size = made.read_bytes(), made.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (*range(1, size, size // 7), 2048, size - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises(InputError, match="cannot write"):
                work(folder, source)
            assert list(folder.iterdir()) == [made]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    # The old file is unchanged.
    assert made.read_bytes() == old


KILLED = """
import os, signal, sys
from mopo_fast.collect import collect
from mopo_fast.data.hdf5_writer import RowsFile
append = RowsFile.append
def append_and_die(self, rows):
    append(self, rows)
    if self.written >= 200:
        os.kill(os.getpid(), signal.SIGKILL)
RowsFile.append = append_and_die
collect("hopper-random", 2000, out=sys.argv[1], quiet=True, threads=1)
"""


def test_collecting_again_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".hopper_random-local.hdf5.")
    path = collect("hopper-random", 2000, out=tmp_path, quiet=True, threads=1)
    assert list(tmp_path.iterdir()) == [path]
    assert len(load_file(path)) == 2000
