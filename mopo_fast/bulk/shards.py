"""Rollouts in bulk: shards in a folder, each by itself, and the manifest that lists them.

Shard k holds transitions k * shard_rows, ... of rollouts k * 2^32, k * 2^32 + 1, ...: it depends on the plan
and k alone. A shard appears whole, by a rename; the manifest is written anew after each. So a folder whose
process was killed holds whole shards, and the same call makes those that are missing.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import queue
import re
import reprlib
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from mopo_fast import __version__
from mopo_fast.buffer import RingBuffer
from mopo_fast.bulk.files import COMPRESSIONS, file_sha256, import_pyarrow, read_file, write_file
from mopo_fast.bulk.generate import (
    ENCODED_WHOLE,
    WRITTEN_IN_PIECES,
    Count,
    GenerateConfig,
    Generator,
    check_rollout_memory,
    check_value,
    d4rl_arrays,
    generate_config,
    transition_bytes,
)
from mopo_fast.config import Compression, RolloutDtype, ShardFormat
from mopo_fast.data.files import Array, as_tensor
from mopo_fast.data.transitions import Transitions
from mopo_fast.ensemble import MAX_MEMBERS, EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.tasks import Task
from mopo_fast.utils.atomic import read_json_as, sweep, write_json
from mopo_fast.utils.lock import locked
from mopo_fast.utils.progress import progress_bar
from mopo_fast.utils.tensors import tensors_sha256

MANIFEST = "manifest.json"
# Edges of the histogram of penalties: ten bins a decade, then one below and one above.
PENALTY_EDGES = np.geomspace(1e-4, 1e4, 81)
# A shard's number has six digits.
MOST_SHARDS = 10**6

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Natural = Annotated[int, Field(ge=0, lt=2**63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
ShardRows = Annotated[int, Field(ge=1, lt=2**32)]

_DTYPES = {
    "observations": np.float32,
    "actions": np.float32,
    "rewards": np.float32,
    "next_observations": np.float32,
    "terminals": np.bool_,
    "timeouts": np.bool_,
    "raw_rewards": np.float32,
    "penalties": np.float32,
    "members": np.int32,
    "rollout_index": np.int64,
    "step": np.int32,
}
_MATRICES = ("observations", "actions", "next_observations")


# --- the manifest, as it is written and as it is read


@dataclass(frozen=True)
class Plan:
    """All that decides the shards' bytes, but for the processor: kernels of other instruction sets round
    differently."""

    count: Count
    shard_rows: ShardRows
    format: ShardFormat
    compression: Compression
    rollout: GenerateConfig
    dataset: str
    observations_sha256: Digest
    dynamics_sha256: Digest
    policy_sha256: Digest
    mopo_fast: str

    def __post_init__(self) -> None:
        check_format(self.format, self.compression)
        check_shards(self.count, self.shard_rows)

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_rows)

    def rows(self, shard: int) -> int:
        """Transitions in it; the last has what is left."""
        return min(self.shard_rows, self.count - shard * self.shard_rows)

    def file(self, shard: int) -> str:
        return f"shard-{shard:06d}.{self.format}"

    def shard(self, file: str) -> int:
        """Return the number of the shard that `file` names.

        Raises:
            InputError: no shard of the plan has that name.
        """
        digits = re.match("shard-([0-9]{6})[.]", file)
        shard = int(digits[1]) if digits else 0
        if not (shard < self.shards and file == self.file(shard)):
            raise InputError(f"{file!r} is none of the plan's {self.shards} shards")
        return shard

    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class ShardRecord:
    """A shard's entry in the manifest: its file, and counts over its rows.

    Attributes:
        starts: rollouts begun; `non_finite` of them ended in a prediction that was not finite.
        penalty_counts: the histogram of penalties over `PENALTY_EDGES`.
        rows_of_step, terminals_of_step: rows, and terminals among them, of each step of a rollout.
    """

    file: str
    rows: Annotated[int, Field(ge=1, lt=2**32)]
    bytes: Annotated[int, Field(ge=1, lt=2**63)]
    sha256: Digest
    starts: Annotated[int, Field(ge=1, le=2**32)]
    non_finite: Natural
    reward_sum: Finite
    penalty_sum: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    penalty_counts: list[Natural]
    rows_of_step: list[Natural]
    terminals_of_step: list[Natural]

    def __post_init__(self) -> None:
        if not sum(self.penalty_counts) == sum(self.rows_of_step) == self.rows:
            raise InputError(f"the counts of {self.file} do not add up to its {self.rows} rows")
        if len(self.penalty_counts) != len(PENALTY_EDGES) + 1:
            raise InputError(f"{self.file} has {len(self.penalty_counts)} penalty_counts")
        if len(self.terminals_of_step) != len(self.rows_of_step):
            raise InputError(f"{self.file} has terminals_of_step and rows_of_step of different lengths")
        ended = zip(self.terminals_of_step, self.rows_of_step, strict=True)
        if any(terminals > rows for terminals, rows in ended) or self.non_finite > self.starts:
            raise InputError(f"{self.file} has more ends than rollouts")


@dataclass(frozen=True)
class Manifest:
    """A folder's manifest.json: the plan, and a record of each finished shard, in their order."""

    format_version: Annotated[int, Field(ge=1, le=1)]
    plan: Plan
    penalty_edges: list[Finite]
    shards: list[ShardRecord]

    def __post_init__(self) -> None:
        plan, before = self.plan, -1
        if len(self.penalty_edges) != len(PENALTY_EDGES) or not np.allclose(
            self.penalty_edges, PENALTY_EDGES
        ):
            raise InputError("penalty_edges are others than format_version 1 has")
        for record in self.shards:
            shard = plan.shard(record.file)
            if shard <= before:
                raise InputError(f"{record.file} is listed twice, or out of order")
            if record.rows != plan.rows(shard):
                raise InputError(f"{record.file} has {record.rows} rows in place of {plan.rows(shard)}")
            if len(record.rows_of_step) != plan.rollout.horizon:
                raise InputError(f"{record.file} has {len(record.rows_of_step)} steps in rows_of_step")
            before = shard

    def records(self) -> dict[int, ShardRecord]:
        """The records by the shards' numbers."""
        return {self.plan.shard(record.file): record for record in self.shards}


