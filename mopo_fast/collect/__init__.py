"""Collect data sets in MuJoCo by D4RL's protocol, with uniform actions or with SAC trained online."""

import os
from pathlib import Path
from typing import Any

from mopo_fast._version import __version__
from mopo_fast.config import OnlineConfig, ZInit
from mopo_fast.data import d4rl
from mopo_fast.data.local import local_file
from mopo_fast.errors import InputError
from mopo_fast.tasks import RELABELLED, TASKS
from mopo_fast.utils.atomic import check_writable

__all__ = ["collect"]


def collect(
    name: str,
    steps: int | None = None,
    *,
    seed: int = 0,
    z_init: ZInit = "constant",
    out: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    online: OnlineConfig | None = None,
) -> Path:
    """Collect a data set in MuJoCo, and write it to an HDF5 file in D4RL's layout.

    Episodes last at most 1000 steps. `random` sets have uniform actions. All other tiers of a seed come from
    one SAC agent, trained online (see `mopo_fast.collect.online`). An interrupted training continues where it
    was stopped. The file does not depend on the number of threads.

    Args:
        name: TASK-TIER with D4RL's names, such as `hopper-medium`; or one of the paper's out-of-distribution
            tasks, `halfcheetah-jump` and `ant-angle`: the full replay of an agent trained with another
            reward, relabelled. The data set's name is `<name>-local`.
        steps: number of transitions, by default 1,000,000; the last episode is cut. medium-expert has this
            many from each policy. Replays contain every stored transition and do not take `steps`.
        seed: seed of all random numbers.
        z_init: height that halfcheetah-jump's reward measures from, as in `environments.HalfCheetahJump`.
        out: path of the file (.hdf5 or .h5) or its folder; by default the folder of local data sets.
        threads: number of threads, by default one per core.
        overwrite: replace an existing file.
        quiet: show no progress bars.
        online: settings of the SAC agent's training, by default `OnlineConfig()`.

    Returns:
        The path of the file.

    Raises:
        InputError: the name is unknown; a number is out of range; the file exists; a folder cannot be
            written, or another process trains in it; or the agent never reached the tier's score.
    """
    local_name = name.removesuffix("-local")
    task, _, tier = local_name.partition("-")
    if local_name in RELABELLED:
        task, tier = local_name, "full-replay"
    elif task not in d4rl.TASKS or tier not in d4rl.TIERS:
        raise InputError(
            f"cannot collect {name!r}; give TASK-TIER with TASK one of {', '.join(d4rl.TASKS)} and TIER one"
            f" of {', '.join(d4rl.TIERS)}; or {' or '.join(RELABELLED)}"
        )
    if steps is not None and tier.endswith("replay"):
        raise InputError(f"{local_name} contains every stored transition; leave out steps, got {steps!r}")
    if z_init != "constant":
        # The import takes a second.
        from mopo_fast.data.rewards import check_z_init

        check_z_init(local_name, z_init)
    steps = 1_000_000 if steps is None else steps
    for argument, value, least in (("steps", steps, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{argument} must be a whole number of at least {least}, got {value!r}")
    local_name = f"{local_name}-local"
    path = Path(out).expanduser() if out is not None else local_file(local_name)
    if path.suffix in (".npz", ".pkl", ".csv", ".parquet"):
        raise InputError(f"cannot write {path}; write .hdf5 and convert it with `mopo-fast convert`")
    if path.suffix not in (".hdf5", ".h5"):
        path = local_file(local_name, path)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already; choose another --out, or replace it with --overwrite")
    check_writable(path)
    # These imports take seconds, for which a mistake should not wait.
    import gymnasium
    import mujoco

    from mopo_fast.collect.online import collect_online
    from mopo_fast.collect.uniform import MAX_PATH, RULES, collect_uniform
    from mopo_fast.utils.machine import resolve_threads

    threads = resolve_threads(threads)
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
        config = online or OnlineConfig()
        collect_online(path, task, tier, steps, metadata, config=config, z_init=z_init, **options)
    return path
