"""Load data sets of every supported kind as `Transitions`."""

import difflib
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mopo_fast.data import d4rl
from mopo_fast.data.formats import SUFFIXES, format_of
from mopo_fast.data.local import MINARI_PREFIX, local_file, local_folder
from mopo_fast.errors import InputError
from mopo_fast.utils.lazy import lazy_submodules

if TYPE_CHECKING:
    from mopo_fast.config import Compat, DataConfig
    from mopo_fast.data.files import load_file
    from mopo_fast.data.rewards import relabel, relabel_file
    from mopo_fast.data.transitions import Transitions

__all__ = [
    "Transitions",
    "find_dataset",
    "load_configured",
    "load_dataset",
    "load_file",
    "relabel",
    "relabel_file",
]

MEMORY_PREFIX = "memory:"
"""Prefix of the name under which a run records data that were given in memory."""

# These modules are imported on first use: the command line looks up names before it imports torch.
_HOMES = {"Transitions": "transitions", "load_file": "files", "relabel": "rewards", "relabel_file": "rewards"}

_get_submodule, __dir__ = lazy_submodules(__name__)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        return _get_submodule(name)
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


class OfflineEnvironment(Protocol):
    """An environment that brings its own data set, such as `d4rl.OfflineEnv`."""

    def get_dataset(self) -> Mapping[str, Any]:
        """Return the data set's arrays under D4RL's names."""


def load_dataset(
    source: "str | os.PathLike[str] | Mapping[str, Any] | OfflineEnvironment | Transitions",
    *,
    compat: "Compat | None" = None,
    max_transitions: int | None = None,
    memory_map: bool = False,
    quiet: bool = False,
) -> "Transitions":
    """Load a data set by its name or path, from arrays, or from a D4RL environment.

    A source is one of:

    - a file in D4RL's layout (.hdf5, .h5, .npz, .parquet), a NeoRL .npz or a .pkl of trajectories, see
      `load_file`;
    - a folder of shards that `mopo-fast rollout` has written, whose rewards are penalised;
    - the name of a D4RL set, such as `hopper-medium-v2`, which is downloaded to `$D4RL_DATASET_DIR` or
      `~/.d4rl/datasets` unless it is there;
    - the name of a local set, such as `halfcheetah-random-local`, in `$MOPO_FAST_DATA_DIR` or
      `~/.mopo_fast/datasets`;
    - a Minari set, `minari:ID`, which is downloaded unless it is there, or a `minari.MinariDataset`;
    - a dictionary of arrays under D4RL's names or those of `names.ALIASES`, such as obs and dones, or an
      environment whose `get_dataset()` returns one;
    - `Transitions`, which are checked and, where needed, copied.

    Args:
        source: the data set.
        compat: code whose loader is followed, see `load_file`. Folders of shards and `Transitions` take none.
        max_transitions: number of transitions to keep, the last ones; None for all.
        memory_map: leave a file's arrays in the file, see `load_file`.
        quiet: show no progress bar.

    Returns:
        Checked float32 transitions on the CPU.

    Raises:
        InputError: there is no such data set, it cannot be fetched, or its file is damaged.
    """
    data = _load(source, compat, memory_map, quiet)
    return data if max_transitions is None else data.last(max_transitions)


def load_configured(
    source: "str | os.PathLike[str] | Mapping[str, Any] | OfflineEnvironment | Transitions",
    config: "DataConfig",
    *,
    memory_map: bool = False,
    quiet: bool = False,
) -> "Transitions":
    """Load the data of a run or a fit by the settings of its config.

    Args:
        source: the data set, as in `load_dataset`.
        config: settings of the data.
        memory_map: as in `load_dataset`.
        quiet: as in `load_dataset`.

    Raises:
        InputError: as `load_dataset`; or most rows do not follow one another, while `config.compat` is d4rl.
    """
    data = load_dataset(source, compat=config.compat, memory_map=memory_map, quiet=quiet)
    contradicted = data.info.get("contradicted", 0)
    if contradicted > len(data) / 2:
        raise InputError(
            f"{data.name or 'the data set'} has {contradicted:,} rows whose successor is not the next row's"
            f" observation, which compat {config.compat} takes; leave out --data.compat, or give"
            " --data.compat None"
        )
    # With compat d4rl, `load_dataset` keeps the constant dimensions that the package has too.
    data = d4rl.without_contact_forces(data)
    return data if config.max_transitions is None else data.last(config.max_transitions)


