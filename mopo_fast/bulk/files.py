"""Files of rollouts, written atomically: one file in D4RL's layout, or one shard of a plan.

A shard is an HDF5 file, also in D4RL's layout, or a Parquet file. Uncompressed HDF5 is memory-mapped when it
is read.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from mopo_fast.config import Checksum, Compression
from mopo_fast.data.formats import check_file
from mopo_fast.data.hdf5_writer import Pieces, hdf5_pieces, write_pieces, write_values
from mopo_fast.data.manifest import Plan, ShardRecord, count_rows
from mopo_fast.data.parquet import METADATA, import_pyarrow
from mopo_fast.data.shards import d4rl_arrays
from mopo_fast.data.stored import Array
from mopo_fast.data.transitions import Transitions
from mopo_fast.data.write import write_arrays
from mopo_fast.utils.atomic import atomic_path

# The algorithms of checksums.
_HASHES: dict[Checksum, Callable[[], Any]] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}
# Bytes hashed between two calls of `check`.
_BLOCK = 1 << 20
# Rows of a row group in Parquet.
_ROW_GROUP = 1 << 17


# --- one file


def save_transitions(path: str | os.PathLike[str], data: Transitions, *, overwrite: bool = False) -> None:
    """Write a rollout's transitions to a file in D4RL's layout, atomically.

    The file holds the arrays of `d4rl_arrays`, and `data.info` as metadata/*.

    Args:
        path: file to write; its suffix is .hdf5, .h5 or .npz.
        data: transitions of model rollouts.
        overwrite: replace the file if it exists.

    Raises:
        InputError: the suffix is another, the file exists and `overwrite` is False, the transitions have no
            rollout_index, or the file cannot be written.
    """
    path = Path(path)
    check_file(path, overwrite)
    metadata = {f"metadata/{name}": value for name, value in data.info.items() if value is not None}
    write_arrays(path, d4rl_arrays(data) | metadata)


# --- one shard


def write_shard(
    folder: Path,
    plan: Plan,
    rows: Transitions,
    metadata: dict[str, Any],
    checksum: Checksum,
    check: Callable[[], None] = lambda: None,
) -> ShardRecord:
    """Write one shard atomically, and return its entry for the manifest.

    Args:
        folder: folder of the shards.
        plan: plan of the folder.
        rows: transitions of the shard, from `Generator.make_shard`.
        metadata: metadata of the shard, from `Generator.make_shard`.
        checksum: algorithm of the file's checksum.
        check: called every few megabytes. If it raises, the shard's temporary file is removed.

    Raises:
        InputError: the shard cannot be written.
    """
    arrays = d4rl_arrays(rows)
    described = {
        **metadata,
        **{name: value for name, value in plan.rollout.described().items() if value is not None},
        "dataset": plan.dataset,
        "mopo_fast": plan.mopo_fast,
    }
    path = folder / plan.file(metadata["shard"])
    size, found = write_file(path, arrays, described, plan.compression, checksum, check)
    return ShardRecord(
        file=path.name,
        bytes=size,
        checksum=found,
        starts=metadata["starts"],
        non_finite=metadata["non_finite"],
        **count_rows(arrays, plan.rollout.horizon),
    )


# --- its formats


def write_file(
    path: Path,
    arrays: dict[str, Array],
    metadata: dict[str, Any],
    compression: Compression,
    checksum: Checksum = "xxh3_128",
    check: Callable[[], None] = lambda: None,
) -> tuple[int, str]:
    """Write a shard's file atomically, and return its size in bytes and its checksum.

    The checksum of an HDF5 file is computed from memory, block by block, before each block is written.

    Args:
        path: file to write; its suffix is .hdf5 or .parquet.
        arrays: arrays of the shard.
        metadata: metadata of the shard.
        compression: compression, one of those for the file's format in `COMPRESSIONS`.
        checksum: algorithm of the checksum.
        check: called every few megabytes. If it raises, the temporary file is removed.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        if path.suffix == ".parquet":
            _write_parquet(temporary, arrays, metadata, compression, check)
            return temporary.stat().st_size, file_checksum(temporary, checksum, check)
        values = {f"metadata/{name}": value for name, value in metadata.items()}
        if compression == "none":
            pieces = hdf5_pieces(arrays | values)
        else:
            pieces = _to_hdf5(arrays, values, compression, check)
        digest = _HASHES[checksum]()
        write_pieces(temporary, pieces, check, digest.update)
        return temporary.stat().st_size, f"{checksum}:{digest.hexdigest()}"


def file_checksum(path: Path, checksum: Checksum, check: Callable[[], None] = lambda: None) -> str:
    """Return the checksum of a file as the manifest has it; for `check` see `write_file`."""
    digest, block = _HASHES[checksum](), memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            check()
            digest.update(block[:count])
    return f"{checksum}:{digest.hexdigest()}"


def _to_hdf5(
    arrays: dict[str, Array], values: dict[str, Any], compression: Compression, check: Callable[[], None]
) -> Pieces:
    # Compressed in memory, so that the HDF5 library never meets a full disk.
    content = io.BytesIO()
    options: dict[str, Any] = {"compression": compression, "shuffle": True}
    with h5py.File(content, "w") as file:
        for name, array in arrays.items():
            # Chunks of whole rows, about a megabyte each.
            rows = max(1, 2**20 // max(1, array[:1].nbytes))
            chunks = (min(rows, len(array)), *array.shape[1:])
            made = file.create_dataset(name, array.shape, array.dtype, chunks=chunks, **options)
            for first in range(0, len(array), rows):
                check()
                made[first : first + rows] = array[first : first + rows]
        write_values(file, values)
    return [(0, content.getbuffer())]


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
    table = table.replace_schema_metadata({METADATA: json.dumps(metadata)})
    # Without dictionary encoding, since floats seldom repeat.
    options = {"compression": compression, "use_dictionary": False}
    with pyarrow.parquet.ParquetWriter(path, table.schema, **options) as writer:
        for first in range(0, len(table), _ROW_GROUP):
            check()
            writer.write_table(table.slice(first, _ROW_GROUP))
