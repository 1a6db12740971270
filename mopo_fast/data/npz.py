"""Read npz files without trusting them: no pickles, and no sizes that their bytes cannot hold."""

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mopo_fast.data.stored import DEFLATE_RATIO, MAX_OBJECTS, SLACK, Array, Stored, declared_bytes, reading
from mopo_fast.utils.zip_files import open_zip

_MAGIC = b"\x93NUMPY"


@contextlib.contextmanager
def open_npz(path: Path) -> Iterator[dict[str, Stored]]:
    """Open and check an npz file, as a mapping from keys to unread arrays.

    Members that are not arrays are in the mapping too, without a shape.

    Raises:
        InputError: the file is damaged or encrypted, has two members of one name, arrays of objects or
            records, or declares more than its bytes can hold.
    """
    with contextlib.ExitStack() as stack:
        with reading(path, "npz"):
            raw = stack.enter_context(open(path, "rb"))
            archive = stack.enter_context(open_zip(raw))
            found = _walk(path, archive, path.stat().st_size)
        yield found


def _walk(path: Path, archive: zipfile.ZipFile, size: int) -> dict[str, Stored]:
    members = archive.infolist()
    if len(members) > MAX_OBJECTS:
        raise ValueError(f"it has more than {MAX_OBJECTS:,} members")
    if sum(member.compress_size for member in members) > size:
        raise ValueError(f"its members are stored in more bytes than the file's {size:,}")
    found: dict[str, Stored] = {}
    for member in members:
        key = member.filename.removesuffix(".npy")
        if not key.isprintable():
            raise ValueError(f"{key!r} is not a valid name")
        if key in found:
            raise ValueError(f"{key} occurs twice")
        if member.flag_bits & 1:
            raise ValueError(f"{key} is encrypted")
        ratio = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: DEFLATE_RATIO}.get(member.compress_type)
        if ratio is None:
            raise ValueError(f"{key} is compressed by another method than deflate")
        if member.file_size > member.compress_size * ratio + (SLACK if ratio > 1 else 0):
            raise ValueError(
                f"{key} declares {member.file_size:,} bytes, more than its stored bytes can hold"
            )
        found[key] = _member(path, archive, member, key)
    return found


def _member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, key: str) -> Stored:
    def load() -> Array:
        with reading(path, "npz"), archive.open(member) as content:
            # Without pickles, arrays of objects are refused.
            return np.asarray(np.lib.format.read_array(content, allow_pickle=False))

    with archive.open(member) as content:
        if content.read(len(_MAGIC)) != _MAGIC:
            return Stored(None, None, load)
        content.seek(0)
        version = np.lib.format.read_magic(content)
        readers: dict[Any, Any] = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise ValueError(
                f"{key} has version {version} of the npy format, which arrays of numbers do not use"
            )
        shape, _, dtype = readers[version](content)
        begin = content.tell()
    if dtype.hasobject or dtype.fields is not None or dtype.subdtype is not None:
        raise ValueError(f"{key} holds {dtype}; only numbers and texts are read")
    if any(length < 0 for length in shape):
        raise ValueError(f"{key} has the shape {shape}")
    if begin + declared_bytes(shape, dtype) != member.file_size:
        raise ValueError(
            f"{key} has {member.file_size:,} bytes, which do not fit its shape {shape} of {dtype}"
        )
    return Stored(shape, dtype, load)