def check_format(format: str, compression: str) -> None:
    """Raise `InputError` where shards cannot be written in such a format."""
    if (format, compression) not in [(name, one) for name, some in COMPRESSIONS.items() for one in some]:
        known = "; ".join(f"{name}: {', '.join(some)}" for name, some in COMPRESSIONS.items())
        raise InputError(f"no format {format!r} with compression {compression!r}; there are {known}")


def check_shards(count: int, shard_rows: int) -> None:
    """Raise `InputError` where `count` transitions are too many shards."""
    shards = -(-count // shard_rows)
    if shards > MOST_SHARDS:
        raise InputError(f"{shards:,} shards are more than {MOST_SHARDS:,}; raise shard_rows or lower count")


def regular_file(path: Path) -> os.stat_result:
    """Return the status of a file that lies in its folder itself.

    Raises:
        InputError: there is none, or it is a symbolic link, which may lead anywhere, or no file.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is a symbolic link or no file; remove it")
    return status


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read a folder's manifest and check it whole.

    Raises:
        InputError: there is none, or it is damaged, of another version, or contradicts itself.
    """
    path = Path(folder) / MANIFEST
    regular_file(path)
    return read_json_as(path, Manifest)


def _write_manifest(out: Path, plan: Plan, records: dict[int, ShardRecord]) -> Manifest:
    shards = [records[shard] for shard in sorted(records)]
    manifest = Manifest(1, plan, PENALTY_EDGES.tolist(), shards)
    write_json(out / MANIFEST, dataclasses.asdict(manifest))
    return manifest


# --- making shards


def make_shard(
    generator: Generator, ring: RingBuffer, plan: Plan, shard: int, advance: Callable[[int], None]
) -> tuple[Transitions, dict[str, Any]]:
    """The shard's transitions, which are the first rows of `ring`, and its metadata."""
    ring.clear()
    rows = plan.rows(shard)
    starts, non_finite = generator.fill(ring, rows, shard << 32, advance)
    metadata = {"plan": plan.sha256(), "shard": shard, "starts": starts, "non_finite": non_finite}
    return ring.storage[:rows], metadata


def write_shard(
    folder: Path,
    plan: Plan,
    rows: Transitions,
    metadata: dict[str, Any],
    check: Callable[[], None] = lambda: None,
) -> ShardRecord:
    """Write one shard, whole or not at all; return what the manifest says of it.

    Args:
        check: called every few megabytes; what it raises abandons the shard.

    Raises:
        InputError: it cannot be written.
    """
    arrays = d4rl_arrays(rows)
    described = {
        **metadata,
        **{name: value for name, value in dataclasses.asdict(plan.rollout).items() if value is not None},
        "dataset": plan.dataset,
        "mopo_fast": plan.mopo_fast,
    }
    path = folder / plan.file(metadata["shard"])
    size, digest = write_file(path, arrays, described, plan.compression, check)
    return _record(plan, path, arrays, metadata, size, digest)


def _record(
    plan: Plan, path: Path, arrays: dict[str, Array], metadata: dict[str, Any], size: int, digest: str
) -> ShardRecord:
    horizon, step, ended = plan.rollout.horizon, arrays["step"], arrays["terminals"]
    bins = np.searchsorted(PENALTY_EDGES.astype(np.float32), arrays["penalties"], side="right")
    return ShardRecord(
        file=path.name,
        rows=len(step),
        bytes=size,
        sha256=digest,
        starts=metadata["starts"],
        non_finite=metadata["non_finite"],
        reward_sum=float(arrays["rewards"].sum(dtype=np.float64)),
        penalty_sum=float(arrays["penalties"].sum(dtype=np.float64)),
        penalty_counts=np.bincount(bins, minlength=len(PENALTY_EDGES) + 1).tolist(),
        rows_of_step=np.bincount(step, minlength=horizon).tolist(),
        terminals_of_step=np.bincount(step[ended], minlength=horizon).tolist(),
    )


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
    overwrite: bool = False,
    quiet: bool = False,
) -> Manifest:
    """Write `count` transitions of a run's policy in its ensemble to a folder, shard by shard.

    A folder with a part of the same shards is completed; one that has them all is left as it is. A call that
    is refused leaves everything as it was; one that is interrupted leaves its finished shards.

    Args:
        run: a run's folder; its config.json says which task ends an episode and which penalty counts.
        data: start states are drawn from its observations, with replacement.
        shard_rows: transitions in each shard; two shards are held in memory.
        horizon, penalty_coef: None: the run's own.
        format, compression: see `COMPRESSIONS`.
        ray: None: this process; "auto", "local" or an address: a Ray cluster, see `cluster.py`.
        task: the run's task; to be given where that is a Python file, which is executed.
        overwrite: delete the shards that the folder's manifest lists first.

    Returns:
        The manifest.

    Raises:
        InputError: the run is not whole, the data do not fit it, a number is out of range, the folder holds
            something else or cannot be written, or another process is at work in it.
    """
    out = Path(out)
    check_format(format, compression)
    if format == "parquet":
        import_pyarrow()
    config = generate_config(
        run, horizon=horizon, seed=seed, penalty_coef=penalty_coef, dtype=dtype, backend=backend, task=task
    )
    check_value("count", count, Count)
    check_value("shard_rows", shard_rows, ShardRows)
    check_shards(count, shard_rows)
    rows = min(count, shard_rows)
    rings = 1 if count == rows else 2
    # HDF5 compresses into memory.
    copies = ENCODED_WHOLE if format == "hdf5" and compression != "none" else WRITTEN_IN_PIECES
    check_rollout_memory(config, rows, rings, copies, "count, shard_rows or horizon")
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
        mopo_fast=__version__,
    )
    with _maker(ray, generator, threads) as make, _tidily_locked(out):
        doomed = _listed_files(out) if overwrite else []
        records = _find_shards(out, plan, doomed)
        missing = [shard for shard in range(plan.shards) if shard not in records]
        _check_space(out, plan, missing, generator, doomed)
        for path in doomed:
            path.unlink()
        _write_manifest(out, plan, records)
        with progress_bar("transitions", count, quiet=quiet) as bar:
            bar.update(completed=sum(record.rows for record in records.values()))

            def keep(shard: int, record: ShardRecord) -> None:
                records[shard] = record
                _write_manifest(out, plan, records)
                rows = sum(one.rows for one in records.values())
                penalty = sum(one.penalty_sum for one in records.values()) / rows
                bar.update(note=f"mean penalty {penalty:.4g}")

            make(out, plan, missing, keep, bar.advance)
        return _write_manifest(out, plan, records)


