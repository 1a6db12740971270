"""Write HDF5 files without letting the HDF5 library write to the disk.

On a full disk the library crashes, or reports an error for every array. Here it writes its metadata into
memory only. Then disk space for the whole file is reserved, and the arrays are written straight from their
memory to the positions that the library assigned. Each array lies in one piece, uncompressed, and aligned to
be mapped into memory.
"""

import contextlib
import errno
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from mopo_fast.utils.atomic import atomic_path

Array = npt.NDArray[Any]

Pieces = list[tuple[int, Any]]
"""Positions in a file, in bytes, each with the contents to write there."""

_ALIGNMENT = 64
# Number of bytes written between two calls of `check`: few enough to be hashed and copied from the cache.
_BLOCK = 1 << 20


class Output(io.RawIOBase):
    """Fills an existing file. `write_at` writes all bytes, or raises an `OSError`.

    Used as a stream it never raises, because np.savez does not survive an error while it writes. Call `check`
    at the end, which raises the first error.
    """

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDWR)
        self._position = self._end = 0
        self._error: OSError | None = None

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            os.close(self._handle)
        super().close()

    def reserve(self, size: int) -> None:
        """Make the file `size` bytes long, and reserve disk space for it."""
        try:
            os.posix_fallocate(self._handle, 0, max(1, size))
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        # If the file system cannot reserve space, a full disk is noticed when the data are written.
        os.truncate(self._handle, size)

    def write_at(self, offset: int, piece: Any) -> None:
        """Write all bytes of an array or a buffer at the position `offset`."""
        rest = memoryview(piece).cast("B")
        while len(rest):
            written = os.pwrite(self._handle, rest, offset)
            rest, offset = rest[written:], offset + written

    def check(self) -> None:
        """Raise the first error that `write` met, if any."""
        if self._error is not None:
            raise self._error

    def writable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Set the position of the next `write`, and return it."""
        self._position = offset + (0, self._position, self._end)[whence]
        return self._position

    def write(self, piece: Any, /) -> int:
        """Write a buffer at the current position, and return its size even after an error."""
        count = memoryview(piece).nbytes
        if self._error is None:
            try:
                self.write_at(self._position, piece)
            except OSError as error:
                self._error = error
        self._position += count
        self._end = max(self._end, self._position)
        return count


class _Frame(io.RawIOBase):
    """A file in memory that keeps what HDF5 writes, without the gaps that it leaves for arrays."""

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
        memoryview(buffer)[:] = self.content(self.position, self.position + len(buffer))
        return len(buffer)

    def content(self, begin: int, end: int) -> bytes:
        content = np.zeros(end - begin, np.uint8)
        for offset, piece in self.pieces:
            first, last = max(offset, begin), min(offset + len(piece), end)
            if first < last:
                part = np.frombuffer(piece, np.uint8)[first - offset : last - offset]
                content[first - begin : last - begin] = part
        return content.tobytes()


@dataclass(frozen=True)
class Layout:
    """The layout of an HDF5 file.

    Attributes:
        size: size of the whole file, in bytes.
        pieces: everything in the file except the arrays, in the order of the positions. Padding is included.
        offsets: position of each array with elements, in bytes.
    """

    size: int
    pieces: Pieces
    offsets: dict[str, int]


def make_layout(
    arrays: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]], values: Mapping[str, Any]
) -> Layout:
    """Make the layout of a file.

    Args:
        arrays: shape and type of each array.
        values: numbers and texts that the file holds beside the arrays.
    """
    frame, offsets = _Frame(), {}
    room = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    room.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    room.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(frame, "w", alignment_threshold=_ALIGNMENT, alignment_interval=_ALIGNMENT) as file:
        for name, (shape, dtype) in arrays.items():
            made = file.create_dataset(name, shape, dtype, dcpl=room)
            if 0 not in shape:
                offsets[name] = made.id.get_offset()
        write_values(file, values)
    pieces: Pieces = []
    position = 0
    ends = {
        offset: offset + math.prod(arrays[name][0]) * arrays[name][1].itemsize
        for name, offset in offsets.items()
    }
    for offset, end in sorted({**ends, frame.size: frame.size}.items()):
        if offset > position:
            pieces.append((position, frame.content(position, offset)))
        position = end
    return Layout(frame.size, pieces, offsets)


def write_values(file: h5py.File, values: Mapping[str, Any]) -> None:
    """Write numbers, small arrays and texts. Texts get a fixed length, which needs none of HDF5's heaps."""
    for name, value in values.items():
        array = np.asarray(value)
        if array.ndim == 0 and array.dtype.kind in "SU":
            text = array.item()
            content = text.encode() if isinstance(text, str) else text
            array = np.array(content, h5py.string_dtype("utf-8", max(1, len(content))))
        file[name] = array


