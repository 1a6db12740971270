"""Penalised model rollouts to a file, in D4RL's layout."""

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from mopo_fast import __version__
from mopo_fast.atomic import atomic_path, read_json
from mopo_fast.data.transitions import Transitions
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine
from mopo_fast.seeds import ROLLOUT, START, derive_seed
from mopo_fast.tasks import Task, get_task, parse_dataset_name


def generate(
    run: str | os.PathLike[str],
    data: Transitions,
    *,
    count: int,
    horizon: int,
    seed: int = 0,
    penalty_coef: float | None = None,
    backend: str = "auto",
) -> Transitions:
    """Roll a run's policy out in its ensemble, from `count` observations of `data` drawn with replacement.

    Args:
        run: a run's folder; its config.json says which task ends an episode and which penalty counts.
        penalty_coef: None: the run's own.

    Raises:
        InputError: the run is not whole, the data do not fit it, or a number is out of range.
    """
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    task, tier, rollout = _settings(run)
    if penalty_coef is None:
        penalty_coef = rollout["penalty_coef"]
    if penalty_coef is None:
        penalty_coef = task.tuned_for(tier)[1]
    engine = RolloutEngine(
        EnsembleDynamics.load(run),
        penalty=rollout["penalty"],
        penalty_coef=penalty_coef,
        termination=task.box,
        backend=backend,
        penalty_members=rollout["penalty_members"],
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


def run_task(run: str | os.PathLike[str]) -> Task:
    """The task that a run was trained for.

    Raises:
        InputError: no config.json, or one that names no task.
    """
    return _settings(run)[0]


def _settings(run: str | os.PathLike[str]) -> tuple[Task, str | None, dict[str, Any]]:
    """(task, data tier, rollout settings) from a run's config.json."""
    path = Path(run) / "config.json"
    config = read_json(path)
    try:
        name, tier = parse_dataset_name(Path(config["dataset"]).stem)
        return get_task(config["task"] or name), tier, config["rollout"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} lacks or garbles {error}; it is not a run's") from error


def save_transitions(path: str | os.PathLike[str], data: Transitions) -> None:
    """Write a rollout's transitions to .hdf5, .h5 or .npz in D4RL's layout, atomically.

    D4RL's keys, with `timeouts` where a rollout ends without a terminal, and the rollout's own arrays:
    raw_rewards, penalties, members, rollout_index, step. `data.info` becomes metadata/* (HDF5 only).

    Raises:
        InputError: another ending, no rollout_index, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".hdf5", ".h5", ".npz"):
        raise InputError(f"cannot write {path}: the file's name must end in .hdf5, .h5 or .npz")
    if data.rollout_index is None:
        raise InputError("only model rollouts can be saved: these transitions have no rollout_index")
    arrays = {name: array.cpu().numpy() for name, array in data.arrays().items()}
    last = np.append(np.diff(arrays["rollout_index"]) != 0, True)[: len(data)]
    arrays["timeouts"] = last & ~arrays["terminals"]
    with atomic_path(path) as temporary:
        if path.suffix == ".npz":
            with temporary.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
            return
        with h5py.File(temporary, "w") as file:
            for name, array in arrays.items():
                file[name] = array
            for name, value in data.info.items():
                file[f"metadata/{name}"] = value
