"""Replace the rewards of transitions: by a function, or for the paper's out-of-distribution tasks."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch

from mopo_fast.config import ZInit
from mopo_fast.data.files import load_file, open_file
from mopo_fast.data.names import rename
from mopo_fast.data.stored import read_all
from mopo_fast.data.transitions import Transitions
from mopo_fast.data.write import write_arrays
from mopo_fast.errors import InputError
from mopo_fast.tasks import TASKS

Arrays = dict[str, npt.NDArray[Any]]
RewardFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Height of halfcheetah's torso in the MuJoCo model when its root's z coordinate is 0, in metres.
_TORSO_HEIGHT = 0.7


def relabel(data: Transitions, reward_function: RewardFunction) -> Transitions:
    """Return the transitions with rewards computed by a function.

    Args:
        data: the transitions. They are not changed.
        reward_function: function of observations [n, obs_dim], actions [n, act_dim] and next_observations
            [n, obs_dim] that returns rewards [n].

    Raises:
        InputError: the rewards have another shape or are not finite.
    """
    rewards = reward_function(data.observations, data.actions, data.next_observations)
    if rewards.shape != data.rewards.shape:
        raise InputError(
            f"the reward function must return shape {tuple(data.rewards.shape)}, got {tuple(rewards.shape)}"
        )
    return dataclasses.replace(data, rewards=rewards.to(data.rewards)).validate()


def _jump(arrays: Arrays, z_init: ZInit = "constant") -> Arrays:
    """Turn halfcheetah's rewards v_x - 0.1 |a|^2 into min(v_x, 3) - 0.1 |a|^2 + 15 (z - z_init).

    Rewards in which v_x is already capped at 3 give the same result. Observations without the torso's height
    get it.

    Args:
        arrays: D4RL's arrays of whole episodes.
        z_init: as in `environments.HalfCheetahJump`. "episode" takes the height in an episode's first row.
    """

    def with_height(observations: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if observations.shape[1] != 17:
            return observations
        return np.insert(observations, 8, _TORSO_HEIGHT + observations[:, 0], axis=1)

    cost = 0.1 * np.square(arrays["actions"].astype(np.float64)).sum(axis=1)
    height = arrays["next_observations"][:, 0].astype(np.float64)
    if z_init == "episode":
        height -= arrays["observations"][_first_rows(arrays), 0]
    jump = 15.0 * height
    rewards = np.minimum(arrays["rewards"] + cost, 3.0) - cost + jump
    return arrays | {
        "observations": with_height(arrays["observations"]),
        "next_observations": with_height(arrays["next_observations"]),
        "rewards": rewards.astype(np.float32),
    }


def _first_rows(arrays: Arrays) -> npt.NDArray[np.int64]:
    """Return the first row of each row's episode, [n]."""
    begins = np.ones(len(arrays["rewards"]), bool)
    begins[1:] = (arrays["next_observations"][:-1] != arrays["observations"][1:]).any(axis=1)
    for flags in ("terminals", "timeouts"):
        if flags in arrays:
            begins[1:] |= arrays[flags].reshape(-1)[:-1].astype(bool)
    return np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))


def _angle(arrays: Arrays) -> Arrays:
    """Replace v_x in ant's rewards by v_x cos 30 deg + v_y sin 30 deg, as ant-angle has it."""
    x, y = arrays["infos/x_velocity"], arrays["infos/y_velocity"]
    turned = (math.cos(math.pi / 6) - 1.0) * x + math.sin(math.pi / 6) * y
    return arrays | {"rewards": (arrays["rewards"] + turned).astype(np.float32)}


RELABELLED: dict[str, Callable[[Arrays], Arrays]] = {"halfcheetah-jump": _jump, "ant-angle": _angle}
"""Functions that turn D4RL's arrays of the original task into those of each out-of-distribution task."""


