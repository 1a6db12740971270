"""Shards made on a Ray cluster: the models and the start states cross once, each shard is a task.

A shard depends on the plan and its number alone, so a task whose worker is lost is done again, elsewhere, to
the same bytes.
"""

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mopo_fast.bulk.files import write_shard
from mopo_fast.bulk.generate import Generator
from mopo_fast.bulk.plan import Plan, ShardRecord
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.utils.interrupts import deferred

# Makes shards of a plan, given by their numbers, in a folder. It calls the first function with the record of
# each that is written, the second with numbers of transitions as they are made.
Maker = Callable[[Path, Plan, list[int], Callable[[ShardRecord], None], Callable[[int], None]], None]

# How often a shard is tried again whose worker was lost.
_RETRIES = 5


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise InputError("--ray takes the extra mopo_fast[ray]: pip install 'ray[tune]'") from None
    return ray


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Connect Ray to a cluster for the length of the block, unless it is connected already.

    Args:
        address: "auto": the cluster that runs on this machine; "local": one of this process alone, with this
            machine's cores; else an address, as Ray takes it.

    Raises:
        InputError: Ray is not installed, or there is no such cluster.
    """
    ray = _import_ray()
    if ray.is_initialized():
        yield ray
        return
    _check_address(address)
    try:
        try:
            # A process whose `ray.init` is interrupted ends by SIGSEGV.
            with deferred():
                ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(f"cannot reach a Ray cluster at {address!r}: {error}") from error
        yield ray
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise `InputError` where nobody listens at HOST:PORT: Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"cannot reach a Ray cluster at {address!r}: {error}") from error


def _make(
    models: tuple[EnsembleDynamics, Actor, torch.Tensor], out: Path, plan: Plan, shard: int, threads: int
) -> ShardRecord:
    """Make one shard in a worker, which keeps the models for the next."""
    key = plan.sha256()
    if key not in _KEPT:
        _KEPT.clear()
        generator = Generator(*models, plan.rollout, threads)
        _KEPT[key] = generator, generator.ring(plan.rows(0))
    generator, ring = _KEPT[key]
    return write_shard(out, plan, *generator.shard(plan, shard, ring))


# A worker's generator and ring for the last plan, by the plan's digest.
_KEPT: dict[str, Any] = {}


@contextlib.contextmanager
def workers(address: str, generator: Generator, threads: int | None) -> Iterator[Maker]:
    """Yield a maker of shards on the CPUs or GPUs of a cluster, in a folder that all its machines see.

    Args:
        threads: of one worker, which takes as many of the cluster's CPUs; None: 1.

    Raises:
        InputError: no cluster, or none that is large enough; in the making, a shard that was lost too often,
            or what a worker raises.
    """
    threads = threads or 1
    engine = generator.engine
    with connected(address) as ray:
        gpus = 1 if engine.device.type == "cuda" else 0
        total = ray.cluster_resources()
        if gpus > total.get("GPU", 0) or threads > total.get("CPU", 0):
            raise InputError(
                f"the cluster at {address!r} has {total.get('CPU', 0):g} CPUs and"
                f" {total.get('GPU', 0):g} GPUs; a worker takes {threads} and {gpus}"
            )
        task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=_RETRIES)(_make)
        models = ray.put((engine.ensemble, generator.policy, generator.observations))
        # Enough to keep every worker busy, few enough for the scheduler.
        at_once = 2 * max(1, int(total["CPU"]) // threads)

        def make(
            out: Path,
            plan: Plan,
            shards: list[int],
            keep: Callable[[ShardRecord], None],
            advance: Callable[[int], None],
        ) -> None:
            folder, todo = out.resolve(), list(reversed(shards))
            running: dict[Any, int] = {}
            try:
                while todo or running:
                    while todo and len(running) < at_once:
                        shard = todo.pop()
                        running[task.remote(models, folder, plan, shard, threads)] = shard
                    done, _ = ray.wait(list(running), num_returns=1)
                    for reference in done:
                        shard = running.pop(reference)
                        record = _result(ray, reference, plan.file(shard))
                        keep(record)
                        advance(record.rows)
            finally:
                # After a failure or an interruption nobody may go on writing into the folder.
                for reference in running:
                    ray.cancel(reference, force=True)

        yield make


def _result(ray: Any, reference: Any, file: str) -> ShardRecord:
    try:
        record: ShardRecord = ray.get(reference)
        return record
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise InputError(
            f"{file} was lost {_RETRIES + 1} times with its worker ({error}); the same command goes on"
        ) from error
