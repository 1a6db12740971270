"""Names under which other code stores the arrays of a data set."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from mopo_fast.errors import InputError

ALIASES = {
    "observations": ("obs", "observation"),
    "actions": ("action",),
    "rewards": ("reward",),
    "next_observations": ("next_obs", "next_observation"),
    "terminals": ("terminations", "dones", "done"),
    "timeouts": ("truncations",),
}
"""Other names that are accepted for D4RL's, of Gymnasium, Stable-Baselines3, CleanRL and NeoRL."""

MAX_EPISODE_STEPS = 1000
"""Step limit of every D4RL MuJoCo environment, for files without `timeouts`."""

# These flags may be set at time limits too.
_MAY_BE_TIMEOUTS = ("dones", "done")


def find_names(keys: Collection[Any], source: str) -> dict[str, str]:
    """Return the key of each array that a data set has, by D4RL's name.

    D4RL's own name comes first. Without it the array may have one of `ALIASES`.

    Args:
        keys: all keys of the data set.
        source: name of the data set in errors.

    Raises:
        InputError: an array has two of `ALIASES`, so that it is not clear which one is meant.
    """
    found = {}
    for name, others in ALIASES.items():
        given = [name] if name in keys else [other for other in others if other in keys]
        if len(given) > 1:
            raise InputError(
                f"{source} has both {given[0]!r} and {given[1]!r}; name the one that is meant {name!r}"
            )
        if given:
            found[name] = given[0]
    return found


def rename(arrays: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the arrays of a data set under D4RL's names, all others under their own.

    A row that is done and a time-out is no terminal, as in Stable-Baselines3.

    NeoRL's `index` holds the first row of each trajectory. Its `done` is also set at the step limit, so the
    end of a trajectory of `MAX_EPISODE_STEPS` steps counts as a time-out.

    Args:
        arrays: the arrays, by any of the accepted names.
        source: name of the data set in errors.

    Raises:
        InputError: an array has two names, or NeoRL's index does not hold the first rows of trajectories.
    """
    names = find_names(arrays.keys(), source)
    ours = {key: name for name, key in names.items()}
    renamed = {ours.get(key, key): item for key, item in arrays.items()}
    if names.get("terminals") not in _MAY_BE_TIMEOUTS:
        return renamed
    if "timeouts" not in names and "index" in arrays:
        renamed["timeouts"] = _neorl_timeouts(renamed["terminals"], renamed.pop("index"), source)
    if "timeouts" in renamed:
        done, timeouts = (np.asarray(renamed[name]).reshape(-1) for name in ("terminals", "timeouts"))
        # Other sizes are an error, which is reported where the arrays are read.
        if len(done) == len(timeouts):
            renamed["terminals"] = np.where(timeouts, 0, done)
    return renamed


def _neorl_timeouts(done: Any, index: Any, source: str) -> Any:
    done, starts = np.asarray(done).reshape(-1), np.asarray(index).reshape(-1)
    steps = np.diff(starts.astype(np.int64), append=len(done)) if starts.dtype.kind in "iu" else np.zeros(1)
    if not len(steps) or starts[0] != 0 or (steps < 1).any():
        raise InputError(f"{source}: index must hold the first row of each trajectory, in order from 0")
    ends = np.cumsum(steps) - 1
    timeouts = np.zeros(len(done), bool)
    timeouts[ends] = (steps >= MAX_EPISODE_STEPS) | (done[ends] == 0)
    return timeouts
