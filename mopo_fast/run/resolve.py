"""Complete and check the settings of a run before it writes anything, and build its parts from them."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from mopo_fast.backends.precision import dtypes_of
from mopo_fast.buffer import row_bytes
from mopo_fast.config import RolloutConfig, RunConfig, TrainConfig
from mopo_fast.data import MEMORY_PREFIX, Transitions, find_dataset, load_configured
from mopo_fast.data.origin import find_origin, origin_of
from mopo_fast.data.table import in_table, table_bytes
from mopo_fast.data.transitions import DATA_ARRAYS
from mopo_fast.ensemble import EnsembleDynamics, mlp_bytes
from mopo_fast.errors import InputError
from mopo_fast.fit import check_fit_memory, count_holdout, data_sha256, make_ensemble, read_fit
from mopo_fast.presets import preset
from mopo_fast.rollout import RolloutEngine, make_truncation
from mopo_fast.run.checkpoint import last_checkpoint, read_data_sha256
from mopo_fast.run.dynamics import check_same_data, read_dynamics, training_backend
from mopo_fast.run.folder import holds_run, read_config
from mopo_fast.sac import SAC
from mopo_fast.tasks import (
    TASKS,
    Task,
    evaluated_in,
    get_task,
    in_version,
    parse_dataset_name,
    termination_of,
)
from mopo_fast.utils.atomic import absolute_file
from mopo_fast.utils.machine import check_device, check_memory
from mopo_fast.utils.tensors import tensors_sha256

# First words of where a horizon or a penalty_coef comes from; the code that tuned it follows `TUNED_BY`.
TUNED_BY, FALLBACK, FALLBACK_FOR = "tuned by ", "fallback", "fallback, none is tuned for "


def take_data(config: TrainConfig, *, memory_map: bool) -> tuple[TrainConfig, Transitions | None]:
    """Separate data in memory from the settings of a run.

    Returns:
        The settings, whose `dataset` is a text: `memory:NAME` in place of data in memory; and these data, or
        None where `dataset` is a name or a path.

    Raises:
        InputError: the data are not valid, or `memory_map` is True for data in memory.
    """
    if isinstance(config.dataset, str | os.PathLike):
        return dataclasses.replace(config, dataset=os.fspath(config.dataset)), None
    config.data.validate()
    data = load_configured(config.dataset, config.data, memory_map=memory_map)
    return dataclasses.replace(config, dataset=f"{MEMORY_PREFIX}{data.name or 'unnamed'}"), data


def resolve(
    config: TrainConfig, out: Path | None = None, data: Transitions | None = None
) -> tuple[RunConfig, Task]:
    """Fill in the task, the horizon, the penalty coefficient and the dtypes, and check all settings.

    Args:
        config: settings of the run, as the user gave them.
        out: folder of the run. If it holds a checkpoint, the ensemble there is checked and not the one in
            `config.dynamics_from`.
        data: data in memory that `take_data` found; their digest is recorded.

    Returns:
        The complete settings and the task.

    Raises:
        InputError: a setting is unknown or out of range, or asks for something that this machine lacks.
    """
    config, task = _fill_in(config, data)
    config.validate()
    config, task = _in_version_of_data(config, task, out, data)
    check_device(config.device)
    # Building the engine and SAC once brings their errors before the data set is read and the model fitted.
    make_engine(config, task, _ensemble(config, task, out), config.backend)
    _check_memory(config, task)
    make_sac(config, task, training_backend(config))
    return config, task


def load_data(
    config: RunConfig, task: Task, data: Transitions | None = None, *, memory_map: bool, quiet: bool
) -> Transitions:
    """Load the data set of a run, unless `data` are given, and check that it fits the run.

    Raises:
        InputError: the data set cannot be read, or does not fit the task or the config.
    """
    if data is None:
        data = load_configured(config.dataset, config.data, memory_map=memory_map, quiet=quiet)
    check_sizes(data, config.dataset, task)
    largest = max(map(abs, map(float, data.actions.aminmax())))
    if largest > 1.0 + 1e-3:
        raise InputError(
            f"{config.dataset} has actions up to {largest:.4g}; scale the environment's range to [-1, 1]"
        )
    if _is_copied(data, config.device):
        # Before the fit, though the copy is made after it.
        _check_copy_memory(data, config.device)
    if config.dynamics_from is None:
        count_holdout(len(data), config.dynamics)
    return data


def place_data(data: Transitions, device: torch.device | str) -> Transitions:
    """Place the data of a run where SAC reads them fastest.

    A GPU takes them into its memory. For the CPU, `in_table` copies them; data that are mapped from a file
    stay in it.

    Raises:
        InputError: there is no memory for the copy.
    """
    if not _is_copied(data, device):
        return data.to(device)
    _check_copy_memory(data, device)
    return in_table(data)


def _is_copied(data: Transitions, device: torch.device | str) -> bool:
    return torch.device(device).type == "cpu" and not data.info.get("memory_mapped")


def _check_copy_memory(data: Transitions, device: torch.device | str) -> None:
    size = len(data) * table_bytes(data.arrays(), data.obs_dim, data.act_dim)
    lower = "the number of transitions, or train from a file with --memory-map (memory_map=True)"
    check_memory("the data set in SAC's layout", size, device, lower)


def check_run_data(run: Path, data: Transitions) -> None:
    """Raise `InputError` where a run was trained on other data than these.

    The digest of a run's data is in its checkpoint, and in fit.json if the ensemble was fitted in the run.
    """
    last = last_checkpoint(run)
    recorded = None if last is None else read_data_sha256(last)
    if recorded is None and read_config(run).dynamics_from is None and (run / "fit.json").exists():
        recorded = read_fit(run)["data_sha256"]
    if recorded not in (None, data_sha256(data)):
        raise InputError(
            f"the data set of the run in {run} has changed since the run was trained; name one with --dataset"
        )


def check_sizes(data: Transitions, name: str, task: Task) -> None:
    """Raise `InputError` where the data set `name` has other dimensions than the task."""
    if (data.obs_dim, data.act_dim) != (task.obs_dim, task.act_dim):
        raise InputError(
            f"{name} has {data.obs_dim} observation and {data.act_dim} action dimensions, the"
            f" task {task.name} has {task.obs_dim} and {task.act_dim}; give the data set's own task by --task"
        )


def _fill_in(config: TrainConfig, data: Transitions | None) -> tuple[RunConfig, Task]:
    try:
        if data is not None:
            names = ", ".join(TASKS)
            raise InputError(f"data in memory need a task; give TrainConfig(..., task=...), one of {names}")
        named_task, tier = parse_dataset_name(Path(config.dataset).stem)
    except InputError:
        if config.task is None:
            # The likelier mistake is a data set that does not exist, and its error says more.
            if data is None:
                find_dataset(config.dataset)
            raise
        named_task, tier = config.task, None
    task = get_task(config.task or named_task)
    rollout = config.rollout
    origins: dict[str, str] = {}
    named = f"{task.short_name} {tier}" if tier else task.short_name
    values: dict[str, Any] = dict(
        zip(("horizon", "penalty_coef"), task.tuned_for(tier, rollout.tuned), strict=True)
    )
    preset_rollout = preset(config.preset, config.dataset).rollout if config.preset else RolloutConfig()
    for name, value in values.items():
        own = getattr(rollout, name)
        if own is None:
            rollout = dataclasses.replace(rollout, **{name: value})
            tuned = (tier or "") in task.tuned.get(rollout.tuned, {})
            by = "the authors" if rollout.tuned == "authors" else rollout.tuned
            origins[name] = f"{TUNED_BY}{by} for {named}" if tuned else f"{FALLBACK_FOR}{named}"
        elif own == getattr(preset_rollout, name):
            origins[name] = f"preset {config.preset}"
        else:
            origins[name] = "given"
        # A run that was resolved before keeps what was found then.
        origins[name] = getattr(config, f"{name}_from", "") or origins[name]
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    dtypes = dtypes_of(config.matmul_precision, config.device, config.backend)
    rollout = dataclasses.replace(rollout, dtype=rollout.dtype or dtypes.rollout)
    given |= {"task": task.name, "rollout": rollout}
    for name in ("dynamics", "sac"):
        part = getattr(config, name)
        given[name] = dataclasses.replace(part, dtype=part.dtype or dtypes.training)
    if data is None:
        given["dataset"] = absolute_file(config.dataset)
    if config.dynamics_from is not None:
        given["dynamics_from"] = absolute_file(config.dynamics_from)
    given |= {f"{name}_from": origin for name, origin in origins.items()}
    digest = None if data is None else tensors_sha256({name: getattr(data, name) for name in DATA_ARRAYS})
    return RunConfig(**given, task_sha256=task.file_sha256, data_sha256=digest), task


def _in_version_of_data(
    config: RunConfig, task: Task, out: Path | None, data: Transitions | None
) -> tuple[RunConfig, Task]:
    """Set the version of the environment, and the reference returns, that the data's metadata name.

    A run that goes on keeps those that it began with. A task of the user's has the environment that it names.
    """
    if TASKS.get(task.name) != task or not task.env_id:
        return config, task
    if out is not None and holds_run(out):
        began = read_config(out)
        env_id, references = began.env_id, began.reference_returns
    else:
        origin = find_origin(config.dataset) if data is None else origin_of(data.info.get("metadata", {}))
        env_id = evaluated_in(task, origin.env_id)
        references = None if env_id is None else origin.reference_returns
        env_id = None if env_id == task.env_id else env_id
    config = dataclasses.replace(config, env_id=env_id, reference_returns=references)
    return config, in_version(task, env_id, references, "config.json" if out is None else out / "config.json")


def rollout_backend(config: RunConfig, task: Task) -> str:
    """Return the name of the backend that makes the rollouts of a run without a checkpoint."""
    return make_engine(config, task, _ensemble(config, task, None), config.backend).backend


def _ensemble(config: RunConfig, task: Task, out: Path | None) -> EnsembleDynamics:
    """Return an ensemble of the same shape as the run's."""
    if config.dynamics_from is None:
        check_fit_memory(config.dynamics, config.device)
        return make_ensemble(task.obs_dim, task.act_dim, config.dynamics).to(config.device)
    if out is None or last_checkpoint(out) is None:
        check_same_data(config)
        folder = Path(config.dynamics_from)
        ensemble = read_dynamics(folder)[0].to(config.device)
    else:
        folder, ensemble = out, EnsembleDynamics.load(out, config.device)
    if (ensemble.obs_dim, ensemble.act_dim) != (task.obs_dim, task.act_dim):
        raise InputError(
            f"the ensemble in {folder} is for {ensemble.obs_dim} observation and {ensemble.act_dim} action"
            f" dimensions, the task {task.name} has {task.obs_dim} and {task.act_dim}; give an ensemble of"
            " this task by --dynamics-from"
        )
    return ensemble


