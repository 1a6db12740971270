"""Makes the files of `version_0_1_0/`, which later versions must read and go on with.

Run once in that folder, with version 0.1.0: `python ../version_0_1_0.py`. It leaves the data, a run and a fit
that were stopped half-way, the same run finished, and rollouts in a file and in shards of both formats.
"""

import contextlib
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

from mopo_fast import fit, train
from mopo_fast.cli import main

DATA, COUNT, SHARD_ROWS = "hopper-random-local.hdf5", 300, 200
DYNAMICS = ["--dynamics.members=3", "--dynamics.elites=2", "--dynamics.hidden", "16", "16"]
DYNAMICS += ["--dynamics.weight-decay", "1e-5", "1e-5", "1e-5", "--dynamics.max-epochs=6"]
DYNAMICS += ["--dynamics.batch-size=64"]
RUN = [DATA, "--seed=3", "--steps=75", "--threads=1", *DYNAMICS, "--horizon=5"]
RUN += [
    "--rollout.batch-size=60",
    "--rollout.interval=10",
    "--rollout.retain-epochs=1",
    "--sac.hidden",
    "16",
    "16",
]
RUN += ["--sac.batch-size=32", "--evaluation.episodes=2", "--evaluation.interval=2"]


class Stopped(Exception):
    """In place of a kill."""


@contextlib.contextmanager
def stopped_after(module: Any, checkpoints: int) -> Any:
    """The program ends once its module has written so many checkpoints."""
    save, count = module.save_tensors, 0

    def save_and_stop(*arguments: Any, **options: Any) -> None:
        nonlocal count
        save(*arguments, **options)
        count += 1
        if count == checkpoints:
            raise Stopped

    with mock.patch.object(module, "save_tensors", save_and_stop), contextlib.suppress(Stopped):
        yield


if __name__ == "__main__":
    main(["collect", "hopper-random", "--steps=600", f"--out={DATA}", "--quiet"])
    with stopped_after(train, 4):
        main(["train", *RUN, "--out=run", "--quiet"])
    shutil.copytree("run", "finished")
    main(["train", *RUN, "--out=finished", "--resume", "--quiet"])
    with stopped_after(fit, 3):
        main(["fit", DATA, *DYNAMICS, "--seed=3", "--threads=1", "--out=fit", "--quiet"])
    for form in ("hdf5", "parquet"):
        shards = [
            f"--count={COUNT}",
            f"--shard-rows={SHARD_ROWS}",
            f"--format={form}",
            f"--out=shards-{form}",
        ]
        main(["rollout", "finished", f"--dataset={DATA}", *shards, "--quiet"])
    main(["rollout", "finished", f"--dataset={DATA}", "--count=100", "--out=rollouts.hdf5", "--quiet"])
    # Large, and never read again.
    for pattern in ("report.html", "*.png", "*tfevents*", ".lock"):
        for path in Path().rglob(pattern):
            path.unlink()
