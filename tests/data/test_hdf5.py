"""Test HDF5 files: links to other files, false declarations, and everything that valid files contain."""

import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from small_arrays import ROWS, arrays

from mopo_fast import InputError, load_dataset
from mopo_fast.cli import main
from mopo_fast.data import hdf5, load_file
from mopo_fast.data.hdf5 import open_hdf5
from mopo_fast.data.shards import read_file


def write(path: Path, change: Callable[[h5py.File], None] = lambda file: None, **options: Any) -> Path:
    with h5py.File(path, "w", **options) as file:
        for key, array in arrays().items():
            file[key] = array
        change(file)
    return path


def escaping(file: h5py.File) -> None:
    file["infos/\x1b[2J"] = 1


def soft_link(file: h5py.File) -> None:
    file["rewards_again"] = h5py.SoftLink("/rewards")


def dangling_link(file: h5py.File) -> None:
    file.create_group("infos")["nothing"] = h5py.SoftLink("/nowhere")


def external_link(file: h5py.File) -> None:
    del file["rewards"]
    file["rewards"] = h5py.ExternalLink("other.hdf5", "/rewards")


def external_storage(file: h5py.File) -> None:
    del file["rewards"]
    file.create_dataset("rewards", ROWS, np.float32, external=[("/etc/passwd", 0, 4 * ROWS)])


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((ROWS,), np.float32)
    layout[:] = h5py.VirtualSource(".", "metadata/itself", shape=(ROWS,))
    file.create_group("metadata").create_virtual_dataset("itself", layout)


def growing_virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((ROWS,), np.float32, maxshape=(None,))
    source = h5py.VirtualSource(".", "infos/itself", shape=(ROWS,), maxshape=(None,))
    layout[: h5py.h5s.UNLIMITED] = source[: h5py.h5s.UNLIMITED]
    file.create_group("infos").create_virtual_dataset("itself", layout)


def cycle(file: h5py.File) -> None:
    file.create_group("infos/deeper")["top"] = file["/"]


def twice(file: h5py.File) -> None:
    file["metadata"] = file.create_group("infos")


def named_type(file: h5py.File) -> None:
    file["type"] = np.dtype("f4")


def use_of_a_named_type(file: h5py.File) -> None:
    file["type"] = np.dtype("f4")
    file.create_dataset("infos", (3,), dtype=file["type"])
    del file["type"]


def deep(file: h5py.File) -> None:
    file.create_group("/".join("g" * (hdf5._MAX_DEPTH + 2)))


def scale_offset(file: h5py.File) -> None:
    file.create_dataset("infos", data=np.arange(100), scaleoffset=0)


def unknown_filter(file: h5py.File) -> None:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((10,))
    properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL)
    h5py.h5d.create(file.id, b"infos", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((100,)), properties)


def deflated_twice(file: h5py.File) -> None:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((10,))
    properties.set_deflate(9)
    properties.set_deflate(9)
    h5py.h5d.create(file.id, b"infos", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((100,)), properties)


def only_fill_values(file: h5py.File) -> None:
    file.create_dataset("infos", (2**32, 100), np.float32, chunks=True)


def nothing_allocated(file: h5py.File) -> None:
    file.create_dataset("infos", (2**32, 100), np.float32)


def one_chunk_of_many(file: h5py.File) -> None:
    file.create_dataset("infos", (2**32,), np.float32, chunks=(1000,), compression="gzip")[:1000] = 1.0


def huge_chunk(file: h5py.File) -> None:
    file.create_dataset("infos", (10,), np.float32, maxshape=(None,), chunks=(2**29,), compression="gzip")


