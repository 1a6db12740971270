"""Files in D4RL's layout: any HDF5 or npz to `Transitions`, checked on the way in; arrays to HDF5."""

import contextlib
import errno
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import h5py
import numpy as np
import numpy.typing as npt
import torch

from mopo_fast.atomic import atomic_path
from mopo_fast.data.transitions import Transitions
from mopo_fast.errors import InputError

Array = npt.NDArray[Any]
Compat = Literal["d4rl"]

MAX_EPISODE_STEPS = 1000
"""Where a file has no `timeouts`: the step limit of every D4RL MuJoCo environment."""

# What h5py and numpy raise, each for another kind of damage.
_DAMAGE = (OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error)


def load_file(
    path: str | os.PathLike[str], *, compat: Compat | None = None, name: str | None = None
) -> Transitions:
    """Transitions from observations, actions, rewards, terminals and, if any, timeouts, next_observations.

    By default every transition has its true successor: `next_observations` where the file has them, else the
    next row's observation; rows that have none (the last one, those that end an episode) are left out.
    compat="d4rl" does bit for bit what `d4rl.qlearning_dataset` does: the next row's observation, after a
    terminal too; only time-outs and the last row are left out.

    Args:
        path: .npz, or HDF5 with any other ending.
        name: by default the name in a locally collected file's metadata, else the file's stem.

    Returns:
        float32 transitions on the CPU.

    Raises:
        InputError: a file that is missing, truncated or not in this layout; values that are not finite.
    """
    if compat is not None and compat not in get_args(Compat):
        raise InputError(f'compat must be None or "d4rl", got {compat!r}')
    path = Path(path)
    with _open(path) as file:
        reader = _Reader(path, file)
        observations = reader.floats("observations", 2)
        actions = reader.floats("actions", 2)
        rewards = reader.floats("rewards", 1)
        terminals = reader.flags("terminals")
        timeouts = reader.flags("timeouts") if "timeouts" in file else None
        successors = None
        if compat is None and "next_observations" in file:
            successors = reader.floats("next_observations", 2)
        metadata = reader.metadata()
    if timeouts is None:
        timeouts = _step_limits(terminals, after_terminal=1 if compat == "d4rl" else 0)
    if successors is not None:
        rule = "next_observations"
        keep: Array | slice = slice(None)
    else:
        rule = "next row, as d4rl.qlearning_dataset" if compat == "d4rl" else "next row of the episode"
        keep = ~timeouts if compat == "d4rl" else ~(timeouts | terminals)
        keep[-1:] = False
        keep = np.flatnonzero(keep)
        successors = observations[keep + 1]
    local_name = str(metadata.get("name", ""))
    data = Transitions(
        observations=torch.from_numpy(observations[keep]),
        actions=torch.from_numpy(actions[keep]),
        rewards=torch.from_numpy(rewards[keep]),
        next_observations=torch.from_numpy(successors),
        terminals=torch.from_numpy(terminals[keep]),
        name=name or (local_name if local_name.endswith("-local") else path.stem),
        info={"path": str(path), "rows": len(rewards), "successors": rule, "metadata": metadata},
    )
    if len(data) == 0:
        raise InputError(f"{path} has {len(rewards)} rows, none of them with a successor")
    return data.validate()


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Mapping[str, Any]]:
    """The file as {key: array to be read}; every way in which it can be broken is one `InputError`."""
    if not path.is_file():
        raise InputError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        if path.suffix != ".npz":
            # Locks fail on many shared file systems, and files written here appear whole or not at all.
            with h5py.File(path, "r", locking=False) as file:
                yield file
        else:
            with open(path, "rb") as raw:
                if not zipfile.is_zipfile(raw):
                    raise ValueError("no zip directory at its end")
                # Never a pickle: an object array is refused.
                with np.load(raw, allow_pickle=False) as file:
                    yield file
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{path} does not fit into memory ({error})") from error
    except _DAMAGE as error:
        kind = "npz" if path.suffix == ".npz" else "HDF5"
        raise InputError(f"{path} is not a whole {kind} file ({error}); get or make it again") from error