def _check_memory(config: RunConfig, task: Task) -> None:
    sac, rollout = config.sac, config.rollout
    # As in `check_fit_memory`, every value has a gradient and one or two arrays more.
    networks = 3 * mlp_bytes(1 + sac.critics, (1, *sac.hidden, 1), sac.batch_size)
    check_memory("SAC", networks, config.device, "sac.batch_size, sac.hidden or sac.critics")
    stored = row_bytes(task.obs_dim, task.act_dim, penalties=rollout.penalty_coef != 0.0)
    rows = rollout.buffer_rows * stored
    lower = "horizon, rollout.batch_size or rollout.retain_epochs"
    check_memory("the model buffer", rows, config.device, lower)


def make_engine(
    config: TrainConfig,
    task: Task,
    ensemble: EnsembleDynamics,
    backend: str,
    data: Transitions | None = None,
) -> RolloutEngine:
    """Build the engine that makes the rollouts of a run.

    Args:
        config: the run's settings.
        task: its task.
        ensemble: its dynamics.
        backend: as in `RolloutEngine`.
        data: its data, which `truncate_quantile` is a quantile of. Without them it truncates nothing.
    """
    rollout = config.rollout
    assert rollout.penalty_coef is not None and rollout.dtype is not None
    engine = RolloutEngine(
        ensemble,
        penalty=rollout.penalty,
        penalty_coef=rollout.penalty_coef,
        penalty_members=rollout.penalty_members,
        termination=termination_of(task, rollout.termination),
        backend=backend,
        dtype=rollout.dtype,
        threads=config.threads,
        truncate_at=rollout.truncate_at,
        halt_reward=None if rollout.truncate_at is None else rollout.halt_reward,
        member=rollout.member,
    )
    if rollout.truncate_quantile is not None and data is not None:
        at = engine.penalty_quantile(data, rollout.truncate_quantile)
        exact = rollout.dtype == "float64"
        engine.truncation = make_truncation(at, rollout.halt_reward, exact=exact)
    return engine


def make_sac(config: TrainConfig, task: Task, backend: str) -> SAC:
    """Build SAC in its state before the first update."""
    return SAC(
        task.obs_dim,
        task.act_dim,
        config.sac,
        seed=config.seed,
        device=config.device,
        total_updates=config.steps,
        backend=backend,
        threads=config.threads,
    )
