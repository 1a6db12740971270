"""Names of data sets and of the files that hold them."""

import os
from pathlib import Path

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
