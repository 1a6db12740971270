"""The lines that announce a run or a fit before it begins."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mopo_fast.backends.cpu import isa
from mopo_fast.backends.precision import describe, dtypes_of
from mopo_fast.config import (
    DynamicsConfig,
    FitConfig,
    RolloutConfig,
    RunConfig,
    SACConfig,
    TrainConfig,
)
from mopo_fast.data import Transitions, find_dataset
from mopo_fast.data.episodes import find_episodes
from mopo_fast.data.files import Reader, open_file
from mopo_fast.data.local import MINARI_PREFIX
from mopo_fast.data.origin import origin_of
from mopo_fast.data.summary import find_faults
from mopo_fast.data.transitions import NEXT_ROW, QLEARNING
from mopo_fast.errors import InputError, printable
from mopo_fast.fit import choose_backend
from mopo_fast.run.checkpoint import last_checkpoint
from mopo_fast.run.dynamics import training_backend
from mopo_fast.run.folder import shorten
from mopo_fast.run.resolve import FALLBACK, FALLBACK_FOR, TUNED_BY, rollout_backend
from mopo_fast.tasks import TASKS, Task, evaluated_in, get_task, parse_dataset_name
from mopo_fast.utils.machine import device_name, resolve_threads
from mopo_fast.utils.progress import print_lines

logger = logging.getLogger("mopo_fast")

# Settings that a data set's name may decide: what the paper calls them, and their flags.
_DECIDED = {"horizon": ("horizon", "--horizon"), "penalty_coef": ("lambda", "--penalty-coef")}


def open_runs(
    given: Sequence[TrainConfig],
    runs: Mapping[Path, RunConfig],
    task: Task,
    data: Transitions,
    *,
    quiet: bool,
) -> None:
    """Print what the runs are about to do, and warn where a name alone decides, or nothing is tuned.

    Args:
        given: settings of the runs, as the caller gave them.
        runs: their complete settings, by folder. They differ in seed and penalty_coef alone.
        task: their task.
        data: their data.
        quiet: print no more than the warnings.
    """
    configs, folders = list(runs.values()), list(runs)
    if not quiet:
        _print(_describe_runs(configs, folders, task, data))
    warn_of_origins(given[0], configs[0])
    warn_of_environment(configs[0], task, data)
    warn_of_faults(data, task)


def open_fit(config: FitConfig, data: Transitions, out: Path, *, quiet: bool) -> None:
    """Print what a fit without a training is about to do, and warn of what is wrong with the data.

    Args:
        config: settings of the fit.
        data: its data.
        out: folder for the ensemble.
        quiet: print no more than the warnings.
    """
    if not quiet:
        _print(_describe_whole_fit(config, data, out))
    warn_of_faults(data, None if config.task is None else get_task(config.task))


def _describe_whole_fit(config: FitConfig, data: Transitions, out: Path) -> dict[str, str]:
    dynamics, device = config.dynamics, config.device
    backend = choose_backend(config.backend, data.obs_dim, data.act_dim, dynamics, device)
    return {
        **_describe_data(config.dataset, data),
        "device": _describe_device(device, [backend], config.threads),
        "fit": f"{_describe_fit(dynamics)}, seed {config.seed}, {dynamics.dtype} by the backend {backend}",
        **_describe_precision(config),
        "folder": str(out),
    }


def warn_of_faults(data: Transitions, task: Task | None) -> None:
    """Warn of what `find_faults` finds in the data of a run, one warning each."""
    for fault in find_faults(data, task):
        logger.warning("%s", fault)


def warn_of_origins(given: TrainConfig, config: RunConfig) -> None:
    """Warn where a file's name alone decides the horizon or lambda, and where neither is tuned.

    Args:
        given: settings as the caller gave them. No warning follows if they are complete, since the caller
            has had it already.
        config: the complete settings.
    """
    if isinstance(given, RunConfig) and given.horizon_from:
        return
    origins = {"horizon": config.horizon_from, "penalty_coef": config.penalty_coef_from}
    for begins, message in (
        (
            TUNED_BY,
            "the name of the file {dataset} alone decides {values} ({origin}); if it holds other data, set"
            " {flags}",
        ),
        (
            FALLBACK,
            "{code} tuned no {names} for {tuned_for}, so {dataset} gets {values}, which is tuned most often"
            " elsewhere; other values may score far higher: set {flags}, or try some with `mopo-fast sweep`",
        ),
    ):
        names = [name for name, origin in origins.items() if origin.startswith(begins)]
        if not names or (begins == TUNED_BY and not _named_by_file(config)):
            continue
        values = [f"{_DECIDED[name][0]} {getattr(config.rollout, name):g}" for name in names]
        origin = origins[names[0]]
        text = message.format(
            dataset=config.dataset,
            values=" and ".join(values),
            names=" and ".join(_DECIDED[name][0] for name in names),
            origin=origin,
            code="the authors" if config.rollout.tuned == "authors" else config.rollout.tuned,
            tuned_for=origin.removeprefix(FALLBACK_FOR),
            flags=" and ".join(_DECIDED[name][1] for name in names),
        )
        logger.warning("%s", text)


def warn_of_environment(config: RunConfig, task: Task, data: Transitions) -> None:
    """Say where the policy is evaluated in another environment than the one that the data were made in.

    Args:
        config: settings of the run.
        task: its task, with the environment of the evaluations.
        data: its data.
    """
    metadata = data.info.get("metadata", {})
    own, origin = get_task(task.name) if task.file_sha256 is None else task, origin_of(metadata)
    if not task.env_id or own.name not in TASKS:
        return
    evaluated = f"the policy is evaluated in {task.env_id}"
    if origin.env_id is None:
        if config.dataset.startswith(MINARI_PREFIX):
            logger.warning(
                "%s does not say which version of the environment it is of; %s", config.dataset, evaluated
            )
        return
    # A relabelled file of an earlier version names the environment of the original reward.
    known = origin.env_id == own.env_id or evaluated_in(own, origin.env_id) is not None
    if not known and "relabelled" not in metadata:
        logger.warning(
            "%s is of %s, which is no known version of %s; %s",
            config.dataset,
            shorten(origin.env_id),
            own.env_id,
            evaluated,
        )
    elif origin.options:
        logger.warning(
            "%s is of %s with the options %s, without which %s",
            config.dataset,
            origin.env_id,
            shorten(origin.options),
            evaluated,
        )
    if task.env_id != own.env_id and own.min_return is not None and config.reference_returns is None:
        logger.warning(
            "%s has no reference returns for %s; the score is by those of D4RL, which are of %s",
            config.dataset,
            task.env_id,
            own.env_id,
        )


def _named_by_file(config: RunConfig) -> bool:
    """Tell whether nothing but the name of a file says which data set it is."""
    path, name = find_dataset(config.dataset)
    if name is not None or path.suffix == ".pkl" or path.is_dir():
        return name is None
    # Files that `collect` has made record their name.
    with open_file(path) as file:
        recorded = str(Reader(str(path), file).metadata().get("name", ""))
    try:
        return parse_dataset_name(recorded) != parse_dataset_name(path.stem)
    except InputError:
        return True


def _print(block: Mapping[str, str]) -> None:
    width = max(map(len, block))
    print_lines("\n".join(printable(f"{name:<{width}}  {value}") for name, value in block.items()))


def _describe_runs(
    configs: Sequence[RunConfig], folders: Sequence[Path], task: Task, data: Transitions
) -> dict[str, str]:
    config = configs[0]
    horizon, origin = config.rollout.horizon, config.penalty_coef_from
    coefs = dict.fromkeys(f"{one.rollout.penalty_coef:g}" for one in configs)
    seeds = dict.fromkeys(str(one.seed) for one in configs)
    resumed = {folder for folder in folders if last_checkpoint(folder) is not None}
    training = "the checkpoint's backend" if resumed else f"the backend {training_backend(config)}"
    rollouts = "the checkpoint's backend"
    used = [training_backend(config)]
    if not resumed:
        used.append(rollout_backend(config, task))
        rollouts = f"the backend {used[-1]}"
    if config.dynamics_from is not None:
        fit = f"none, the ensemble is that in {config.dynamics_from}"
    else:
        fit = f"{_describe_fit(config.dynamics)}, {config.dynamics.dtype} by the backend {used[0]}"
    many = f"{len(configs)} runs at once, each of " if len(configs) > 1 else ""
    resuming = (
        f", {'some' if len(resumed) < len(configs) else 'going'} on from a checkpoint" if resumed else ""
    )
    return {
        **_describe_data(config.dataset, data),
        "task": f"{task.short_name}, evaluated in {task.env_id or 'the ensemble'}",
        **_describe_references(config),
        "horizon": f"{horizon} ({_shorten(config.horizon_from)})",
        "lambda": f"{', '.join(coefs)} ({_shorten(origin)})",
        "penalty": config.rollout.penalty,
        "device": _describe_device(config.device, used, config.threads),
        "fit": fit,
        "rollouts": f"{config.rollout.batch_size:,} an epoch, {config.rollout.dtype} by {rollouts}",
        "SAC": f"{many}{config.steps:,} updates in {config.epochs:,} epochs, {config.sac.dtype}"
        f" by {training}",
        **_describe_ends(config.rollout),
        **_describe_critics(config.sac),
        **_describe_entropy(config, task),
        **_describe_precision(config),
        "seed": f"{', '.join(seeds)}{resuming}",
        "folder": ", ".join(map(str, folders)),
    }


def _describe_references(config: RunConfig) -> dict[str, str]:
    if config.reference_returns is None:
        return {}
    low, high = config.reference_returns
    return {"score": f"0 for a return of {low:g}, 100 for {high:g}, as the data set says"}


def _describe_precision(config: RunConfig | FitConfig) -> dict[str, str]:
    precision = config.matmul_precision
    if precision == "highest":
        return {}
    parts: dict[str, str | None] = {"the fit": config.dynamics.dtype}
    if isinstance(config, RunConfig):
        parts |= {"rollouts": config.rollout.dtype, "SAC": config.sac.dtype}
    why = dtypes_of(precision, config.device, config.backend).why
    return {"precision": describe(precision, why, parts)}


def _shorten(origin: str) -> str:
    """Shorten the origin of a value. `warn_of_origins` says of a fallback what it is for."""
    return FALLBACK if origin.startswith(FALLBACK) else origin


def _describe_entropy(config: RunConfig, task: Task) -> dict[str, str]:
    """Tell that the target entropy is the authors', if the task is another than theirs."""
    entropy = config.sac.target_entropy
    if entropy != SACConfig().target_entropy or "authors" in task.tuned or entropy == -task.act_dim:
        return {}
    return {"entropy": f"target {entropy:g}, the authors' for their tasks; act_dim would be -{task.act_dim}"}


