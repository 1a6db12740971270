"""Files, or arrays by D4RL's names, to `Transitions`, checked on the way in; arrays to HDF5."""

import contextlib
import errno
import io
import os
import warnings
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
from mopo_fast.data import trajectories
from mopo_fast.data.transitions import Transitions, first_not_finite
from mopo_fast.errors import InputError

Array = npt.NDArray[Any]
Compat = Literal["d4rl"]

MAX_EPISODE_STEPS = 1000
"""Where a file has no `timeouts`: the step limit of every D4RL MuJoCo environment."""

# What h5py and numpy raise, each for another kind of damage.
_DAMAGE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    EOFError,
    IndexError,
    zipfile.BadZipFile,
    zlib.error,
)


def load_file(
    path: str | os.PathLike[str],
    *,
    compat: Compat | None = None,
    name: str | None = None,
    memory_map: bool = False,
) -> Transitions:
    """Transitions from observations, actions, rewards, terminals and, if any, timeouts, next_observations.

    By default every transition has its true successor: `next_observations` where the file has them, else the
    next row's observation; rows that have none (the last one, those that end an episode) are left out.
    compat="d4rl" does bit for bit what `d4rl.qlearning_dataset` does: the next row's observation, after a
    terminal too; only time-outs and the last row are left out.

    NeoRL's npz files (obs, action, reward, next_obs, done, index) are known by their keys. Their observations
    begin with the x position, which the environments' own and D4RL's leave out: 12 dimensions for hopper, 18
    for halfcheetah and walker2d.

    Args:
        path: .npz, .pkl (a list of trajectories, see `trajectories.read`), or HDF5 with any other ending.
        name: by default the name in a locally collected file's metadata, else the file's stem.
        memory_map: leave all but the terminals in the file, to be read as they are needed; for sets larger
            than the memory. It must be HDF5, uncompressed, float32, with next_observations, as `collect` and
            `mopo-fast convert` write it.

    Returns:
        float32 transitions on the CPU.

    Raises:
        InputError: a file that is missing, truncated or not in this layout; values that are not finite.
    """
    path = Path(path)
    with open_file(path) as file:
        arrays = _mapped(path, file, compat) if memory_map else file
        data = from_arrays(arrays, compat=compat, name=name, source=str(path))
    if not data.name:
        local_name = str(data.info["metadata"].get("name", ""))
        data.name = local_name if local_name.endswith("-local") else path.stem
    data.info = {"path": str(path), **data.info}
    return data.validate()


