"""Test npz archives with false declarations and with content that is no numeric array."""

import io
import struct
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_arrays import ROWS, arrays

from mopo_fast import InputError
from mopo_fast.cli import main
from mopo_fast.compat import torch_files
from mopo_fast.data import load_file
from mopo_fast.data.npz import open_npz


def npy(array: Any) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def header(text: str, content: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(text))
    return b"\x93NUMPY" + version + length + text.encode("latin1") + content


def described(shape: str, descr: str = "'<f4'", order: str = "False", **more: Any) -> bytes:
    return header(f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}\n", **more)


def write(path: Path, rewards: bytes, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for key, array in arrays().items():
            archive.writestr(f"{key}.npy", rewards if key == "rewards" else npy(array))
    return path


FOUR = bytes(4 * ROWS)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (described("(2**62, 2**62)"), "rewards|Cannot parse|literal|malformed"),
        (described("(4611686018427387904, 4611686018427387904)"), r"do not fit its shape"),
        (described("(10000000000,)"), r"rewards has \d+ bytes, .* shape \(10000000000,\) of float32"),
        (described("(20,)", content=FOUR[1:]), "do not fit its shape"),
        (described("(20,)", content=FOUR + b"1"), "do not fit its shape"),
        (described("(-20,)", content=FOUR), r"rewards has the shape \(-20,\)"),
        (described("(-4, -5)", content=FOUR), r"rewards has the shape \(-4, -5\)"),
        (described("(20.0,)", content=FOUR), "shape"),
        (described("20", content=FOUR), "shape"),
        (described("(20,)", descr="'O'", content=FOUR), "rewards holds object"),
        (described("(20,)", descr="'|O8'", content=FOUR), "rewards holds object"),
        (described("(20,)", descr="[('a', '<f4')]", content=FOUR), "rewards holds"),
        (described("(20,)", descr="[('a', 'O')]", content=FOUR), "rewards holds"),
        (described("(20,)", descr="'nothing'", content=FOUR), "descr"),
        (described("(20,)", descr="'V2147483647'"), "do not fit its shape"),
        (described("(20,)", order="1", content=FOUR), "fortran"),
        (header("{'descr': '<f4'}"), "[Hh]eader"),
        (header("{" * 3000), "header|EOF"),
        (header("(" * 9000), "header|EOF"),
        (header(" " * 60_000), "[Hh]eader"),
        (described("(20,)", content=FOUR, version=b"\x03\x00"), r"version \(3, 0\) of the npy format"),
        (described("(20,)", content=FOUR, version=b"\x09\x09"), r"version \(9, 9\)"),
        (b"\x93NUMPY\x01", "EOF|data"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", "EOF|data|large"),
    ],
)  # fmt: skip
def test_headers(rewards: bytes, message: str, tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = write(tmp_path / "a.npz", rewards, method)
        with pytest.raises(InputError, match=rf"a\.npz is not a whole npz file \((?s:.*)({message})"):
            load_file(path)
    assert main(["convert", str(path), str(tmp_path / "new" / "b.hdf5")]) == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "rewards",
    [
        npy(np.asfortranarray(np.arange(ROWS, dtype=np.float64)[:, None])),
        npy(np.arange(ROWS, dtype=">f8")),
        npy(np.arange(ROWS, dtype=np.float16)),
        npy(np.arange(ROWS, dtype=np.longdouble)),
        npy(np.arange(ROWS, dtype=">i2")),
        npy(np.arange(ROWS, dtype=np.uint64)),
        described("(20,)", descr="'|i1'", content=bytes(range(ROWS)), version=b"\x02\x00"),
    ],
)  # fmt: skip
def test_numbers_of_any_kind(rewards: bytes, tmp_path: Path) -> None:
    data = load_file(write(tmp_path / "a.npz", rewards))
    assert data.rewards.tolist() == list(range(ROWS))


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (npy(np.full(ROWS, "a")), "rewards must be numbers, got <U1"),
        (npy(np.full(ROWS, b"a")), r"rewards must be numbers, got \|S1"),
        (npy(np.zeros(ROWS, complex)), "rewards must be numbers, got complex128"),
        (npy(np.zeros(ROWS, "M8[s]")), r"rewards must be numbers, got datetime64\[s\]"),
        (npy(np.zeros(ROWS, "V4")), r"rewards must be numbers, got \|V4"),
        (npy(np.float32(3)), r"rewards must be \[n\], got shape \(\)"),
        (npy(np.zeros(0)), "rewards has 0 rows"),
        (npy(np.array([0, np.nan] * 10)), "rewards is not a finite"),
        (npy(np.full(ROWS, 1e300, np.longdouble)), "rewards is not a finite float32 number at row 0"),
        (b"no array", "rewards is not an array"),
    ],
)
def test_arrays_that_do_not_fit(rewards: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_file(write(tmp_path / "a.npz", rewards))


def test_flags(tmp_path: Path) -> None:
    for terminals, message in (
        (np.full(ROWS, np.nan), "terminals must be 0 or 1, got nan at row 0"),
        (np.full(ROWS, 2, np.uint8).view(bool), "terminals must be 0 or 1, got 2 at row 0"),
        (np.full(ROWS, 256), "terminals must be 0 or 1, got 256 at row 0"),
        (np.full(ROWS, -1, np.int8), "terminals must be 0 or 1, got -1 at row 0"),
    ):
        np.savez(tmp_path / "a.npz", **{**arrays(), "terminals": terminals})
        with pytest.raises(InputError, match=message):
            load_file(tmp_path / "a.npz")


def archive_of(path: Path, names: list[str], content: bytes, method: int = zipfile.ZIP_STORED) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as archive:
        # zipfile warns about duplicate names.
        warnings.simplefilter("ignore", UserWarning)
        for name in names:
            archive.writestr(name, content)
    return path


def test_archives(tmp_path: Path) -> None:
    one = npy(np.zeros(3))
    for path, message in (
        (archive_of(tmp_path / "a.npz", ["rewards.npy"] * 2, one), "rewards occurs twice"),
        (archive_of(tmp_path / "b.npz", ["rewards.npy", "rewards"], one), "rewards occurs twice"),
        (archive_of(tmp_path / "c.npz", list(map(str, range(10_001))), b""), "more than 10,000 members"),
        (archive_of(tmp_path / "e.npz", ["\x1b[2J.npy"], one), r"'\\x1b\[2J' is not a valid name"),
        (archive_of(tmp_path / "d.npz", ["a.npy"], one, zipfile.ZIP_BZIP2), "another method than deflate"),
    ):
        with pytest.raises(InputError, match=rf"npz file \(.*{message}"):
            load_file(path)


def test_a_directory_is_measured_before_it_is_read(tmp_path: Path) -> None:
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, *[0] * 8, 1, *[0] * 6) + b"a"
    count = (1 << 24) // len(entry) + 1
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, count * len(entry), 0, 0)
    for name in ("a.npz", "a.pt"):
        # torch recognises its files by these first bytes.
        (tmp_path / name).write_bytes(b"PK\3\4" + entry * count + end)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"its zip directory has 16,777,\d+ bytes, more than 16,777,216"):
        load_file(tmp_path / "a.npz")
    with pytest.raises(InputError, match=r"its zip directory has 16,777,\d+ bytes, more than 16,777,216"):
        torch_files.load(tmp_path / "a.pt")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def patch_directory(path: Path, change: dict[int, bytes]) -> None:
    """Change bytes of the first entry in an archive's directory, given by their offsets in the entry."""
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    for offset, piece in change.items():
        content[entry + offset : entry + offset + len(piece)] = piece
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({8: b"\x01\x00"}, "is encrypted"),
        ({10: b"\x63\x00"}, "another method than deflate"),
        ({20: b"\xff\xff\xff\x0f"}, "stored in more bytes than the file"),
        ({24: b"\xff\xff\xff\x7f"}, "declares 2,147,483,647 bytes, more than its stored bytes can hold"),
        ({24: b"\x00\x00\x00\x00"}, ""),
        ({16: b"\x00\x00\x00\x00"}, "CRC"),
        ({42: b"\xff\xff\x00\x00"}, ""),
    ],
)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_directories(change: dict[int, bytes], message: str, method: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", npy(np.zeros(ROWS)), method)
    patch_directory(path, change)
    with pytest.raises(InputError, match=rf"a\.npz is not a whole npz file \((?s:.*){message}"):
        load_file(path)


def test_a_bomb(tmp_path: Path) -> None:
    """A large compressed array is not decompressed until it is read, and then it must fit into memory."""
    shape = (10**7,)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("infos/a.npy", "w", force_zip64=True) as member:
            member.write(described(str(shape)))
            for _ in range(4):
                member.write(bytes(10**7))
        for key, array in arrays().items():
            archive.writestr(f"{key}.npy", npy(array))
    assert (tmp_path / "a.npz").stat().st_size < 10**6
    with open_npz(tmp_path / "a.npz") as file:
        assert file["infos/a"].shape == shape
    assert len(load_file(tmp_path / "a.npz")) == ROWS


def test_converting_more_than_the_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "a.npz", **arrays(), large=np.zeros(10**6))
    monkeypatch.setattr("mopo_fast.data.stored.available_memory", lambda: 8 * 10**6)
    assert main(["convert", str(tmp_path / "a.npz"), str(tmp_path / "new" / "b.hdf5")]) == 2
    assert not (tmp_path / "new").exists()


def test_texts_go_along(tmp_path: Path) -> None:
    texts = {"metadata/name": "µ-local", "metadata/algorithm": np.bytes_("SAC"), "infos/texts": ["a", "b"]}
    np.savez(tmp_path / "a.npz", **arrays(), **texts)
    assert main(["convert", str(tmp_path / "a.npz"), str(tmp_path / "b.hdf5")]) == 0
    assert load_file(tmp_path / "b.hdf5").info["metadata"] == {"name": "µ-local", "algorithm": "SAC"}
