"""True steps of MuJoCo from any observation."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mopo_fast.environments import make_environment
from mopo_fast.errors import InputError
from mopo_fast.tasks import TASKS

Array = npt.NDArray[Any]

# Tasks whose observation is qpos without its first number, then qvel, and whose reward depends on nothing
# else: the limit at which the observed velocities are clipped.
_LIMITS = {"halfcheetah": np.inf, "hopper": 10.0, "walker2d": 10.0}


@dataclass(frozen=True)
class TrueSteps:
    """True successors of some observations and actions.

    Attributes:
        next_observations: [n, obs_dim] float64.
        rewards: [n] float64.
        terminals: bool [n].
        known: bool [n]. False where the state cannot be rebuilt, because a velocity is clipped in the
            observation, or where MuJoCo's step is not finite. The other arrays have no meaning there.
    """

    next_observations: Array
    rewards: Array
    terminals: Array
    known: Array


class Simulator:
    """MuJoCo's environment of a task, set to states that are rebuilt from observations.

    The position along the track is not observed and is set to 0: neither the dynamics nor the rewards depend
    on it. The solver starts cold, as after a reset.

    Args:
        task: name of a task.

    Raises:
        InputError: the task's observations do not hold the whole state.
    """

    def __init__(self, task: str) -> None:
        if task not in _LIMITS:
            raise InputError(f"states can be rebuilt for {', '.join(_LIMITS)}, not for {task}")
        self._limit = _LIMITS[task]
        self._environment = make_environment(TASKS[task].env_id).unwrapped

    def knows(self, observations: Array) -> Array:
        """Tell which observations [n, obs_dim] determine their states, as bool [n]."""
        positions = self._environment.model.nq - 1
        velocities = np.abs(observations[:, positions:])
        return np.asarray(np.isfinite(observations).all(axis=1) & (velocities < self._limit).all(axis=1))

    def step(self, observations: Array, actions: Array) -> TrueSteps:
        """Make one true step from each observation [n, obs_dim] with its action [n, act_dim]."""
        observations = np.asarray(observations, dtype=np.float64)
        known = self.knows(observations)
        successors, rewards = np.zeros_like(observations), np.zeros(len(observations))
        terminals = np.zeros(len(observations), dtype=bool)
        for i in np.flatnonzero(known):
            self.set_state(observations[i])
            successors[i], rewards[i], terminals[i] = self._environment.step(actions[i])[:3]
        known &= np.isfinite(successors).all(axis=1) & np.isfinite(rewards)
        return TrueSteps(successors, rewards, terminals, known)

    def set_state(self, observation: Array) -> None:
        """Set the environment to the state of an observation [obs_dim]."""
        environment = self._environment
        positions = environment.model.nq - 1
        # Contacts and the solver's start of an earlier state would be left over otherwise.
        environment.reset()
        environment.set_state(np.append(0.0, observation[:positions]), observation[positions:])

    def close(self) -> None:
        """Release the environment."""
        self._environment.close()
