"""Data sets made in the environments by D4RL's protocol: by uniform actions, or by SAC trained online."""

import os
from pathlib import Path
from typing import Any

import gymnasium
import mujoco

from mopo_fast._version import __version__
from mopo_fast.collect.online import collect_online
from mopo_fast.collect.uniform import MAX_PATH, RULES, collect_uniform
from mopo_fast.config import OnlineConfig
from mopo_fast.data import d4rl
from mopo_fast.data.local import local_file
from mopo_fast.data.relabel import RELABELLED
from mopo_fast.errors import InputError
from mopo_fast.tasks import TASKS
from mopo_fast.utils.atomic import check_writable
from mopo_fast.utils.machine import resolve_threads

__all__ = ["collect"]


def collect(
    name: str,
    steps: int | None = None,
    *,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    online: OnlineConfig | None = None,
) -> Path:
    """Make a data set in MuJoCo and write it to an HDF5 file in D4RL's layout.

    Episodes last at most 1000 steps. `random` sets are of uniform actions. The others come from a SAC agent
    trained online (see `mopo_fast.collect.online`), which goes on where it was stopped and which all tiers
    of a seed share. The file is the same for any number of threads.

    Args:
        name: TASK-TIER, as D4RL has them, such as `hopper-medium`, or one of the paper's two
            out-of-distribution tasks, `halfcheetah-jump` or `ant-angle`: the full replay of an agent trained
            by another reward, relabelled. The set is called `<name>-local`.
        steps: transitions, by default 1 M; the last episode is cut. medium-expert has so many of each half.
            Replays hold all that was stored and take none.
        out: the file (.hdf5 or .h5) or its folder; by default the folder of local data sets.
        threads: None takes every core.
        overwrite: replace a file that is there already.
        online: how the SAC agent is trained, by default `OnlineConfig()`.

    Returns:
        The file's path.

    Raises:
        InputError: no such set, a number out of range, a file that exists, a folder that cannot be written or
            where another process trains, or a training that never got as good as the tier's name says.
    """
    local_name = name.removesuffix("-local")
    task, _, tier = local_name.partition("-")
    if local_name in RELABELLED:
        task, tier = local_name, "full-replay"
    elif task not in d4rl.TASKS or tier not in d4rl.TIERS:
        raise InputError(
            f"cannot collect {name!r}; it must be TASK-TIER with a task of {', '.join(d4rl.TASKS)}"
            f" and a tier of {', '.join(d4rl.TIERS)}; or {' or '.join(RELABELLED)}"
        )
    threads = resolve_threads(threads)
    if steps is not None and tier.endswith("replay"):
        raise InputError(f"{local_name} holds all that was stored; leave out steps, got {steps!r}")
    steps = 1_000_000 if steps is None else steps
    for what, value, least in (("steps", steps, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{what} must be a whole number of at least {least}, got {value!r}")
    local_name = f"{local_name}-local"
    path = Path(out).expanduser() if out is not None else local_file(local_name)
    if path.suffix in (".npz", ".pkl", ".csv", ".parquet"):
        raise InputError(f"cannot write {path}: collect writes .hdf5; `mopo-fast convert` makes others of it")
    if path.suffix not in (".hdf5", ".h5"):
        path = local_file(local_name, path)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already; choose another --out, or replace it with --overwrite")
    check_writable(path)
    metadata = {
        "name": local_name,
        "env_id": TASKS[task].env_id,
        "seed": seed,
        "max_path": MAX_PATH,
        "mopo_fast": __version__,
        "mujoco": mujoco.__version__,
        "gymnasium": gymnasium.__version__,
    }
    options: dict[str, Any] = {"seed": seed, "threads": threads, "quiet": quiet}
    if tier == "random" and task in RULES:
        collect_uniform(path, task, steps, metadata, **options)
    else:
        collect_online(path, task, tier, steps, metadata, config=online or OnlineConfig(), **options)
    return path