def _describe_data(dataset: str, data: Transitions) -> dict[str, str]:
    rows = data.info.get("rows", len(data))
    earlier, successors = data.info.get("earlier_left_out", 0), data.info.get("successors")
    dropped = "" if rows == len(data) else f" of {rows:,} rows"
    if earlier:
        dropped += f", the last of {len(data) + earlier:,} transitions"
    if successors == NEXT_ROW and (lost := data.info.get("terminals_left_out", 0)):
        dropped += f"; {lost:,} of those left out are terminal, since the data have no next_observations"
    episodes = find_episodes(data)
    if episodes is None:
        ended = "none, the rows do not follow one another"
    else:
        returns = episodes.returns
        ended = f"{len(returns):,}, return {returns.mean():.1f} on average, {returns.max():.1f} at best"
    described = {"data set": dataset, "transitions": f"{len(data):,}{dropped}", "episodes": ended}
    if successors == QLEARNING:
        wrong = int(data.terminals.sum())
        described["successors"] = f"those of d4rl.qlearning_dataset, wrong for {wrong:,} terminal rows"
    return described


def _describe_fit(config: DynamicsConfig) -> str:
    layers = " x ".join(map(str, config.hidden)) or "no hidden layer"
    norms = " with layer norms" if config.layer_norm else ""
    return f"{config.members} networks of {layers}{norms}"


