"""Data sets in, one `Transitions` out."""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mopo_fast.data import d4rl, minari
from mopo_fast.data.files import Compat, from_arrays, load_file
from mopo_fast.data.local import local_file, local_folder
from mopo_fast.data.relabel import relabel, relabel_file
from mopo_fast.data.transitions import Transitions
from mopo_fast.errors import InputError

__all__ = [
    "Transitions",
    "find_dataset",
    "load_dataset",
    "load_file",
    "relabel",
    "relabel_file",
]

_SUFFIXES = (".hdf5", ".h5", ".npz", ".pkl")


class OfflineEnvironment(Protocol):
    """What `d4rl.OfflineEnv` is to us, and any environment that has its `get_dataset`."""

    def get_dataset(self) -> Mapping[str, Any]: ...


def load_dataset(
    source: str | os.PathLike[str] | Mapping[str, Any] | OfflineEnvironment,
    *,
    compat: Compat | None = None,
    memory_map: bool = False,
    quiet: bool = False,
) -> Transitions:
    """A data set by name or path, from arrays, or from a D4RL environment.

    Args:
        source: a file in D4RL's layout (.hdf5, .h5, .npz), a NeoRL .npz or a .pkl of trajectories, see
            `load_file`; a local set, `halfcheetah-random-local`, in `$MOPO_FAST_DATA_DIR`, else
            `~/.mopo_fast/datasets`; a D4RL name, `hopper-medium-v2`, downloaded to `$D4RL_DATASET_DIR`, else
            `~/.d4rl/datasets`, unless it is there; a Minari data set, `minari:ID`, likewise; a dictionary
            of arrays by D4RL's names; or an environment whose `get_dataset()` gives one.
        compat: how successors are found, see `load_file`.
        memory_map: leave a file's arrays in the file, see `load_file`.
        quiet: no progress bar.

    Returns:
        float32 transitions on the CPU, checked.

    Raises:
        InputError: no such data set, one that cannot be fetched, or a file that is not sound.
    """
    if memory_map and (not isinstance(source, (str, os.PathLike)) or str(source).startswith(minari.PREFIX)):
        raise InputError("only a file can be mapped into memory; `mopo-fast convert` writes one")
    if isinstance(source, Mapping):
        return from_arrays(source, compat=compat).validate()
    if not isinstance(source, (str, os.PathLike)):
        return _from_environment(source, compat)
    if str(source).startswith(minari.PREFIX):
        known = str(source)
        return from_arrays(minari.read(known), compat=compat, name=known, source=known).validate()
    path, name = find_dataset(source)
    if name not in d4rl.LOCATIONS:
        return load_file(path, compat=compat, name=name, memory_map=memory_map)
    data = load_file(d4rl.fetch(name, quiet=quiet), compat=compat, name=name, memory_map=memory_map)
    return data if compat else d4rl.without_contact_forces(data)


def _from_environment(environment: OfflineEnvironment, compat: Compat | None) -> Transitions:
    if not callable(getattr(environment, "get_dataset", None)):
        raise InputError(
            "load_dataset takes a name, a path, a dictionary of arrays or an environment with get_dataset(),"
            f" got {type(environment).__name__}"
        )
    name = getattr(getattr(environment, "spec", None), "id", None)
    return from_arrays(
        environment.get_dataset(),
        compat=compat,
        name=name,
        source=f"the data set of {name or type(environment).__name__}",
        # d4rl.qlearning_dataset goes by this where there are no time-outs.
        max_episode_steps=getattr(environment, "_max_episode_steps", None),
    ).validate()


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
    if name.startswith(minari.PREFIX):
        return minari.path(name), name
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
        f" Minari's, minari:ID; and files ending in {', '.join(_SUFFIXES)}"
    )
