"""Penalised model rollouts of a trained run, as any part of an endless sequence of rollouts."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch

from mopo_fast import __version__
from mopo_fast.backends.philox import BATCH_STREAM, random_choice
from mopo_fast.buffer import RingBuffer
from mopo_fast.bulk.plan import generate_config
from mopo_fast.config import RolloutDtype
from mopo_fast.data.manifest import SHARD_ARRAYS, GenerateConfig, Plan, Positive
from mopo_fast.data.transitions import Transitions, transition_bytes
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine, allocate
from mopo_fast.tasks import Task, get_task, termination_of
from mopo_fast.utils.atomic import check_value
from mopo_fast.utils.machine import check_device, check_memory, torch_threads
from mopo_fast.utils.seeds import ROLLOUT, START, derive_seed

# Start states of one call: enough to be fast, few enough to show progress.
_STARTS_PER_CALL = 50_000
# Rollouts in a row without a finite transition after which the models count as broken.
_MAX_EMPTY_ROLLOUTS = 10_000
# Memory that a writer needs beside the rollout, as a multiple of the rollout's own: a writer that makes the
# whole file in memory, one that encodes and writes in pieces, and one that writes the rollout's own memory.
# Time-outs are included.
ENCODED_WHOLE, WRITTEN_IN_PIECES, WRITTEN_IN_PLACE = 1.125, 0.375, 0.125


class Generator:
    """Generator of an endless sequence of rollouts, any part of which can be made on its own.

    The start state and all random numbers of rollout `i` depend only on the seed and `i`.

    Args:
        ensemble: dynamics.
        policy: policy to roll out.
        observations: observations [n, obs_dim] from which start states are drawn with replacement.
        config: settings of the rollouts.
        threads: number of CPU threads; None for all cores.

    Raises:
        InputError: the models, the observations or the settings do not fit each other.
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
            # A shard stores penalties, with a penalty_coef of 0 too.
            penalties=True,
            truncate_at=config.truncate_at,
            halt_reward=config.halt_reward,
            member=config.member,
        )
        self.observations = observations.to(self.engine.device)

    def fill(
        self, ring: RingBuffer, count: int, first: int = 0, advance: Callable[[int], None] = lambda _: None
    ) -> tuple[int, int]:
        """Fill the first `count` rows of a ring buffer with transitions of rollouts first, first + 1, ...

        The last rollout may be cut short.

        Args:
            ring: empty ring buffer with room for at least count + horizon rows.
            count: number of transitions.
            first: number of the first rollout in the endless sequence.
            advance: called after each kernel call with the number of transitions that it made.

        Returns:
            Number of rollouts begun, and number of those that ended at a non-finite prediction.

        Raises:
            InputError: thousands of rollouts in a row had no finite transition.
        """
        # The compiled kernels have threads of their own. Torch's would spin at the barriers of a hundred
        # small operations a call, on a core that a writer may need.
        compiled = self.engine.backend == "cpu"
        with torch_threads(1) if compiled else contextlib.nullcontext():
            return self._fill(ring, count, first, advance)

    def _fill(
        self, ring: RingBuffer, count: int, first: int, advance: Callable[[int], None]
    ) -> tuple[int, int]:
        horizon, seed = self.config.horizon, self.config.seed
        starts, non_finite, empty = 0, 0, 0
        while ring.size < count:
            missing = count - ring.size
            batch = min(-(-missing // horizon), _STARTS_PER_CALL)
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
            empty = 0 if len(made) else empty + batch
            if empty >= _MAX_EMPTY_ROLLOUTS:
                raise InputError(
                    f"the last {empty} rollouts had no finite transition; the ensemble or the policy is"
                    " broken, or the data are of another task"
                )
            advance(min(len(made), missing))
        return starts, non_finite

    def make_shard(
        self, plan: Plan, shard: int, ring: RingBuffer, advance: Callable[[int], None] = lambda _: None
    ) -> tuple[Transitions, dict[str, Any]]:
        """Make one shard of a plan.

        Args:
            plan: plan of the shard's folder.
            shard: number of the shard.
            ring: ring buffer from `allocate_ring` for the plan's largest shard; it is overwritten.
            advance: see `fill`.

        Returns:
            The shard's transitions, which are the first rows of `ring`, and its metadata.

        Raises:
            InputError: see `fill`.
        """
        ring.clear()
        rows = plan.rows(shard)
        starts, non_finite = self.fill(ring, rows, shard << 32, advance)
        metadata = {
            "plan": plan.settings_sha256(),
            "shard": shard,
            "starts": starts,
            "non_finite": non_finite,
        }
        return ring.storage[:rows], metadata

    def allocate_ring(self, count: int) -> RingBuffer:
        """Allocate a ring buffer with every array of a rollout and room for `fill` to write `count` rows."""
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
    device: str = "cpu",
    task: str | Task | None = None,
) -> Transitions:
    """Roll a run's policy out in its ensemble and return the transitions; `generate_shards` writes to disk.

    Args:
        run: folder of the run. Its config.json gives the task, with its termination, and the penalty.
        data: transitions from whose observations start states are drawn with replacement.
        count: number of transitions.
        horizon: maximal number of steps of a rollout; None for the run's own.
        seed: seed of all random numbers.
        penalty_coef: weight of the penalty in the reward; None for the run's own.
        dtype: precision of the matrix products, see `RolloutEngine`.
        backend: backend of `RolloutEngine`.
        threads: number of CPU threads; None for all cores.
        device: device that makes the rollouts, "cpu" or "cuda". The result is on the CPU.
        task: the run's task. It must be given if it is a Python file, since that file is executed.

    Returns:
        `count` transitions, ordered by rollout, then step.

    Raises:
        InputError: the run is incomplete, the data do not fit it, an argument is out of range, or the
            transitions and the file that `save_transitions` writes do not fit into memory.
    """
    config = generate_config(
        run, horizon=horizon, seed=seed, penalty_coef=penalty_coef, dtype=dtype, backend=backend, task=task
    )
    check_value("count", count, Positive)
    check_rollout_memory(config, count, 1, WRITTEN_IN_PLACE, "count or horizon")
    check_device(device)
    ensemble, policy = EnsembleDynamics.load(run, device), Actor.load(run, device)
    generator = Generator(ensemble, policy, data.observations, config, threads)
    ring = generator.allocate_ring(count)
    starts, non_finite = generator.fill(ring, count)
    rollouts = ring.storage[:count].to("cpu")
    rollouts.info = {
        "run": str(run),
        "dataset": data.name,
        "count": count,
        "starts": starts,
        "non_finite": non_finite,
        **config.described(),
        "backend": generator.engine.backend,
        "mopo_fast": __version__,
    }
    return rollouts


def check_rollout_memory(
    config: GenerateConfig, count: int, buffers: int, file_copies: float, lower: str
) -> None:
    """Raise `InputError` if buffers of transitions, and their writer's own memory, do not fit into memory.

    Args:
        config: settings of the rollouts.
        count: transitions in each buffer.
        buffers: number of buffers held at once.
        file_copies: memory of the writer as a multiple of one buffer's, such as `ENCODED_WHOLE`.
        lower: names of the arguments to lower, for the message.
    """
    task = get_task(config.task)
    starts = min(-(-count // config.horizon), _STARTS_PER_CALL)
    rows = buffers * (count + config.horizon) + round(file_copies * count) + starts
    check_memory(
        f"{count} transitions at once, in rollouts of {config.horizon} steps",
        rows * transition_bytes(SHARD_ARRAYS, task.obs_dim, task.act_dim),
        "cpu",
        lower,
    )