# Makes shards of a plan in a folder: calls the first function for each that is there, the second with the
# transitions as they are made.
Maker = Callable[[Path, Plan, list[int], Callable[[int, ShardRecord], None], Callable[[int], None]], None]


@contextlib.contextmanager
def _maker(ray: str | None, generator: Generator, threads: int | None) -> Iterator[Maker]:
    """The maker of shards: this process, or a cluster, connected for the length of the block."""
    if ray is None:
        yield lambda *arguments: _make_here(generator, *arguments)
    else:
        from mopo_fast.bulk.cluster import workers

        with workers(ray, generator, threads) as make:
            yield make


@contextlib.contextmanager
def _tidily_locked(out: Path) -> Iterator[None]:
    """Lock a folder; where the block fails before a shard is there, remove what was not there before it."""
    folders = [folder for folder in (out, *out.parents) if not folder.exists()]
    lock_is_new = not (out / ".lock").exists()
    with locked(out):
        manifest_is_new = not (out / MANIFEST).exists()
        try:
            yield
        except BaseException:
            if manifest_is_new and not any(out.glob("shard-*")):
                (out / MANIFEST).unlink(missing_ok=True)
                if lock_is_new:
                    (out / ".lock").unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    for folder in folders:
                        folder.rmdir()
            raise


