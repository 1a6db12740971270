"""Write shards on a local Ray cluster of two workers, one of which is killed; run by test_cluster.py."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import ray

from mopo_fast.bulk.write import generate_shards
from mopo_fast.data import load_dataset


def workers() -> list[int]:
    """Return the process IDs of Ray's workers that make shards; Ray names them after their task."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::_make"):
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


def kill_one(out: Path, killed: list[int]) -> None:
    """Kill a worker once the first shard is finished, while others are being made."""
    while not list(out.glob("shard-*")):
        time.sleep(0.001)
    while not killed:
        for process in workers()[:1]:
            os.kill(process, signal.SIGKILL)
            killed.append(process)


def main(run: str, dataset: str, out: str, count: str, shard_rows: str, kill: str) -> None:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    killed: list[int] = []
    if kill == "kill":
        threading.Thread(target=kill_one, args=(Path(out), killed), daemon=True).start()
    generate_shards(
        run,
        load_dataset(dataset),
        out,
        count=int(count),
        shard_rows=int(shard_rows),
        seed=7,
        ray="auto",
        quiet=True,
    )
    print(len(killed))


if __name__ == "__main__":
    main(*sys.argv[1:])