class _Reader:
    """Reads arrays of a file and checks each against the first."""

    def __init__(self, path: Path, file: Mapping[str, Any]) -> None:
        self._path, self._file = path, file
        self._rows: int | None = None

    def _read(self, key: str, ndim: int) -> Array:
        if key not in self._file:
            keys = ", ".join(sorted(map(str, self._file))) or "nothing"
            raise InputError(f"{self._path} lacks {key!r}; it has {keys}")
        stored = self._file[key]
        # A group, an HDF5 null or a foreign member of an archive.
        if getattr(stored, "shape", None) is None:
            raise InputError(f"{self._path}: {key} is not an array")
        array = np.asarray(stored)
        if array.dtype.kind not in "fiub":
            raise InputError(f"{self._path}: {key} must be numbers, got {array.dtype}")
        if ndim == 1 and array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        if array.ndim != ndim or 0 in array.shape[1:]:
            expected = "[n]" if ndim == 1 else "[n, dim]"
            raise InputError(f"{self._path}: {key} must be {expected}, got shape {array.shape}")
        if self._rows is None:
            self._rows, self._dim = array.shape
        if len(array) != self._rows:
            raise InputError(f"{self._path}: {key} has {len(array)} rows, observations {self._rows}")
        if key == "next_observations" and array.shape[1] != self._dim:
            raise InputError(f"{self._path}: {key} has {array.shape[1]} columns, observations {self._dim}")
        return array

    def floats(self, key: str, ndim: int) -> Array:
        """A float32 array, every value finite."""
        with np.errstate(over="ignore"):
            array = self._read(key, ndim).astype(np.float32)
        finite = np.isfinite(array)
        if not finite.all():
            row = int(np.argwhere(~finite)[0, 0])
            raise InputError(f"{self._path}: {key} is not a finite float32 number at row {row}")
        return array

    def flags(self, key: str) -> Array:
        """A bool array, stored as bool or as 0 and 1."""
        array = self._read(key, 1)
        flags = array.astype(bool)
        if not np.array_equal(array, flags):
            row = int(np.flatnonzero(array != flags)[0])
            raise InputError(f"{self._path}: {key} must be 0 or 1, got {array[row]} at row {row}")
        return flags

    def metadata(self) -> dict[str, str | float]:
        """The strings and numbers of the file's metadata group."""
        group = self._file.get("metadata")
        found: dict[str, str | float] = {}
        for key, item in group.items() if isinstance(group, h5py.Group) else ():
            value = item[()] if isinstance(item, h5py.Dataset) and item.shape == () else None
            if isinstance(value, bytes):
                found[key] = value.decode("utf-8", "replace")
            elif isinstance(value, (np.integer, np.floating)):
                found[key] = value.item()
        return found


@contextlib.contextmanager
def new_file(path: Path, metadata: dict[str, Any]) -> Iterator[Any]:
    """An HDF5 file to be filled, which is there when it is whole."""
    with atomic_path(path) as temporary:
        try:
            with h5py.File(temporary, "w") as file:
                for key, value in metadata.items():
                    file[f"metadata/{key}"] = value
                yield file
                file["metadata/steps"] = len(file["rewards"])
        except (OSError, RuntimeError) as error:
            # What h5py raises on a full disk is of many kinds.
            number = getattr(error, "errno", None) or getattr(error.__context__, "errno", None) or errno.EIO
            raise OSError(number, os.strerror(number)) from error


def store(file: Any, arrays: dict[str, Array], first: int, total: int) -> int:
    """Write rows from row `first` of `total` on, as many as there is room for; return how many."""
    count = min(len(arrays["rewards"]), total - first)
    for key, array in arrays.items():
        stored = file.require_dataset(key, (total, *array.shape[1:]), array.dtype)
        stored[first : first + count] = array[:count]
    return count


def _step_limits(terminals: Array, after_terminal: int) -> Array:
    """Time-outs of a file that has none: rows that complete `MAX_EPISODE_STEPS`.

    `after_terminal` is the step count after a terminal; d4rl.qlearning_dataset counts from 1 there.
    """
    timeouts = np.zeros_like(terminals)
    start, count = 0, 0
    for end in [*np.flatnonzero(terminals), len(terminals) - 1]:
        timeouts[start + MAX_EPISODE_STEPS - 1 - count : end + 1 : MAX_EPISODE_STEPS] = True
        start, count = end + 1, 0 if timeouts[end] else after_terminal
    return timeouts
