"""Arrays that are still in their file, and the one error for all damaged files."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mopo_fast.errors import InputError
from mopo_fast.utils.machine import available_memory, map_mode, size_text

Array = npt.NDArray[Any]

MAX_OBJECTS = 10_000
"""Most objects in one file; D4RL's files have about 50."""

SLACK = 1 << 20
"""Bytes that a file may declare beyond the ones it holds, for fill values and tiny archives."""

DEFLATE_RATIO = 1032
"""Most bytes that deflate (gzip, zip) makes of one byte; lzf makes fewer."""


@dataclass(frozen=True)
class Stored:
    """An object in a file, described without reading its values.

    Attributes:
        shape: shape of the array; None for other objects, such as groups.
        dtype: type of the elements, of kind "O" for texts of any length; None for other objects.
        load: function that reads the array.
        offset: position of an uncompressed array in the file, in bytes; None for other arrays.
    """

    shape: tuple[int, ...] | None
    dtype: np.dtype[Any] | None
    load: Callable[[], Array]
    offset: int | None = None

    @property
    def nbytes(self) -> int:
        """Size of the array in memory, in bytes."""
        return declared_bytes(self.shape, self.dtype)

    @property
    def kind(self) -> str:
        """NumPy's letter for the kind of the elements; "" for objects that are not arrays."""
        return "" if self.dtype is None else self.dtype.kind

    def map(self, path: Path) -> Array:
        """Map the array into memory. The file is read where the array is used.

        The array must have an offset. Changes to it stay in this process, see `map_mode`.
        """
        # numpy's type stubs do not accept these arguments.
        memmap: Any = np.memmap
        mapped: Array
        try:
            mapped = memmap(path, self.dtype, map_mode(), self.offset, self.shape)
        except OSError:
            # Linux refuses a private mapping of a file that is larger than its memory.
            mapped = memmap(path, self.dtype, "r", self.offset, self.shape)
        return mapped

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self.load(), dtype)


def declared_bytes(shape: tuple[int, ...] | None, dtype: np.dtype[Any] | None) -> int:
    """Return the size of an array in memory, in bytes. Python integers do not overflow as NumPy's do."""
    if shape is None or dtype is None:
        return 0
    size = dtype.itemsize
    for length in shape:
        size *= length
    return size


def is_kept(item: Stored) -> bool:
    """Tell whether `item` holds numbers or one text, the only objects that `convert` copies."""
    return item.kind in tuple("fiub") or (item.shape == () and item.kind in tuple("SUO"))


def read_all(path: Path, file: Mapping[str, Any]) -> dict[str, Array]:
    """Read all arrays of numbers and all single texts of an open file."""
    kept = {key: item for key, item in file.items() if not isinstance(item, Stored) or is_kept(item)}
    check_fits(path, sum(item.nbytes for item in kept.values()), "")
    return {key: np.asarray(item) for key, item in kept.items()}


def check_fits(source: object, size: int, otherwise: str) -> None:
    """Raise `InputError` where an array or file is larger than the available memory.

    Args:
        source: name of the data, for the error.
        size: size in memory, in bytes.
        otherwise: advice at the end of the error, or "".
    """
    available = available_memory()
    if size > available:
        raise InputError(
            f"{source} does not fit into memory: it takes {size_text(size)}, and"
            f" {size_text(available)} are available{otherwise and '; ' + otherwise}"
        )


@contextlib.contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn every exception raised while a file is read into one `InputError` that names it."""
    try:
        yield
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{path} does not fit into memory ({error})") from error
    # Libraries raise a different exception for each kind of damage.
    except Exception as error:
        raise InputError(f"{path} is not a whole {kind} file ({error}); download or make it again") from error
