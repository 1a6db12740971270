"""Penalised model rollouts to a file, in D4RL's layout."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mopo_fast import __version__
from mopo_fast.atomic import read_json
from mopo_fast.config import Penalty, PenaltyMembers
from mopo_fast.data.files import check_file, write_arrays
from mopo_fast.data.transitions import Transitions
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.machine import check_memory
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine
from mopo_fast.seeds import ROLLOUT, START, derive_seed
from mopo_fast.tasks import Task, get_task, termination_of


@dataclass(frozen=True)
class RunSettings:
    """How a run's rollouts were made: `RolloutConfig`'s fields of these names, none left open."""

    horizon: int
    penalty: Penalty
    penalty_coef: float
    penalty_members: PenaltyMembers
    termination: str | None


def generate(
    run: str | os.PathLike[str],
    data: Transitions,
    *,
    count: int,
    horizon: int | None = None,
    seed: int = 0,
    penalty_coef: float | None = None,
    backend: str = "auto",
) -> Transitions:
    """Roll a run's policy out in its ensemble, from `count` observations of `data` drawn with replacement.

    Args:
        run: a run's folder; its config.json says which task ends an episode and which penalty counts.
        horizon, penalty_coef: None: the run's own.

    Raises:
        InputError: the run is not whole, the data do not fit it, or a number is out of range.
    """
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    if seed < 0:
        raise InputError(f"seed must not be negative, got {seed}")
    task, settings = run_settings(run)
    horizon = settings.horizon if horizon is None else horizon
    # float32 arrays, a bool, then member, step and rollout_index.
    row = 4 * (2 * task.obs_dim + task.act_dim + 3) + 1 + 4 + 4 + 8
    check_memory(f"{count} rollouts of {horizon} steps", count * horizon * row, "cpu", "count or horizon")
    engine = RolloutEngine(
        EnsembleDynamics.load(run),
        penalty=settings.penalty,
        penalty_coef=settings.penalty_coef if penalty_coef is None else penalty_coef,
        termination=termination_of(task, settings.termination),
        backend=backend,
        penalty_members=settings.penalty_members,
    )
    generator = torch.Generator().manual_seed(derive_seed(seed, START))
    start = data.observations[torch.randint(len(data), (count,), generator=generator)]
    rollouts = engine.rollout(Actor.load(run), start, horizon, seed=derive_seed(seed, ROLLOUT))
    rollouts.info |= {
        "run": str(run),
        "dataset": data.name,
        "count": count,
        "horizon": horizon,
        "seed": seed,
        "penalty": engine.penalty,
        "penalty_coef": engine.penalty_coef,
        "backend": engine.backend,
        "mopo_fast": __version__,
    }
    return rollouts


def run_settings(run: str | os.PathLike[str]) -> tuple[Task, RunSettings]:
    """What a run's config.json says of its task and its rollouts.

    Raises:
        InputError: there is no config.json, or it is not a run's.
    """
    path = Path(run) / "config.json"
    config = read_json(path)
    try:
        rollout = config["rollout"]
        names = (field.name for field in dataclasses.fields(RunSettings))
        return get_task(config["task"]), RunSettings(**{name: rollout[name] for name in names})
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} lacks or garbles {error}; it is not a run's") from error


def save_transitions(path: str | os.PathLike[str], data: Transitions, *, overwrite: bool = False) -> None:
    """Write a rollout's transitions to .hdf5, .h5 or .npz in D4RL's layout, atomically.

    D4RL's keys, with `timeouts` where a rollout ends without a terminal, and the rollout's own arrays:
    raw_rewards, penalties, members, rollout_index, step. `data.info` becomes metadata/*.

    Raises:
        InputError: another ending, a file that exists without `overwrite`, no rollout_index, or the file
            cannot be written.
    """
    path = Path(path)
    check_file(path, overwrite)
    if data.rollout_index is None:
        raise InputError("only model rollouts can be saved: these transitions have no rollout_index")
    arrays = {name: array.cpu().numpy() for name, array in data.arrays().items()}
    last = np.append(np.diff(arrays["rollout_index"]) != 0, True)[: len(data)]
    arrays["timeouts"] = last & ~arrays["terminals"]
    write_arrays(path, {**arrays, **{f"metadata/{name}": value for name, value in data.info.items()}})