class _Abandoned(Exception):
    """The shard that is being written is not wanted any more."""


def _make_here(
    generator: Generator,
    out: Path,
    plan: Plan,
    shards: list[int],
    keep: Callable[[int, ShardRecord], None],
    advance: Callable[[int], None],
) -> None:
    """Make shards one after the other, while the one before is encoded and written.

    A failure or an interruption abandons the shard that is being written.
    """
    if not shards:
        return
    rows = max(plan.rows(shard) for shard in shards)
    free: queue.Queue[RingBuffer] = queue.Queue()
    for _ in range(min(2, len(shards))):
        free.put(generator.ring(rows))
    full: queue.Queue[Any] = queue.Queue()
    errors: list[BaseException] = []
    failed = threading.Event()

    def check() -> None:
        if failed.is_set():
            raise _Abandoned

    def write() -> None:
        while (job := full.get()) is not None:
            ring, made, metadata = job
            try:
                if not errors:
                    check()
                    keep(metadata["shard"], write_shard(out, plan, made, metadata, check))
            except BaseException as error:
                errors.append(error)
            free.put(ring)

    writer = threading.Thread(target=write, name="mopo_fast shards")
    try:
        writer.start()
        for shard in shards:
            ring = free.get()
            if errors:
                break
            full.put((ring, *make_shard(generator, ring, plan, shard, advance)))
        full.put(None)
        writer.join()
    except BaseException:
        failed.set()
        full.put(None)
        writer.join()
        raise
    if errors:
        raise errors[0]


def _listed_files(out: Path) -> list[Path]:
    """The shards that the manifest of `out` lists and that are there, each a file of its own.

    Raises:
        InputError: the manifest is not sound, or one of them is a symbolic link.
    """
    if not os.path.lexists(out / MANIFEST):
        return []
    paths = [out / record.file for record in read_manifest(out).shards]
    present = [path for path in paths if os.path.lexists(path)]
    for path in present:
        regular_file(path)
    return present


