"""Rollouts in bulk: shards in a folder, each by itself, and the manifest that lists them.

Shard k holds transitions k * shard_rows, ... of rollouts k * 2^32, k * 2^32 + 1, ...: it depends on the plan
and k alone. A shard appears whole, by a rename; the manifest is written anew after each. So a folder whose
process was killed holds whole shards, and the same call makes those that are missing.
"""

import dataclasses
import hashlib
import json
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mopo_fast import __version__
from mopo_fast.atomic import read_json, sweep, write_json
from mopo_fast.buffer import RingBuffer
from mopo_fast.config import Compression, RolloutDtype, ShardFormat
from mopo_fast.data.files import Array, as_tensor
from mopo_fast.data.transitions import Transitions
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.generate import GenerateConfig, Generator, check_count, d4rl_arrays, generate_config
from mopo_fast.lock import locked
from mopo_fast.policy import Actor
from mopo_fast.progress import progress_bar
from mopo_fast.shard_files import COMPRESSIONS, file_sha256, import_pyarrow, read_file, write_file
from mopo_fast.tasks import Task
from mopo_fast.tensors import tensors_sha256

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
# Of the histogram of penalties: ten bins a decade, then those below and above.
PENALTY_EDGES = np.geomspace(1e-4, 1e4, 81)


@dataclass(frozen=True)
class Plan:
    """All that decides the shards' bytes, but for the processor: kernels of other instruction sets round
    differently."""

    count: int
    shard_rows: int
    format: ShardFormat
    compression: Compression
    rollout: GenerateConfig
    dataset: str
    observations_sha256: str
    dynamics_sha256: str
    policy_sha256: str
    mopo_fast: str = __version__

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_rows)

    def rows(self, shard: int) -> int:
        """Transitions in it; the last has what is left."""
        return min(self.shard_rows, self.count - shard * self.shard_rows)

    def file(self, shard: int) -> str:
        return f"shard-{shard:06d}.{self.format}"

    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


# What the manifest says of one shard.
Record = dict[str, Any]


def make_shard(
    generator: Generator, ring: RingBuffer, plan: Plan, shard: int, advance: Callable[[int], None]
) -> tuple[Transitions, dict[str, Any]]:
    """The shard's transitions, which are the first rows of `ring`, and its metadata."""
    ring.clear()
    rows = plan.rows(shard)
    starts, non_finite = generator.fill(ring, rows, shard << 32, advance)
    metadata = {"plan": plan.sha256(), "shard": shard, "starts": starts, "non_finite": non_finite}
    return ring.storage[:rows], metadata


def write_shard(folder: Path, plan: Plan, rows: Transitions, metadata: dict[str, Any]) -> Record:
    """Write one shard, whole or not at all; what the manifest says of it.

    Raises:
        InputError: it cannot be written.
    """
    arrays = d4rl_arrays(rows)
    shard = metadata["shard"]
    described = {
        **metadata,
        **{name: value for name, value in dataclasses.asdict(plan.rollout).items() if value is not None},
        "dataset": plan.dataset,
        "mopo_fast": plan.mopo_fast,
    }
    size, digest = write_file(folder / plan.file(shard), arrays, described, plan.compression)
    return _record(plan, arrays, metadata, size, digest)


def _record(plan: Plan, arrays: dict[str, Array], metadata: dict[str, Any], size: int, digest: str) -> Record:
    horizon, step, ended = plan.rollout.horizon, arrays["step"], arrays["terminals"]
    bins = np.searchsorted(PENALTY_EDGES.astype(np.float32), arrays["penalties"], side="right")
    return {
        "file": plan.file(metadata["shard"]),
        "rows": len(step),
        "bytes": size,
        "sha256": digest,
        "starts": int(metadata["starts"]),
        "non_finite": int(metadata["non_finite"]),
        "reward_sum": float(arrays["rewards"].sum(dtype=np.float64)),
        "penalty_sum": float(arrays["penalties"].sum(dtype=np.float64)),
        "penalty_counts": np.bincount(bins, minlength=len(PENALTY_EDGES) + 1).tolist(),
        "rows_of_step": np.bincount(step, minlength=horizon).tolist(),
        "terminals_of_step": np.bincount(step[ended], minlength=horizon).tolist(),
    }


