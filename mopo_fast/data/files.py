"""Read files, or arrays under D4RL's names, as checked `Transitions`."""

import contextlib
import math
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mopo_fast.config import COMPATS, Compat
from mopo_fast.data import d4rl, trajectories
from mopo_fast.data.formats import format_of
from mopo_fast.data.hdf5 import open_hdf5
from mopo_fast.data.local import MINARI_PREFIX
from mopo_fast.data.names import ALIASES, MAX_EPISODE_STEPS, find_names, rename
from mopo_fast.data.npz import open_npz
from mopo_fast.data.parquet import open_parquet
from mopo_fast.data.stored import Stored, check_fits, is_kept, reading
from mopo_fast.data.transitions import NEXT_OBSERVATIONS, NEXT_ROW, QLEARNING, Transitions, first_not_finite
from mopo_fast.errors import InputError

Array = npt.NDArray[Any]


def load_file(
    path: str | os.PathLike[str],
    *,
    compat: Compat | None = None,
    name: str | None = None,
    memory_map: bool = False,
) -> Transitions:
    """Load transitions from a file.

    The file holds observations, actions, rewards, terminals and optionally timeouts and next_observations, by
    these names or those of `names.ALIASES`, such as obs, next_obs and dones.

    By default every transition gets its true successor: the row of `next_observations`, or without them the
    next row's observation. In the latter case rows without a successor (the last row, and rows that end an
    episode) are dropped. compat="d4rl" reproduces `d4rl.qlearning_dataset` bit for bit: the successor is the
    next row's observation even after a terminal, and only time-outs and the last row are dropped. It takes
    rows in the order in which they are stored. compat="offlinerl-kit" reproduces OfflineRL-Kit's loader
    (offlinerlkit/utils/load_dataset.py): true successors as by default, without time-outs and the last row.

    NeoRL's npz files (obs, action, reward, next_obs, done, index) have the time-outs that follow from their
    index. Their observations begin with the x position, which D4RL and the environments leave out: 12
    dimensions for hopper, 18 for halfcheetah and walker2d.

    Args:
        path: a .npz file, a .pkl file (list of trajectories, see `trajectories.read`), a .parquet file with
            vectors as lists, or HDF5 with any other ending.
        compat: None for true successors, "d4rl" or "offlinerl-kit".
        name: name of the data; by default the one in a locally collected file's metadata, or the file's stem.
        memory_map: leave all arrays but the terminals in the file and read them when they are used, for sets
            larger than the memory. The file must be uncompressed float32 HDF5 with next_observations, as
            `collect` and `mopo-fast convert` write it.

    Returns:
        float32 transitions on the CPU.

    Raises:
        InputError: the file is missing, truncated or not in this layout, or a value is not finite.
    """
    path = Path(path)
    with open_file(path) as file:
        arrays = _mapped(path, file, compat) if memory_map else file
        data = from_arrays(arrays, compat=compat, name=name, source=str(path))
    if not data.name:
        local_name = str(data.info["metadata"].get("name", ""))
        data.name = local_name if local_name.endswith("-local") else path.stem
    data.info = {"path": str(path), **data.info}
    d4rl.check_rows(path, name, data.info["complete_rows"])
    return data.validate()


