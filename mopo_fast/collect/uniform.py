"""Collect data sets of uniform random actions.

`mujoco.rollout` steps whole batches of episodes in native code. The stored values are bit for bit those of
gymnasium's `env.step`, cast to float32.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mujoco
import mujoco.rollout
import numpy as np
import numpy.typing as npt

from mopo_fast.data.hdf5_writer import new_file
from mopo_fast.environments import make_environment
from mopo_fast.errors import InputError
from mopo_fast.tasks import TASKS
from mopo_fast.utils.progress import progress_bar
from mopo_fast.utils.seeds import COLLECT, derive_seed

Array = npt.NDArray[Any]

UNIFORM = "uniform random actions"
MAX_PATH = 1000
"""Most steps of an episode, the limit of D4RL and of the environments."""
# Most physics steps of a thread in one call of `mujoco.rollout`, except where one episode has more.
_BATCH_STEPS = 1 << 12


@dataclass(frozen=True)
class Rules:
    """The rules by which an environment turns physics states into transitions.

    Source: gymnasium, envs/mujoco/*_v4.py.

    Attributes:
        ctrl_cost: weight of the squared action in the reward.
        healthy_reward: reward for each step.
        max_velocity: limit to which observed velocities are clipped, in both directions.
        height: open interval of qpos[1], outside which the episode ends.
        angle: open interval of qpos[2], outside which the episode ends.
        state: open interval of every element of qpos[2:] and qvel, outside which the episode ends.
        first_roll: number of steps of the first attempt at an episode. Most random episodes are shorter.
    """

    ctrl_cost: float
    healthy_reward: float = 0.0
    max_velocity: float = np.inf
    height: tuple[float, float] = (-np.inf, np.inf)
    angle: tuple[float, float] = (-np.inf, np.inf)
    state: tuple[float, float] = (-np.inf, np.inf)
    first_roll: int = MAX_PATH

    def healthy(self, states: Array) -> Array:
        """Tell in which states [..., qpos and qvel] the episode goes on, as bool [...]."""
        inside = _between(states[..., 1], self.height) & _between(states[..., 2], self.angle)
        return inside & _between(states[..., 2:], self.state).all(axis=-1)


RULES = {
    "halfcheetah": Rules(ctrl_cost=0.1),
    "hopper": Rules(1e-3, 1.0, 10.0, (0.7, np.inf), (-0.2, 0.2), (-100.0, 100.0), first_roll=24),
    "walker2d": Rules(1e-3, 1.0, 10.0, (0.8, 2.0), (-1.0, 1.0), first_roll=24),
}


def _between(values: Array, bounds: tuple[float, float]) -> Array:
    # Without a rule everything passes, even NaN, as in gymnasium.
    if bounds == (-np.inf, np.inf):
        return np.ones(values.shape, dtype=bool)
    return np.asarray((bounds[0] < values) & (values < bounds[1]))


@dataclass(frozen=True)
class _Episode:
    states: Array
    """[length + 1, qpos and qvel] float64."""
    actions: Array
    """[length, act_dim] float32."""
    terminal: bool


class _Collector:
    """Rolls out episodes 0, 1, 2, ... of one environment. Episode k depends on (seed, k) alone."""

    def __init__(self, task: str, seed: int, threads: int) -> None:
        self.env = make_environment(TASKS[task].env_id).unwrapped
        self.rules, self.seed, self.threads = RULES[task], seed, threads
        self.model = self.env.model
        self.nq = self.model.nq
        self.pool = mujoco.rollout.Rollout(nthread=threads)
        self.scratch = [mujoco.MjData(self.model) for _ in range(threads)]

    def __enter__(self) -> "_Collector":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.close()
        self.env.close()

    def batches(self, steps: int) -> Iterator[list[_Episode]]:
        """Yield whole episodes in order, until they have at least `steps` steps together."""
        first, collected = 0, 0
        while collected < steps:
            # Ctrl-C waits until the call returns, about 0.1 s.
            most = self.threads * max(1, _BATCH_STEPS // (self.rules.first_roll * self.env.frame_skip))
            count = min(most, math.ceil((steps - collected) / self.rules.first_roll))
            episodes = self._batch(range(first, first + count))
            yield episodes
            first += count
            collected += sum(len(episode.actions) for episode in episodes)

    def _batch(self, indices: range) -> list[_Episode]:
        done: dict[int, _Episode] = {}
        pending = list(indices)
        length = self.rules.first_roll
        while pending:
            for index, episode in zip(pending, self._roll(pending, length), strict=True):
                if episode.terminal or length == MAX_PATH:
                    done[index] = episode
            # An episode that is longer than its roll starts over. To continue it would take the solver's warm
            # start, on which the last bits depend and which `mujoco.rollout` does not return.
            pending = [index for index in pending if index not in done]
            length = min(2 * length, MAX_PATH)
        return [done[index] for index in indices]

    def _roll(self, indices: list[int], length: int) -> Iterator[_Episode]:
        """Yield the first `length` steps of each episode, cut where the episode ends."""
        model, data, skip = self.model, self.env.data, self.env.frame_skip
        spec = mujoco.mjtState.mjSTATE_FULLPHYSICS
        starts = np.empty((len(indices), mujoco.mj_stateSize(model, spec)))
        warmstarts = np.empty((len(indices), model.nv))
        actions = np.empty((len(indices), length, model.nu), dtype=np.float32)
        for row, index in enumerate(indices):
            self.env.reset(seed=derive_seed(self.seed, COLLECT, index))
            mujoco.mj_getState(model, data, starts[row], spec)
            warmstarts[row] = data.qacc_warmstart
            actions[row] = self.env.np_random.uniform(-1.0, 1.0, (length, model.nu))
        # Controls and states have one row per physics step.
        controls = np.repeat(actions.astype(np.float64), skip, axis=1)
        states, _ = self.pool.rollout(model, self.scratch, starts, controls, initial_warmstart=warmstarts)
        # Keep one row per control step: time, qpos, qvel.
        states = np.concatenate([starts[:, None], states[:, skip - 1 :: skip]], axis=1)
        ended = ~self.rules.healthy(states[:, 1:, 1:])
        for row, index in enumerate(indices):
            terminal = bool(ended[row].any())
            steps = int(ended[row].argmax()) + 1 if terminal else length
            if not math.isclose(states[row, steps, 0], steps * self.env.dt, rel_tol=1e-6):
                raise InputError(f"the simulation of episode {index} became unstable; choose another seed")
            yield _Episode(
                states[row, : steps + 1, 1:].copy(),
                actions[row, :steps].copy(),
                # At the step limit D4RL writes a time-out, never a terminal.
                terminal and steps < MAX_PATH,
            )

    def transitions(self, episodes: list[_Episode]) -> dict[str, Array]:
        """Join whole episodes to D4RL's arrays."""
        before = np.concatenate([episode.states[:-1] for episode in episodes])
        after = np.concatenate([episode.states[1:] for episode in episodes])
        actions = np.concatenate([episode.actions for episode in episodes])
        last = np.cumsum([len(episode.actions) for episode in episodes]) - 1
        terminals = np.zeros(len(actions), dtype=bool)
        terminals[last] = [episode.terminal for episode in episodes]
        timeouts = np.zeros(len(actions), dtype=bool)
        timeouts[last] = ~terminals[last]
        velocity = (after[:, 0] - before[:, 0]) / self.env.dt
        # gymnasium computes the cost of a float32 action in float32.
        cost = np.float32(self.rules.ctrl_cost) * np.square(actions).sum(axis=1)
        return {
            "observations": self._observe(before),
            "actions": actions,
            "rewards": (velocity + self.rules.healthy_reward - cost).astype(np.float32),
            "next_observations": self._observe(after),
            "terminals": terminals,
            "timeouts": timeouts,
            "infos/action_log_probs": np.full(len(actions), -actions.shape[1] * math.log(2.0), np.float32),
            "infos/qpos": before[:, : self.nq],
            "infos/qvel": before[:, self.nq :],
        }

    def _observe(self, states: Array) -> Array:
        """Return float32 observations: all but the position along the track; velocities are clipped."""
        limit = self.rules.max_velocity
        velocity = np.clip(states[:, self.nq :], -limit, limit)
        return np.concatenate([states[:, 1 : self.nq], velocity], axis=1).astype(np.float32)


def collect_uniform(
    path: Path, task: str, steps: int, metadata: dict[str, Any], *, seed: int, threads: int, quiet: bool
) -> None:
    """Write `steps` transitions of uniform actions to an HDF5 file. `collect` checks the arguments."""
    with (
        _Collector(task, seed, threads) as collector,
        progress_bar(f"collect {metadata['name']}", steps, unit="step", quiet=quiet) as bar,
        new_file(path, steps, metadata | {"policy": UNIFORM}) as file,
    ):
        for episodes in collector.batches(steps):
            file.append(collector.transitions(episodes))
            bar.update(completed=file.written)
