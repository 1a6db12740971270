"""Files, or arrays by D4RL's names, to `Transitions`, checked on the way in; arrays to HDF5."""

import contextlib
import math
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from mopo_fast.data import trajectories
from mopo_fast.data.hdf5 import open_hdf5
from mopo_fast.data.hdf5_writer import Output, hdf5_pieces, write_pieces
from mopo_fast.data.npz import open_npz
from mopo_fast.data.stored import Stored, check_fits, is_kept, reading
from mopo_fast.data.transitions import Transitions, first_not_finite
from mopo_fast.errors import InputError
from mopo_fast.utils.atomic import atomic_path

Array = npt.NDArray[Any]
Compat = Literal["d4rl"]

MAX_EPISODE_STEPS = 1000
"""Where a file has no `timeouts`: the step limit of every D4RL MuJoCo environment."""


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
    stored = compat is None and "next_observations" in arrays
    successor = ("next_observations",) if stored else ()
    reader.check_memory(
        ("observations", "actions", "rewards", "terminals", "timeouts", *successor), not stored
    )
    observations = reader.floats("observations", 2)
    actions = reader.floats("actions", 2)
    rewards = reader.floats("rewards", 1)
    terminals = reader.flags("terminals")
    timeouts = reader.flags("timeouts") if "timeouts" in arrays else None
    if stored:
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
    if path.suffix == ".pkl":
        with reading(path, "pickle"):
            found = trajectories.read(path)
        yield found
    elif path.suffix == ".npz":
        with open_npz(path) as file:
            if "obs" in file and "observations" not in file:
                with reading(path, "npz"):
                    file = _from_neorl(file)
            yield file
    else:
        with open_hdf5(path) as file:
            yield file


def _mapped(path: Path, file: Mapping[str, Any], compat: Compat | None) -> dict[str, Any]:
    """The file's arrays where they are, and its metadata."""
    names = ("observations", "actions", "rewards", "next_observations")
    if path.suffix in (".npz", ".pkl") or "next_observations" not in file or compat is not None:
        raise InputError(
            f"{path} cannot be mapped into memory: that takes HDF5 with next_observations, and no compat"
        )
    arrays = dict(file)
    for key in names:
        stored = file.get(key)
        if stored is not None and (stored.offset is None or stored.dtype != np.float32):
            raise InputError(
                f"{path}: {key} cannot be mapped into memory, it must be uncompressed float32;"
                " `mopo-fast convert` writes without compression"
            )
        if stored is not None:
            arrays[key] = stored.map(path)
    return arrays


def as_tensor(array: Array) -> torch.Tensor:
    """A tensor on the array's memory, which may be a file's that nobody writes to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array)


def _from_neorl(file: Mapping[str, Any]) -> dict[str, Any]:
    """NeoRL's arrays by D4RL's names; `index` holds the rows at which trajectories begin.

    Its `done` does not tell an end from the step limit: one at the last step that is allowed is a time-out.
    """
    names = {"obs": "observations", "action": "actions", "reward": "rewards", "next_obs": "next_observations"}
    arrays = {ours: file[theirs] for theirs, ours in names.items() if theirs in file}
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
            keys = ", ".join(sorted({str(key).split("/")[0] for key in self._file})) or "nothing"
            raise InputError(f"{self._path} lacks {key!r}; it has {keys}")
        stored = self._file[key]
        # A group, an HDF5 null or a foreign member of an archive.
        if getattr(stored, "shape", None) is None:
            raise InputError(f"{self._path}: {key} is not an array")
        if not isinstance(stored, Stored):
            stored = self._as_array(key, stored)
        # From here on a file's array is known, and only then it is read.
        if stored.dtype.kind not in "fiub":
            raise InputError(f"{self._path}: {key} must be numbers, got {stored.dtype}")
        shape = stored.shape
        if ndim == 1 and len(shape) == 2 and shape[1] == 1:
            shape = shape[:1]
        if len(shape) != ndim or 0 in shape[1:]:
            expected = "[n]" if ndim == 1 else "[n, dim]"
            raise InputError(f"{self._path}: {key} must be {expected}, got shape {shape}")
        if self._rows is None:
            self._rows, self._dim = shape[0], shape[-1]
        if shape[0] != self._rows:
            raise InputError(f"{self._path}: {key} has {shape[0]} rows, observations {self._rows}")
        if key == "next_observations" and shape[1] != self._dim:
            raise InputError(f"{self._path}: {key} has {shape[1]} columns, observations {self._dim}")
        array = stored.load() if isinstance(stored, Stored) else stored
        return array[:, 0] if array.ndim > ndim else array

    def _as_array(self, key: str, value: Any) -> Array:
        try:
            return np.asanyarray(value)
        except InputError:
            raise
        # Arrays of other libraries fail in their own ways.
        except Exception as error:
            raise InputError(f"{self._path}: {key} is not an array ({error})") from error

    def check_memory(self, keys: Collection[str], copied: bool) -> None:
        """Raise `InputError` where the arrays of these keys, as float32 and flags, do not fit into memory.

        Args:
            copied: rows are picked from them, which takes their size again.
        """
        arrays = {key: self._file[key] for key in keys if isinstance(self._file.get(key), Stored)}
        sizes = {key: 1 if key in ("terminals", "timeouts") else 4 for key in arrays}
        kept = sum(math.prod(array.shape or (0,)) * sizes[key] for key, array in arrays.items())
        # The largest is there in its own type too while it is converted.
        largest = max((array.nbytes for array in arrays.values()), default=0)
        check_fits(
            self._path,
            kept * (1 + copied) + largest,
            "--memory-map (memory_map=True) leaves uncompressed HDF5 in the file",
        )

    def floats(self, key: str, ndim: int) -> Array:
        """A float32 array, every value finite; a copy, unless it is mapped."""
        array = self._read(key, ndim)
        if not isinstance(array, np.memmap) or array.dtype != np.float32:
            # Arrays from a file are copies already; values beyond float32 are found below.
            with np.errstate(all="ignore"):
                array = array.astype(np.float32, copy=not isinstance(self._file[key], Stored))
        row = first_not_finite(as_tensor(array))
        if row is not None:
            raise InputError(f"{self._path}: {key} is not a finite float32 number at row {row}")
        return array

    def flags(self, key: str) -> Array:
        """A bool array, stored as bool or as 0 and 1."""
        array = self._read(key, 1)
        # A file's bool may be any byte, which NumPy would take for granted.
        if array.dtype == np.bool_:
            array = array.view(np.uint8)
        flags = array.astype(bool)
        if not np.array_equal(array, flags):
            row = int(np.flatnonzero(array != flags)[0])
            raise InputError(f"{self._path}: {key} must be 0 or 1, got {array[row]} at row {row}")
        return flags

    def metadata(self) -> dict[str, str | float]:
        """The texts and numbers by keys that begin with "metadata/"."""
        found: dict[str, str | float] = {}
        for key, item in self._file.items():
            if not str(key).startswith("metadata/"):
                continue
            name = str(key).removeprefix("metadata/")
            if isinstance(item, Stored) and not is_kept(item):
                continue
            array = self._as_array(key, item)
            value: Any = array[()] if array.shape == () else None
            if isinstance(value, bytes):
                found[name] = value.decode("utf-8", "replace")
            elif isinstance(value, str):
                found[name] = str(value)
            elif isinstance(value, (np.integer, np.floating)):
                found[name] = value.item()
        return found


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
    with atomic_path(path) as temporary:
        if Path(path).suffix != ".npz":
            write_pieces(temporary, hdf5_pieces(arrays))
            return
        with contextlib.closing(Output(temporary)) as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.check()
