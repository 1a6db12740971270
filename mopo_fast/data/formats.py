"""Formats of data files, told by a file's ending or its first bytes."""

import os
from pathlib import Path
from typing import Literal

from mopo_fast.errors import InputError

Format = Literal["hdf5", "npz", "pkl", "parquet"]

SUFFIXES: dict[str, Format] = {
    ".hdf5": "hdf5",
    ".h5": "hdf5",
    ".npz": "npz",
    ".pkl": "pkl",
    ".parquet": "parquet",
}
"""Endings of data files, and their formats. HDF5 may have any other ending too."""

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def format_of(path: Path) -> Format:
    """Return the format of a data file.

    Raises:
        InputError: the file is of no known format, or it cannot be read.
    """
    known = SUFFIXES.get(path.suffix.lower())
    if known is None:
        try:
            known = "hdf5" if has_hdf5_signature(path) else None
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error})") from error
    if known is None:
        raise InputError(
            f"{path} is no data set of a known format, judging by its ending and first bytes; write your"
            ' arrays with numpy.savez("FILE.npz", observations=..., actions=..., rewards=...,'
            f" terminals=...). Names of data files end in {', '.join(SUFFIXES)}"
        )
    return known


def has_hdf5_signature(path: Path) -> bool:
    """Tell whether a file begins with HDF5's signature."""
    with open(path, "rb") as raw:
        return raw.read(len(_HDF5_SIGNATURE)) == _HDF5_SIGNATURE


def check_file(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Raise `InputError` before any work where `write_arrays` could not write `path`."""
    path = Path(path)
    if path.suffix not in (".hdf5", ".h5", ".npz"):
        raise InputError(f"cannot write {path}; its name must end in .hdf5, .h5 or .npz")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already; choose another file, or replace it with --overwrite")
