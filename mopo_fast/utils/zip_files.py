"""Zip files, opened only if their directory has a reasonable size."""

import zipfile
from typing import Any, BinaryIO

# Upper limit of the bytes of a directory. One of 65,536 members has about 4 MiB, which take Python 40 MiB.
_LARGEST_DIRECTORY = 1 << 24
# Python's own search for the end record. It is private, but a search of our own might find another record.
_end_record: Any = zipfile._EndRecData  # type: ignore[attr-defined]
_SIZE = 5


def open_zip(file: BinaryIO) -> zipfile.ZipFile:
    """Open a zip file for reading.

    Raises:
        ValueError: the directory has more than 16 MiB, or there is none at the end of the file.
    """
    record = _end_record(file)
    if not record:
        raise ValueError("no zip directory at its end")
    if record[_SIZE] > _LARGEST_DIRECTORY:
        raise ValueError(f"its zip directory has {record[_SIZE]:,} bytes, more than {_LARGEST_DIRECTORY:,}")
    return zipfile.ZipFile(file)
