"""Settings of a run's rollouts, from the run's config.json."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, get_type_hints

from pydantic import Field

from mopo_fast.config import RolloutDtype
from mopo_fast.data.manifest import GenerateConfig, RunSettings
from mopo_fast.errors import InputError
from mopo_fast.run.find import check_run
from mopo_fast.tasks import Task, in_version, task_of_run
from mopo_fast.utils.atomic import check_utf8, check_value, read_json_as


@dataclass(frozen=True)
class _RunRollout(RunSettings):
    """The settings of a run's rollouts, of which a quantile becomes a limit once the run is finished."""

    truncate_quantile: float | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class _Rollouts:
    truncate_at: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


@dataclass(frozen=True)
class _Summary:
    """Field of a run's summary.json that is read here."""

    rollouts: _Rollouts | None = None


@dataclass(frozen=True)
class _RunConfig:
    """Fields of a run's config.json that are read here."""

    task: str | None
    rollout: _RunRollout | None = None
    task_sha256: str | None = None
    env_id: str | None = None
    reference_returns: tuple[float, float] | None = None


def run_settings(run: str | os.PathLike[str], task: str | Task | None = None) -> tuple[Task, RunSettings]:
    """Read a run's task and the settings of its rollouts from its config.json.

    Args:
        run: folder of the run.
        task: the run's task. None looks it up by the name in config.json, which is refused if it is a Python
            file, because that file would be executed. See `task_of_run`.

    Raises:
        InputError: config.json is missing or is not that of a run, or `task` is not the run's task.
    """
    check_run(run)
    check_utf8(run)
    path = Path(run) / "config.json"
    config = read_json_as(path, _RunConfig)
    if config.task is None or config.rollout is None:
        raise InputError(f"{path} has no settings of rollouts; give a folder that `mopo-fast train` made")
    task = task_of_run(path, config.task, config.task_sha256, task)
    task = in_version(task, config.env_id, config.reference_returns, path)
    return task, _with_limit(Path(run), config.rollout)


def _with_limit(run: Path, settings: _RunRollout) -> RunSettings:
    """Return the settings with the penalty that ended the run's rollouts, where a quantile had set it."""
    values = dataclasses.asdict(settings)
    if values.pop("truncate_quantile") is not None:
        path = run / "summary.json"
        summary = read_json_as(path, _Summary) if path.exists() else _Summary()
        if summary.rollouts is None or summary.rollouts.truncate_at is None:
            raise InputError(
                f"the penalty that ends rollouts of {run} is in its summary.json, which the end of the"
                " training writes; finish the run first"
            )
        values["truncate_at"] = summary.rollouts.truncate_at
    return RunSettings(**values)


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
    """Return a run's settings of rollouts, with its horizon and penalty_coef replaced unless None is given.

    Args:
        run: folder of the run.
        horizon: maximal number of steps of a rollout; None for the run's own.
        seed: seed of all random numbers.
        penalty_coef: weight of the penalty in the reward; None for the run's own.
        dtype: precision of the matrix products.
        backend: backend of `RolloutEngine`.
        task: the run's task, see `run_settings`.

    Raises:
        InputError: a value is out of range, or see `run_settings`.
    """
    task, settings = run_settings(run, task)
    values = dataclasses.asdict(settings)
    values |= {"task": task.name, "seed": seed, "dtype": dtype, "backend": backend}
    given = {"horizon": horizon, "penalty_coef": penalty_coef}
    values |= {name: value for name, value in given.items() if value is not None}
    kinds = get_type_hints(GenerateConfig, include_extras=True)
    return GenerateConfig(**{name: check_value(name, values[name], kind) for name, kind in kinds.items()})
