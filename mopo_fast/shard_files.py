"""A shard as a file: HDF5 in D4RL's layout or Parquet, written whole or not at all, and read."""

import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mopo_fast.atomic import atomic_path
from mopo_fast.config import Compression, ShardFormat
from mopo_fast.data.files import Array, open_file
from mopo_fast.errors import InputError
from mopo_fast.machine import check_memory

COMPRESSIONS: dict[ShardFormat, tuple[Compression, ...]] = {
    "hdf5": ("none", "lzf", "gzip"),
    "parquet": ("none", "snappy", "zstd"),
}

# Bytes, and where in a file they go.
Pieces = list[tuple[int, Any]]
# Bytes that are written or hashed between two calls of `check`.
_BLOCK = 4 << 20
# Rows of a row group in Parquet, and the most columns that are read.
_ROW_GROUP = 1 << 17
_MOST_COLUMNS = 64
# The types of columns that are read, and of their lists' items.
_ITEM_BYTES = {"bool": 1, "int32": 4, "int64": 8, "float": 4, "double": 8}


def write_file(
    path: Path,
    arrays: dict[str, Array],
    metadata: dict[str, Any],
    compression: Compression,
    check: Callable[[], None] = lambda: None,
) -> tuple[int, str]:
    """Write a shard, .hdf5 or .parquet; return its size in bytes and its SHA-256.

    Args:
        check: called every few megabytes; what it raises abandons the file, of which nothing is left.

    Raises:
        InputError: it cannot be written.
    """
    with atomic_path(path) as temporary:
        if path.suffix == ".parquet":
            _write_parquet(temporary, arrays, metadata, compression, check)
        else:
            _write_hdf5(temporary, arrays, metadata, compression, check)
        return temporary.stat().st_size, file_sha256(temporary, check)


def file_sha256(path: Path, check: Callable[[], None] = lambda: None) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal; `check` as in `write_file`."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            check()
            digest.update(block)
    return digest.hexdigest()


def _write_hdf5(
    path: Path,
    arrays: dict[str, Array],
    metadata: dict[str, Any],
    compression: Compression,
    check: Callable[[], None],
) -> None:
    if compression == "none":
        pieces = _to_hdf5_in_place(arrays, metadata)
    else:
        pieces = _to_hdf5(arrays, metadata, compression, check)
    with open(path, "r+b") as file:
        for offset, piece in pieces:
            file.seek(offset)
            content = memoryview(piece).cast("B")
            for first in range(0, len(content), _BLOCK):
                check()
                file.write(content[first : first + _BLOCK])


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


def _to_hdf5(
    arrays: dict[str, Array], metadata: dict[str, Any], compression: Compression, check: Callable[[], None]
) -> Pieces:
    # Made in memory: on a full disk HDF5 itself prints a traceback for every array.
    content = io.BytesIO()
    options: dict[str, Any] = {"compression": compression, "shuffle": True}
    with h5py.File(content, "w") as file:
        for name, array in arrays.items():
            # Of a whole number of rows, about a megabyte.
            rows = max(1, 2**20 // max(1, array[:1].nbytes))
            chunks = (min(rows, len(array)), *array.shape[1:])
            made = file.create_dataset(name, array.shape, array.dtype, chunks=chunks, **options)
            for first in range(0, len(array), rows):
                check()
                made[first : first + rows] = array[first : first + rows]
        _write_metadata(file, metadata)
    return [(0, content.getbuffer())]


def _write_metadata(file: h5py.File, metadata: dict[str, Any]) -> None:
    for name, value in metadata.items():
        file[f"metadata/{name}"] = value


def _write_parquet(
    path: Path,
    arrays: dict[str, Array],
    metadata: dict[str, Any],
    compression: Compression,
    check: Callable[[], None],
) -> None:
    pyarrow = import_pyarrow()

    def column(array: Array) -> Any:
        values = pyarrow.array(np.ascontiguousarray(array).reshape(-1))
        return values if array.ndim == 1 else pyarrow.FixedSizeListArray.from_arrays(values, array.shape[1])

    table = pyarrow.table({name: column(array) for name, array in arrays.items()})
    table = table.replace_schema_metadata({"mopo_fast": json.dumps(metadata)})
    # No dictionaries: floats repeat too seldom.
    options = {"compression": compression, "use_dictionary": False}
    with pyarrow.parquet.ParquetWriter(path, table.schema, **options) as writer:
        for first in range(0, len(table), _ROW_GROUP):
            check()
            writer.write_table(table.slice(first, _ROW_GROUP))


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
        scalars = file["metadata"]
        if not isinstance(scalars, h5py.Group):
            raise ValueError("metadata is no group")
        metadata = {key: _dataset(item)[()] for key, item in scalars.items()}
        decoded = {k: v.decode() if isinstance(v, bytes) else v for k, v in metadata.items()}
        arrays: dict[str, Array] = {}
        for name, item in file.items():
            if name == "metadata":
                continue
            offset = _dataset(item).id.get_offset()
            arrays[name] = (
                item[()] if offset is None else np.memmap(path, item.dtype, "r", offset, item.shape)
            )
        return arrays, decoded


def _dataset(item: Any) -> h5py.Dataset:
    if not isinstance(item, h5py.Dataset):
        raise ValueError("it holds something that is no array")
    return item


def _from_parquet(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    pyarrow = import_pyarrow()
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_parquet(path, file)
            table = file.read()
        metadata = json.loads(table.schema.metadata[b"mopo_fast"])
        if not isinstance(metadata, dict):
            raise ValueError("its metadata are no dictionary")
        return {name: _from_column(name, table[name]) for name in table.column_names}, metadata
    except InputError:
        raise
    # pyarrow raises what is its own, and what Python has for the same.
    except (
        pyarrow.ArrowException,
        OSError,
        LookupError,
        TypeError,
        ValueError,
        RecursionError,
        MemoryError,
    ) as error:
        raise InputError(f"{path} is not a whole Parquet file ({error}); get or make it again") from error


def _check_parquet(path: Path, file: Any) -> None:
    """Raise where the footer of a Parquet file announces no flat arrays, or more than the memory holds."""
    schema, footer = file.schema_arrow, file.metadata
    if len(schema.names) > _MOST_COLUMNS or len(set(schema.names)) < len(schema.names):
        raise ValueError(f"it has {len(schema.names)} columns, some of them of one name, or too many")
    width = 0
    for field in schema:
        size = _list_size(field.type)
        item = str(field.type.value_type if size else field.type)
        if item not in _ITEM_BYTES:
            raise ValueError(f"{field.name} is of type {str(field.type)[:80]}")
        width += max(1, size) * _ITEM_BYTES[item]
    stored = sum(max(0, footer.row_group(group).total_byte_size) for group in range(footer.num_row_groups))
    check_memory(f"{path} with {footer.num_rows} rows", stored + footer.num_rows * width, "cpu", "shard_rows")


def _list_size(kind: Any) -> int:
    """The length of lists of a fixed size; 0 for another type."""
    import pyarrow

    return int(kind.list_size) if pyarrow.types.is_fixed_size_list(kind) else 0


def _from_column(name: str, column: Any) -> Array:
    values = column.combine_chunks()
    size = _list_size(values.type)
    flat = values.values[values.offset * size : (values.offset + len(values)) * size] if size else values
    if values.null_count or flat.null_count:
        raise ValueError(f"{name} has empty places")
    array: Array = flat.to_numpy(zero_copy_only=False)
    return array.reshape(-1, size) if size else array
