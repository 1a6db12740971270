"""A shard as a file: HDF5 in D4RL's layout or Parquet, written whole or not at all, and read."""

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mopo_fast.atomic import atomic_path
from mopo_fast.config import Compression, ShardFormat
from mopo_fast.data.files import Array, open_file
from mopo_fast.errors import InputError

COMPRESSIONS: dict[ShardFormat, tuple[Compression, ...]] = {
    "hdf5": ("none", "lzf", "gzip"),
    "parquet": ("none", "snappy", "zstd"),
}

# Bytes, and where in a file they go.
Pieces = list[tuple[int, Any]]


def write_file(
    path: Path, arrays: dict[str, Array], metadata: dict[str, Any], compression: Compression
) -> tuple[int, str]:
    """Write a shard, .hdf5 or .parquet; its size in bytes and its SHA-256.

    Raises:
        InputError: it cannot be written.
    """
    if path.suffix == ".parquet":
        pieces = _to_parquet(arrays, metadata, compression)
    elif compression == "none":
        pieces = _to_hdf5_in_place(arrays, metadata)
    else:
        pieces = _to_hdf5(arrays, metadata, compression)
    with atomic_path(path) as temporary, open(temporary, "r+b") as file:
        for offset, piece in pieces:
            file.seek(offset)
            file.write(memoryview(piece).cast("B"))
        file.flush()
        return temporary.stat().st_size, file_sha256(temporary)


def file_sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Frame(io.RawIOBase):
    """A file in memory for what HDF5 writes around its arrays, without the room that it leaves for them."""

    def __init__(self) -> None:
        self.pieces: Pieces = []
        self.position = self.size = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def write(self, piece: Any, /) -> int:
        self.pieces.append((self.position, bytes(piece)))
        self.position += len(piece)
        self.size = max(self.size, self.position)
        return len(piece)

    def truncate(self, size: int | None = None, /) -> int:
        self.size = self.position if size is None else size
        return self.size

    def readinto(self, buffer: Any, /) -> int:
        content = np.zeros(len(buffer), np.uint8)
        for offset, piece in self.pieces:
            first = max(offset, self.position)
            last = min(offset + len(piece), self.position + len(buffer))
            if first < last:
                part = np.frombuffer(piece, np.uint8)[first - offset : last - offset]
                content[first - self.position : last - self.position] = part
        memoryview(buffer)[:] = content.tobytes()
        return len(buffer)


def _to_hdf5_in_place(arrays: dict[str, Array], metadata: dict[str, Any]) -> Pieces:
    """The arrays themselves, not copied: HDF5 only says where they go, and what stands between them."""
    frame, pieces = _Frame(), []
    room = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    room.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    room.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    # Aligned, to be mapped into memory.
    with h5py.File(frame, "w", alignment_threshold=64, alignment_interval=64) as file:
        for name, array in arrays.items():
            made = file.create_dataset(name, array.shape, array.dtype, dcpl=room)
            if array.size:
                pieces.append((made.id.get_offset(), np.ascontiguousarray(array)))
        _write_metadata(file, metadata)
    return [*frame.pieces, *pieces]


def _to_hdf5(arrays: dict[str, Array], metadata: dict[str, Any], compression: Compression) -> Pieces:
    # Made in memory: on a full disk HDF5 itself prints a traceback for every array.
    content = io.BytesIO()
    options: dict[str, Any] = {"compression": compression, "shuffle": True}
    with h5py.File(content, "w") as file:
        for name, array in arrays.items():
            # Of a whole number of rows, about a megabyte.
            rows = max(1, 2**20 // max(1, array[:1].nbytes))
            chunks = (min(rows, len(array)), *array.shape[1:])
            file.create_dataset(name, data=array, chunks=chunks, **options)
        _write_metadata(file, metadata)
    return [(0, content.getbuffer())]


def _write_metadata(file: h5py.File, metadata: dict[str, Any]) -> None:
    for name, value in metadata.items():
        file[f"metadata/{name}"] = value


def _to_parquet(arrays: dict[str, Array], metadata: dict[str, Any], compression: Compression) -> Pieces:
    pyarrow = import_pyarrow()

    def column(array: Array) -> Any:
        values = pyarrow.array(np.ascontiguousarray(array).reshape(-1))
        return values if array.ndim == 1 else pyarrow.FixedSizeListArray.from_arrays(values, array.shape[1])

    table = pyarrow.table({name: column(array) for name, array in arrays.items()})
    table = table.replace_schema_metadata({"mopo_fast": json.dumps(metadata)})
    sink = pyarrow.BufferOutputStream()
    # No dictionaries: floats repeat too seldom.
    pyarrow.parquet.write_table(table, sink, compression=compression, use_dictionary=False)
    return [(0, sink.getvalue())]


def import_pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError("Parquet takes the extra mopo_fast[parquet]: pip install pyarrow") from None
    return pyarrow


def read_file(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """A shard's arrays, mapped into memory where it is uncompressed HDF5, and its metadata.

    Raises:
        InputError: it is missing or damaged.
    """
    if path.suffix == ".parquet":
        return _from_parquet(path)
    with open_file(path) as file:
        metadata = {key: item[()] for key, item in file["metadata"].items()}
        decoded = {k: v.decode() if isinstance(v, bytes) else v for k, v in metadata.items()}
        arrays: dict[str, Array] = {}
        for name, item in file.items():
            if name == "metadata":
                continue
            offset = item.id.get_offset()
            arrays[name] = (
                item[()] if offset is None else np.memmap(path, item.dtype, "r", offset, item.shape)
            )
        return arrays, decoded


def _from_parquet(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    pyarrow = import_pyarrow()
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        table = pyarrow.parquet.read_table(path).combine_chunks()
        arrays: dict[str, Array] = {}
        for name in table.column_names:
            values = table[name].chunk(0)
            if pyarrow.types.is_fixed_size_list(values.type):
                flat = values.flatten().to_numpy(zero_copy_only=False)
                arrays[name] = flat.reshape(-1, values.type.list_size)
            else:
                arrays[name] = values.to_numpy(zero_copy_only=False)
        return arrays, json.loads(table.schema.metadata[b"mopo_fast"])
    except (pyarrow.ArrowException, OSError, KeyError, TypeError, IndexError, ValueError) as error:
        raise InputError(f"{path} is not a whole Parquet file ({error}); get or make it again") from error
