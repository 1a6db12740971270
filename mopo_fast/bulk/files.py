"""Files of rollouts, written atomically: one file in D4RL's layout, or one shard of a plan.

A shard is an HDF5 file, also in D4RL's layout, or a Parquet file. Uncompressed HDF5 is memory-mapped when it
is read.
"""

import dataclasses
import hashlib
import io
import json
import os
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import xxhash

from mopo_fast.bulk.plan import SHARD_ARRAYS, Plan, ShardRecord, count_rows
from mopo_fast.config import Checksum, Compression
from mopo_fast.data.files import as_tensor, open_file
from mopo_fast.data.hdf5_writer import Pieces, hdf5_pieces, write_pieces, write_values
from mopo_fast.data.local import check_file
from mopo_fast.data.parquet import METADATA, import_pyarrow
from mopo_fast.data.stored import Array, check_fits, is_kept
from mopo_fast.data.transitions import ROLLOUT_ARRAYS, Transitions, array_layout
from mopo_fast.data.write import write_arrays
from mopo_fast.ensemble import MAX_MEMBERS
from mopo_fast.errors import InputError
from mopo_fast.utils.atomic import atomic_path, regular_file

# The algorithms of checksums.
_HASHES: dict[Checksum, Callable[[], Any]] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}
# Bytes hashed between two calls of `check`.
_BLOCK = 1 << 20
# Rows of a row group in Parquet.
_ROW_GROUP = 1 << 17


# --- a rollout's arrays, and a file of them


def d4rl_arrays(data: Transitions) -> dict[str, Array]:
    """Return a rollout's arrays by their names in a file: those of `Transitions`, and "timeouts".

    A time-out marks the last row of a rollout that did not end in a terminal state.

    Raises:
        InputError: the transitions have no rollout_index, so they are no model rollouts.
    """
    if data.rollout_index is None:
        raise InputError("only model rollouts can be saved: these transitions have no rollout_index")
    arrays = {name: array.cpu().numpy() for name, array in data.arrays().items()}
    last = np.append(np.diff(arrays["rollout_index"]) != 0, True)[: len(data)]
    arrays["timeouts"] = last & ~arrays["terminals"]
    return arrays


def as_transitions(arrays: dict[str, Array], name: str, info: dict[str, Any]) -> Transitions:
    """Return a shard's arrays as transitions that share their memory."""
    tensors: dict[str, Any] = {key: as_tensor(arrays[key]) for key in ROLLOUT_ARRAYS}
    return Transitions(**tensors, name=name, info=info)


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
        **{name: value for name, value in dataclasses.asdict(plan.rollout).items() if value is not None},
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


def read_shard(path: Path, plan: Plan, shard: int) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read a shard's arrays and metadata; check the arrays' names, types and shapes against the plan.

    Args:
        path: file of the shard.
        plan: plan of its folder.
        shard: number of the shard.

    Raises:
        InputError: the file is missing or damaged, or holds other arrays than the plan says.
    """
    regular_file(path)
    arrays, metadata = read_file(path)
    if arrays.keys() != set(SHARD_ARRAYS):
        names = ", ".join(sorted(arrays.keys() ^ set(SHARD_ARRAYS)))
        raise InputError(
            f"{path} must hold exactly the arrays of a rollout; missing or unknown: {reprlib.repr(names)}"
        )
    for name, array in arrays.items():
        # A row's size, 1 here, is not checked: the plan does not store obs_dim and act_dim.
        row, kind = array_layout(name, 1, 1)
        dtype = torch.empty(0, dtype=kind, device="cpu").numpy().dtype
        ndim, rows = 1 + len(row), plan.rows(shard)
        if array.dtype != dtype or array.ndim != ndim or len(array) != rows or 0 in array.shape:
            raise InputError(
                f"{path}: {name} must be {dtype} of {ndim} dimensions and {rows} rows,"
                f" got {array.dtype} {array.shape}"
            )
    if arrays["observations"].shape != arrays["next_observations"].shape:
        raise InputError(f"{path}: observations and next_observations have different shapes")
    return arrays, metadata


def check_values(path: Path, arrays: dict[str, Array], plan: Plan, shard: int) -> None:
    """Raise `InputError` if a shard's arrays hold a value that no rollout of the plan can have."""
    first = shard << 32
    ranges = {
        "step": (0, plan.rollout.horizon),
        "rollout_index": (first, first + 2**32),
        "members": (-1, MAX_MEMBERS),
        "penalties": (0, np.inf),
    }
    for name, (low, high) in ranges.items():
        if not (arrays[name].min() >= low and arrays[name].max() < high):
            raise InputError(f"{path}: {name} must be from {low} to below {high}")
    for name in ("terminals", "timeouts"):
        # The bytes of a file's bool may be neither 0 nor 1.
        if arrays[name].view(np.uint8).max() > 1:
            raise InputError(f"{path}: {name} holds bytes that are neither 0 nor 1")
    rows = as_transitions(arrays, str(path), {}).validate()
    if not np.array_equal(d4rl_arrays(rows)["timeouts"], arrays["timeouts"]):
        raise InputError(f"{path}: timeouts are not where rollouts end without a terminal")
    coef = plan.rollout.penalty_coef
    expected = arrays["raw_rewards"] - np.float32(coef) * arrays["penalties"]
    if not np.allclose(arrays["rewards"], expected, rtol=1e-4, atol=1e-4):
        raise InputError(f"{path}: rewards are not raw_rewards - {coef:g} * penalties")


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


def read_file(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read a shard's arrays and its metadata; arrays in uncompressed HDF5 are memory maps.

    Raises:
        InputError: the file is missing or damaged.
    """
    with open_file(path) as file:
        arrays = {key: item for key, item in file.items() if "/" not in key and item.shape is not None}
        check_fits(path, sum(item.nbytes for item in arrays.values() if item.offset is None), "")
        values = {
            key.removeprefix("metadata/"): np.asarray(item).item()
            for key, item in file.items()
            if key.startswith("metadata/") and item.shape == () and is_kept(item)
        }
        texts = {k: v.decode("utf-8", "replace") for k, v in values.items() if isinstance(v, bytes)}
        found = {k: np.asarray(v) if v.offset is None else v.map(path) for k, v in arrays.items()}
        return found, values | texts
