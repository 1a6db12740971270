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
from mopo_fast.simulation import HALFCHEETAH, HOPPER, WALKER2D, State
from mopo_fast.tasks import TASKS
from mopo_fast.utils.progress import progress_bar
from mopo_fast.utils.seeds import COLLECT, derive_seed

Array = npt.NDArray[Any]

UNIFORM = "uniform random actions"
MAX_PATH = 1000
"""Most steps of an episode, the limit of D4RL and of the environments."""
# Most physics steps of a thread in one call of `mujoco.rollout`, except where one episode has more.
_BATCH_STEPS = 1 << 12


RULES = {"halfcheetah": HALFCHEETAH, "hopper": HOPPER, "walker2d": WALKER2D}
FIRST_ROLL = {"halfcheetah": MAX_PATH, "hopper": 24, "walker2d": 24}
"""Number of steps of the first attempt at an episode. Most random episodes are shorter."""


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
        self.rules, self.first_roll, self.seed, self.threads = RULES[task], FIRST_ROLL[task], seed, threads
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
            most = self.threads * max(1, _BATCH_STEPS // (self.first_roll * self.env.frame_skip))
            count = min(most, math.ceil((steps - collected) / self.first_roll))
            episodes = self._batch(range(first, first + count))
            yield episodes
            first += count
            collected += sum(len(episode.actions) for episode in episodes)

    def _batch(self, indices: range) -> list[_Episode]:
        done: dict[int, _Episode] = {}
        pending = list(indices)
        length = self.first_roll
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
        ended = ~self.rules.healthy(self._split(states[:, 1:, 1:]))
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
        before = self._split(np.concatenate([episode.states[:-1] for episode in episodes]))
        after = self._split(np.concatenate([episode.states[1:] for episode in episodes]))
        actions = np.concatenate([episode.actions for episode in episodes])
        last = np.cumsum([len(episode.actions) for episode in episodes]) - 1
        terminals = np.zeros(len(actions), dtype=bool)
        terminals[last] = [episode.terminal for episode in episodes]
        timeouts = np.zeros(len(actions), dtype=bool)
        timeouts[last] = ~terminals[last]
        velocity = self.rules.velocity(before, after, self.env.dt)
        return {
            "observations": self.rules.observe(before).astype(np.float32),
            "actions": actions,
            "rewards": self.rules.reward(velocity, after, actions).astype(np.float32),
            "next_observations": self.rules.observe(after).astype(np.float32),
            "terminals": terminals,
            "timeouts": timeouts,
            "infos/action_log_probs": np.full(len(actions), -actions.shape[1] * math.log(2.0), np.float32),
            "infos/qpos": before["qpos"],
            "infos/qvel": before["qvel"],
        }

    def _split(self, states: Array) -> State:
        return {"qpos": states[..., : self.nq], "qvel": states[..., self.nq :]}


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