def _find_shards(out: Path, plan: Plan, doomed: list[Path]) -> dict[int, ShardRecord]:
    """Find the shards of `plan` that are there already, but for those that are doomed.

    Raises:
        InputError: the folder holds something else, or a shard that is not what the manifest says.
    """
    found: dict[int, ShardRecord] = {}
    if os.path.lexists(out / MANIFEST):
        manifest = read_manifest(out)
        if not doomed:
            _check_same(out, manifest.plan, plan)
            for shard, record in manifest.records().items():
                path = out / record.file
                if not os.path.lexists(path):
                    continue
                size = regular_file(path).st_size
                if size != record.bytes:
                    raise InputError(
                        f"{path} has {size:,} bytes, {MANIFEST} says {record.bytes:,};"
                        " delete it to have it made again"
                    )
                found[shard] = record
    elif any(not path.name.startswith((".lock", f".{MANIFEST}.", ".shard-")) for path in out.iterdir()):
        raise InputError(f"{out} holds other things; choose a new folder")
    sweep(out)
    # Whole, but the process was killed before the manifest could say so.
    for shard in range(plan.shards):
        path = out / plan.file(shard)
        if shard not in found and path not in doomed and os.path.lexists(path):
            found[shard] = _read_record(path, plan, shard)
    return found


def _check_same(out: Path, theirs: Plan, ours: Plan) -> None:
    """Raise `InputError` where a folder's shards are of another plan; name the first setting that differs."""
    there, here = (dataclasses.asdict(plan.rollout) | dataclasses.asdict(plan) for plan in (theirs, ours))
    for name in here:
        if name != "rollout" and there[name] != here[name]:
            raise InputError(
                f"{out} holds other rollouts: there {name} is {there[name]!r}, here {here[name]!r};"
                " choose another folder, or go on with the same settings"
            )


def _read_record(path: Path, plan: Plan, shard: int) -> ShardRecord:
    """Read a shard that the manifest does not list yet.

    Raises:
        InputError: it is of another plan, or not sound.
    """
    arrays, metadata = _read_shard(path, plan, shard)
    if (str(metadata.get("plan")), str(metadata.get("shard"))) != (plan.sha256(), str(shard)):
        raise InputError(f"{path} is of other rollouts; delete it, or choose another folder")
    _check_values(path, arrays, plan, shard)
    numbers = {name: np.asarray(metadata.get(name)).tolist() for name in ("starts", "non_finite")}
    for name, number in numbers.items():
        check_value(f"{path}: {name}", number, Natural)
    return _record(plan, path, arrays, numbers, path.stat().st_size, file_sha256(path))


def _check_space(out: Path, plan: Plan, missing: list[int], generator: Generator, doomed: list[Path]) -> None:
    """Raise `InputError` where the disk has no room for the missing shards in the place of those doomed."""
    ensemble = generator.engine.ensemble
    needed = transition_bytes(ensemble.obs_dim, ensemble.act_dim) * sum(map(plan.rows, missing))
    free = shutil.disk_usage(out).free + sum(path.lstat().st_size for path in doomed)
    if plan.compression == "none" and needed > free:
        raise InputError(
            f"{out} takes another {needed / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} free;"
            " lower count, compress, or choose another disk"
        )


# --- reading shards