_AVERAGE = {"min": "lowest", "mean": "mean"}


def _describe_ends(config: RolloutConfig) -> dict[str, str]:
    """Tell which penalty ends a rollout, and what its last step is then."""
    if not config.truncates:
        return {}
    limit = f"the data's {config.truncate_quantile} quantile"
    if config.truncate_quantile == 1.0:
        limit = "the highest one in the data"
    if config.truncate_at is not None:
        limit = f"{config.truncate_at:g}"
    halt = "" if config.halt_reward is None else f", with the reward {config.halt_reward:g} and a terminal"
    return {"truncation": f"where a penalty is above {limit}{halt}"}


def _describe_critics(config: SACConfig) -> dict[str, str]:
    """Tell the number of critics, and which of them count, where either is not SAC's own."""
    default = SACConfig()
    if (config.critics, config.target_critics, config.actor_q) == (default.critics, None, default.actor_q):
        return {}
    drawn = "" if config.target_critics is None else f", {config.target_critics} drawn for each target"
    return {"critics": f"{config.critics}{drawn}, the actor raises their {_AVERAGE[config.actor_q]} Q"}


def _describe_device(device: str, used: Sequence[str], threads: int | None) -> str:
    parts = [device_name(device)]
    if torch.device(device).type == "cpu":
        count = resolve_threads(threads)
        parts.append(f"{count} thread{'s' * (count > 1)}")
    if "cpu" in used:
        parts.append(f"instruction set {isa()}")
    return ", ".join(parts)