def _load(source: Any, compat: "Compat | None", memory_map: bool, quiet: bool) -> "Transitions":
    from mopo_fast.data import minari
    from mopo_fast.data.files import from_arrays, load_file
    from mopo_fast.data.shards import load_rollouts
    from mopo_fast.data.transitions import Transitions

    if memory_map and (not isinstance(source, (str, os.PathLike)) or str(source).startswith(MINARI_PREFIX)):
        given = source if isinstance(source, str) else type(source).__name__
        raise InputError(
            f"only a file can be mapped into memory, got {given}; write one with `mopo-fast convert`"
        )
    if isinstance(source, Transitions):
        if compat is not None:
            raise InputError(
                f"Transitions have their successors, so compat must be None, got {compat!r}; give"
                " TrainConfig(..., data=DataConfig())"
            )
        return source.as_data()
    if isinstance(source, Mapping):
        return from_arrays(source, compat=compat).validate()
    if minari.is_minari(source):
        known = f"{MINARI_PREFIX}{getattr(getattr(source, 'spec', None), 'dataset_id', 'unnamed')}"
        arrays = minari.read_object(source, known)
        return from_arrays(arrays, compat=compat, name=known, source=known).validate()
    if not isinstance(source, (str, os.PathLike)):
        return _from_environment(source, compat)
    if str(source).startswith(MINARI_PREFIX):
        known = str(source)
        return from_arrays(minari.read(known), compat=compat, name=known, source=known).validate()
    path, name = find_dataset(source)
    if path.is_dir():
        if compat is not None or memory_map:
            raise InputError(
                f"{path} is a folder, which takes neither compat nor --memory-map (memory_map=True);"
                " make one file of it with `mopo-fast convert`, or leave them out (--data.compat None)"
            )
        return load_rollouts(path)
    if name not in d4rl.LOCATIONS:
        return load_file(path, compat=compat, name=name, memory_map=memory_map)
    data = load_file(d4rl.fetch(name, quiet=quiet), compat=compat, name=name, memory_map=memory_map)
    return data if compat else d4rl.without_contact_forces(data)


def _from_environment(environment: OfflineEnvironment, compat: "Compat | None") -> "Transitions":
    from mopo_fast.data.files import from_arrays

    if not callable(getattr(environment, "get_dataset", None)):
        raise InputError(
            "source must be a name, a path, a dictionary of arrays or an environment with get_dataset(),"
            f" got {type(environment).__name__}"
        )
    name = getattr(getattr(environment, "spec", None), "id", None)
    return from_arrays(
        environment.get_dataset(),
        compat=compat,
        name=name,
        source=f"the data set of {name or type(environment).__name__}",
        # d4rl.qlearning_dataset uses this step limit where there are no time-outs.
        max_episode_steps=getattr(environment, "_max_episode_steps", None),
    ).validate()


def find_dataset(name_or_path: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """Find the file of a data set, or its folder of shards.

    Returns:
        The path, which does not exist yet for a D4RL or Minari set that was never fetched; and the data set's
        name, or None where it was given as a path.

    Raises:
        InputError: there is no such data set. The message lists the known ones.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    is_folder = path.is_dir() and name not in d4rl.LOCATIONS and not name.endswith("-local")
    if is_folder and (path / "config.json").is_file():
        from mopo_fast.tasks import resume_command

        raise InputError(
            f"{path} is the folder of a run, not a data set; `{resume_command(path)}` continues it"
        )
    named = name.startswith((MEMORY_PREFIX, MINARI_PREFIX)) or name.endswith("-local")
    is_path = isinstance(name_or_path, os.PathLike) or path.is_file() or bool(path.suffix and not named)
    if is_path or is_folder:
        if not path.exists():
            raise InputError(f"{path} does not exist")
        if path.is_file():
            format_of(path)
        return path, None
    if name.startswith(MEMORY_PREFIX):
        raise InputError(
            f"{name} were data in the memory of a Python program; give them again in Python, or save them"
            " with `Transitions.save` and name the file"
        )
    if name.startswith(MINARI_PREFIX):
        from mopo_fast.data import minari

        return minari.path(name), name
    if name in d4rl.LOCATIONS:
        return d4rl.cache_path(name), name
    if name.endswith("-local"):
        path = local_file(name)
        if not path.is_file():
            raise InputError(
                f"{name} does not exist at {path}; make it with"
                f" `mopo-fast collect {name.removesuffix('-local')}`"
            )
        return path, name
    local = sorted(file.stem.replace("_", "-") for file in local_folder().glob("*-local.hdf5"))
    close = difflib.get_close_matches(name, [*d4rl.LOCATIONS, *local])
    raise InputError(
        f"unknown data set {name!r}"
        + (f", did you mean {' or '.join(close)}?" if close else ".")
        + f" Known are D4RL's TASK-TIER-VERSION, with TASK one of {', '.join(d4rl.TASKS)},"
        f" TIER one of {', '.join(d4rl.TIERS)} and VERSION one of v0, v1, v2;"
        f" sets collected on this machine ({', '.join(local) or 'none yet, see `mopo-fast collect`'});"
        f" Minari's minari:ID; files that end in {', '.join(SUFFIXES)}, and folders of shards"
    )