def from_arrays(
    arrays: Mapping[str, Any],
    *,
    compat: Compat | None = None,
    name: str | None = None,
    source: str = "the data set",
    max_episode_steps: int | None = None,
) -> Transitions:
    """Make transitions of arrays under D4RL's names, by the rules of `load_file`.

    Args:
        arrays: the arrays, by name.
        compat: rule by which successors are found, see `load_file`.
        name: name of the data.
        source: name of the arrays in errors.
        max_episode_steps: step limit for arrays without time-outs; None is `MAX_EPISODE_STEPS`.

    Raises:
        InputError: an array is missing, has a wrong shape or type, or a value that is not finite.
    """
    if compat is not None and compat not in COMPATS:
        raise InputError(f"compat must be None or one of {', '.join(COMPATS)}, got {compat!r}")
    reader = Reader(source, arrays)
    arrays = reader.file
    known = "next_observations" in arrays
    stored = known and compat != "d4rl"
    successor = ("next_observations",) if known else ()
    picked, keeps_terminals = compat is not None or not known, stored or compat == "d4rl"
    reader.check_memory(("observations", "actions", "rewards", "terminals", "timeouts", *successor), picked)
    observations = reader.floats("observations", 2)
    actions = reader.floats("actions", 2)
    rewards = reader.floats("rewards", 1)
    terminals = reader.flags("terminals")
    timeouts = reader.flags("timeouts") if "timeouts" in arrays else None
    ends = np.flatnonzero(terminals if timeouts is None else terminals | timeouts)
    keep: Array | slice = slice(None)
    if picked:
        if timeouts is None:
            # Other code counts on from 1 after a terminal whose row it keeps.
            timeouts = step_limits(terminals, 1 if keeps_terminals else 0, max_episode_steps)
        keep = ~timeouts if keeps_terminals else ~(timeouts | terminals)
        keep[-1:] = False
        # An episode ends where the next row is left out.
        timeouts = np.append(~keep[1:], True)[keep] & ~terminals[keep]
        keep = np.flatnonzero(keep)
    contradicted = 0
    if stored:
        rule = NEXT_OBSERVATIONS
        successors = reader.floats("next_observations", 2)[keep]
    else:
        rule = QLEARNING if compat == "d4rl" else NEXT_ROW
        assert not isinstance(keep, slice)
        successors = observations[keep + 1]
        if known:
            true = reader.floats("next_observations", 2)[keep]
            contradicted = int(((true != successors).any(axis=1) & ~terminals[keep]).sum())
    data = Transitions(
        observations=as_tensor(observations[keep]),
        actions=as_tensor(actions[keep]),
        rewards=as_tensor(rewards[keep]),
        next_observations=as_tensor(successors),
        terminals=as_tensor(terminals[keep]),
        timeouts=None if timeouts is None else as_tensor(timeouts),
        name=name or "",
        info={
            "rows": len(rewards),
            "complete_rows": int(ends[-1]) + 1 if len(ends) else 0,
            "terminals_left_out": int(terminals.sum()) - int(terminals[keep].sum()),
            "successors": rule,
            "contradicted": contradicted,
            "memory_mapped": isinstance(observations, np.memmap),
            "metadata": reader.metadata(),
        },
    )
    if len(data) == 0:
        raise InputError(
            f"{source} has {len(rewards)} rows, none of them with a successor; give longer episodes"
        )
    return data


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[Mapping[str, Any]]:
    """Open a data file as a mapping from keys to arrays.

    Arrays of HDF5, npz and Parquet files are read when they are used.

    Raises:
        InputError: the file is missing or damaged in any way.
    """
    if not path.is_file():
        raise InputError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    kind = format_of(path)
    if kind == "pkl":
        with reading(path, "pickle"):
            found = trajectories.read(path)
        yield found
    elif kind == "npz":
        with open_npz(path) as file:
            yield file
    elif kind == "parquet":
        with open_parquet(path) as file:
            yield file
    else:
        with open_hdf5(path) as file:
            yield file


def _mapped(path: Path, file: Mapping[str, Any], compat: Compat | None) -> dict[str, Any]:
    """Return the arrays of an HDF5 file, with all but the flags mapped into memory, and its metadata."""
    names = find_names(file, str(path))
    if format_of(path) != "hdf5" or "next_observations" not in names or compat is not None:
        raise InputError(
            f"{path} cannot be mapped into memory; that needs HDF5 with next_observations, and no compat"
            " (--data.compat None)"
        )
    arrays = dict(file)
    for key in (key for name, key in names.items() if name not in ("terminals", "timeouts")):
        stored = file[key]
        if stored.offset is None or stored.dtype != np.float32:
            raise InputError(
                f"{path}: {key} must be uncompressed float32 to be mapped into memory; convert the file with"
                " `mopo-fast convert`"
            )
        arrays[key] = stored.map(path)
    return arrays