def relabeller(task: str, z_init: ZInit) -> tuple[Callable[[Arrays], Arrays], dict[str, str]]:
    """Return the function in `RELABELLED` for a task, and the metadata of what it makes.

    Args:
        task: one of `RELABELLED`.
        z_init: as in `environments.HalfCheetahJump`.

    Raises:
        InputError: `z_init` is unknown, or the task is not halfcheetah-jump and `z_init` not "constant".
    """
    check_z_init(task, z_init)
    metadata = {"relabelled": task, "env_id": TASKS[task].env_id}
    if z_init == "constant":
        return RELABELLED[task], metadata
    metadata["env_id"] = "mopo_fast/HalfCheetahJumpMeasured-v0"
    return functools.partial(_jump, z_init=z_init), metadata


def check_z_init(task: str, z_init: str) -> None:
    """Raise `InputError` where `z_init` is unknown, or is not "constant" for a task without a height."""
    if z_init not in get_args(ZInit):
        raise InputError(f"z_init must be one of {', '.join(get_args(ZInit))}, got {z_init!r}")
    if z_init != "constant" and task != "halfcheetah-jump":
        raise InputError(f"z_init belongs to halfcheetah-jump, not to {task}; leave it out")


_TAKES = {
    "halfcheetah-jump": ({17, 18}, 6, ("next_observations",)),
    "ant-angle": ({27}, 8, ("next_observations", "infos/x_velocity", "infos/y_velocity")),
}


def relabel_file(
    file: str | os.PathLike[str],
    task: str,
    out: str | os.PathLike[str],
    *,
    z_init: ZInit = "constant",
    overwrite: bool = False,
) -> Path:
    """Write a copy of an HDF5 file with the rewards of another task.

    Args:
        file: path of the data set. Everything in it but the rewards is copied.
        task: one of `RELABELLED`.
        out: path of the new file, which ends in .hdf5 or .h5.
        z_init: as in `environments.HalfCheetahJump`, for halfcheetah-jump alone. "episode" takes the height
            in an episode's first row, which the file must begin its episodes with.
        overwrite: replace an existing file.

    Returns:
        The path of the new file.

    Raises:
        InputError: the task is unknown; the data set is damaged, relabelled already, has other sizes than the
            task or lacks an array that the reward needs; `out` exists or cannot be written.
    """
    if task not in RELABELLED:
        raise InputError(f"cannot relabel for {task!r}; choose one of {', '.join(RELABELLED)}")
    relabelled, marks = relabeller(task, z_init)
    path, out = Path(file), Path(out)
    if out.suffix not in (".hdf5", ".h5"):
        raise InputError(f"out must end in .hdf5 or .h5, got {out}")
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists already; choose another --out, or replace it with --overwrite")
    data = load_file(path)
    obs_dims, act_dim, needed = _TAKES[task]
    if data.obs_dim not in obs_dims or data.act_dim != act_dim:
        raise InputError(
            f"{path} has {data.obs_dim} observation and {data.act_dim} action dimensions, but {task} is made"
            f" from {' or '.join(map(str, sorted(obs_dims)))} and {act_dim}; give a data set of that task"
        )
    if "relabelled" in data.info["metadata"]:
        raise InputError(f"{path} is relabelled already; give the file that it was made from")
    with open_file(path) as source:
        found = rename(read_all(path, source), str(path))
    for key in ("rewards", *needed):
        if key not in found:
            raise InputError(
                f"{path} lacks {key}, which the reward of {task} needs; collect the data set again"
            )
        if key != "next_observations":
            if found[key].size != len(data) or found[key].dtype.kind not in "fiub":
                raise InputError(f"{path}: {key} must be {len(data)} numbers, got shape {found[key].shape}")
            found[key] = found[key].reshape(-1)
    metadata = marks | {"name": f"{task}-local", "steps": len(data)}
    write_arrays(out, relabelled(found) | {f"metadata/{key}": value for key, value in metadata.items()})
    return out