def from_arrays(
    arrays: Mapping[str, Any],
    *,
    compat: Compat | None = None,
    name: str | None = None,
    source: str = "the data set",
    max_episode_steps: int | None = None,
) -> Transitions:
    """Transitions from arrays by D4RL's names, as `load_file` makes them.

    Args:
        source: what errors call the arrays.
        max_episode_steps: where there are no time-outs: the step limit; None: `MAX_EPISODE_STEPS`.

    Raises:
        InputError: an array is missing, or has another shape or type; values that are not finite.
    """
    if compat is not None and compat not in get_args(Compat):
        raise InputError(f'compat must be None or "d4rl", got {compat!r}')
    reader = Reader(source, arrays)
    observations = reader.floats("observations", 2)
    actions = reader.floats("actions", 2)
    rewards = reader.floats("rewards", 1)
    terminals = reader.flags("terminals")
    timeouts = reader.flags("timeouts") if "timeouts" in arrays else None
    if compat is None and "next_observations" in arrays:
        rule = "next_observations"
        keep: Array | slice = slice(None)
        successors = reader.floats("next_observations", 2)
    else:
        if timeouts is None:
            timeouts = step_limits(terminals, 1 if compat == "d4rl" else 0, max_episode_steps)
        rule = "next row, as d4rl.qlearning_dataset" if compat == "d4rl" else "next row of the episode"
        keep = ~timeouts if compat == "d4rl" else ~(timeouts | terminals)
        keep[-1:] = False
        keep = np.flatnonzero(keep)
        successors = observations[keep + 1]
    data = Transitions(
        observations=as_tensor(observations[keep]),
        actions=as_tensor(actions[keep]),
        rewards=as_tensor(rewards[keep]),
        next_observations=as_tensor(successors),
        terminals=as_tensor(terminals[keep]),
        name=name or "",
        info={
            "rows": len(rewards),
            "successors": rule,
            "memory_mapped": isinstance(observations, np.memmap),
            "metadata": reader.metadata(),
        },
    )
    if len(data) == 0:
        raise InputError(f"{source} has {len(rewards)} rows, none of them with a successor")
    return data


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[Mapping[str, Any]]:
    """The file as {key: array to be read}; every way in which it can be broken is one `InputError`."""
    if not path.is_file():
        raise InputError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    kind = {".npz": "npz", ".pkl": "pickle"}.get(path.suffix, "HDF5")
    try:
        if kind == "HDF5":
            # Locks fail on many shared file systems, and files written here appear whole or not at all.
            with h5py.File(path, "r", locking=False) as file:
                yield file
        elif kind == "pickle":
            yield trajectories.read(path)
        else:
            with open(path, "rb") as raw:
                if not zipfile.is_zipfile(raw):
                    raise ValueError("no zip directory at its end")
                # Never a pickle: an object array is refused.
                with np.load(raw, allow_pickle=False) as file:
                    yield _from_neorl(file) if "obs" in file and "observations" not in file else file
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(
            f"{path} does not fit into memory ({error}); --memory-map (memory_map=True) leaves it in the file"
        ) from error
    except _DAMAGE as error:
        raise InputError(f"{path} is not a whole {kind} file ({error}); get or make it again") from error


def _mapped(path: Path, file: Mapping[str, Any], compat: Compat | None) -> dict[str, Any]:
    """The file's arrays where they are, and its metadata."""

    def array(key: str) -> Array:
        stored = file[key]
        offset = stored.id.get_offset() if isinstance(stored, h5py.Dataset) else None
        if offset is None or stored.dtype != np.float32 or stored.size == 0:
            raise InputError(
                f"{path}: {key} cannot be mapped into memory, it must be uncompressed float32;"
                " `mopo-fast convert` writes without compression"
            )
        return np.memmap(path, np.float32, "r", offset, stored.shape)

    if not isinstance(file, h5py.File) or "next_observations" not in file or compat is not None:
        raise InputError(
            f"{path} cannot be mapped into memory: that takes HDF5 with next_observations, and no compat"
        )
    names = ("observations", "actions", "rewards", "next_observations")
    arrays: dict[str, Any] = {key: array(key) for key in names if key in file}
    if "terminals" in file:
        arrays["terminals"] = file["terminals"]
    for key in file.get("metadata", {}):
        arrays[f"metadata/{key}"] = file[f"metadata/{key}"][()]
    return arrays