def inflating_chunk(file: h5py.File) -> None:
    made = file.create_dataset("infos", (1000,), np.uint8, chunks=(1000,), compression="gzip")
    made.id.write_direct_chunk((0,), zlib.compress(bytes(3 * 10**8)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (soft_link, "rewards_again is a link; copy"),
        (dangling_link, "infos/nothing is a link"),
        (external_link, "rewards is a link"),
        (escaping, r"'infos/\\x1b\[2J' is not a valid name"),
        (external_storage, "rewards is stored in other files"),
        (virtual, "metadata/itself is virtual"),
        (growing_virtual, "infos/itself is virtual"),
        (cycle, "the group infos/deeper/top has two names"),
        (twice, "the group (infos|metadata) has two names"),
        (named_type, "type is neither a group nor a data set"),
        (use_of_a_named_type, "infos has a named type"),
        (deep, "groups are nested more than 32 deep"),
        (scale_offset, "infos uses other filters than shuffle, gzip, lzf and fletcher32; repack"),
        (unknown_filter, "infos uses other filters"),
        (deflated_twice, "infos uses other filters"),
        (only_fill_values, r"infos declares 1,717,986,918,400 bytes, more than its 0 stored bytes can hold"),
        (nothing_allocated, r"infos declares 1,717,986,918,400 bytes"),
        (one_chunk_of_many, r"infos declares 17,179,869,184 bytes"),
        (huge_chunk, r"infos has chunks of 2,147,483,648 bytes, more than"),
        (inflating_chunk, r"a chunk of infos holds more than its 1,000 bytes"),
    ],
)  # fmt: skip
def test_what_is_refused(
    change: Callable[[h5py.File], None], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "other.hdf5")
    path = write(tmp_path / "a.hdf5", change)
    assert path.stat().st_size < 10**6
    message = rf"a\.hdf5 is not a whole HDF5 file \({message}"
    for options in {}, {"memory_map": True}, {"compat": "d4rl"}:
        with pytest.raises(InputError, match=message):
            load_file(path, **options)
    with pytest.raises(InputError, match=message):
        read_file(path)
    assert main(["convert", str(path), str(tmp_path / "new" / "b.npz")]) == 2
    assert not (tmp_path / "new").exists()
    assert "is not a whole HDF5 file" in capsys.readouterr().err


def test_the_number_of_objects(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5", lambda file: file.create_group("infos/empty"))
    with open_hdf5(path, max_objects=len(arrays()) + 2) as file:
        assert sorted(file) == sorted([*arrays(), "infos", "infos/empty"])
    with pytest.raises(InputError, match="it has more than 7 objects"), open_hdf5(path, max_objects=7):
        pass


def test_a_user_block(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5", userblock_size=512)
    with pytest.raises(InputError, match="does not begin with HDF5's signature"):
        load_file(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: file.create_dataset("rewards", ROWS, [("a", "f4"), ("b", "i4")]), "must be numbers"),
        (lambda file: file.create_dataset("rewards", ROWS, np.complex64), "must be numbers, got complex64"),
        (lambda file: file.create_dataset("rewards", ROWS, h5py.vlen_dtype(np.float32)), "must be numbers"),
        (lambda file: file.create_dataset("rewards", ROWS, h5py.ref_dtype), "must be numbers"),
        (lambda file: file.create_dataset("rewards", ROWS, "V4"), "must be numbers"),
        (lambda file: file.create_dataset("rewards", ROWS, h5py.string_dtype()), "must be numbers"),
        (lambda file: file.create_dataset("rewards", ROWS, "S4"), "must be numbers"),
        (lambda file: file.create_dataset("rewards", ROWS, np.dtype(("f4", (2,)))), "must be numbers"),
        (lambda file: file.create_dataset("rewards", data=h5py.Empty("f4")), "rewards is not an array"),
        (lambda file: file.create_group("rewards/rewards"), "rewards is not an array"),
        (lambda file: file.create_dataset("rewards", (1,) * 32, "f4"), r"rewards must be \[n\], got shape"),
    ],
)  # fmt: skip
def test_types_that_are_no_numbers(make: Callable[[h5py.File], Any], message: str, tmp_path: Path) -> None:
    def change(file: h5py.File) -> None:
        del file["rewards"]
        make(file)

    with pytest.raises(InputError, match=message):
        load_file(write(tmp_path / "a.hdf5", change))

    def aside(file: h5py.File) -> None:
        make(file.create_group("infos"))
        file["metadata"] = 3.0

    # These faults are in arrays that are not needed; groups and data sets also take each other's places.
    path = write(tmp_path / "b.hdf5", aside)
    assert len(load_file(path)) == ROWS
    assert main(["convert", str(path), str(tmp_path / "c.hdf5"), "--quiet"]) == 0
    assert len(load_file(tmp_path / "c.hdf5", memory_map=True)) == ROWS