def generate_shards(
    run: str | os.PathLike[str],
    data: Transitions,
    out: str | os.PathLike[str],
    *,
    count: int,
    shard_rows: int = 1_000_000,
    horizon: int | None = None,
    seed: int = 0,
    penalty_coef: float | None = None,
    format: ShardFormat = "hdf5",
    compression: Compression = "none",
    dtype: RolloutDtype = "float32",
    backend: str = "auto",
    threads: int | None = None,
    device: str = "cpu",
    ray: str | None = None,
    task: str | Task | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write `count` transitions of a run's policy in its ensemble to a folder, shard by shard.

    A folder with a part of the same shards is completed; one that has them all is left as it is.

    Args:
        run: a run's folder; its config.json says which task ends an episode and which penalty counts.
        data: start states are drawn from its observations, with replacement.
        shard_rows: transitions in each shard; two shards are held in memory.
        horizon, penalty_coef: None: the run's own.
        format, compression: see `COMPRESSIONS`.
        ray: None: this process; "auto", "local" or an address: a Ray cluster, see `cluster.py`.
        task: the run's task; to be given where that is a Python file, which is executed.

    Returns:
        The manifest.

    Raises:
        InputError: the run is not whole, the data do not fit it, a number is out of range, the folder holds
            something else or cannot be written, or another process is at work in it.
    """
    out = Path(out)
    if format not in COMPRESSIONS or compression not in COMPRESSIONS[format]:
        known = "; ".join(f"{name}: {', '.join(some)}" for name, some in COMPRESSIONS.items())
        raise InputError(f"no format {format!r} with compression {compression!r}; there are {known}")
    if format == "parquet":
        import_pyarrow()
    if not 1 <= shard_rows < 2**32:
        raise InputError(f"shard_rows must be at least 1 and below 2^32, got {shard_rows}")
    config = generate_config(
        run, horizon=horizon, seed=seed, penalty_coef=penalty_coef, dtype=dtype, backend=backend, task=task
    )
    check_count(run, config, min(count, 3 * shard_rows))
    ensemble, policy = EnsembleDynamics.load(run, device), Actor.load(run, device)
    generator = Generator(ensemble, policy, data.observations, config, threads)
    plan = Plan(
        count=count,
        shard_rows=shard_rows,
        format=format,
        compression=compression,
        rollout=dataclasses.replace(config, backend=generator.engine.backend),
        dataset=data.name,
        observations_sha256=tensors_sha256({"observations": data.observations}),
        dynamics_sha256=ensemble.sha256(),
        policy_sha256=tensors_sha256(dict(policy.state_dict())),
    )
    with locked(out):
        records = _resume(out, plan)
        missing = [shard for shard in range(plan.shards) if shard not in records]
        _check_space(out, plan, missing, generator)
        with progress_bar("transitions", count, quiet=quiet) as bar:
            bar.update(completed=sum(record["rows"] for record in records.values()))

            def keep(shard: int, record: Record) -> None:
                records[shard] = record
                _write_manifest(out, plan, records)
                rows = sum(one["rows"] for one in records.values())
                penalty = sum(one["penalty_sum"] for one in records.values()) / rows
                bar.update(note=f"mean penalty {penalty:.4g}")

            if ray is None:
                _make_here(out, plan, generator, missing, keep, bar.advance)
            else:
                from mopo_fast.cluster import make_on_cluster

                make_on_cluster(ray, out, plan, generator, threads, missing, keep, bar.advance)
        _write_manifest(out, plan, records)
        return read_manifest(out)


def _make_here(
    out: Path,
    plan: Plan,
    generator: Generator,
    shards: list[int],
    keep: Callable[[int, Record], None],
    advance: Callable[[int], None],
) -> None:
    """Make shards one after the other, while the one before is encoded and written."""
    if not shards:
        return
    rows = max(plan.rows(shard) for shard in shards)
    free: queue.Queue[RingBuffer] = queue.Queue()
    for _ in range(min(2, len(shards))):
        free.put(generator.ring(rows))
    full: queue.Queue[Any] = queue.Queue()
    errors: list[BaseException] = []

    def write() -> None:
        while (job := full.get()) is not None:
            ring, made, metadata = job
            try:
                if not errors:
                    keep(metadata["shard"], write_shard(out, plan, made, metadata))
            except BaseException as error:
                errors.append(error)
            free.put(ring)

    writer = threading.Thread(target=write, name="mopo_fast shards")
    writer.start()
    try:
        for shard in shards:
            ring = free.get()
            if errors:
                break
            full.put((ring, *make_shard(generator, ring, plan, shard, advance)))
    finally:
        full.put(None)
        writer.join()
    if errors:
        raise errors[0]


def _resume(out: Path, plan: Plan) -> dict[int, Record]:
    """What is there already: {shard: record}; the manifest is there afterwards.

    Raises:
        InputError: the folder holds something else, or a shard that is not what the manifest says.
    """
    sweep(out)
    found: dict[int, Record] = {}
    if (out / MANIFEST).exists():
        manifest = read_manifest(out)
        theirs, ours = manifest["plan"], json.loads(json.dumps(dataclasses.asdict(plan)))
        if theirs != ours:
            name = next(key for key in ours if theirs.get(key) != ours[key])
            raise InputError(
                f"{out} holds other rollouts: there {name} is {theirs.get(name)!r}, here {ours[name]!r};"
                " choose another folder, or go on with the same settings"
            )
        numbers = {plan.file(shard): shard for shard in range(plan.shards)}
        for record in manifest["shards"]:
            path = out / record["file"]
            if not path.exists():
                continue
            if path.stat().st_size != record["bytes"]:
                raise InputError(
                    f"{path} has {path.stat().st_size:,} bytes, {MANIFEST} says {record['bytes']:,};"
                    " delete it to have it made again"
                )
            found[numbers[record["file"]]] = record
    elif any(path.name != ".lock" for path in out.iterdir()):
        raise InputError(f"{out} holds other things; choose a new folder")
    # Whole, but the process was killed before the manifest could say so.
    for shard in range(plan.shards):
        path = out / plan.file(shard)
        if shard not in found and path.exists():
            arrays, metadata = read_file(path)
            if metadata.get("plan") != plan.sha256():
                raise InputError(f"{path} is of other rollouts; delete it, or choose another folder")
            found[shard] = _record(plan, arrays, metadata, path.stat().st_size, file_sha256(path))
    _write_manifest(out, plan, found)
    return found


def _check_space(out: Path, plan: Plan, missing: list[int], generator: Generator) -> None:
    ensemble = generator.engine.ensemble
    # float32 arrays, terminals and timeouts, then member, step and rollout_index.
    row = 4 * (2 * ensemble.obs_dim + ensemble.act_dim + 3) + 2 + 4 + 4 + 8
    needed, free = row * sum(map(plan.rows, missing)), shutil.disk_usage(out).free
    if plan.compression == "none" and needed > free:
        raise InputError(
            f"{out} takes another {needed / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} free;"
            " lower count, compress, or choose another disk"
        )


def _write_manifest(out: Path, plan: Plan, records: dict[int, Record]) -> None:
    shards = [records[shard] for shard in sorted(records)]
    write_json(
        out / MANIFEST,
        {
            "format_version": FORMAT_VERSION,
            "plan": dataclasses.asdict(plan),
            "penalty_edges": PENALTY_EDGES.tolist(),
            "shards": shards,
        },
    )


def remove(folder: str | os.PathLike[str]) -> None:
    """Delete a folder's manifest and the shards that it lists; a folder without one is left alone.

    Raises:
        InputError: another process is at work there.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        return
    with locked(folder):
        for record in read_manifest(folder)["shards"]:
            (folder / record["file"]).unlink(missing_ok=True)
        (folder / MANIFEST).unlink()


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """A folder's manifest: `plan`, and for each finished shard a record.

    Raises:
        InputError: there is none, or it is damaged or of another version.
    """
    path = Path(folder) / MANIFEST
    manifest = read_json(path)
    try:
        version, plan, shards = manifest["format_version"], manifest["plan"], manifest["shards"]
        keys = {field.name for field in dataclasses.fields(Plan)}
        whole = keys <= set(plan) and all("file" in record and "sha256" in record for record in shards)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} lacks or garbles {error}; it is not a manifest of rollouts") from error
    if version != FORMAT_VERSION or not whole:
        raise InputError(f"{path} is of format_version {version}, not {FORMAT_VERSION}, or not whole")
    return dict(manifest)


