"""Shards made on a Ray cluster: models and start states are sent once, and each shard is one Ray task.

A shard depends only on the plan and its own number. If a worker is lost, Ray runs its task again elsewhere,
and the result has the same bytes.
"""

import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mopo_fast.bulk.files import write_shard
from mopo_fast.bulk.generate import Generator
from mopo_fast.config import Checksum
from mopo_fast.data.manifest import Plan, ShardRecord
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.utils.interrupts import deferred

# Function (folder, plan, shards, checksum, keep, advance) that makes the shards of these numbers in a folder.
# `checksum` is the algorithm of their checksums. The function calls `keep` with the record of each shard that
# it has written, and `advance` with the number of new transitions.
ShardMaker = Callable[
    [Path, Plan, list[int], Checksum, Callable[[ShardRecord], None], Callable[[int], None]], None
]

# Times that a shard is tried again after its worker was lost.
_RETRIES = 5
# The two ways to a cluster, for error messages.
_START = "give --ray local to use the cores of this machine, or start a cluster with `ray start --head`"


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise InputError("--ray needs Ray; install it with `pip install '.[ray]'` in the checkout") from None
    return ray


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Connect Ray to a cluster for the length of the block, unless it is connected already.

    Args:
        address: "auto" for the cluster that runs on this machine, "local" for a new one on this machine's
            cores that ends with the block, or an address that `ray.init` takes.

    Yields:
        The module ray.

    Raises:
        InputError: Ray is not installed, or there is no such cluster.
    """
    ray = _import_ray()
    if ray.is_initialized():
        yield ray
        return
    _check_address(address)
    # Nothing follows from this notice of a new cluster; one without authentication is still warned of.
    setup = logging.getLogger("ray._private.authentication.authentication_token_setup")
    setup.addFilter(_is_no_token_notice)
    try:
        try:
            # A signal during `ray.init` would end the process by SIGSEGV.
            with deferred():
                ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            if address == "auto":
                raise InputError(f"no Ray cluster runs on this machine; {_START}") from error
            raise InputError(f"cannot reach a Ray cluster at {address!r} ({error}); {_START}") from error
        yield ray
    finally:
        setup.removeFilter(_is_no_token_notice)
        ray.shutdown()


def _is_no_token_notice(record: logging.LogRecord) -> bool:
    return "Token authentication is enabled" not in record.getMessage()


def _check_address(address: str) -> None:
    """Raise `InputError` if nothing listens at HOST:PORT; Ray itself would retry for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"cannot reach a Ray cluster at {address!r} ({error}); {_START}") from error


def _make_shard(
    models: tuple[EnsembleDynamics, Actor, torch.Tensor],
    out: Path,
    plan: Plan,
    shard: int,
    checksum: Checksum,
    threads: int,
) -> ShardRecord:
    """Make one shard in a worker process, and keep the generator for its next shard."""
    key = plan.sha256()
    if key not in _CACHE:
        _CACHE.clear()
        generator = Generator(*models, plan.rollout, threads)
        _CACHE[key] = generator, generator.allocate_ring(plan.rows(0))
    generator, ring = _CACHE[key]
    rows, metadata = generator.make_shard(plan, shard, ring)
    return write_shard(out, plan, rows, metadata, checksum)


# A worker's generator and ring buffer for its last plan, by the plan's digest.
_CACHE: dict[str, Any] = {}


@contextlib.contextmanager
def ray_shard_maker(address: str, generator: Generator, threads: int | None) -> Iterator[ShardMaker]:
    """Connect to a cluster and yield a function that makes shards on its CPUs or GPUs.

    The folder of the shards must be visible to all machines of the cluster.

    Args:
        address: see `connected`.
        generator: its models, start states and device are sent to the workers.
        threads: CPU threads, and CPUs of the cluster, of each Ray worker; None for 1.

    Yields:
        The function. It raises `InputError` if a shard was lost too often, and passes on a worker's error.

    Raises:
        InputError: there is no such cluster, or it is too small for one worker.
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
        task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=_RETRIES)(_make_shard)
        models = ray.put((engine.ensemble, generator.policy, generator.observations))
        # Two tasks for each worker keep it busy without flooding Ray's scheduler.
        at_once = 2 * max(1, int(total["CPU"]) // threads)

        def make(
            out: Path,
            plan: Plan,
            shards: list[int],
            checksum: Checksum,
            keep: Callable[[ShardRecord], None],
            advance: Callable[[int], None],
        ) -> None:
            folder, todo = out.resolve(), list(reversed(shards))
            running: dict[Any, int] = {}
            try:
                while todo or running:
                    while todo and len(running) < at_once:
                        shard = todo.pop()
                        running[task.remote(models, folder, plan, shard, checksum, threads)] = shard
                    done, _ = ray.wait(list(running), num_returns=1)
                    for reference in done:
                        shard = running.pop(reference)
                        record = _result(ray, reference, plan.file(shard))
                        keep(record)
                        advance(record.rows)
            finally:
                # After a failure or an interruption, no worker may go on writing into the folder.
                for reference in running:
                    ray.cancel(reference, force=True)

        yield make


def _result(ray: Any, reference: Any, file: str) -> ShardRecord:
    """Return a task's record; raise its `InputError`, or one that says that its workers were lost."""
    try:
        record: ShardRecord = ray.get(reference)
        return record
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise InputError(
            f"{file} was lost {_RETRIES + 1} times with its worker ({error}); run the same command to go on"
        ) from error
