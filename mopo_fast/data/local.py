"""Names of data sets and of the files that hold them."""

import os
from pathlib import Path

from mopo_fast.errors import InputError

MINARI_PREFIX = "minari:"


def local_folder() -> Path:
    """Return the folder of local data sets: `$MOPO_FAST_DATA_DIR`, or `~/.mopo_fast/datasets` without it."""
    return Path(os.environ.get("MOPO_FAST_DATA_DIR") or "~/.mopo_fast/datasets").expanduser()


def local_file(name: str, folder: Path | None = None) -> Path:
    """Return the path of a local data set, such as hopper_random-local.hdf5 for `hopper-random-local`.

    Args:
        name: name of the data set, with or without `-local`.
        folder: its folder, by default `local_folder()`.
    """
    stem = name.removesuffix("-local").replace("-", "_")
    return (folder or local_folder()) / f"{stem}-local.hdf5"


def check_file(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Raise `InputError` before any work where `write_arrays` could not write `path`."""
    path = Path(path)
    if path.suffix not in (".hdf5", ".h5", ".npz"):
        raise InputError(f"cannot write {path}; its name must end in .hdf5, .h5 or .npz")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already; choose another file, or replace it with --overwrite")
