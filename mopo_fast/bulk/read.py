"""Read a folder of shards: lazily, as one set of transitions; verified; summed up."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mopo_fast.bulk.files import as_transitions, check_values, file_sha256, read_shard
from mopo_fast.bulk.plan import MANIFEST, Manifest, Plan, ShardRecord, count_rows, read_manifest
from mopo_fast.data.stored import Array
from mopo_fast.data.transitions import Transitions
from mopo_fast.errors import InputError
from mopo_fast.utils.atomic import regular_file
from mopo_fast.utils.progress import progress_bar


class Rollouts:
    """The transitions of a folder of shards, read when they are asked for.

    Shards in uncompressed HDF5 are mapped into memory; of others, the last one read is kept.

    Attributes:
        manifest: see `read_manifest`.
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

    @property
    def name(self) -> str:
        return self._folder.name

    def shard(self, number: int) -> Transitions:
        """Return one shard's transitions."""
        if number not in self._open:
            path = self._folder / self.manifest.plan.file(number)
            arrays, metadata = read_shard(path, self.manifest.plan, number)
            made = as_transitions(arrays, self.name, metadata)
            self._sizes = self._sizes or (made.obs_dim, made.act_dim)
            if self._sizes != (made.obs_dim, made.act_dim):
                raise InputError(f"{path} has other dimensions than other shards")
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
    """Open the transitions that `mopo-fast rollout --out FOLDER` has written, without reading them yet.

    Raises:
        InputError: the folder has no manifest, or not all of its shards are there yet.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    rows, count = sum(record.rows for record in manifest.shards), manifest.plan.count
    if rows != count:
        raise InputError(f"{folder} has {rows:,} of {count:,} transitions; the command that began it goes on")
    return Rollouts(folder, manifest)


def verify(folder: str | os.PathLike[str], *, quiet: bool = False) -> Manifest:
    """Read every shard and compare it with the manifest: bytes, arrays, every value's range, rewards, counts.

    Raises:
        InputError: names every shard that is missing or not what it was.
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
            + "\ndelete these, and the command that made them makes them again"
        )
    open_rollouts(folder)
    return manifest


def _verify_shard(folder: Path, plan: Plan, record: ShardRecord) -> None:
    path, shard = folder / record.file, plan.shard(record.file)
    size = regular_file(path).st_size
    if file_sha256(path) != record.sha256:
        raise InputError(f"{path} has other bytes than when it was written")
    arrays, _ = read_shard(path, plan, shard)
    check_values(path, arrays, plan, shard)
    for name, found in {"bytes": size, **count_rows(arrays, plan.rollout.horizon)}.items():
        value = getattr(record, name)
        # The sums' last digits depend on the order of addition.
        if not (np.isclose(found, value) if name.endswith("_sum") else found == value):
            raise InputError(f"{path}: {MANIFEST} has another {name} than the shard")


def summarise(manifest: Manifest) -> dict[str, Any]:
    """Sum the shards up: counts, means (0 without rows), a histogram of penalties, rows and ends by step."""
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


# Columns of a histogram's longest bar.
_WIDTH = 40


def as_text(summary: dict[str, Any]) -> str:
    """Draw a summary for a terminal: counts, the histogram of penalties, terminations step by step."""
    rows, counts = summary["rows"], summary["penalty_counts"]
    lines = [
        f"{rows:,} transitions of {summary['starts']:,} rollouts, {summary['bytes'] / 2**30:.2f} GiB;"
        f" {summary['non_finite']:,} rollouts cut, not finite",
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
