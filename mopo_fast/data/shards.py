"""Reading a folder of shards that `mopo-fast rollout` has written: lazily, or whole as one data set."""

import dataclasses
import os
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mopo_fast.config import MAX_MEMBERS
from mopo_fast.data.files import as_tensor, open_file
from mopo_fast.data.manifest import MANIFEST, SHARD_ARRAYS, Manifest, Plan, manifest_path, read_manifest
from mopo_fast.data.stored import Array, check_fits, is_kept
from mopo_fast.data.transitions import (
    DATA_ARRAYS,
    NEXT_OBSERVATIONS,
    ROLLOUT_ARRAYS,
    Transitions,
    array_layout,
)
from mopo_fast.errors import InputError
from mopo_fast.utils.atomic import regular_file

# --- a rollout's arrays


def d4rl_arrays(data: Transitions) -> dict[str, Array]:
    """Return a rollout's arrays by their names in a file: those of `Transitions`, and "timeouts".

    A time-out marks the last row of a rollout that did not end in a terminal state.

    Raises:
        InputError: the transitions have no rollout_index, so they are no model rollouts.
    """
    if data.rollout_index is None:
        raise InputError("only model rollouts can be saved: these transitions have no rollout_index")
    arrays = {name: array.cpu().numpy() for name, array in data.arrays().items()}
    last = np.append(np.diff(arrays["rollout_index"]) != 0, True)[: len(data)]
    arrays["timeouts"] = last & ~arrays["terminals"]
    return arrays


def as_transitions(arrays: dict[str, Array], name: str, info: dict[str, Any]) -> Transitions:
    """Return a shard's arrays as transitions that share their memory."""
    tensors: dict[str, Any] = {key: as_tensor(arrays[key]) for key in ROLLOUT_ARRAYS}
    return Transitions(**tensors, name=name, info=info)


# --- one shard


def read_shard(path: Path, plan: Plan, shard: int) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read a shard's arrays and metadata; check the arrays' names, types and shapes against the plan.

    Args:
        path: file of the shard.
        plan: plan of its folder.
        shard: number of the shard.

    Raises:
        InputError: the file is missing or damaged, or holds other arrays than the plan says.
    """
    regular_file(path)
    arrays, metadata = read_file(path)
    if arrays.keys() != set(SHARD_ARRAYS):
        names = ", ".join(sorted(arrays.keys() ^ set(SHARD_ARRAYS)))
        raise InputError(
            f"{path} must hold exactly the arrays of a rollout; missing or unknown: {reprlib.repr(names)}"
        )
    for name, array in arrays.items():
        # A row's size, 1 here, is not checked: the plan does not store obs_dim and act_dim.
        row, kind = array_layout(name, 1, 1)
        dtype = torch.empty(0, dtype=kind, device="cpu").numpy().dtype
        ndim, rows = 1 + len(row), plan.rows(shard)
        if array.dtype != dtype or array.ndim != ndim or len(array) != rows or 0 in array.shape:
            raise InputError(
                f"{path}: {name} must be {dtype} of {ndim} dimensions and {rows} rows,"
                f" got {array.dtype} {array.shape}"
            )
    if arrays["observations"].shape != arrays["next_observations"].shape:
        raise InputError(f"{path}: observations and next_observations have different shapes")
    return arrays, metadata


def check_values(path: Path, arrays: dict[str, Array], plan: Plan, shard: int) -> None:
    """Raise `InputError` if a shard's arrays hold a value that no rollout of the plan can have."""
    first = shard << 32
    ranges = {
        "step": (0, plan.rollout.horizon),
        "rollout_index": (first, first + 2**32),
        "members": (-1, MAX_MEMBERS),
        "penalties": (0, np.inf),
    }
    for name, (low, high) in ranges.items():
        if not (arrays[name].min() >= low and arrays[name].max() < high):
            raise InputError(f"{path}: {name} must be from {low} to below {high}")
    for name in ("terminals", "timeouts"):
        # The bytes of a file's bool may be neither 0 nor 1.
        if arrays[name].view(np.uint8).max() > 1:
            raise InputError(f"{path}: {name} holds bytes that are neither 0 nor 1")
    rows = as_transitions(arrays, str(path), {}).validate()
    if not np.array_equal(d4rl_arrays(rows)["timeouts"], arrays["timeouts"]):
        raise InputError(f"{path}: timeouts are not where rollouts end without a terminal")
    coef = plan.rollout.penalty_coef
    expected = arrays["raw_rewards"] - np.float32(coef) * arrays["penalties"]
    at, halt_reward = plan.rollout.truncate_at, plan.rollout.halt_reward
    if at is not None and halt_reward is not None:
        # As the kernels compare, in float32.
        halted = arrays["penalties"] > np.float32(at)
        expected = np.where(halted, np.float32(halt_reward), expected)
        if not arrays["terminals"][halted].all():
            raise InputError(f"{path}: a step with a penalty above {at:g} is not terminal")
    if not np.allclose(arrays["rewards"], expected, rtol=1e-4, atol=1e-4):
        raise InputError(f"{path}: rewards are not raw_rewards - {coef:g} * penalties")