def _read_shard(path: Path, plan: Plan, shard: int) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read a shard: its arrays, which have the plan's names, types and shapes, and its metadata.

    Raises:
        InputError: the file is missing, damaged, or holds other arrays.
    """
    regular_file(path)
    arrays, metadata = read_file(path)
    if arrays.keys() != _DTYPES.keys():
        names = ", ".join(sorted(map(str, arrays.keys() ^ _DTYPES.keys())))
        raise InputError(f"{path} lacks, or has beside a rollout's arrays: {reprlib.repr(names)}")
    for name, array in arrays.items():
        ndim = 2 if name in _MATRICES else 1
        if (
            array.dtype != _DTYPES[name]
            or array.ndim != ndim
            or len(array) != plan.rows(shard)
            or 0 in array.shape
        ):
            raise InputError(
                f"{path}: {name} must be {np.dtype(_DTYPES[name])} of {ndim} dimensions and"
                f" {plan.rows(shard)} rows, got {array.dtype} {array.shape}"
            )
    if arrays["observations"].shape != arrays["next_observations"].shape:
        raise InputError(f"{path}: observations and next_observations have different shapes")
    return arrays, metadata


def _check_values(path: Path, arrays: dict[str, Array], plan: Plan, shard: int) -> None:
    """Raise `InputError` where a value in a shard's arrays is none that a rollout of the plan can have."""
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
        # A file's bytes may be others than those of true and false.
        if arrays[name].view(np.uint8).max() > 1:
            raise InputError(f"{path}: {name} holds bytes that are neither 0 nor 1")
    rows = Transitions(**_tensors(arrays), name=str(path)).validate()
    if not np.array_equal(d4rl_arrays(rows)["timeouts"], arrays["timeouts"]):
        raise InputError(f"{path}: timeouts are not where rollouts end without a terminal")
    coef = plan.rollout.penalty_coef
    expected = arrays["raw_rewards"] - np.float32(coef) * arrays["penalties"]
    if not np.allclose(arrays["rewards"], expected, rtol=1e-4, atol=1e-4):
        raise InputError(f"{path}: rewards are not raw_rewards - {coef:g} * penalties")


def _tensors(arrays: dict[str, Array]) -> dict[str, Any]:
    """The arrays that `Transitions` has."""
    names = {field.name for field in dataclasses.fields(Transitions)} & set(arrays)
    return {name: as_tensor(arrays[name]) for name in names}


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
        self._sizes: tuple[tuple[int, ...], ...] | None = None
        mapped = (manifest.plan.format, manifest.plan.compression) == ("hdf5", "none")
        self._keep = len(self._ends) if mapped else 1

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def name(self) -> str:
        return self._folder.name

    def shard(self, number: int) -> Transitions:
        """One shard's transitions."""
        if number not in self._open:
            plan = self.manifest.plan
            arrays, metadata = _read_shard(self._folder / plan.file(number), plan, number)
            sizes = tuple(arrays[name].shape[1:] for name in _MATRICES)
            if self._sizes not in (None, sizes):
                raise InputError(f"{self._folder / plan.file(number)} has other dimensions than other shards")
            self._sizes = sizes
            while len(self._open) >= self._keep:
                del self._open[next(iter(self._open))]
            self._open[number] = Transitions(**_tensors(arrays), name=self.name, info=metadata)
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
        return Transitions(**whole, name=self.name, info=dataclasses.asdict(self.manifest.plan))

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
        for shard, record in manifest.records().items():
            try:
                _verify_shard(folder / record.file, manifest.plan, shard, record)
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


def _verify_shard(path: Path, plan: Plan, shard: int, record: ShardRecord) -> None:
    size = regular_file(path).st_size
    if file_sha256(path) != record.sha256:
        raise InputError(f"{path} has other bytes than when it was written")
    arrays, _ = _read_shard(path, plan, shard)
    _check_values(path, arrays, plan, shard)
    made = {"starts": record.starts, "non_finite": record.non_finite}
    found = dataclasses.asdict(_record(plan, path, arrays, made, size, record.sha256))
    for name, value in dataclasses.asdict(record).items():
        # The sums' last digits depend on the order of addition.
        if not (np.isclose(found[name], value) if name.endswith("_sum") else found[name] == value):
            raise InputError(f"{path}: {MANIFEST} has another {name} than the shard")


def summarise(manifest: Manifest) -> dict[str, Any]:
    """Counts and means over all shards (0 where there are none), the histogram of penalties, and where
    rollouts end."""
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
    most = max(counts, default=0)
    for i in range(filled[0], filled[-1] + 1) if filled else ():
        lines.append(f"  from {edges[i]:>8} {'█' * round(width * counts[i] / most):<{width}} {counts[i]:,}")
    lines += ["", "ended by termination"]
    for step, (here, ended) in enumerate(
        zip(summary["rows_of_step"], summary["terminals_of_step"], strict=True)
    ):
        share = ended / here if here else 0.0
        lines.append(f"  step {step + 1:>3} {'█' * round(width * share):<{width}} {share:.2%} of {here:,}")
    return "\n".join(lines)
