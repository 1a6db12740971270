"""Read HDF5 files without trusting them. The package opens no such file in another way.

The HDF5 library follows links and external storage to other files, and allocates whatever a file declares.
Every file is therefore walked first, object by object. It is refused as a whole if anything in it leads to
another file or declares more than its bytes can hold. Metadata that are damaged on purpose may still crash
the library; only a separate process would protect against that.
"""

import contextlib
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5g, h5l, h5o, h5s, h5t, h5z

from mopo_fast.data.formats import has_hdf5_signature
from mopo_fast.data.stored import DEFLATE_RATIO, MAX_OBJECTS, SLACK, Array, Stored, reading
from mopo_fast.errors import InputError

_MAX_DEPTH = 32

# Filters in the order in which they are applied. Others are refused: their decoders are rarely tested.
_FILTERS = {h5z.FILTER_SHUFFLE: 0, h5z.FILTER_DEFLATE: 1, h5z.FILTER_LZF: 1, h5z.FILTER_FLETCHER32: 2}
_COMPRESSORS = (h5z.FILTER_DEFLATE, h5z.FILTER_LZF)

# HDF5's file format, section III.E: reference to a text of any length, header of its heap, of an object.
_REFERENCE = struct.Struct("<IQI")
_HEAP = struct.Struct("<5s3xQ")
_HEAP_OBJECT = struct.Struct("<H6xQ")

# Possible size of a decompressed chunk, in bytes, above which its true size is measured first.
_PROBE_ABOVE = 1 << 28


@contextlib.contextmanager
def open_hdf5(
    path: Path, max_objects: int = MAX_OBJECTS, *, locked: bool = False
) -> Iterator[dict[str, Stored]]:
    """Open and check an HDF5 file, as a mapping from keys such as "infos/qpos" to unread arrays.

    Groups are in the mapping too, without a shape.

    Args:
        path: path of the file.
        max_objects: most objects that the file may have.
        locked: whether the caller holds the file's lock and has written all of it.

    Raises:
        InputError: the file is damaged; is open for writing; has links, external or virtual storage, or
            filters other than gzip, lzf, shuffle and fletcher32; or declares arrays that its bytes cannot
            hold.
    """
    with contextlib.ExitStack() as stack:
        with reading(path, "HDF5"):
            # Opening a pipe would wait for a writer.
            if not path.is_file():
                raise ValueError("it is not a regular file")
            if not has_hdf5_signature(path):
                raise ValueError("it does not begin with HDF5's signature")
            file = stack.enter_context(_open(path, locked))
            found = _Walk(path, file, max_objects).found
        yield found


def _open(path: Path, locked: bool) -> h5py.File:
    """Open a file for reading, also if other programs or this process read it at the same time.

    Raises:
        InputError: another program, or this process, has the file open for writing.
    """
    errors = []
    # HDF5 refuses to open a file a second time in one process with another setting of its locks; and locks
    # fail on many shared file systems.
    for locking in (False,) if locked else ("best-effort", True, False):
        try:
            file = h5py.File(path, "r", driver="sec2", locking=locking)
        except BlockingIOError:
            raise InputError(
                f"{path} is open for writing in another program; close it there and try again"
            ) from None
        except OSError as error:
            errors.append(error)
            continue
        # HDF5 shares a file that this process has opened for writing; not all of it is on the disk yet.
        if file.mode != "r":
            file.close()
            raise InputError(f"{path} is open for writing in this process; close it and try again")
        return file
    if "already open for write" in str(errors[0]):
        raise InputError(
            f"{path} is open for writing in another program, or one ended without closing it; close it there,"
            " or clear its mark with h5clear -s"
        )
    raise errors[0]


