"""A shard as a file: HDF5 in D4RL's layout or Parquet, written whole or not at all, and read."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mopo_fast.atomic import atomic_path
from mopo_fast.config import Compression, ShardFormat
from mopo_fast.data.files import open_file
from mopo_fast.data.hdf5_writer import Pieces, hdf5_pieces, write_pieces, write_values
from mopo_fast.data.stored import Array, check_fits, is_kept
from mopo_fast.errors import InputError

COMPRESSIONS: dict[ShardFormat, tuple[Compression, ...]] = {
    "hdf5": ("none", "lzf", "gzip"),
    "parquet": ("none", "snappy", "zstd"),
}


def write_file(
    path: Path, arrays: dict[str, Array], metadata: dict[str, Any], compression: Compression
) -> tuple[int, str]:
    """Write a shard, .hdf5 or .parquet; its size in bytes and its SHA-256.

    Raises:
        InputError: it cannot be written.
    """
    if path.suffix == ".parquet":
        pieces = _to_parquet(arrays, metadata, compression)
    else:
        values = {f"metadata/{name}": value for name, value in metadata.items()}
        if compression == "none":
            pieces = hdf5_pieces(arrays | values)
        else:
            pieces = _to_hdf5(arrays, values, compression)
    with atomic_path(path) as temporary:
        write_pieces(temporary, pieces)
        return temporary.stat().st_size, file_sha256(temporary)


def file_sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_hdf5(arrays: dict[str, Array], values: dict[str, Any], compression: Compression) -> Pieces:
    # Made in memory, where HDF5 cannot meet a full disk.
    content = io.BytesIO()
    options: dict[str, Any] = {"compression": compression, "shuffle": True}
    with h5py.File(content, "w") as file:
        for name, array in arrays.items():
            # Of a whole number of rows, about a megabyte.
            rows = max(1, 2**20 // max(1, array[:1].nbytes))
            chunks = (min(rows, len(array)), *array.shape[1:])
            file.create_dataset(name, data=array, chunks=chunks, **options)
        write_values(file, values)
    return [(0, content.getbuffer())]


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
        arrays = {key: item for key, item in file.items() if "/" not in key and item.shape is not None}
        check_fits(path, sum(item.nbytes for item in arrays.values() if item.offset is None), "")
        values = {
            key.removeprefix("metadata/"): np.asarray(item).item()
            for key, item in file.items()
            if key.startswith("metadata/") and is_kept(item)
        }
        texts = {k: v.decode("utf-8", "replace") for k, v in values.items() if isinstance(v, bytes)}
        found = {k: np.asarray(v) if v.offset is None else v.map(path) for k, v in arrays.items()}
        return found, values | texts


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
