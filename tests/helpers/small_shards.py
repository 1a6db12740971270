"""A small run in hopper, and its rollouts as shards."""

import contextlib
import json
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mopo_fast import Actor, EnsembleDynamics, Transitions
from mopo_fast.bulk.write import generate_shards
from mopo_fast.data.manifest import Manifest, manifest_path

COUNT, SHARD = 1100, 200
CONFIG = {
    "dataset": "hopper-random-local",
    "task": "hopper",
    "rollout": {
        "horizon": 3,
        "penalty": "ensemble_std",
        "penalty_coef": 2.0,
        "penalty_members": "elites",
        "termination": None,
        "backend": "auto",
    },
}


def make_run(folder: Path) -> Path:
    """Write models with random weights and the settings of their rollouts."""
    generator = torch.Generator().manual_seed(0)
    EnsembleDynamics(11, 3, hidden=(8,), generator=generator).save(folder)
    Actor(11, 3, hidden=(8,), generator=generator).save(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def make_shards(run: Path, data: Transitions, out: Path, **options: Any) -> Manifest:
    settings = {"count": COUNT, "shard_rows": SHARD, "seed": 7, "threads": 1, "quiet": True}
    return generate_shards(run, data, out, **settings | options)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def edit(folder: Path, change: Callable[[Any], None]) -> None:
    """Change a manifest in place."""
    path = manifest_path(folder)
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Limit files of this process to `size` bytes, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