class Rollouts:
    """The transitions of a folder of shards, read when they are asked for.

    Shards in uncompressed HDF5 are mapped into memory; of others, the last one read is kept.

    Attributes:
        manifest: see `read_manifest`.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self._folder, self.manifest = folder, manifest
        self._ends = np.cumsum([record["rows"] for record in manifest["shards"]])
        self._open: dict[int, Transitions] = {}
        self._keep = len(self._ends) if manifest["plan"]["compression"] == "none" else 1
        if manifest["plan"]["format"] != "hdf5":
            self._keep = 1

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def name(self) -> str:
        return self._folder.name

    def shard(self, number: int) -> Transitions:
        """One shard's transitions."""
        if number not in self._open:
            record = self.manifest["shards"][number]
            arrays, metadata = read_file(self._folder / record["file"])
            names = {field.name for field in dataclasses.fields(Transitions)} & set(arrays)
            tensors: dict[str, Any] = {name: as_tensor(arrays[name]) for name in names}
            while len(self._open) >= self._keep:
                del self._open[next(iter(self._open))]
            self._open[number] = Transitions(**tensors, name=self.name, info=metadata)
        return self._open[number]

    def __iter__(self) -> Iterator[Transitions]:
        """Every shard's transitions, one shard after the other."""
        return map(self.shard, range(len(self._ends)))

    def __getitem__(self, index: slice | torch.Tensor | Array) -> Transitions:
        """The transitions at a slice, a mask or indices, in that order, copied into memory."""
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
        return Transitions(**whole, name=self.name, info=dict(self.manifest["plan"]))

    def batches(self, size: int, *, seed: int) -> Iterator[Transitions]:
        """Batches without end, each of `size` transitions drawn uniformly with replacement."""
        random = np.random.default_rng(seed)
        while True:
            yield self[random.integers(len(self), size=size)]


