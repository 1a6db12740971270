"""Data sets in, one `Transitions` out."""

import difflib
import os
from pathlib import Path

from mopo_fast.data import d4rl
from mopo_fast.data.collect import collect, local_file, local_folder
from mopo_fast.data.files import Compat, load_file
from mopo_fast.data.relabel import relabel, relabel_file
from mopo_fast.data.transitions import Transitions, concatenate
from mopo_fast.errors import InputError

__all__ = [
    "Transitions",
    "collect",
    "concatenate",
    "find_dataset",
    "load_dataset",
    "load_file",
    "relabel",
    "relabel_file",
]

_SUFFIXES = (".hdf5", ".h5", ".npz")


def load_dataset(
    name_or_path: str | os.PathLike[str], *, compat: Compat | None = None, quiet: bool = False
) -> Transitions:
    """A data set by name or path.

    Args:
        name_or_path: a file in D4RL's layout (.hdf5, .h5, .npz); a local set, `halfcheetah-random-local`, in
            `$MOPO_FAST_DATA_DIR`, else `~/.mopo_fast/datasets`; or a D4RL name, `hopper-medium-v2`, which is
            downloaded to `$D4RL_DATASET_DIR`, else `~/.d4rl/datasets`, unless it is there.
        compat: how successors are found, see `load_file`.
        quiet: no progress bar.

    Returns:
        float32 transitions on the CPU, checked.

    Raises:
        InputError: no such data set, one that cannot be fetched, or a file that is not sound.
    """
    path, name = find_dataset(name_or_path)
    if name not in d4rl.LOCATIONS:
        return load_file(path, compat=compat, name=name)
    data = load_file(d4rl.fetch(name, quiet=quiet), compat=compat, name=name)
    return data if compat else d4rl.without_contact_forces(data)


def find_dataset(name_or_path: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """The file of a data set, and its name where it goes by one; a D4RL set may not be fetched yet.

    Raises:
        InputError: no such data set; the message says which there are.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if isinstance(name_or_path, os.PathLike) or path.is_file() or path.suffix in _SUFFIXES:
        if not path.exists():
            raise InputError(f"{path} does not exist")
        return path, None
    if name in d4rl.LOCATIONS:
        return d4rl.cache_path(name), name
    if name.endswith("-local"):
        path = local_file(name)
        if not path.is_file():
            raise InputError(
                f"{name} is not at {path}; make it with `mopo-fast collect {name.removesuffix('-local')}`"
            )
        return path, name
    local = sorted(file.stem.replace("_", "-") for file in local_folder().glob("*-local.hdf5"))
    close = difflib.get_close_matches(name, [*d4rl.LOCATIONS, *local])
    raise InputError(
        f"unknown data set {name!r}"
        + (f", did you mean {' or '.join(close)}?" if close else ";")
        + f" There are D4RL's, TASK-TIER-VERSION with a task of {', '.join(d4rl.TASKS)},"
        f" a tier of {', '.join(d4rl.TIERS)} and a version of v0, v1, v2;"
        f" those collected here: {', '.join(local) or 'none yet, see `mopo-fast collect`'};"
        f" and files ending in {', '.join(_SUFFIXES)}"
    )