class _Walk:
    """Checks every object of a file, by calls that follow no link.

    Attributes:
        found: all objects, by key.
    """

    def __init__(self, path: Path, file: h5py.File, max_objects: int) -> None:
        self.path, self.file, self.max_objects = path, file, max_objects
        self.size = path.stat().st_size
        self.stored = 0
        self.found: dict[str, Stored] = {}
        root = h5g.open(file.id, b"/")
        # Addresses of the objects met so far. A data set may have several names.
        self.seen = {h5o.get_info(root).addr}
        pending = [("", root)]
        while pending:
            prefix, group = pending.pop()
            for name in self._names(group, prefix):
                key = prefix + name
                info = h5o.get_info(group, name.encode())
                again = info.addr in self.seen
                self.seen.add(info.addr)
                if info.type == h5o.TYPE_GROUP:
                    if again:
                        raise ValueError(f"the group {key} has two names")
                    if key.count("/") >= _MAX_DEPTH:
                        raise ValueError(f"groups are nested more than {_MAX_DEPTH} deep")
                    self.found[key] = Stored(None, None, self._refusal(key))
                    pending.append((f"{key}/", h5g.open(group, name.encode())))
                elif info.type == h5o.TYPE_DATASET:
                    self.found[key] = self._dataset(key, h5d.open(group, name.encode()), again)
                else:
                    raise ValueError(f"{key} is neither a group nor a data set")

    def _names(self, group: h5g.GroupID, prefix: str) -> list[str]:
        links: list[tuple[bytes, int]] = []

        def visit(name: bytes, info: Any) -> bool | None:
            links.append((name, info.type))
            return len(self.found) + len(links) > self.max_objects or None

        group.links.iterate(visit, info=True)
        if len(self.found) + len(links) > self.max_objects:
            raise ValueError(f"it has more than {self.max_objects:,} objects")
        names = []
        for name, kind in links:
            key = prefix + name.decode()
            if not key.isprintable():
                raise ValueError(f"{key!r} is not a valid name")
            if kind != h5l.TYPE_HARD:
                raise ValueError(f"{key} is a link; copy its target into the file")
            if b"/" in name or name in (b"", b".", b".."):
                raise ValueError(f"{key!r} is not a valid name")
            names.append(name.decode())
        return names

    def _dataset(self, key: str, dataset: h5d.DatasetID, again: bool) -> Stored:
        properties = dataset.get_create_plist()
        layout = properties.get_layout()
        if layout not in (h5d.COMPACT, h5d.CONTIGUOUS, h5d.CHUNKED):
            raise ValueError(f"{key} is virtual, its values are in other data sets")
        if properties.get_external_count():
            raise ValueError(f"{key} is stored in other files")
        kind, space = dataset.get_type(), dataset.get_space()
        if kind.committed():
            raise ValueError(f"{key} has a named type")
        if space.get_simple_extent_type() == h5s.NULL:
            return Stored(None, None, self._refusal(key))
        shape = tuple(int(length) for length in space.shape)
        logical = math.prod(shape) * kind.get_size()
        offset = None
        if layout == h5d.CHUNKED:
            held, ratio = self._chunks(key, dataset, properties)
        else:
            held, ratio = dataset.get_storage_size(), 1
            offset = dataset.get_offset() if layout == h5d.CONTIGUOUS and logical else None
            if offset is not None and offset + logical > self.size:
                raise ValueError(f"{key} extends beyond the end of the file")
        if not again and layout != h5d.COMPACT:
            self.stored += held
            if self.stored > self.size:
                raise ValueError(f"its arrays are stored in more bytes than the file's {self.size:,}")
        if logical > held * ratio + SLACK:
            raise ValueError(
                f"{key} declares {logical:,} bytes, more than its {held:,} stored bytes can hold"
            )
        read, readable = self._reader(key), kind.get_class() in (h5t.INTEGER, h5t.FLOAT, h5t.ENUM)
        if isinstance(kind, h5t.TypeStringID):
            readable = not kind.is_variable_str()
            # Only single texts of any length are read: an array of them could claim any amount of memory.
            if not readable and shape == () and layout == h5d.CONTIGUOUS and held in (0, _REFERENCE.size):
                return Stored(shape, np.dtype(object), self._text_reader(dataset.get_offset()))
        return Stored(shape, np.dtype(kind.dtype), *((read, offset) if readable else (self._refusal(key),)))

    def _chunks(self, key: str, dataset: h5d.DatasetID, properties: Any) -> tuple[int, int]:
        """Check the chunks of a data set.

        Returns:
            The size of the stored chunks in bytes, and the most bytes that one of these can expand to.
        """
        filters = [properties.get_filter(number)[0] for number in range(properties.get_nfilters())]
        order = [_FILTERS.get(code, -1) for code in filters]
        if -1 in order or order != sorted(set(order)):
            raise ValueError(
                f"{key} uses other filters than shuffle, gzip, lzf and fletcher32; repack it, such as with"
                " `h5repack -f GZIP=4`"
            )
        compressed = any(code in filters for code in _COMPRESSORS)
        whole = math.prod(properties.get_chunk()) * dataset.get_type().get_size()
        held = largest = 0

        def visit(chunk: Any) -> None:
            nonlocal held, largest
            if chunk.byte_offset is None or chunk.byte_offset + chunk.size > self.size:
                raise ValueError(f"{key} extends beyond the end of the file")
            held += chunk.size
            largest = max(largest, chunk.size)
            if chunk.size * DEFLATE_RATIO > max(_PROBE_ABOVE, 4 * whole) and h5z.FILTER_DEFLATE in filters:
                self._probe(key, chunk, whole)

        dataset.chunk_iter(visit)
        # HDF5 allocates whole chunks, however small the array is.
        if whole > largest * (DEFLATE_RATIO if compressed else 1) + SLACK:
            raise ValueError(f"{key} has chunks of {whole:,} bytes, more than its stored bytes can hold")
        return held, DEFLATE_RATIO if compressed else 1

    def _probe(self, key: str, chunk: Any, whole: int) -> None:
        """Refuse a chunk that inflates to more than its size: HDF5 would allocate any amount of memory."""
        inflate, made = zlib.decompressobj(), 0
        with open(self.path, "rb") as raw:
            raw.seek(chunk.byte_offset)
            block = raw.read(chunk.size)
        while block and not inflate.eof:
            made += len(inflate.decompress(block, SLACK))
            block = inflate.unconsumed_tail
            if made > whole + SLACK:
                raise ValueError(f"a chunk of {key} holds more than its {whole:,} bytes")

    def _reader(self, key: str) -> Callable[[], Array]:
        def read() -> Array:
            with reading(self.path, "HDF5"):
                return np.asarray(self.file[key][()])

        return read

    def _text_reader(self, offset: int | None) -> Callable[[], Array]:
        """Return a reader of a text of any length that avoids HDF5, which hangs on some damaged heaps."""

        def read() -> Array:
            with reading(self.path, "HDF5"), open(self.path, "rb") as raw:
                if offset is None:
                    return np.array(b"")
                raw.seek(offset)
                length, address, index = _REFERENCE.unpack(raw.read(_REFERENCE.size))
                if length == 0:
                    return np.array(b"")
                raw.seek(min(address, self.size))
                signature, size = _HEAP.unpack(raw.read(_HEAP.size))
                if signature != b"GCOL\x01" or not _HEAP.size <= size <= self.size - address:
                    raise ValueError("a text lies outside its heap")
                heap, at, number = raw.read(size - _HEAP.size), 0, 1
                while number:
                    number, count = _HEAP_OBJECT.unpack_from(heap, at)
                    at += _HEAP_OBJECT.size
                    if number == index and length <= count <= len(heap) - at:
                        return np.array(heap[at : at + length])
                    at += (count + 7) // 8 * 8
                raise ValueError("a text lies outside its heap")

        return read

    def _refusal(self, key: str) -> Callable[[], Array]:
        def refuse() -> Array:
            raise InputError(f"{self.path}: {key} is neither an array of numbers nor one text")

        return refuse