def as_tensor(array: Array) -> torch.Tensor:
    """A tensor on the array's memory, which may be a file's that nobody writes to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array)


def _from_neorl(file: Mapping[str, Any]) -> dict[str, Array]:
    """NeoRL's arrays by D4RL's names; `index` holds the rows at which trajectories begin.

    Its `done` does not tell an end from the step limit: one at the last step that is allowed is a time-out.
    """
    names = {"obs": "observations", "action": "actions", "reward": "rewards", "next_obs": "next_observations"}
    arrays = {ours: np.asarray(file[theirs]) for theirs, ours in names.items() if theirs in file}
    if "done" in file:
        done = np.asarray(file["done"]).reshape(-1)
        starts = np.asarray(file["index"]).reshape(-1) if "index" in file else np.zeros(1, np.int64)
        if starts.dtype.kind not in "iu" or starts[:1].any() or (np.diff(starts) < 1).any():
            raise ValueError("index does not hold the first rows of trajectories")
        ends = np.append(starts[1:], len(done)) - 1
        arrays["timeouts"] = np.zeros(len(done), bool)
        arrays["timeouts"][ends] = (ends - starts + 1 >= MAX_EPISODE_STEPS) | (done[ends] == 0)
        arrays["terminals"] = np.where(arrays["timeouts"], 0, done)
    return arrays


class Reader:
    """Reads arrays of a file and checks each against the first."""

    def __init__(self, path: str, file: Mapping[str, Any]) -> None:
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
        array: Array = np.asanyarray(stored)
        if array.dtype.kind not in "fiub":
            raise InputError(f"{self._path}: {key} must be numbers, got {array.dtype}")
        if ndim == 1 and array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        if array.ndim != ndim or 0 in array.shape[1:]:
            expected = "[n]" if ndim == 1 else "[n, dim]"
            raise InputError(f"{self._path}: {key} must be {expected}, got shape {array.shape}")
        if self._rows is None:
            self._rows, self._dim = len(array), array.shape[-1]
        if len(array) != self._rows:
            raise InputError(f"{self._path}: {key} has {len(array)} rows, observations {self._rows}")
        if key == "next_observations" and array.shape[1] != self._dim:
            raise InputError(f"{self._path}: {key} has {array.shape[1]} columns, observations {self._dim}")
        return array

    def floats(self, key: str, ndim: int) -> Array:
        """A float32 array, every value finite; a copy, unless it is mapped."""
        array = self._read(key, ndim)
        if not isinstance(array, np.memmap) or array.dtype != np.float32:
            with np.errstate(over="ignore"):
                array = array.astype(np.float32)
        row = first_not_finite(as_tensor(array))
        if row is not None:
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
        if isinstance(group, h5py.Group):
            items = dict(group.items())
        else:
            # A dictionary's or an npz file's keys are flat.
            names = [key for key in self._file if str(key).startswith("metadata/")]
            items = {name.removeprefix("metadata/"): np.asarray(self._file[name]) for name in names}
        found: dict[str, str | float] = {}
        for key, item in items.items():
            value = item[()] if getattr(item, "shape", None) == () else None
            if isinstance(value, bytes):
                found[key] = value.decode("utf-8", "replace")
            elif isinstance(value, str):
                found[key] = str(value)
            elif isinstance(value, (np.integer, np.floating)):
                found[key] = value.item()
        return found


@contextlib.contextmanager
def new_file(path: Path, metadata: dict[str, Any]) -> Iterator[Any]:
    """An HDF5 file to be filled, which is there when it is whole."""
    with atomic_path(path) as temporary:
        try:
            with h5py.File(temporary, "w", locking=False) as file:
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


def step_limits(terminals: Array, after_terminal: int, limit: int | None = None) -> Array:
    """Time-outs of a file that has none: rows that complete `limit` steps, by default `MAX_EPISODE_STEPS`.

    `after_terminal` is the step count after a terminal; d4rl.qlearning_dataset counts from 1 there.
    """
    limit = limit or MAX_EPISODE_STEPS
    timeouts = np.zeros_like(terminals)
    start, count = 0, 0
    for end in [*np.flatnonzero(terminals), len(terminals) - 1]:
        timeouts[start + limit - 1 - count : end + 1 : limit] = True
        start, count = end + 1, 0 if timeouts[end] else after_terminal
    return timeouts


def check_file(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Raise `InputError` where a file cannot be `path`, to be told before the work."""
    path = Path(path)
    if path.suffix not in (".hdf5", ".h5", ".npz"):
        raise InputError(f"cannot write {path}: the file's name must end in .hdf5, .h5 or .npz")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already; choose another file, or replace it with --overwrite")


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Write arrays, numbers and texts by their keys, to .npz or else to HDF5, uncompressed, atomically."""
    # Made in memory: on a full disk HDF5 itself prints a traceback for every array.
    content = io.BytesIO()
    if Path(path).suffix == ".npz":
        np.savez(content, allow_pickle=False, **arrays)
    else:
        with h5py.File(content, "w") as file:
            for name, array in arrays.items():
                file[name] = array
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())