def as_tensor(array: Array) -> torch.Tensor:
    """Return a tensor that shares the array's memory, which may be a read-only mapping of a file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array)


class Reader:
    """Reads the arrays of a data set, and checks each against the first one.

    Args:
        source: name of the data set in errors.
        file: its arrays, by key.

    Attributes:
        file: the arrays under D4RL's names, see `rename`.
    """

    def __init__(self, source: str, file: Mapping[str, Any]) -> None:
        self._source, self._keys = source, list(file)
        read = {*find_names(file, source).values(), "index"}
        plain = {key: self._plain(key, item) if key in read else item for key, item in file.items()}
        self.file = rename(plain, source)
        self._rows: int | None = None

    def _read(self, key: str, ndim: int) -> Array:
        # pandas users store a column for each dimension, which no reader can name.
        is_parquet = ndim == 2 and self._source.endswith(".parquet")
        lists = "; in a Parquet file it is one column, with a list of numbers in each row" * is_parquet
        if key not in self.file:
            if key == "observations" and "episode_0/observations" in self._keys:
                raise InputError(
                    f"{self._source} is a file of Minari's; give the name of its data set, {MINARI_PREFIX}ID,"
                    " such as `minari list local` prints"
                )
            keys = ", ".join(sorted({str(key).split("/")[0] for key in self._keys})) or "nothing"
            names = " or ".join(map(repr, (key, *ALIASES[key])))
            raise InputError(
                f"{self._source} lacks {key!r}, it has {keys}; name it {names}, or add it{lists}"
            )
        stored = self.file[key]
        # Groups, HDF5's null arrays and foreign members of an archive have no shape.
        if getattr(stored, "shape", None) is None:
            raise InputError(f"{self._source}: {key} is not an array")
        if not isinstance(stored, Stored):
            stored = self._as_array(key, stored)
        # All checks come before the array is read.
        if stored.dtype.kind not in "fiub":
            raise InputError(f"{self._source}: {key} must be numbers, got {stored.dtype}")
        shape = stored.shape
        if ndim == 1 and len(shape) == 2 and shape[1] == 1:
            shape = shape[:1]
        if len(shape) != ndim or 0 in shape[1:]:
            expected = "[n]" if ndim == 1 else "[n, dim]"
            raise InputError(f"{self._source}: {key} must be {expected}, got shape {shape}{lists}")
        if self._rows is None:
            self._rows, self._dim = shape[0], shape[-1]
        if shape[0] != self._rows:
            raise InputError(
                f"{self._source}: {key} has {shape[0]} rows, observations {self._rows}; they must be equal"
            )
        if key == "next_observations" and shape[1] != self._dim:
            raise InputError(
                f"{self._source}: {key} has {shape[1]} columns, observations {self._dim}; they must be equal"
            )
        array = stored.load() if isinstance(stored, Stored) else stored
        return array[:, 0] if array.ndim > ndim else array

    def _plain(self, key: str, value: Any) -> Any:
        """Return a list as an array, and a tensor without its gradient on the CPU."""
        if isinstance(value, torch.Tensor):
            return value.detach().cpu()
        return self._as_array(key, value) if isinstance(value, (list, tuple)) else value

    def _as_array(self, key: str, value: Any) -> Array:
        try:
            return np.asanyarray(value)
        except InputError:
            raise
        # Arrays of other libraries may raise anything.
        except Exception as error:
            raise InputError(f"{self._source}: {key} is not an array ({error})") from error

    def check_memory(self, keys: Collection[str], copied: bool) -> None:
        """Raise `InputError` where the named arrays, as float32 and flags, do not fit into memory.

        Args:
            keys: names of the arrays; missing ones count nothing.
            copied: rows will be picked from the arrays, which takes their size a second time.
        """
        arrays = {key: self.file[key] for key in keys if isinstance(self.file.get(key), Stored)}
        sizes = {key: 1 if key in ("terminals", "timeouts") else 4 for key in arrays}
        kept = sum(math.prod(array.shape or (0,)) * sizes[key] for key, array in arrays.items())
        # While the largest array is converted, memory also holds it in its own type.
        largest = max((array.nbytes for array in arrays.values()), default=0)
        check_fits(
            self._source,
            kept * (1 + copied) + largest,
            "--memory-map (memory_map=True) leaves uncompressed HDF5 in the file",
        )

    def floats(self, key: str, ndim: int) -> Array:
        """Read an array as float32 and check that it is finite. Mapped float32 arrays are not copied."""
        array = self._read(key, ndim)
        if not isinstance(array, np.memmap) or array.dtype != np.float32:
            # Arrays read from a file are copies already. Values beyond float32 become infinite, see below.
            with np.errstate(all="ignore"):
                array = array.astype(np.float32, copy=not isinstance(self.file[key], Stored))
        row = first_not_finite(as_tensor(array))
        if row is not None:
            raise InputError(
                f"{self._source}: {key} is not a finite float32 number at row {row}; drop or correct it"
            )
        return array

    def flags(self, key: str) -> Array:
        """Read an array of flags, stored as bool or as 0 and 1."""
        array = self._read(key, 1)
        # A file may store any byte as bool, and NumPy does not check it.
        if array.dtype == np.bool_:
            array = array.view(np.uint8)
        flags = array.astype(bool)
        if not np.array_equal(array, flags):
            row = int(np.flatnonzero(array != flags)[0])
            raise InputError(f"{self._source}: {key} must be 0 or 1, got {array[row]} at row {row}")
        return flags

    def metadata(self) -> dict[str, str | float]:
        """Return the texts and numbers whose keys begin with "metadata/"."""
        found: dict[str, str | float] = {}
        for key, item in self.file.items():
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
    """Compute the time-outs of a data set that has none, [n] bool: rows that complete `limit` steps.

    Args:
        terminals: [n] bool.
        after_terminal: step count with which an episode begins after a terminal; 1 reproduces
            d4rl.qlearning_dataset, 0 is right.
        limit: step limit, by default `MAX_EPISODE_STEPS`.
    """
    limit = limit or MAX_EPISODE_STEPS
    timeouts = np.zeros_like(terminals)
    start, count = 0, 0
    for end in [*np.flatnonzero(terminals), len(terminals) - 1]:
        timeouts[start + limit - 1 - count : end + 1 : limit] = True
        start, count = end + 1, 0 if timeouts[end] else after_terminal
    return timeouts
