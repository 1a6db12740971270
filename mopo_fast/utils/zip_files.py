"""Zip files whose directory is measured before it is read."""

import zipfile
from typing import Any, BinaryIO

# A directory of 65,536 members has about 4 MiB. Python takes ten times as much memory for it.
_LARGEST_DIRECTORY = 1 << 24
# Python's own search of the end record, which is declared nowhere: another could find another record.
_end_record: Any = zipfile._EndRecData  # type: ignore[attr-defined]
_SIZE = 5


def open_zip(file: BinaryIO) -> zipfile.ZipFile:
    """`zipfile.ZipFile` for reading, unless its directory has more than 16 MiB.

    Raises:
        ValueError: it has, or there is no directory at the file's end.
    """
    record = _end_record(file)
    if not record:
        raise ValueError("no zip directory at its end")
    if record[_SIZE] > _LARGEST_DIRECTORY:
        raise ValueError(f"its zip directory has {record[_SIZE]:,} bytes, more than {_LARGEST_DIRECTORY:,}")
    return zipfile.ZipFile(file)
