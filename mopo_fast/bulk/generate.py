"""Penalised model rollouts of a trained run: an endless sequence, and transitions of it in memory."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch

from mopo_fast import __version__
from mopo_fast.backends.philox import BATCH_STREAM, random_choice
from mopo_fast.buffer import RingBuffer
from mopo_fast.bulk.plan import SHARD_ARRAYS, GenerateConfig, Plan, Positive, generate_config
from mopo_fast.config import RolloutDtype
from mopo_fast.data.transitions import Transitions, transition_bytes
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine, allocate
from mopo_fast.tasks import Task, get_task, termination_of
from mopo_fast.utils.atomic import check_value
from mopo_fast.utils.machine import check_memory
from mopo_fast.utils.seeds import ROLLOUT, START, derive_seed

# Start states of one call: enough to be fast, few enough to show progress.
_STARTS = 50_000
# Rollouts in a row without a finite transition: the models are broken.
_HOPELESS = 10_000
# Copies of a rollout that its writer holds beside it at most, time-outs included: one that makes the whole
# file in memory, one that writes pieces as it makes them, and one that writes from the rollout's own memory.
ENCODED_WHOLE, WRITTEN_IN_PIECES, WRITTEN_IN_PLACE = 1.125, 0.375, 0.125


class Generator:
    """An endless sequence of rollouts; any stretch of it can be made alone, to the same rows.

    Rollout `i` starts at an observation drawn by (seed, i), and its random numbers are of (seed, i).

    Args:
        observations: [n, obs_dim], which start states are drawn from, with replacement.
        threads: of the CPU kernel; None: all cores.

    Raises:
        InputError: the models, the data or the settings do not fit each other.
    """

    def __init__(
        self,
        ensemble: EnsembleDynamics,
        policy: Actor,
        observations: torch.Tensor,
        config: GenerateConfig,
        threads: int | None = None,
    ) -> None:
        self.config, self.policy = config, policy
        self.engine = RolloutEngine(
            ensemble,
            penalty=config.penalty,
            penalty_coef=config.penalty_coef,
            termination=termination_of(get_task(config.task), config.termination),
            backend=config.backend,
            dtype=config.dtype,
            threads=threads,
            penalty_members=config.penalty_members,
        )
        self.observations = observations.to(self.engine.device)

    def fill(
        self, ring: RingBuffer, count: int, first: int = 0, advance: Callable[[int], None] = lambda _: None
    ) -> tuple[int, int]:
        """Write `count` transitions of rollouts `first`, first + 1, ... into the start of `ring`.

        The last rollout may be cut short.

        Args:
            ring: empty, of at least count + horizon rows.
            advance: called with the number of transitions after each stretch.

        Returns:
            Rollouts begun, and how many ended in a prediction that was not finite.

        Raises:
            InputError: nearly all rollouts end in one that is not finite.
        """
        horizon, seed = self.config.horizon, self.config.seed
        starts, non_finite, fruitless = 0, 0, 0
        while ring.size < count:
            missing = count - ring.size
            batch = min(-(-missing // horizon), _STARTS)
            numbers = torch.arange(first + starts, first + starts + batch, device=self.engine.device)
            drawn = random_choice(numbers, 0, BATCH_STREAM, len(self.observations), derive_seed(seed, START))
            made = self.engine.rollout(
                self.policy,
                self.observations[drawn],
                horizon,
                seed=derive_seed(seed, ROLLOUT),
                rows=numbers,
                out=ring,
            )
            starts, non_finite = starts + batch, non_finite + made.info["non_finite"]
            fruitless = 0 if len(made) else fruitless + batch
            if fruitless >= _HOPELESS:
                raise InputError(
                    f"the last {fruitless} rollouts had no finite transition; the ensemble or the policy is"
                    " broken, or the data are not its task's"
                )
            advance(min(len(made), missing))
        return starts, non_finite

    def shard(
        self, plan: Plan, shard: int, ring: RingBuffer, advance: Callable[[int], None] = lambda _: None
    ) -> tuple[Transitions, dict[str, Any]]:
        """Make a shard's transitions, which are the first rows of `ring`, and its metadata.

        Args:
            ring: made by `self.ring` for the plan's largest shard; its former rows are lost.
            advance: as in `fill`.

        Raises:
            InputError: as `fill`.
        """
        ring.clear()
        rows = plan.rows(shard)
        starts, non_finite = self.fill(ring, rows, shard << 32, advance)
        metadata = {"plan": plan.sha256(), "shard": shard, "starts": starts, "non_finite": non_finite}
        return ring.storage[:rows], metadata

    def ring(self, count: int) -> RingBuffer:
        """Allocate a ring that `fill` can write `count` transitions into, with every array of a rollout."""
        ensemble = self.engine.ensemble
        rows = count + self.config.horizon
        return RingBuffer.over(allocate(rows, ensemble.obs_dim, ensemble.act_dim, self.engine.device))


def generate(
    run: str | os.PathLike[str],
    data: Transitions,
    *,
    count: int,
    horizon: int | None = None,
    seed: int = 0,
    penalty_coef: float | None = None,
    dtype: RolloutDtype = "float32",
    backend: str = "auto",
    threads: int | None = None,
    task: str | Task | None = None,
) -> Transitions:
    """Roll a run's policy out in its ensemble, from observations of `data` drawn with replacement.

    Args:
        run: a run's folder; its config.json says which task ends an episode and which penalty counts.
        count: transitions.
        horizon, penalty_coef: None: the run's own.
        task: the run's task; to be given where that is a Python file, which is executed.

    Returns:
        `count` transitions, in memory, ordered by rollout, then step; `generate_shards` writes any number to
        disk.

    Raises:
        InputError: the run is not whole, the data do not fit it, a number is out of range, or the memory
            does not hold the transitions and the file that `save_transitions` makes of them.
    """
    config = generate_config(
        run, horizon=horizon, seed=seed, penalty_coef=penalty_coef, dtype=dtype, backend=backend, task=task
    )
    check_value("count", count, Positive)
    check_rollout_memory(config, count, 1, WRITTEN_IN_PLACE, "count or horizon")
    generator = Generator(EnsembleDynamics.load(run), Actor.load(run), data.observations, config, threads)
    ring = generator.ring(count)
    starts, non_finite = generator.fill(ring, count)
    rollouts = ring.storage[:count]
    rollouts.info = {
        "run": str(run),
        "dataset": data.name,
        "count": count,
        "starts": starts,
        "non_finite": non_finite,
        **dataclasses.asdict(config),
        "backend": generator.engine.backend,
        "mopo_fast": __version__,
    }
    return rollouts


def check_rollout_memory(
    config: GenerateConfig, count: int, rollouts: int, file_copies: float, lower: str
) -> None:
    """Raise `InputError` where the memory does not hold rollouts and what a writer needs beside them.

    Args:
        count: transitions of each rollout.
        rollouts: how many are held at once.
        file_copies: copies of one rollout that its writer makes.
        lower: the arguments to lower.
    """
    task = get_task(config.task)
    starts = min(-(-count // config.horizon), _STARTS)
    rows = rollouts * (count + config.horizon) + round(file_copies * count) + starts
    check_memory(
        f"{count} transitions at once, in rollouts of {config.horizon} steps",
        rows * transition_bytes(SHARD_ARRAYS, task.obs_dim, task.act_dim),
        "cpu",
        lower,
    )
