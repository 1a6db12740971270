"""HDF5 read without trusting it: the one way in which this package opens such a file.

HDF5 follows links and external storage to other files, and allocates whatever a file declares. So a file is
walked first, object by object, and refused as a whole if anything in it leads elsewhere or asks for more than
its bytes can hold. Its library may still fail on metadata that are damaged on purpose; nothing but another
process would keep that away.
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

from mopo_fast.data.stored import DEFLATE_RATIO, MOST_ARRAYS, SLACK, Array, Stored, reading
from mopo_fast.errors import InputError

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_DEEPEST = 32

# In the order in which they are applied. All others are refused: their decoders are seldom used and tested.
_FILTERS = {h5z.FILTER_SHUFFLE: 0, h5z.FILTER_DEFLATE: 1, h5z.FILTER_LZF: 1, h5z.FILTER_FLETCHER32: 2}
_COMPRESSORS = (h5z.FILTER_DEFLATE, h5z.FILTER_LZF)

# HDF5's file format, III.E: the reference to a text of any length, the heap that it lies in, an object there.
_REFERENCE = struct.Struct("<IQI")
_HEAP = struct.Struct("<5s3xQ")
_HEAP_OBJECT = struct.Struct("<H6xQ")

# Bytes that one compressed chunk may become before its true size is found out.
_UNPROBED = 1 << 28


@contextlib.contextmanager
def open_hdf5(path: Path, most: int = MOST_ARRAYS) -> Iterator[dict[str, Stored]]:
    """The checked file as {key: array to be read}, with keys such as "infos/qpos"; groups have no shape.

    Args:
        most: objects that it may have.

    Raises:
        InputError: it is damaged, or refused: links other than plain names, external or virtual storage,
            other filters than gzip, lzf, shuffle and fletcher32, or arrays that its bytes cannot hold.
    """
    with contextlib.ExitStack() as stack:
        with reading(path, "HDF5"):
            # To open a pipe would wait for somebody to write to it.
            if not path.is_file():
                raise ValueError("it is no regular file")
            with open(path, "rb") as raw:
                if raw.read(len(_SIGNATURE)) != _SIGNATURE:
                    raise ValueError("it does not begin with HDF5's signature")
            # Locks fail on many shared file systems, and files written here appear whole or not at all.
            file = stack.enter_context(h5py.File(path, "r", driver="sec2", locking=False))
            found = _Walk(path, file, most).found
        yield found


class _Walk:
    """One pass over every object of a file, by the calls that follow no link."""

    def __init__(self, path: Path, file: h5py.File, most: int) -> None:
        self.path, self.file, self.most = path, file, most
        self.size = path.stat().st_size
        self.stored = 0
        self.found: dict[str, Stored] = {}
        root = h5g.open(file.id, b"/")
        # Data sets that were met under another name, and groups.
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
                    if key.count("/") >= _DEEPEST:
                        raise ValueError(f"groups are nested more than {_DEEPEST} deep")
                    self.found[key] = Stored(None, None, self._refusal(key))
                    pending.append((f"{key}/", h5g.open(group, name.encode())))
                elif info.type == h5o.TYPE_DATASET:
                    self.found[key] = self._dataset(key, h5d.open(group, name.encode()), again)
                else:
                    raise ValueError(f"{key} is neither a group nor a data set")

    def _names(self, group: h5g.GroupID, prefix: str) -> list[str]:
        links: list[tuple[bytes, int]] = []

        def take(name: bytes, info: Any) -> bool | None:
            links.append((name, info.type))
            return len(self.found) + len(links) > self.most or None

        group.links.iterate(take, info=True)
        if len(self.found) + len(links) > self.most:
            raise ValueError(f"it has more than {self.most:,} objects")
        names = []
        for name, kind in links:
            key = prefix + name.decode()
            if not key.isprintable():
                raise ValueError(f"{key!r} is no name")
            if kind != h5l.TYPE_HARD:
                raise ValueError(f"{key} is a link to another place; copy what it points to into the file")
            if b"/" in name or name in (b"", b".", b".."):
                raise ValueError(f"{key!r} is no name")
            names.append(name.decode())
        return names

    def _dataset(self, key: str, dataset: h5d.DatasetID, again: bool) -> Stored:
        properties = dataset.get_create_plist()
        layout = properties.get_layout()
        if layout not in (h5d.COMPACT, h5d.CONTIGUOUS, h5d.CHUNKED):
            raise ValueError(f"{key} is virtual: its values are other data sets'")
        if properties.get_external_count():
            raise ValueError(f"{key} is stored in other files")
        kind, space = dataset.get_type(), dataset.get_space()
        if kind.committed():
            raise ValueError(f"{key} has a type of its own name")
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
                raise ValueError(f"{key} goes on beyond the end of the file")
        if not again and layout != h5d.COMPACT:
            self.stored += held
            if self.stored > self.size:
                raise ValueError(f"its arrays are stored in more bytes than the file's {self.size:,}")
        if logical > held * ratio + SLACK:
            raise ValueError(f"{key} declares {logical:,} bytes, more than its {held:,} stored ones hold")
        read, readable = self._reader(key), kind.get_class() in (h5t.INTEGER, h5t.FLOAT, h5t.ENUM)
        if isinstance(kind, h5t.TypeStringID):
            readable = not kind.is_variable_str()
            # One text of any length: those of an array take as much memory as they say.
            if not readable and shape == () and layout == h5d.CONTIGUOUS and held in (0, _REFERENCE.size):
                return Stored(shape, np.dtype(object), self._text_reader(dataset.get_offset()))
        return Stored(shape, np.dtype(kind.dtype), *((read, offset) if readable else (self._refusal(key),)))

    def _chunks(self, key: str, dataset: h5d.DatasetID, properties: Any) -> tuple[int, int]:
        """Bytes that the chunks are stored in, and how many of the array's each of them can hold."""
        filters = [properties.get_filter(number)[0] for number in range(properties.get_nfilters())]
        order = [_FILTERS.get(code, -1) for code in filters]
        if -1 in order or order != sorted(set(order)):
            raise ValueError(
                f"{key} is stored by other filters than shuffle, gzip, lzf and fletcher32; repack it, such as"
                " by h5repack -f GZIP=4"
            )
        compressed = any(code in filters for code in _COMPRESSORS)
        whole = math.prod(properties.get_chunk()) * dataset.get_type().get_size()
        held = largest = 0

        def take(chunk: Any) -> None:
            nonlocal held, largest
            if chunk.byte_offset is None or chunk.byte_offset + chunk.size > self.size:
                raise ValueError(f"{key} goes on beyond the end of the file")
            held += chunk.size
            largest = max(largest, chunk.size)
            if chunk.size * DEFLATE_RATIO > max(_UNPROBED, 4 * whole) and h5z.FILTER_DEFLATE in filters:
                self._probe(key, chunk, whole)

        dataset.chunk_iter(take)
        # Any chunk is made whole in memory, however little of it the array takes.
        if whole > largest * (DEFLATE_RATIO if compressed else 1) + SLACK:
            raise ValueError(f"{key} has chunks of {whole:,} bytes, more than its stored ones hold")
        return held, DEFLATE_RATIO if compressed else 1

    def _probe(self, key: str, chunk: Any, whole: int) -> None:
        """Refuse a chunk that inflates to more than it should: HDF5 would take any amount of memory."""
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
        """Read a text of any length without HDF5, which never returns from some damaged heaps."""

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
                    raise ValueError("a text is not where it should be")
                heap, at, number = raw.read(size - _HEAP.size), 0, 1
                while number:
                    number, count = _HEAP_OBJECT.unpack_from(heap, at)
                    at += _HEAP_OBJECT.size
                    if number == index and length <= count <= len(heap) - at:
                        return np.array(heap[at : at + length])
                    at += (count + 7) // 8 * 8
                raise ValueError("a text is not where it should be")

        return read

    def _refusal(self, key: str) -> Callable[[], Array]:
        def refuse() -> Array:
            raise InputError(f"{self.path}: {key} is not an array of numbers, nor one text")

        return refuse
