"""A local Ray cluster of two CPUs and a process that is connected to it, for test_cluster.py.

Ray connects a whole process to a cluster, so the tests' own process stays outside. All tests share the
cluster: its start, and the imports of its processes, take longer than their work.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import ray
from places import HELPERS, ROOT

from mopo_fast.bulk.write import generate_shards
from mopo_fast.cli import main
from mopo_fast.data import load_dataset


@dataclass(frozen=True)
class Done:
    """The exit code of a command line, and the texts that it and Ray have written to the two streams."""

    returncode: int
    stdout: str
    stderr: str


class Cluster:
    """Runs commands and generates shards in the connected process."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def command(self, *line: Any) -> Done:
        return self._pool.submit(_command, [str(word) for word in line]).result(600)

    def shards(self, run: Path, dataset: Path, out: Path, *, kill: bool, **options: Any) -> int:
        """Write shards; return how many workers were killed meanwhile, 1 with `kill`."""
        return self._pool.submit(_shards, run, dataset, out, kill, options).result(600)


@contextlib.contextmanager
def cluster_of_two() -> Iterator[Cluster]:
    """Start a cluster for the length of the block."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _connect) as pool:
        yield Cluster(pool)
        pool.submit(ray.shutdown).result(60)


def _connect() -> None:
    # For Ray's workers.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(HELPERS), os.environ.get("PYTHONPATH", "")])
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)


def _command(line: list[str]) -> Done:
    with TemporaryFile() as out, TemporaryFile() as err:
        # Files in place of the streams themselves, because Ray writes from C++ too.
        before = [os.dup(number) for number in (1, 2)]
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            code = main(line)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, stream in enumerate(before, 1):
                os.dup2(stream, number)
                os.close(stream)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
        return Done(code, *texts)


def _shards(run: Path, dataset: Path, out: Path, kill: bool, options: dict[str, Any]) -> int:
    killed: list[int] = []
    if kill:
        threading.Thread(target=_kill_one, args=(out, killed), daemon=True).start()
    generate_shards(run, load_dataset(dataset), out, ray="auto", quiet=True, **options)
    return len(killed)


def _workers() -> list[int]:
    """Return the process IDs of Ray's workers that make shards; Ray names them after their task."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::_make"):
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


def _kill_one(out: Path, killed: list[int]) -> None:
    """Kill a worker once the first shard is finished, while others are being made."""
    while not list(out.glob("shard-*")):
        time.sleep(0.001)
    while not killed:
        for process in _workers()[:1]:
            os.kill(process, signal.SIGKILL)
            killed.append(process)