@pytest.mark.parametrize(
    "options",
    [
        {"chunks": True},
        {"maxshape": True},
        {"compression": "gzip", "compression_opts": 9},
        {"compression": "gzip", "shuffle": True, "fletcher32": True},
        {"compression": "lzf", "shuffle": True},
        {"fletcher32": True},
    ],
)
@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", ">f8", "<f2"])
def test_what_d4rl_and_others_write(options: dict[str, Any], libver: str, kind: str, tmp_path: Path) -> None:
    """Files with all entries of D4RL's files are read in every HDF5 storage layout."""
    expected = arrays()
    with h5py.File(tmp_path / "a.hdf5", "w", libver=libver, track_order=True) as file:
        for key, array in expected.items():
            extent = {"maxshape": (None, *array.shape[1:])} if "maxshape" in options else {}
            array = array.astype(kind) if array.dtype != bool else array
            file.create_dataset(key, data=array, **{**options, **extent})
        file["infos/qpos"] = np.zeros((ROWS, 5))
        file["metadata/algorithm"] = "SAC"
        file["metadata/iteration"] = np.int64(7)
        file["metadata/policy/fc0/weight"] = np.zeros((256, 11), np.float32)
        file["metadata/policy/nonlinearity"] = np.bytes_("relu")
        # Constant values have the highest compression ratio, which must not be refused.
        file.create_dataset("infos/zeros", data=np.zeros(10**6), compression="gzip", compression_opts=9)
        file["infos/rewards"] = file["rewards"]
        file.attrs["made by"] = "someone"
    data = load_dataset(tmp_path / "a.hdf5")
    for key in ("observations", "actions", "rewards", "next_observations", "terminals"):
        rounded = expected[key].astype(kind).astype(expected[key].dtype)
        assert np.array_equal(data.arrays()[key].numpy(), rounded), key
    known = {"algorithm": "SAC", "iteration": 7, "policy/nonlinearity": "relu"}
    assert data.info["metadata"] == known


def test_many_texts_are_not_read(tmp_path: Path) -> None:
    """A text may take any amount of memory, so one text is read but an array of texts is not."""

    def texts(file: h5py.File) -> None:
        file["infos/texts"] = np.array(["a", "b"], h5py.string_dtype())
        file["infos/text"] = "c"

    path = write(tmp_path / "a.hdf5", texts)
    with open_hdf5(path) as file:
        assert np.asarray(file["infos/text"]).item() == b"c"
        with pytest.raises(InputError, match="infos/texts is neither an array of numbers nor one text"):
            np.asarray(file["infos/texts"])


def test_texts_in_a_damaged_heap(tmp_path: Path) -> None:
    """Heaps are checked before HDF5 reads them, because it never returns from some damaged ones."""
    texts = {"metadata/name": "x-local", "metadata/b": ""}
    path = write(tmp_path / "a.hdf5", lambda file: file.update(texts))
    assert load_file(path).info["metadata"] == {"name": "x-local", "b": ""}
    whole = path.read_bytes()
    heap = whole.index(b"GCOL")
    with h5py.File(path) as file:
        reference = file["metadata/name"].id.get_offset()
    refused = 0
    for at in (*range(heap, heap + 48), *range(reference, reference + 16)):
        for value in (0, 1, 7, 0x7F, 0xFF):
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            try:
                load_file(path)
            except InputError as error:
                refused += 1
                assert str(error).startswith(f"{path} is not a whole HDF5 file (")
    assert refused > 50


