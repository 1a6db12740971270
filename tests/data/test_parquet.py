"""Test Parquet files as data sets: from other libraries, of other types, and damaged."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch

from mopo_fast import InputError, load_dataset
from mopo_fast.data.convert import convert
from mopo_fast.data.parquet import open_parquet

ROWS = 12


def arrays() -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        "observations": random.normal(size=(ROWS, 3)).astype(np.float32),
        "actions": random.uniform(-1, 1, (ROWS, 2)).astype(np.float32),
        "rewards": random.normal(size=ROWS).astype(np.float32),
        "next_observations": random.normal(size=(ROWS, 3)).astype(np.float32),
        "terminals": np.arange(ROWS) == 5,
        "timeouts": np.arange(ROWS) == ROWS - 1,
    }


def write_pyarrow(path: Path) -> None:
    def column(array: Any) -> Any:
        flat = pyarrow.array(array.reshape(-1))
        return flat if array.ndim == 1 else pyarrow.FixedSizeListArray.from_arrays(flat, array.shape[1])

    table = pyarrow.table({name: column(array) for name, array in arrays().items()})
    pyarrow.parquet.write_table(table, path, row_group_size=5)


def write_lists(path: Path) -> None:
    """Write what pandas and DuckDB do: lists of float64, and a column of another type."""
    columns = {name: pyarrow.array(array.tolist()) for name, array in arrays().items()}
    pyarrow.parquet.write_table(pyarrow.table({**columns, "note": ["x"] * ROWS}), path)


def write_pandas(path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame({name: list(array) for name, array in arrays().items()}).to_parquet(path)


def write_polars(path: Path) -> None:
    polars = pytest.importorskip("polars")
    polars.DataFrame(arrays()).write_parquet(path)


def write_duckdb(path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    write_pyarrow(path.with_name("source.parquet"))
    duckdb.sql(f"copy (from '{path.with_name('source.parquet')}') to '{path}'")


@pytest.mark.parametrize("write", [write_pyarrow, write_lists, write_pandas, write_polars, write_duckdb])
def test_a_parquet_file_is_a_data_set(write: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.parquet"
    write(path)
    data, expected = load_dataset(str(path)), arrays()
    assert (data.name, len(data)) == ("mine", ROWS)
    for name, array in data.arrays().items():
        assert torch.equal(array, torch.from_numpy(expected[name])), name


def test_parquet_is_converted(tmp_path: Path) -> None:
    write_pyarrow(tmp_path / "mine.parquet")
    assert convert(str(tmp_path / "mine.parquet"), str(tmp_path / "mine.hdf5")) == ROWS
    mapped = load_dataset(tmp_path / "mine.hdf5", memory_map=True)
    assert torch.equal(mapped.observations, torch.from_numpy(arrays()["observations"]))


def test_parquet_is_not_mapped(tmp_path: Path) -> None:
    write_pyarrow(tmp_path / "mine.parquet")
    with pytest.raises(InputError, match="cannot be mapped into memory"):
        load_dataset(tmp_path / "mine.parquet", memory_map=True)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([[1.0, 2.0]] * (ROWS - 1) + [[1.0]], "actions has lists of different lengths"),
        ([[1.0, 2.0]] * (ROWS - 1) + [None], "actions has null values"),
        ([[1.0, 2.0]] * (ROWS - 1) + [[1.0, None]], "actions has null values"),
        ([[[1.0]]] * ROWS, "actions is not an array"),
        (["x"] * ROWS, "actions is not an array"),
        ([{"a": 1}] * ROWS, "actions is not an array"),
        ([[]] * ROWS, r"actions must be \[n, dim\], got shape \(12, 0\)|actions is not an array"),
        (
            [1.0] * ROWS,
            r"must be \[n, dim\], got shape \(12,\); in a Parquet file it is one column, with a list",
        ),
        ([[1.0, float("nan")]] * ROWS, "actions is not a finite float32 number at row 0"),
    ],
)
def test_columns_of_other_types_are_refused(tmp_path: Path, column: Any, message: str) -> None:
    path = tmp_path / "mine.parquet"
    columns = {name: pyarrow.array(array.tolist()) for name, array in arrays().items()}
    pyarrow.parquet.write_table(pyarrow.table(columns | {"actions": pyarrow.array(column)}), path)
    with pytest.raises(InputError, match=message):
        load_dataset(path)


def test_a_damaged_file_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "mine.parquet"
    write_pyarrow(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:100], b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"mine\.parquet is not a whole Parquet file"):
            load_dataset(path)


def test_columns_are_described_before_they_are_read(tmp_path: Path) -> None:
    write_lists(tmp_path / "mine.parquet")
    with open_parquet(tmp_path / "mine.parquet") as file:
        assert {name: item.shape for name, item in file.items()} == {
            **{name: array.shape for name, array in arrays().items()},
            "note": None,
        }
