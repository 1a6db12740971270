"""Penalised model rollouts of a trained run, as many transitions as are asked for."""

import dataclasses
import os
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import numpy as np
import torch
from pydantic import Field, TypeAdapter, ValidationError

from mopo_fast import __version__
from mopo_fast.backends.philox import BATCH_STREAM, random_choice
from mopo_fast.buffer import RingBuffer
from mopo_fast.config import Penalty, PenaltyMembers, RolloutDtype
from mopo_fast.data.files import check_file, write_arrays
from mopo_fast.data.transitions import Transitions
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine, allocate
from mopo_fast.tasks import Task, get_task, task_of_run, termination_of
from mopo_fast.utils.atomic import read_json_as
from mopo_fast.utils.machine import check_memory
from mopo_fast.utils.seeds import ROLLOUT, START, derive_seed

# Start states of one call: enough to be fast, few enough to show progress.
_STARTS = 50_000
# Rollouts in a row without a finite transition: the models are broken.
_HOPELESS = 10_000
# Copies of a rollout that its writer holds beside it at most, time-outs included: one that makes the whole
# file in memory, one that writes pieces as it makes them, and one that writes from the rollout's own memory.
ENCODED_WHOLE, WRITTEN_IN_PIECES, WRITTEN_IN_PLACE = 1.125, 0.375, 0.125

Count = Annotated[int, Field(ge=1, lt=2**63)]


@dataclass(frozen=True)
class RunSettings:
    """How a run's rollouts were made: `RolloutConfig`'s fields of these names, none left open."""

    horizon: Annotated[int, Field(ge=1, lt=2**31)]
    penalty: Penalty
    penalty_coef: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    penalty_members: PenaltyMembers
    termination: str | None


@dataclass(frozen=True)
class GenerateConfig(RunSettings):
    """What rollouts are made, and by what arithmetic."""

    task: str
    seed: Annotated[int, Field(ge=0, lt=2**64)]
    dtype: RolloutDtype
    backend: str


@dataclass(frozen=True)
class _RunConfig:
    """The part of a run's config.json that is read here."""

    task: str
    rollout: RunSettings
    task_sha256: str | None = None


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

    def ring(self, count: int) -> RingBuffer:
        """A ring that `fill` can write `count` transitions into, with every array of a rollout."""
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
        `count` transitions, in memory, ordered by rollout, then step; `shards.generate_shards` writes any
        number to disk.

    Raises:
        InputError: the run is not whole, the data do not fit it, a number is out of range, or the memory
            does not hold the transitions and the file that `save_transitions` makes of them.
    """
    config = generate_config(
        run, horizon=horizon, seed=seed, penalty_coef=penalty_coef, dtype=dtype, backend=backend, task=task
    )
    check_value("count", count, Count)
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


def generate_config(
    run: str | os.PathLike[str],
    *,
    horizon: int | None,
    seed: int,
    penalty_coef: float | None,
    dtype: RolloutDtype,
    backend: str,
    task: str | Task | None = None,
) -> GenerateConfig:
    """Return the run's own settings, with what is given in their place.

    Raises:
        InputError: a value is out of range; or as `run_settings`.
    """
    task, settings = run_settings(run, task)
    given: dict[str, Any] = {"horizon": horizon, "penalty_coef": penalty_coef}
    values = dataclasses.asdict(settings) | {k: v for k, v in given.items() if v is not None}
    config = GenerateConfig(**values, task=task.name, seed=seed, dtype=dtype, backend=backend)
    for name, kind in get_type_hints(GenerateConfig, include_extras=True).items():
        check_value(name, getattr(config, name), kind)
    return dataclasses.replace(config, penalty_coef=float(config.penalty_coef))


def check_value(name: str, value: Any, kind: Any) -> None:
    """Raise `InputError` unless `value` is of the declared type, in its range.

    Args:
        name: what the error calls the value.
        kind: a type; ranges are `Annotated[int, Field(ge=0)]`.
    """
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        must_be = error.errors(include_url=False)[0]["msg"].removeprefix("Input should be")
        raise InputError(f"{name} must be{must_be}, got {reprlib.repr(value)}") from error


def transition_bytes(obs_dim: int, act_dim: int) -> int:
    """Bytes of one stored transition: float32 arrays, two flags, member and step, rollout_index."""
    return 4 * (2 * obs_dim + act_dim + 3) + 2 + 4 + 4 + 8


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
        rows * transition_bytes(task.obs_dim, task.act_dim),
        "cpu",
        lower,
    )


def run_settings(run: str | os.PathLike[str], task: str | Task | None = None) -> tuple[Task, RunSettings]:
    """What a run's config.json says of its task and its rollouts.

    Args:
        task: the run's task; None: as config.json says, unless that is a Python file. See `task_of_run`.

    Raises:
        InputError: there is no config.json, or it is not a run's; or `task` is not the run's.
    """
    path = Path(run) / "config.json"
    config = read_json_as(path, _RunConfig)
    return task_of_run(path, config.task, config.task_sha256, task), config.rollout


def d4rl_arrays(data: Transitions) -> dict[str, np.ndarray[Any, Any]]:
    """A rollout's arrays by D4RL's keys and its own: raw_rewards, penalties, members, rollout_index, step.

    `timeouts` are where a rollout ends without a terminal.

    Raises:
        InputError: there is no rollout_index.
    """
    if data.rollout_index is None:
        raise InputError("only model rollouts can be saved: these transitions have no rollout_index")
    arrays = {name: array.cpu().numpy() for name, array in data.arrays().items()}
    last = np.append(np.diff(arrays["rollout_index"]) != 0, True)[: len(data)]
    arrays["timeouts"] = last & ~arrays["terminals"]
    return arrays


def save_transitions(path: str | os.PathLike[str], data: Transitions, *, overwrite: bool = False) -> None:
    """Write a rollout's transitions to .hdf5, .h5 or .npz in D4RL's layout, atomically.

    The arrays are those of `d4rl_arrays`; `data.info` becomes metadata/*.

    Raises:
        InputError: another ending, a file that exists without `overwrite`, no rollout_index, or the file
            cannot be written.
    """
    path = Path(path)
    check_file(path, overwrite)
    metadata = {f"metadata/{name}": value for name, value in data.info.items() if value is not None}
    write_arrays(path, d4rl_arrays(data) | metadata)
