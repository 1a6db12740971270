"""Arrays that are still in their file, and the one error for every way in which a file can be damaged."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mopo_fast.errors import InputError
from mopo_fast.utils.machine import available_memory, map_mode

Array = npt.NDArray[Any]

MOST_ARRAYS = 10_000
"""Objects of one file; D4RL's have about 50."""

SLACK = 1 << 20
"""Bytes that a file may declare without holding them: fill values, and archives of next to nothing."""

DEFLATE_RATIO = 1032
"""The most that deflate (gzip, zip) expands a byte; lzf expands less."""


@dataclass(frozen=True)
class Stored:
    """An array in a file, described without being read.

    Attributes:
        shape: None for what is no array, such as a group.
        dtype: None likewise; of kind "O" for texts of any length.
        load: reads it.
        offset: where an uncompressed array begins in the file, in bytes; None for any other.
    """

    shape: tuple[int, ...] | None
    dtype: np.dtype[Any] | None
    load: Callable[[], Array]
    offset: int | None = None

    @property
    def nbytes(self) -> int:
        return declared_bytes(self.shape, self.dtype)

    @property
    def kind(self) -> str:
        """NumPy's letter for the kind of element; "" for what is no array."""
        return "" if self.dtype is None else self.dtype.kind

    def map(self, path: Path) -> Array:
        """The array in the file itself, which is read where it is used; it must have an offset.

        What is written to it stays in this process, see `map_mode`.
        """
        # Its types refuse what a described array has.
        memmap: Any = np.memmap
        mapped: Array
        try:
            mapped = memmap(path, self.dtype, map_mode(), self.offset, self.shape)
        except OSError:
            # Linux promises nobody a copy of a file that is larger than all its memory.
            mapped = memmap(path, self.dtype, "r", self.offset, self.shape)
        return mapped

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self.load(), dtype)


def declared_bytes(shape: tuple[int, ...] | None, dtype: np.dtype[Any] | None) -> int:
    """The size in memory, without the overflow of NumPy's integers."""
    if shape is None or dtype is None:
        return 0
    size = dtype.itemsize
    for length in shape:
        size *= length
    return size


def is_kept(item: Stored) -> bool:
    """Tell whether `item` holds numbers or one text, which is all that one format takes from another."""
    return item.kind in tuple("fiub") or (item.shape == () and item.kind in tuple("SUO"))


def read_all(path: Path, file: Mapping[str, Any]) -> dict[str, Array]:
    """Every array of numbers and every single text of an open file."""
    kept = {key: item for key, item in file.items() if not isinstance(item, Stored) or is_kept(item)}
    check_fits(path, sum(item.nbytes for item in kept.values()), "")
    return {key: np.asarray(item) for key, item in kept.items()}


def check_fits(source: object, size: int, otherwise: str) -> None:
    """Raise `InputError` where `size` bytes of `source` are more than the memory that is available."""
    available = available_memory()
    if size > available:
        raise InputError(
            f"{source} does not fit into memory: it takes {size / 2**30:,.1f} GiB,"
            f" {available / 2**30:,.1f} GiB are available{otherwise and '; ' + otherwise}"
        )


@contextlib.contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever reading a file of some kind raises into one `InputError`."""
    try:
        yield
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{path} does not fit into memory ({error})") from error
    # Libraries raise something else for each kind of damage.
    except Exception as error:
        raise InputError(f"{path} is not a whole {kind} file ({error}); get or make it again") from error
