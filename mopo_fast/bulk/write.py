"""Writing a folder of shards: find the shards that exist, and make those that are missing.

A shard appears by a rename once it is complete, and the manifest is written again after each shard. A folder
whose process was killed therefore holds complete shards only. The same call checks them by their checksums
and makes the rest.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mopo_fast import __version__
from mopo_fast.buffer import RingBuffer
from mopo_fast.bulk.cluster import ShardMaker, ray_shard_maker
from mopo_fast.bulk.files import file_checksum, write_shard
from mopo_fast.bulk.generate import ENCODED_WHOLE, WRITTEN_IN_PIECES, Generator, check_rollout_memory
from mopo_fast.bulk.plan import generate_config
from mopo_fast.config import CHECKSUMS, Checksum, Compression, RolloutDtype, ShardFormat
from mopo_fast.data.manifest import (
    MANIFEST,
    OLD_MANIFEST,
    SHARD_ARRAYS,
    Manifest,
    Plan,
    Positive,
    ShardRecord,
    ShardRows,
    algorithm_of,
    manifest_path,
    read_manifest,
    write_manifest,
)
from mopo_fast.data.parquet import import_pyarrow
from mopo_fast.data.shards import read_file
from mopo_fast.data.transitions import Transitions, transition_bytes
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.tasks import Task
from mopo_fast.utils.atomic import check_value, regular_file, sweep
from mopo_fast.utils.lock import locked
from mopo_fast.utils.machine import check_device, size_text
from mopo_fast.utils.progress import progress_bar
from mopo_fast.utils.tensors import tensors_sha256

logger = logging.getLogger("mopo_fast")

# Beginnings of the names of files that a process may leave before its first shard.
_OWN = (".lock", f".{MANIFEST}.", f".{OLD_MANIFEST}.", ".shard-")


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
    checksum: Checksum | None = None,
    dtype: RolloutDtype = "float32",
    backend: str = "auto",
    threads: int | None = None,
    device: str = "cpu",
    ray: str | None = None,
    task: str | Task | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Manifest:
    """Write `count` transitions of a run's policy in its ensemble to a folder of shards.

    If the folder already holds some of these shards, only the missing ones are made, and those whose checksum
    is not that in the manifest. A folder grows with a larger `count`. A call that raises `InputError` before
    the first shard changes nothing; an interrupted call keeps its finished shards.

    Args:
        run: folder of the run. Its config.json gives the task, with its termination, and the penalty.
        data: transitions from whose observations start states are drawn with replacement.
        out: folder of the shards; it is created if it does not exist.
        count: number of transitions in all shards together.
        shard_rows: number of transitions in each shard. Two shards are held in memory.
        horizon: maximal number of steps of a rollout; None for the run's own.
        seed: seed of all random numbers.
        penalty_coef: weight of the penalty in the reward; None for the run's own.
        format: format of the files, "hdf5" or "parquet".
        compression: compression of the files, see `COMPRESSIONS` in data/manifest.py.
        checksum: algorithm of the shards' checksums in the manifest. "xxh3_128" finds accidental damage at
            the speed of memory. "sha256" is cryptographic, but takes several times the time. None for the
            algorithm of the shards that the folder holds, and for "xxh3_128" in a new folder.
        dtype: precision of the matrix products, see `RolloutEngine`.
        backend: backend of `RolloutEngine`.
        threads: number of CPU threads; None for all cores, or for 1 in each worker of a cluster.
        device: device of the models, "cpu" or "cuda".
        ray: Ray cluster that makes the shards, see `cluster.connected`; None for this process.
        task: the run's task. It must be given if it is a Python file, since that file is executed.
        overwrite: first delete the shards that the folder's manifest lists.
        quiet: show no progress bar.

    Returns:
        The manifest.

    Raises:
        InputError: the run is incomplete, the data do not fit it, an argument is out of range, the folder
            holds something else or cannot be written, or another process works in it.
    """
    out = Path(out)
    if format == "parquet":
        import_pyarrow()
    config = generate_config(
        run, horizon=horizon, seed=seed, penalty_coef=penalty_coef, dtype=dtype, backend=backend, task=task
    )
    check_value("count", count, Positive)
    check_value("shard_rows", shard_rows, ShardRows)
    if checksum is not None and checksum not in CHECKSUMS:
        raise InputError(f"unknown checksum {checksum!r}; choose one of {', '.join(CHECKSUMS)}")
    rows = min(count, shard_rows)
    buffers = 1 if count == rows else 2
    # Compressed HDF5 files are made in memory.
    copies = ENCODED_WHOLE if format == "hdf5" and compression != "none" else WRITTEN_IN_PIECES
    check_rollout_memory(config, rows, buffers, copies, "count, shard_rows or horizon")
    check_device(device)
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
    maker: contextlib.AbstractContextManager[ShardMaker]
    if ray is None:
        maker = contextlib.nullcontext(functools.partial(_make_here, generator))
    else:
        maker = ray_shard_maker(ray, generator, threads)
    with maker as make, _locked_or_restored(out):
        records, replaced, algorithm = _find_shards(out, plan, checksum, overwrite, quiet)
        missing = [shard for shard in range(plan.shards) if plan.file(shard) not in records]
        _check_space(out, plan, missing, generator, replaced)
        for path in replaced:
            path.unlink()
        if manifest_path(out) != out / MANIFEST:
            os.replace(manifest_path(out), out / MANIFEST)
        write_manifest(out, plan, records)
        with progress_bar("transitions", count, quiet=quiet) as bar:
            bar.update(completed=sum(record.rows for record in records.values()))

            def keep(record: ShardRecord) -> None:
                records[record.file] = record
                write_manifest(out, plan, records)
                rows = sum(one.rows for one in records.values())
                penalty = sum(one.penalty_sum for one in records.values()) / rows
                bar.update(note=f"mean penalty {penalty:.4g}")

            make(out, plan, missing, algorithm, keep, bar.advance)
        return write_manifest(out, plan, records)


@contextlib.contextmanager
def _locked_or_restored(out: Path) -> Iterator[None]:
    """Lock a folder; if the block fails before a shard is written, restore the folder as it was."""
    lock_is_new = out.is_dir() and not (out / ".lock").exists()
    with locked(out):
        manifest_is_new = not os.path.lexists(manifest_path(out))
        try:
            yield
        except BaseException:
            if manifest_is_new and not any(out.glob("shard-*")):
                (out / MANIFEST).unlink(missing_ok=True)
                if lock_is_new:
                    (out / ".lock").unlink(missing_ok=True)
            raise


class _Abandoned(Exception):
    """Raised to stop writing a shard after a failure or an interruption."""


def _make_here(
    generator: Generator,
    out: Path,
    plan: Plan,
    shards: list[int],
    checksum: Checksum,
    keep: Callable[[ShardRecord], None],
    advance: Callable[[int], None],
) -> None:
    """Make shards in this process; a thread encodes and writes each while the next one is made.

    A failure or an interruption abandons the shard that is being written. For the arguments see `ShardMaker`.
    """
    if not shards:
        return
    rows = max(plan.rows(shard) for shard in shards)
    free: queue.Queue[RingBuffer] = queue.Queue()
    for _ in range(min(2, len(shards))):
        free.put(generator.allocate_ring(rows))
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
                    keep(write_shard(out, plan, made, metadata, checksum, check))
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
            full.put((ring, *generator.make_shard(plan, shard, ring, advance)))
        full.put(None)
        writer.join()
    except BaseException:
        failed.set()
        full.put(None)
        writer.join()
        raise
    if errors:
        raise errors[0]


def _find_shards(
    out: Path, plan: Plan, checksum: Checksum | None, overwrite: bool, quiet: bool
) -> tuple[dict[str, ShardRecord], list[Path], Checksum]:
    """Find the sound shards of a plan in its folder, by their checksums.

    Args:
        out: folder of the shards.
        plan: plan of the call.
        checksum: algorithm of the call; None for that of the folder's shards.
        overwrite: whether the shards listed in the manifest are to be replaced.
        quiet: show no progress bar.

    Returns:
        Records of the plan's sound shards by file name, the files to delete, whose shards are made again, and
        the algorithm for the checksums of new shards.

    Raises:
        InputError: the folder holds something else, or shards of another plan or with other checksums.
    """
    if not os.path.lexists(manifest_path(out)):
        if any(not path.name.startswith(_OWN) for path in out.iterdir()):
            raise InputError(f"{out} holds other files; choose a new folder")
        sweep(out)
        return {}, [], checksum or CHECKSUMS[0]
    manifest = read_manifest(out)
    # A process that was killed before its first shard has left a manifest that binds nobody.
    if not overwrite and (manifest.shards or any(out.glob("shard-*"))):
        _check_same(out, manifest.plan, plan)
    there = None if overwrite else manifest.checksum
    if there and checksum and there != checksum:
        raise InputError(
            f"{out} holds shards with {there} checksums, and checksum is {checksum!r}; leave checksum out"
            " to keep the folder's, or choose another folder"
        )
    sweep(out)
    sound: dict[str, ShardRecord] = {}
    again: list[Path] = []
    with progress_bar("shards checked", len(manifest.shards), quiet=quiet or overwrite) as bar:
        for record in manifest.shards:
            path, algorithm = out / record.file, algorithm_of(record.checksum)
            if os.path.lexists(path):
                size = regular_file(path).st_size
                if overwrite or record.rows != plan.rows(plan.shard(record.file)):
                    # A larger count lengthens a last shard that was cut short.
                    again.append(path)
                elif size != record.bytes or file_checksum(path, algorithm) != record.checksum:
                    again.append(_bad(path, "it is not the file that the manifest lists"))
                else:
                    sound[record.file] = record
            bar.advance()
    # The process was killed between a shard and the manifest, so there is no digest to check the shard by.
    digests = {plan.settings_sha256(), manifest.plan.sha256()}
    listed = {record.file for record in manifest.shards}
    for shard in range(plan.shards):
        path = out / plan.file(shard)
        if path.name not in listed and os.path.lexists(path):
            _check_belongs(path, digests, shard)
            again.append(path)
    return sound, again, there or checksum or CHECKSUMS[0]


def _bad(path: Path, why: str) -> Path:
    """Warn that a shard is made again, and return its path."""
    logger.warning("%s is made again: %s", path, why)
    return path


def _check_same(out: Path, existing: Plan, new: Plan) -> None:
    """Raise `InputError` that names the first setting in which a folder's plan differs from a new one.

    Only the count may differ, if it has grown.
    """
    there, here = (dataclasses.asdict(plan.rollout) | dataclasses.asdict(plan) for plan in (existing, new))
    for name in here:
        if name == "rollout" or (name == "count" and here[name] > there[name]):
            continue
        if there[name] != here[name]:
            raise InputError(
                f"{out} holds other rollouts: there {name} is {there[name]!r}, here {here[name]!r};"
                " choose another folder, or use the settings that it was made with"
            )


def _check_belongs(path: Path, digests: set[str], shard: int) -> None:
    """Raise `InputError` if a shard that the manifest does not list is one of another plan.

    Args:
        path: file of the shard.
        digests: digests of the plan that its metadata may have.
        shard: number of the shard.
    """
    regular_file(path)
    try:
        _, metadata = read_file(path)
    except InputError as error:
        _bad(path, str(error))
        return
    if str(metadata.get("plan")) not in digests or str(metadata.get("shard")) != str(shard):
        raise InputError(f"{path} belongs to another plan; delete it, or choose another folder")


def _check_space(
    out: Path, plan: Plan, missing: list[int], generator: Generator, replaced: list[Path]
) -> None:
    """Raise `InputError` if the missing shards do not fit on the disk after the replaced ones are deleted."""
    ensemble = generator.engine.ensemble
    row = transition_bytes(SHARD_ARRAYS, ensemble.obs_dim, ensemble.act_dim)
    needed = row * sum(map(plan.rows, missing))
    free = shutil.disk_usage(out).free + sum(path.lstat().st_size for path in replaced)
    if plan.compression == "none" and needed > free:
        raise InputError(
            f"{out} takes another {size_text(needed)}, the disk has {size_text(free)} free;"
            " lower count, compress, or choose another disk"
        )
