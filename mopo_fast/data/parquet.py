"""Read Parquet files as arrays: columns of numbers, and of lists of numbers that all have one length."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mopo_fast.data.stored import MAX_OBJECTS, Array, Stored, check_fits, declared_bytes, reading
from mopo_fast.errors import InputError

# Key of the file's metadata that holds those of a shard, as JSON.
METADATA = "mopo_fast"


def import_pyarrow() -> Any:
    """Import pyarrow with its Parquet module.

    Raises:
        InputError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            "Parquet files need pyarrow; install it with `pip install '.[parquet]'` in the checkout"
        ) from None
    return pyarrow


@contextlib.contextmanager
def open_parquet(path: Path) -> Iterator[dict[str, Stored]]:
    """Open and check a Parquet file, as a mapping from columns to unread arrays.

    A column of lists is an array of two dimensions. Columns of other types are in the mapping without a
    shape. A shard's metadata are in it under metadata/NAME.

    Raises:
        InputError: pyarrow is not installed; the file is damaged, or has two columns of one name, or more
            data than fit into memory.
    """
    pyarrow = import_pyarrow()
    with contextlib.ExitStack() as stack:
        with reading(path, "Parquet"):
            file = stack.enter_context(pyarrow.parquet.ParquetFile(path))
            found = _walk(path, file)
        yield found


def _walk(path: Path, file: Any) -> dict[str, Stored]:
    schema, footer = file.schema_arrow, file.metadata
    if len(schema.names) > MAX_OBJECTS or len(set(schema.names)) < len(schema.names):
        raise ValueError(f"it has {len(schema.names)} columns: too many, or two of one name")
    encoded = sum(max(0, footer.row_group(group).total_byte_size) for group in range(footer.num_row_groups))
    check_fits(path, encoded, "")
    found = {field.name: _column(path, file, field, footer.num_rows) for field in schema}
    for name, value in json.loads((schema.metadata or {}).get(METADATA.encode(), b"{}")).items():
        if isinstance(value, (str, int, float)):
            found[f"metadata/{name}"] = _constant(np.asarray(value))
    check_fits(path, encoded + sum(array.nbytes for array in found.values()), "")
    return found


def _constant(value: Array) -> Stored:
    return Stored(value.shape, value.dtype, lambda: value)


def _column(path: Path, file: Any, field: Any, rows: int) -> Stored:
    import pyarrow

    types, kind = pyarrow.types, field.type
    is_fixed = types.is_fixed_size_list(kind)
    is_list = is_fixed or types.is_list(kind) or types.is_large_list(kind)
    item = kind.value_type if is_list else kind
    number = types.is_boolean(item) or types.is_integer(item) or types.is_floating(item)
    if not number or rows < 0 or (is_list and not rows and not is_fixed):
        return Stored(None, None, _no_array)
    shape: tuple[int, ...] = (rows,)
    if is_list:
        shape = rows, int(kind.list_size) if is_fixed else _first_length(file, field.name)
    dtype = np.dtype(item.to_pandas_dtype())

    def load() -> Array:
        with reading(path, "Parquet"):
            values = file.read(columns=[field.name])[field.name].combine_chunks()
            return _as_array(field.name, values, shape)

    # The size of one row bounds what `declared_bytes` multiplies.
    if declared_bytes(shape[1:], dtype) > 1 << 40:
        raise ValueError(f"{field.name} has lists of {shape[1]:,} numbers")
    return Stored(shape, dtype, load)


def _no_array() -> Array:
    raise ValueError("a column that holds neither numbers nor lists of numbers")


def _first_length(file: Any, name: str) -> int:
    first = next(file.iter_batches(batch_size=1, columns=[name])).column(0)
    return len(first[0].as_py() or ())


def _as_array(name: str, values: Any, shape: tuple[int, ...]) -> Array:
    """Return a column's values as an array of the shape.

    Raises:
        ValueError: a value is null, or a list has another length.
    """
    flat = values if len(shape) == 1 else values.flatten()
    if values.null_count or flat.null_count:
        raise ValueError(f"{name} has null values")
    if len(shape) == 2:
        import pyarrow.compute

        lengths = pyarrow.compute.list_value_length(values)
        if len(values) and pyarrow.compute.min_max(lengths).as_py() != {"min": shape[1], "max": shape[1]}:
            raise ValueError(f"{name} has lists of different lengths")
    array: Array = flat.to_numpy(zero_copy_only=False)
    return array.reshape(shape)