def hdf5_pieces(contents: Mapping[str, Any]) -> Pieces:
    """Return the pieces of a file of arrays, numbers and texts by their keys. The arrays are not copied.

    The pieces cover the file from its first byte to its last, in this order.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in contents.items() if np.ndim(array)}
    values = {name: value for name, value in contents.items() if name not in arrays}
    layout = make_layout({name: (array.shape, array.dtype) for name, array in arrays.items()}, values)
    contained = ((offset, arrays[name]) for name, offset in layout.offsets.items())
    return sorted([*layout.pieces, *contained], key=lambda piece: piece[0])


def write_pieces(
    path: Path,
    pieces: Pieces,
    check: Callable[[], None] = lambda: None,
    update: Callable[[memoryview], None] = lambda _: None,
) -> None:
    """Fill an existing file with pieces.

    Args:
        path: path of the file.
        pieces: contents and their positions.
        check: function that is called every megabyte and may stop the writing by an exception.
        update: function that is called with each block before it is written, in the order of the pieces, such
            as a hash's.

    Raises:
        OSError: the disk is full.
    """
    with contextlib.closing(Output(path)) as file:
        file.reserve(max(offset + memoryview(piece).nbytes for offset, piece in pieces))
        for offset, piece in pieces:
            content = memoryview(piece).cast("B")
            for first in range(0, len(content), _BLOCK):
                check()
                block = content[first : first + _BLOCK]
                update(block)
                file.write_at(offset + first, block)


class RowsFile:
    """An HDF5 file whose arrays are filled row by row. The first rows determine its arrays."""

    def __init__(self, file: Output, total: int, metadata: Mapping[str, Any]) -> None:
        self.total, self.written = total, 0
        self._file = file
        self._values = {f"metadata/{key}": value for key, value in {**metadata, "steps": total}.items()}
        self._offsets: dict[str, int] | None = None

    def append(self, rows: Mapping[str, Array]) -> int:
        """Append rows, which must have the same arrays every time.

        Returns:
            The number of rows written. Rows beyond the file's total are dropped.
        """
        if self._offsets is None:
            self._offsets = self._begin(rows)
        count = min(len(rows["rewards"]), self.total - self.written)
        for key, array in rows.items():
            part = np.ascontiguousarray(array[:count])
            if part.size:
                self._file.write_at(self._offsets[key] + self.written * part[0].nbytes, part)
        self.written += count
        return count

    def _begin(self, rows: Mapping[str, Array]) -> dict[str, int]:
        arrays = {key: ((self.total, *array.shape[1:]), array.dtype) for key, array in rows.items()}
        layout = make_layout(arrays, self._values)
        self._file.reserve(layout.size)
        for offset, piece in layout.pieces:
            self._file.write_at(offset, piece)
        return layout.offsets


@contextlib.contextmanager
def new_file(path: Path, total: int, metadata: Mapping[str, Any]) -> Iterator[RowsFile]:
    """Open a new file of `total` rows, which appears at `path` once it is complete.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_path(path) as temporary, contextlib.closing(Output(temporary)) as file:
        rows = RowsFile(file, total, metadata)
        yield rows
        assert rows.written == total
