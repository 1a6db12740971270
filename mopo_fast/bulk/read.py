"""Reading a folder of shards: lazily or whole as one set of transitions, to verify it, or to summarise it."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mopo_fast.bulk.files import as_transitions, check_values, d4rl_arrays, file_checksum, read_shard
from mopo_fast.bulk.plan import (
    MANIFEST,
    Manifest,
    Plan,
    ShardRecord,
    algorithm_of,
    count_rows,
    manifest_path,
    read_manifest,
)
from mopo_fast.data.stored import Array, check_fits
from mopo_fast.data.transitions import DATA_ARRAYS, Transitions
from mopo_fast.errors import InputError
from mopo_fast.utils.atomic import regular_file
from mopo_fast.utils.machine import size_text
from mopo_fast.utils.progress import progress_bar


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
        "successors": "next_observations",
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


def verify(folder: str | os.PathLike[str], *, quiet: bool = False) -> Manifest:
    """Read every shard and check its bytes, arrays, values and statistics against the manifest.

    Args:
        folder: folder of the shards.
        quiet: show no progress bar.

    Returns:
        The manifest.

    Raises:
        InputError: shards are missing, damaged or changed; the message names each of them.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    wrong = []
    with progress_bar("shards", len(manifest.shards), quiet=quiet) as bar:
        for record in manifest.shards:
            try:
                _verify_shard(folder, manifest.plan, record)
            except InputError as error:
                wrong.append(str(error))
            bar.advance()
    if wrong:
        raise InputError(
            "\n".join([f"{len(wrong)} of {len(manifest.shards)} shards are not sound:", *wrong])
            + "\ndelete these shards and run the command that made them again"
        )
    open_rollouts(folder)
    return manifest


def _verify_shard(folder: Path, plan: Plan, record: ShardRecord) -> None:
    path, shard = folder / record.file, plan.shard(record.file)
    size = regular_file(path).st_size
    algorithm = algorithm_of(record.checksum)
    if file_checksum(path, algorithm) != record.checksum:
        raise InputError(f"{path} has changed: its {algorithm} checksum is not that in the manifest")
    arrays, _ = read_shard(path, plan, shard)
    check_values(path, arrays, plan, shard)
    for name, found in {"bytes": size, **count_rows(arrays, plan.rollout.horizon)}.items():
        value = getattr(record, name)
        # The last digits of a sum depend on the order of addition.
        if not (np.isclose(found, value) if name.endswith("_sum") else found == value):
            raise InputError(f"{path}: the manifest has {name} {value!r}, the shard has {found!r}")


def summarise(manifest: Manifest) -> dict[str, Any]:
    """Sum up the statistics of all shards.

    Returns:
        "rows", "bytes", "starts" and "non_finite", summed; "reward_mean" and "penalty_mean", 0 if there are
        no rows; "penalty_edges" and "penalty_counts"; "rows_of_step" and "terminals_of_step".
    """
    shards = manifest.shards
    rows = sum(record.rows for record in shards)

    def added(name: str) -> list[int]:
        return [sum(values) for values in zip(*(getattr(record, name) for record in shards), strict=True)]

    return {
        "rows": rows,
        "bytes": sum(record.bytes for record in shards),
        "starts": sum(record.starts for record in shards),
        "non_finite": sum(record.non_finite for record in shards),
        "reward_mean": sum(record.reward_sum for record in shards) / max(1, rows),
        "penalty_mean": sum(record.penalty_sum for record in shards) / max(1, rows),
        "penalty_edges": manifest.penalty_edges,
        "penalty_counts": added("penalty_counts"),
        "rows_of_step": added("rows_of_step"),
        "terminals_of_step": added("terminals_of_step"),
    }


# Width of a histogram's longest bar in columns.
_WIDTH = 40


def as_text(summary: dict[str, Any]) -> str:
    """Format a summary for a terminal: counts, histogram of penalties, terminations at each step."""
    rows, counts = summary["rows"], summary["penalty_counts"]
    lines = [
        f"{rows:,} transitions of {summary['starts']:,} rollouts, {size_text(summary['bytes'])};"
        f" {summary['non_finite']:,} rollouts ended at a non-finite prediction",
        f"mean penalised reward {summary['reward_mean']:.4g}, mean penalty {summary['penalty_mean']:.4g}",
        "",
        "penalty",
    ]
    edges = ["", *(f"{edge:.3g}" for edge in summary["penalty_edges"])]
    filled = [i for i, count in enumerate(counts) if count]
    most = max(counts, default=0)
    for i in range(filled[0], filled[-1] + 1) if filled else ():
        lines.append(f"  from {edges[i]:>8} {'█' * round(_WIDTH * counts[i] / most):<{_WIDTH}} {counts[i]:,}")
    lines += ["", "ended by termination"]
    for step, (here, ended) in enumerate(
        zip(summary["rows_of_step"], summary["terminals_of_step"], strict=True)
    ):
        share = ended / here if here else 0.0
        lines.append(f"  step {step + 1:>3} {'█' * round(_WIDTH * share):<{_WIDTH}} {share:.2%} of {here:,}")
    return "\n".join(lines)