def open_rollouts(folder: str | os.PathLike[str]) -> Rollouts:
    """The transitions that `mopo-fast rollout --out FOLDER` has written, without reading them yet.

    Raises:
        InputError: the folder has no manifest, or not all of its shards are there yet.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    plan = manifest["plan"]
    rows = sum(record["rows"] for record in manifest["shards"])
    if rows != plan["count"]:
        raise InputError(
            f"{folder} has {rows:,} of {plan['count']:,} transitions; the command that began it goes on"
        )
    return Rollouts(folder, manifest)


def verify(folder: str | os.PathLike[str], *, quiet: bool = False) -> dict[str, Any]:
    """Read every shard and compare it with the manifest: bytes, rows, finiteness, rewards; the manifest.

    Raises:
        InputError: names every shard that is missing or not what it was.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    coef, wrong = manifest["plan"]["rollout"]["penalty_coef"], []
    with progress_bar("shards", len(manifest["shards"]), quiet=quiet) as bar:
        for number, record in enumerate(manifest["shards"]):
            try:
                _verify_shard(folder / record["file"], record, Rollouts(folder, manifest), number, coef)
            except InputError as error:
                wrong.append(str(error))
            bar.advance()
    if wrong:
        raise InputError(
            "\n".join([f"{len(wrong)} of {len(manifest['shards'])} shards are not sound:", *wrong])
            + "\ndelete these, and the command that made them makes them again"
        )
    open_rollouts(folder)
    return manifest


def _verify_shard(path: Path, record: Record, rollouts: Rollouts, number: int, coef: float) -> None:
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if file_sha256(path) != record["sha256"]:
        raise InputError(f"{path} has other bytes than when it was written")
    rows = rollouts.shard(number).validate()
    assert rows.raw_rewards is not None and rows.penalties is not None
    if len(rows) != record["rows"]:
        raise InputError(f"{path} has {len(rows)} rows, {MANIFEST} says {record['rows']}")
    if not torch.allclose(rows.rewards, rows.raw_rewards - coef * rows.penalties, rtol=1e-4, atol=1e-4):
        raise InputError(f"{path}: rewards are not raw_rewards - {coef:g} * penalties")


def summarise(manifest: dict[str, Any]) -> dict[str, Any]:
    """Counts and means over all shards, the histogram of penalties, and where rollouts end."""
    shards = manifest["shards"]
    total = {
        name: sum(record[name] for record in shards) for name in ("rows", "bytes", "starts", "non_finite")
    }

    def added(name: str) -> list[int]:
        return [sum(values) for values in zip(*(record[name] for record in shards), strict=True)]

    return {
        **total,
        "reward_mean": sum(record["reward_sum"] for record in shards) / total["rows"],
        "penalty_mean": sum(record["penalty_sum"] for record in shards) / total["rows"],
        "penalty_edges": manifest["penalty_edges"],
        "penalty_counts": added("penalty_counts"),
        "rows_of_step": added("rows_of_step"),
        "terminals_of_step": added("terminals_of_step"),
    }


def as_text(summary: dict[str, Any], width: int = 40) -> str:
    """A summary for a terminal: counts, the histogram of penalties, terminations step by step."""
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
    most = max(counts)
    for i in range(filled[0], filled[-1] + 1):
        lines.append(f"  from {edges[i]:>8} {'█' * round(width * counts[i] / most):<{width}} {counts[i]:,}")
    lines += ["", "ended by termination"]
    for step, (here, ended) in enumerate(
        zip(summary["rows_of_step"], summary["terminals_of_step"], strict=True)
    ):
        share = ended / here if here else 0.0
        lines.append(f"  step {step + 1:>3} {'█' * round(width * share):<{width}} {share:.2%} of {here:,}")
    return "\n".join(lines)