def read_file(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read a shard's arrays and its metadata; arrays in uncompressed HDF5 are memory maps.

    Raises:
        InputError: the file is missing or damaged.
    """
    with open_file(path) as file:
        arrays = {key: item for key, item in file.items() if "/" not in key and item.shape is not None}
        check_fits(path, sum(item.nbytes for item in arrays.values() if item.offset is None), "")
        values = {
            key.removeprefix("metadata/"): np.asarray(item).item()
            for key, item in file.items()
            if key.startswith("metadata/") and item.shape == () and is_kept(item)
        }
        texts = {k: v.decode("utf-8", "replace") for k, v in values.items() if isinstance(v, bytes)}
        found = {k: np.asarray(v) if v.offset is None else v.map(path) for k, v in arrays.items()}
        return found, values | texts


# --- a folder of them


class Rollouts:
    """Transitions of a folder of shards, read when they are accessed.

    Shards in uncompressed HDF5 are memory-mapped. In any other format, the last shard read stays in memory.

    Attributes:
        manifest: manifest of the folder.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self.manifest = folder, manifest
        self._ends = np.cumsum([record.rows for record in manifest.shards], dtype=np.int64)
        self._open: dict[int, Transitions] = {}
        self._sizes: tuple[int, int] | None = None
        mapped = (manifest.plan.format, manifest.plan.compression) == ("hdf5", "none")
        self._keep = len(self._ends) if mapped else 1

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __repr__(self) -> str:
        plan = self.manifest.plan
        return (
            f"Rollouts({str(self._folder)!r}: {len(self):,} transitions in {len(self._ends):,} shards,"
            f" {plan.format}, data set {plan.dataset!r})"
        )

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self._folder.name

    def shard(self, number: int) -> Transitions:
        """Return one shard's transitions."""
        if number not in self._open:
            path = self._folder / self.manifest.plan.file(number)
            arrays, metadata = read_shard(path, self.manifest.plan, number)
            made = as_transitions(arrays, self.name, metadata)
            self._sizes = self._sizes or (made.obs_dim, made.act_dim)
            if self._sizes != (made.obs_dim, made.act_dim):
                raise InputError(f"{path} has another obs_dim or act_dim than the other shards")
            while len(self._open) >= self._keep:
                del self._open[next(iter(self._open))]
            self._open[number] = made
        return self._open[number]

    def __iter__(self) -> Iterator[Transitions]:
        """Iterate over the shards, one after the other."""
        return map(self.shard, range(len(self._ends)))

    def __getitem__(self, index: slice | torch.Tensor | Array) -> Transitions:
        """Copy the transitions at a slice, a mask or indices into memory, in that order."""
        numbers = np.arange(len(self))[np.asarray(index) if not isinstance(index, slice) else index]
        if numbers.ndim != 1:
            raise TypeError("index rollouts with a slice, a mask or indices; for one row use [i : i + 1]")
        shards = np.searchsorted(self._ends, numbers, side="right")
        made: dict[str, torch.Tensor] = {}
        for shard in np.unique(shards) if len(numbers) else [0]:
            places = np.flatnonzero(shards == shard)
            first = 0 if shard == 0 else self._ends[shard - 1]
            rows = torch.from_numpy(numbers[places] - first)
            for name, array in self.shard(int(shard)).arrays().items():
                target = made.setdefault(name, array.new_empty((len(numbers), *array.shape[1:])))
                target[torch.from_numpy(places)] = array[rows]
        whole: dict[str, Any] = made
        return Transitions(**whole, name=self.name, info=dataclasses.asdict(self.manifest.plan))

    def batches(self, size: int, *, seed: int) -> Iterator[Transitions]:
        """Yield batches without end, each of `size` transitions drawn uniformly with replacement."""
        random = np.random.default_rng(seed)
        while True:
            yield self[random.integers(len(self), size=size)]


def open_rollouts(folder: str | os.PathLike[str]) -> Rollouts:
    """Open a folder written by `mopo-fast rollout --out FOLDER`, without reading its shards yet.

    Raises:
        InputError: the folder has no manifest, or some of its shards are not made yet.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    rows, count = sum(record.rows for record in manifest.shards), manifest.plan.count
    if rows != count:
        raise InputError(f"{folder} has {rows:,} of {count:,} transitions; run its command again to go on")
    return Rollouts(folder, manifest)


def load_rollouts(folder: str | os.PathLike[str]) -> Transitions:
    """Read a folder of shards into memory as a data set, with penalised rewards.

    Returns:
        Checked float32 transitions on the CPU, without the arrays that only rollouts have.

    Raises:
        InputError: the folder is unfinished, a shard is damaged, or the transitions do not fit into memory.
    """
    if not os.path.lexists(manifest_path(folder)):
        raise InputError(f"{folder} is a folder without shards, for it has no {MANIFEST}; give a file in it")
    rollouts = open_rollouts(folder)
    plan, first = rollouts.manifest.plan, rollouts.shard(0).arrays()
    rows = {name: first[name][0] for name in DATA_ARRAYS}
    check_fits(folder, len(rollouts) * sum(row.nbytes for row in rows.values()), "")
    whole: dict[str, Any] = {name: row.new_empty((len(rollouts), *row.shape)) for name, row in rows.items()}
    end = 0
    for number, shard in enumerate(rollouts):
        check_values(Path(folder) / plan.file(number), d4rl_arrays(shard), plan, number)
        begin, end = end, end + len(shard)
        for name, array in whole.items():
            array[begin:end] = shard.arrays()[name]
    info = {
        "path": str(folder),
        "rows": len(rollouts),
        "successors": NEXT_OBSERVATIONS,
        "memory_mapped": False,
        "metadata": _metadata(plan),
    }
    return Transitions(**whole, name=rollouts.name, info=info).validate()


def shard_arrays(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read all arrays of a folder of shards into memory, and its settings as metadata/*.

    Raises:
        InputError: the folder is unfinished, a shard is damaged, or the arrays do not fit into memory.
    """
    rollouts = open_rollouts(folder)
    check_fits(folder, sum(record.bytes for record in rollouts.manifest.shards), "")
    metadata = {f"metadata/{name}": value for name, value in _metadata(rollouts.manifest.plan).items()}
    return d4rl_arrays(rollouts[:]) | metadata


def _metadata(plan: Plan) -> dict[str, Any]:
    values = {"dataset": plan.dataset, "mopo_fast": plan.mopo_fast, **dataclasses.asdict(plan.rollout)}
    return {name: value for name, value in values.items() if value is not None}
