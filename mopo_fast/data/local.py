"""Data sets made on this machine: the folder that they are in, and the names of their files."""

import os
from pathlib import Path


def local_folder() -> Path:
    """Return the folder of local data sets: `$MOPO_FAST_DATA_DIR`, else `~/.mopo_fast/datasets`."""
    return Path(os.environ.get("MOPO_FAST_DATA_DIR") or "~/.mopo_fast/datasets").expanduser()


def local_file(name: str, folder: Path | None = None) -> Path:
    """Return a local data set's file, by D4RL's rule: `hopper-random-local` is `hopper_random-local.hdf5`."""
    stem = name.removesuffix("-local").replace("-", "_")
    return (folder or local_folder()) / f"{stem}-local.hdf5"