def test_a_flag_is_zero_or_one(tmp_path: Path) -> None:
    """HDF5 returns bools with any byte, but masks require 0 or 1."""
    path = write(tmp_path / "a.hdf5")
    with h5py.File(path) as file:
        offset = file["terminals"].id.get_offset()
    content = bytearray(path.read_bytes())
    content[offset + 5] = 2
    path.write_bytes(content)
    with pytest.raises(InputError, match="terminals must be 0 or 1, got 2 at row 5"):
        load_file(path)


# --- files that are open elsewhere

# Opens a file in another process with the arguments given, says so, and waits for the end of its input.
HOLDER = """
import sys, h5py
file = h5py.File(sys.argv[1], sys.argv[2])
print("open", flush=True)
input()
"""


def load_while_open(path: Path, mode: str) -> None:
    """Load a file while another process has it open."""
    command = [sys.executable, "-c", HOLDER, str(path), mode]
    environment = {name: value for name, value in os.environ.items() if name != "HDF5_USE_FILE_LOCKING"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        try:
            assert holder.stdout.readline() == b"open\n"
            assert len(load_dataset(path)) > 0
        finally:
            holder.stdin.close()


@pytest.fixture
def locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HDF5_USE_FILE_LOCKING", raising=False)


@pytest.mark.usefixtures("locks")
def test_files_that_another_program_has_open(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5")
    load_while_open(path, "r")
    with pytest.raises(InputError, match=r"a\.hdf5 is open for writing in another program; close it there"):
        load_while_open(path, "r+")
    assert len(load_dataset(path)) > 0


@pytest.mark.usefixtures("locks")
@pytest.mark.parametrize("locking", [None, True, False, "best-effort"])
def test_files_that_this_process_has_open(tmp_path: Path, locking: Any) -> None:
    path = write(tmp_path / "a.hdf5")
    with h5py.File(path, "r", locking=locking):
        assert len(load_dataset(path)) > 0
    with h5py.File(path, "r+", locking=locking) as file:
        with pytest.raises(InputError, match=r"a\.hdf5 is open for writing in this process; close it"):
            load_dataset(path)
        # The user's own file stays open.
        assert file["rewards"].shape == (ROWS,)


@pytest.mark.usefixtures("locks")
def test_files_whose_writer_has_ended(tmp_path: Path) -> None:
    """Test that the mark of a file that its writer has never closed is told."""
    path = write(tmp_path / "a.hdf5", libver="latest")
    die = "import sys, os, h5py; file = h5py.File(sys.argv[1], 'r+', libver='latest'); os._exit(0)"
    subprocess.run([sys.executable, "-c", die, path], check=True)
    with pytest.raises(InputError, match=r"or one ended without closing it.*h5clear -s"):
        load_dataset(path)


@pytest.mark.usefixtures("locks")
def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = write(tmp_path / "a.hdf5"), h5py.File

    def open_without_locks(*arguments: Any, locking: Any, **options: Any) -> h5py.File:
        if locking is not False:
            raise OSError("unable to lock file, errno = 37, error message = 'No locks available'")
        return opened(*arguments, locking=locking, **options)

    monkeypatch.setattr(hdf5.h5py, "File", open_without_locks)
    assert len(load_dataset(path)) > 0


def test_other_files(tmp_path: Path) -> None:
    """Test that a file of another format is not called a damaged HDF5 file."""
    path = tmp_path / "table.data"
    path.write_text("observations,actions\n1,2\n")
    with pytest.raises(InputError, match=r"table\.data is no data set of a known format.* numpy\.savez"):
        load_dataset(path)
    # HDF5 may have any ending.
    write(tmp_path / "table.dat")
    assert len(load_dataset(tmp_path / "table.dat")) > 0
    # A name with an ending is a path, and not the name of an unknown data set.
    with pytest.raises(InputError, match=r"table\.md does not exist"):
        load_dataset("table.md")


def test_endings_in_capitals(tmp_path: Path) -> None:
    np.savez(tmp_path / "table.npz", **arrays())
    (tmp_path / "table.npz").rename(tmp_path / "TABLE.NPZ")
    assert len(load_dataset(tmp_path / "TABLE.NPZ")) > 0
