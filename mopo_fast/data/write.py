"""Write arrays to HDF5 or npz."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mopo_fast.data.hdf5_writer import Output, hdf5_pieces, write_pieces
from mopo_fast.utils.atomic import atomic_path


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Write arrays, numbers and texts by their keys, uncompressed, whole or not at all.

    Args:
        path: a path that ends in .npz, or any other path for HDF5.
        arrays: contents of the file, by key.
    """
    with atomic_path(path) as temporary:
        if Path(path).suffix != ".npz":
            write_pieces(temporary, hdf5_pieces(arrays))
            return
        with contextlib.closing(Output(temporary)) as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.check()
