"""The MOPO loop: fit the ensemble, then, epoch after epoch, model rollouts, SAC, evaluation.

Source: softlearning/algorithms/mopo.py of the authors' code. Every epoch's randomness depends on (seed,
epoch) alone, and a rollout on (ensemble, policy, start states, seed): so a checkpoint keeps, in place of the
model buffer, the policies that filled it, and a resumed run makes the same rows again.
"""

import contextlib
import copy
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import reprlib
import stat
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from typing_extensions import TypedDict

from mopo_fast import __version__
from mopo_fast.backends import choose_for_run
from mopo_fast.backends.philox import BATCH_STREAM, random_choice
from mopo_fast.buffer import RingBuffer, row_bytes
from mopo_fast.config import TUNED, RolloutConfig, RunConfig, TrainConfig, check_finite, check_runs, to_dict
from mopo_fast.data import Transitions, find_dataset, load_dataset
from mopo_fast.ensemble import EnsembleDynamics, mlp_bytes
from mopo_fast.errors import InputError
from mopo_fast.evaluate import Evaluation, Evaluator, evaluate_in_model
from mopo_fast.fit import check_config, count_holdout, data_sha256, fit_and_save_many, read_fit
from mopo_fast.policy import Actor
from mopo_fast.report import write_report
from mopo_fast.rollout import RolloutEngine
from mopo_fast.run.folder import (
    COLUMNS,
    Board,
    Count,
    Number,
    Seconds,
    append_row,
    cut_back,
    event_files,
    read_summary,
)
from mopo_fast.sac import SAC, Population
from mopo_fast.tasks import Task, get_task, parse_dataset_name, termination_of
from mopo_fast.utils.atomic import parse_json_as, read_json, read_json_as, refuse_links, sweep, write_json
from mopo_fast.utils.lock import locked
from mopo_fast.utils.machine import check_device, check_memory, resolve_threads
from mopo_fast.utils.progress import progress_bar
from mopo_fast.utils.seeds import EVALUATE, ROLLOUT, START, derive_seed
from mopo_fast.utils.seeds import SAC as SAC_SEED
from mopo_fast.utils.tensors import load_into, load_metadata, load_tensors, save_tensors

FORMAT_VERSION = 3
# Epochs at most whose evaluations are not there yet.
_PENDING = 20
# Start states of an evaluation by the model.
_MODEL_STARTS = 1000

# Columns that an evaluation adds to a row of progress.csv.
_EVALUATED = ("score_mean", "score_std", "return_mean", "return_std", "scored_by")
# Values in an error, of files that may hold anything.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def train(
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    memory_map: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """One MOPO run, from data set to report, in the folder `out`.

    Args:
        config: what to do; None in task, horizon and penalty_coef is replaced by what the data set's name
            says, and the result written to config.json.
        out: the run's folder.
        resume: go on from the last checkpoint, to the same final parameters, bit for bit, as a run that was
            never stopped; a folder without a run is a run stopped before its first file. A finished run
            is left as it is.
        memory_map: leave the data in their file, see `load_dataset`; the result is the same. What the fit
            makes of them is in temporary files then.
        quiet: no progress bars.

    Returns:
        What summary.json holds: score_mean, score_std, return_mean, return_std (of the last policy),
        scored_by ("environment" or "model"), updates, seconds {fit, rollout, sac, evaluate, total}, backend,
        device, dtype, dataset, task, seed, versions.

    Raises:
        InputError: a setting cannot be used, another process is at work in `out`, it holds a run and
            `resume` is False or the run's config is another, the data or a checkpoint is not sound, or the
            training diverged.
    """
    return train_many([config], [out], resume=resume, memory_map=memory_map, quiet=quiet)[0]


def train_many(
    configs: Sequence[TrainConfig],
    outs: Sequence[str | os.PathLike[str]],
    *,
    resume: bool = False,
    memory_map: bool = False,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Several runs at once, each in a folder of its own: what `train` does for each.

    Their fits and their SAC updates are made together, see `fit.Population` and `sac.Population`; runs of one
    seed share the fit. A run's numbers are those that it would have alone, to rounding, with the kernels of
    the "cpu" backend to the bit; and it can be gone on with alone.

    Args:
        configs: they may differ in `seed` and `rollout.penalty_coef`.
        outs: the runs' folders.

    Raises:
        InputError: as `train`; or the configs differ in anything else, or two folders are one.
    """
    started = time.perf_counter()
    check_runs(configs)
    runs = [
        _Run(*resolve(config, Path(out)), Path(out), started)
        for config, out in zip(configs, outs, strict=True)
    ]
    _check_together(runs)
    with contextlib.ExitStack() as stack:
        for run in runs:
            stack.enter_context(locked(run.out))
            check_folder(run.out, run.config, resume)
        return _train_all(runs, memory_map, quiet)


@dataclass
class _Run:
    """What is to be done, and where.

    Attributes:
        started: when, on the clock of `time.perf_counter`, earlier sessions' time being taken off.
        ensemble: once it is there.
        fit_seconds: what its fit took this run.
    """

    config: RunConfig
    task: Task
    out: Path
    started: float
    ensemble: EnsembleDynamics | None = None
    fit_seconds: float = 0.0


def _check_together(runs: Sequence[_Run]) -> None:
    def shared(config: TrainConfig) -> Any:
        rollout = dataclasses.replace(config.rollout, penalty_coef=0.0)
        return _as_json(dataclasses.replace(config, seed=0, rollout=rollout))

    for run in runs:
        difference = _first_difference(shared(runs[0].config), shared(run.config))
        if difference:
            raise InputError(
                f"runs made together may differ in seed and penalty_coef alone: {runs[0].out} has"
                f" {difference} as {run.out} has"
            )
    if len({run.out.resolve() for run in runs}) < len(runs):
        raise InputError("every run needs a folder of its own; no seed or penalty_coef may be given twice")


def _train_all(runs: Sequence[_Run], memory_map: bool, quiet: bool) -> list[dict[str, Any]]:
    """What is left to do of the runs; their summaries."""
    unfinished = [run for run in runs if not (run.out / "summary.json").exists()]
    data = None
    if unfinished:
        config, task = unfinished[0].config, unfinished[0].task
        data = load_dataset(config.dataset, memory_map=memory_map, quiet=quiet)
        if (data.obs_dim, data.act_dim) != (task.obs_dim, task.act_dim):
            raise InputError(
                f"{config.dataset} has {data.obs_dim} observation and {data.act_dim} action dimensions, the"
                f" task {task.name} has {task.obs_dim} and {task.act_dim}; name its own task with --task"
            )
        most = max(map(abs, map(float, data.actions.aminmax())))
        if most > 1.0 + 1e-3:
            raise InputError(
                f"{config.dataset}: actions reach {most:.4g}; scale the environment's range to [-1, 1]"
            )
        if config.dynamics_from is None:
            count_holdout(len(data), config.dynamics)
        try:
            for run in unfinished:
                if not (run.out / "config.json").exists():
                    write_json(run.out / "config.json", to_dict(run.config))
            fit_started = time.perf_counter()
            digest = data_sha256(data)
            _make_dynamics(unfinished, data, digest, quiet)
            for run in unfinished:
                if _last_checkpoint(run.out) is None:
                    # The total includes what an earlier, interrupted session spent on the fit.
                    run.started -= max(0.0, run.fit_seconds - (time.perf_counter() - fit_started))
            _train_together(unfinished, data, digest, quiet)
        except OSError as error:
            folders = ", ".join(str(run.out) for run in unfinished)
            raise InputError(f"cannot go on with {folders} ({error}); mend that, then --resume") from error
    for run in runs:
        if not (run.out / "report.html").exists():
            write_report(run.out, data=data)
    return [read_summary(run.out) for run in runs]


def resolve(config: TrainConfig, out: Path | None = None) -> tuple[RunConfig, Task]:
    """`config` with task, horizon and penalty_coef filled in, checked, and its task.

    Args:
        out: the run's folder; with a checkpoint there, its own copy of the dynamics is what counts.

    Raises:
        InputError: a setting is unknown or out of range, or what it asks for is not available here.
    """
    name = Path(config.dataset).stem
    try:
        named_task, tier = parse_dataset_name(name)
    except InputError:
        if config.task is None:
            # A data set that is not there at all is the likelier mistake.
            find_dataset(config.dataset)
            raise
        named_task, tier = config.task, None
    task = get_task(config.task or named_task)
    rollout = config.rollout
    if rollout.tuned not in TUNED:
        raise InputError(f"unknown tuned {rollout.tuned!r}; there are: {', '.join(TUNED)}")
    horizon, penalty_coef = task.tuned_for(tier, rollout.tuned)
    if rollout.horizon is None:
        rollout = dataclasses.replace(rollout, horizon=horizon)
    if rollout.penalty_coef is None:
        rollout = dataclasses.replace(rollout, penalty_coef=penalty_coef)
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    given |= {"task": task.name, "rollout": rollout}
    config = RunConfig(**given, task_sha256=task.file_sha256)

    if config.seed < 0:
        raise InputError(f"seed must not be negative, got {config.seed}")
    at_least_one = {
        "steps": config.steps,
        "rollout horizon": rollout.horizon,
        "rollout batch_size": rollout.batch_size,
        "rollout interval": rollout.interval,
        "rollout retain_epochs": rollout.retain_epochs,
        "evaluation episodes": config.evaluation.episodes,
        "evaluation interval": config.evaluation.interval,
    }
    for setting, value in at_least_one.items():
        if value is None or value < 1:
            raise InputError(f"{setting} must be at least 1, got {value}")
    check_device(config.device)
    if config.dynamics_from is None:
        dynamics = config.dynamics
        check_config(dynamics, config.device)
        ensemble = EnsembleDynamics(
            task.obs_dim,
            task.act_dim,
            members=dynamics.members,
            elites=dynamics.elites,
            hidden=dynamics.hidden,
            activation=dynamics.activation,
        ).to(config.device)
    else:
        if out is None or _last_checkpoint(out) is None:
            folder = Path(config.dynamics_from)
            ensemble = _read_dynamics(folder)[0].to(config.device)
        else:
            folder, ensemble = out, EnsembleDynamics.load(out, config.device)
        if (ensemble.obs_dim, ensemble.act_dim) != (task.obs_dim, task.act_dim):
            raise InputError(
                f"the ensemble in {folder} is for {ensemble.obs_dim} observation and"
                f" {ensemble.act_dim} action dimensions, the task {task.name} has {task.obs_dim} and"
                f" {task.act_dim}"
            )
    # What these refuse is refused now, before the data set is read and the ensemble fitted.
    _engine(config, task, ensemble, config.backend)
    sac = config.sac
    # As for the fit.
    networks = 3 * mlp_bytes(1 + sac.critics, (1, *sac.hidden, 1), sac.batch_size)
    lower = "sac.batch_size, sac.hidden or sac.critics"
    check_memory("SAC", networks, config.device, lower)
    _sac(config, task, _training_backend(config))
    check_finite(config)
    check_memory(
        "the model buffer",
        _capacity(rollout) * row_bytes(task.obs_dim, task.act_dim),
        config.device,
        "horizon, rollout.batch_size or rollout.retain_epochs",
    )
    return config, task


def _capacity(rollout: RolloutConfig) -> int:
    """Rows of the model buffer."""
    assert rollout.horizon is not None
    return rollout.retain_epochs * rollout.horizon * rollout.batch_size


def _engine(config: TrainConfig, task: Task, ensemble: EnsembleDynamics, backend: str) -> RolloutEngine:
    rollout = config.rollout
    assert rollout.penalty_coef is not None
    return RolloutEngine(
        ensemble,
        penalty=rollout.penalty,
        penalty_coef=rollout.penalty_coef,
        penalty_members=rollout.penalty_members,
        termination=termination_of(task, rollout.termination),
        backend=backend,
        dtype=rollout.dtype,
        threads=config.threads,
    )


def _training_backend(config: TrainConfig) -> str:
    return choose_for_run(config.backend, torch.device(config.device))


def _sac(config: TrainConfig, task: Task, backend: str) -> SAC:
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


def check_folder(out: Path, config: RunConfig, resume: bool) -> None:
    """Refuse a folder that holds another run, or whose parts are elsewhere."""
    refuse_links(out / "checkpoint", out / "tensorboard-fit")
    if resume:
        # What atomic_path had not renamed yet when the run was killed; a folder below may be a live run's.
        for folder in (out, out / "checkpoint"):
            sweep(folder)
    # config.json is the first file of a run.
    if not (out / "config.json").exists():
        return
    if not resume:
        raise InputError(f"{out} holds a run already; go on with it by --resume, or choose another --out")
    theirs, ours = read_json_as(out / "config.json", dict[str, Any]), _as_json(config)
    if theirs.get("task_sha256") is None and theirs.get("task") == ours["task"]:
        # The run is older than the record.
        del ours["task_sha256"]
    difference = _first_difference(theirs, ours)
    if difference and difference.startswith("task_sha256"):
        raise InputError(
            f"the file {config.task} has changed since {out} was made; bring it back, or choose another --out"
        )
    if difference:
        raise InputError(
            f"{out} was made with {difference}; resume with the same settings or choose another --out"
        )


def _as_json(config: Any) -> Any:
    """The config as it reads after a trip through a file."""
    return json.loads(json.dumps(to_dict(config)))


def _first_difference(theirs: Any, ours: Any, name: str = "") -> str | None:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in {**theirs, **ours}:
            # These may change when a run goes on, since no result depends on them.
            if key in ("threads", "workers"):
                continue
            difference = _first_difference(theirs.get(key), ours.get(key), f"{name}.{key}".lstrip("."))
            if difference:
                return difference
        return None
    return None if theirs == ours else f"{name} = {_SHORT.repr(theirs)}, not {_SHORT.repr(ours)}"


def _make_dynamics(runs: Sequence[_Run], data: Transitions, data_digest: str, quiet: bool) -> None:
    """Every run's ensemble, in its folder from now on, and the seconds that its fit took this run."""
    config = runs[0].config
    if config.dynamics_from is not None:
        for run in runs:
            if _last_checkpoint(run.out) is None:
                _copy_fit(Path(config.dynamics_from), run.out)
            run.ensemble = EnsembleDynamics.load(run.out, config.device)
        return
    # One fit for each seed, in the folder of the run that has it already, or of the first.
    fits: dict[int, _Run] = {}
    for run in sorted(runs, key=lambda run: not (run.out / "fit.json").exists()):
        fits.setdefault(run.config.seed, run)
    missing = [run for run in fits.values() if not (run.out / "fit.json").exists()]
    if missing:
        fit_and_save_many(
            data,
            [run.out for run in missing],
            seeds=[run.config.seed for run in missing],
            config=config.dynamics,
            device=config.device,
            backend=_training_backend(config),
            threads=config.threads,
            quiet=quiet,
        )
    for run in runs:
        out, seed = run.out, run.config.seed
        if not (out / "fit.json").exists():
            _copy_fit(fits[seed].out, out)
        fit = read_fit(out)
        ours = {"data_sha256": data_digest, "seed": seed, "config": _as_json(config.dynamics)}
        difference = _first_difference({name: fit.get(name) for name in ours}, ours)
        if difference:
            raise InputError(f"{out / 'fit.json'} was made with {difference}; choose another --out")
        # Still there where a run was killed between the two.
        (out / "checkpoint" / "fit.safetensors").unlink(missing_ok=True)
        run.ensemble, run.fit_seconds = EnsembleDynamics.load(out, config.device), fit["seconds"]


def _read_dynamics(source: Path) -> tuple[EnsembleDynamics, Any]:
    """Read an ensemble and its fit.json; None for that of an ensemble that was not fitted here.

    Raises:
        InputError: a file is missing or not sound, or it is a link, which could lead to anything.
    """
    for name in ("dynamics.safetensors", "dynamics.json", "fit.json"):
        path = source / name
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            raise InputError(f"{path} is a link or no regular file; give a folder that holds the file itself")
    ensemble, fit = EnsembleDynamics.load(source), None
    if (source / "fit.json").exists():
        read_fit(source)
        # All of it, in its order, so that the copy has the same bytes.
        fit = read_json(source / "fit.json")
    return ensemble, fit


def _copy_fit(source: Path, out: Path) -> None:
    """Write what the files of a fit hold into `out`, fit.json last: where it is, the fit is whole."""
    ensemble, fit = _read_dynamics(source)
    ensemble.save(out)
    if fit is not None:
        write_json(out / "fit.json", fit)


def _checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder by their epochs."""
    names = {path: re.fullmatch(r"epoch-(\d{6,})\.safetensors", path.name) for path in folder.glob("epoch-*")}
    return {int(match[1]): path for path, match in names.items() if match}


def _last_checkpoint(out: Path) -> Path | None:
    found = _checkpoints(out / "checkpoint")
    return found[max(found)] if found else None


def _remove_older(checkpoint: Path) -> None:
    found = _checkpoints(checkpoint.parent)
    for path in found.values():
        if path != checkpoint:
            path.unlink()


def _train_together(runs: Sequence[_Run], data: Transitions, data_digest: str, quiet: bool) -> None:
    """All epochs that are left of the runs, and their summaries."""
    config = runs[0].config
    on_device, epochs = data.to(config.device), math.ceil(config.steps / config.rollout.interval)
    with (
        Evaluator(_workers(config)) as evaluator,
        progress_bar("train: epochs", epochs * len(runs), quiet=quiet) as bar,
        contextlib.ExitStack() as boards,
    ):
        loops = [_Loop(run, on_device, data_digest, evaluator) for run in runs]
        for loop in loops:
            loop.begin(boards)
        population: Population | None = None
        while unfinished := [loop for loop in loops if loop.epoch < epochs]:
            bar.update(completed=sum(loop.epoch for loop in loops))
            # Those that are behind the others, when they are taken up again, catch up first.
            least = min(loop.epoch for loop in unfinished)
            some = [loop for loop in unfinished if loop.epoch == least]
            sacs = [loop.sac for loop in some]
            if population is None or population.sacs != sacs:
                population = Population(sacs)
            _run_epoch(some, population, last=least + 1 == epochs)
            bar.update(completed=sum(loop.epoch for loop in loops), note=_note(loops))
        for loop in loops:
            loop.write_rows()
            write_json(loop.run.out / "summary.json", loop.summary(len(runs)))


def _run_epoch(loops: Sequence["_Loop"], population: Population, last: bool) -> None:
    """Rollouts, `interval` updates, evaluations where they are due, and a checkpoint, of each."""
    config, epoch = loops[0].config, loops[0].epoch + 1
    for loop in loops:
        loop.roll_out()
    with contextlib.ExitStack() as clocks:
        for loop in loops:
            clocks.enter_context(_Clock(loop.seconds, "sac"))
        metrics = population.update_many(
            loops[0].data,
            [loop.buffer for loop in loops],
            min(config.rollout.interval, config.steps - loops[0].sac.updates),
            [derive_seed(loop.config.seed, SAC_SEED, epoch) for loop in loops],
        )
    for loop, values in zip(loops, metrics, strict=True):
        loop.end_epoch(values, evaluated=last or epoch % config.evaluation.interval == 0)


def _workers(config: TrainConfig) -> int:
    """Processes that evaluate beside the training."""
    if config.evaluation.workers is not None:
        return config.evaluation.workers
    on_cpu = torch.device(config.device).type == "cpu"
    return 0 if on_cpu else min(4, max(1, resolve_threads(None) - 1))


def _note(loops: Sequence["_Loop"]) -> str:
    """For the progress bar: what the runs have come to, on average."""
    scores = [loop.evaluation.score_mean for loop in loops if loop.evaluation is not None]
    known = [score for score in scores if score is not None]
    rows = [loop.row for loop in loops if loop.row is not None]
    parts = [f"score {sum(known) / len(known):.1f}"] if known else []
    for name, form in (("penalty", ".3g"), ("q", ".4g")):
        parts.append(f"{name} {sum(row[name] for row in rows) / len(rows):{form}}")
    return ", ".join(parts)


@dataclass(frozen=True)
class _Rollout:
    """An epoch with rows in the model buffer, and what it takes to make them again.

    Attributes:
        epoch: its number, from 1.
        head: the row of the buffer where its first row is.
        rows: how many it has.
        policy: the actor's parameters that made them.
    """

    epoch: int
    head: int
    rows: int
    policy: dict[str, torch.Tensor]


@dataclass(eq=False)
class _Pending:
    """A row of progress.csv that waits for its policy's evaluation, or for an earlier row's.

    Attributes:
        row: all of it but the evaluation.
        policy: the actor's parameters to be evaluated; None: it is not evaluated.
        evaluation: of these, at work.
    """

    row: dict[str, Any]
    policy: dict[str, torch.Tensor] | None = None
    evaluation: "Future[Evaluation] | None" = None


class _SavedSeconds(TypedDict):
    rollout: Seconds
    sac: Seconds
    evaluate: Seconds
    total: Seconds


class _SavedRollout(TypedDict):
    epoch: Count
    head: Count
    rows: Count


class _SavedBackends(TypedDict):
    rollout: str
    sac: str


@dataclass(frozen=True)
class _Saved:
    """A checkpoint's values that are no tensors, as `_Loop.save` writes them.

    Attributes:
        pending: the rows of `_Pending`, and whether each has a policy.
    """

    epoch: Count
    seconds: _SavedSeconds
    evaluation: Evaluation | None
    rollouts: Annotated[list[_SavedRollout], Field(min_length=1)]
    pending: list[tuple[dict[str, Count | Number], bool]]
    backends: _SavedBackends
    data_sha256: str
    dynamics_sha256: str


class _Loop:
    """The state of a run's training between two epochs, and the parts of an epoch."""

    def __init__(self, run: _Run, data: Transitions, data_digest: str, evaluator: Evaluator) -> None:
        config, task = run.config, run.task
        rollout = config.rollout
        assert rollout.horizon is not None and run.ensemble is not None
        self.run, self.config, self.task, self.data = run, config, task, data
        self.started, self.evaluator = run.started, evaluator
        self.data_sha256 = data_digest
        ensemble = run.ensemble
        self.dynamics_sha256 = ensemble.sha256()
        self.horizon = rollout.horizon
        self.engine = _engine(config, task, ensemble, config.backend)
        self.buffer = RingBuffer(_capacity(rollout), task.obs_dim, task.act_dim, config.device)
        self.sac = _sac(config, task, _training_backend(config))
        self.rollouts: list[_Rollout] = []
        self.pending: list[_Pending] = []
        self.evaluation: Evaluation | None = None
        self.row: dict[str, Any] | None = None
        self.epoch = 0
        self.seconds = {"rollout": 0.0, "sac": 0.0, "evaluate": 0.0}
        self._before = dict(self.seconds)

    def elapsed(self) -> float:
        """Seconds since the run's start, the time between sessions left out."""
        return time.perf_counter() - self.started

    def begin(self, boards: contextlib.ExitStack) -> None:
        """Take up the run where it was left, its log included, which `boards` closes."""
        out, last = self.run.out, _last_checkpoint(self.run.out)
        if last is not None:
            self.restore(last)
            _remove_older(last)
        cut_back(out / "progress.csv", self.epoch - len(self.pending))
        updates = self.pending[0].row["updates"] if self.pending else self.sac.updates + 1
        self.board = boards.enter_context(contextlib.closing(Board(out, purge_step=updates)))
        if last is None and (out / "fit.json").exists():
            _log_fit(out)

    def roll_out(self) -> None:
        """The next epoch's model rollouts."""
        epoch, self._before = self.epoch + 1, dict(self.seconds)
        policy = {name: value.clone() for name, value in self.sac.actor.state_dict().items()}
        head = self.buffer.head
        with _Clock(self.seconds, "rollout"):
            self._rows = self._roll_out(self.sac.actor, epoch)
        self.rollouts.append(_Rollout(epoch, head, len(self._rows), policy))
        # One stays as long as any of its rows does: made again in order, they fill the buffer as it is.
        while sum(rollout.rows for rollout in self.rollouts[1:]) >= self.buffer.capacity:
            del self.rollouts[0]

    def end_epoch(self, metrics: dict[str, float], evaluated: bool) -> None:
        """What follows the updates: evaluation, log, policy, checkpoint."""
        self.epoch, rows = self.epoch + 1, self._rows
        assert rows.penalties is not None and rows.raw_rewards is not None
        row = {
            "epoch": self.epoch,
            "updates": self.sac.updates,
            **metrics,
            "rows": len(rows),
            "penalty": rows.penalties.mean().item(),
            "raw_reward": rows.raw_rewards.mean().item(),
            "terminal_share": rows.terminals.float().mean().item(),
            "non_finite": rows.info["non_finite"],
            "buffer_size": self.buffer.size,
        }
        pending = _Pending(row)
        if evaluated:
            pending.policy = {name: value.clone() for name, value in self.sac.actor.state_dict().items()}
            self._evaluate(pending)
        self.pending.append(pending)
        row |= {f"seconds_{name}": self.seconds[name] - self._before[name] for name in self._before}
        row["seconds_total"] = self.elapsed()
        self.row = row
        self.write_rows(waiting=_PENDING)
        self.sac.actor.save(self.run.out)
        self.save(self.run.out / "checkpoint" / f"epoch-{self.epoch:06}.safetensors")

    def _evaluate(self, pending: _Pending) -> None:
        """Have a row's policy evaluated, here or beside."""
        assert pending.policy is not None
        config, actor = self.config, copy.deepcopy(self.sac.actor)
        actor.load_state_dict(pending.policy)
        if not self.task.env_id:
            pending.evaluation = self._score_by_model(actor)
            return
        with _Clock(self.seconds, "evaluate"):
            pending.evaluation = self.evaluator.submit(
                actor,
                self.task,
                episodes=config.evaluation.episodes,
                seed=derive_seed(config.seed, EVALUATE, pending.row["epoch"]),
                deterministic=config.evaluation.deterministic,
            )

    def _score_by_model(self, actor: Actor) -> Future[Evaluation]:
        """`evaluate_in_model` from the same states of the data in every epoch."""
        seed = derive_seed(self.config.seed, EVALUATE)
        numbers = torch.arange(_MODEL_STARTS, device=self.data.device)
        start = self.data.observations[random_choice(numbers, 0, BATCH_STREAM, len(self.data), seed)]
        future: Future[Evaluation] = Future()
        with _Clock(self.seconds, "evaluate"):
            future.set_result(evaluate_in_model(self.engine, actor, start, self.horizon, seed=seed))
        return future

    @property
    def scored_by(self) -> str:
        """Whose returns the run's are."""
        return "environment" if self.task.env_id else "model"

    def write_rows(self, waiting: int = 0) -> None:
        """Write the rows whose evaluations are there; at most `waiting` are left."""
        while self.pending:
            first, found = self.pending[0], None
            if first.evaluation is not None:
                if len(self.pending) <= waiting and not first.evaluation.done():
                    break
                with _Clock(self.seconds, "evaluate"):
                    found = self.evaluation = first.evaluation.result()
            row = first.row | {name: getattr(found, name, None) for name in _EVALUATED}
            row["scored_by"] = self.scored_by if found else None
            append_row(self.run.out / "progress.csv", {name: row[name] for name in COLUMNS})
            for name, group in COLUMNS.items():
                if row[name] is not None and group:
                    self.board.add_scalar(f"{group}/{name}", row[name], row["updates"])
            self.board.flush()
            del self.pending[0]

    def summary(self, together: int) -> dict[str, Any]:
        """What summary.json holds; `together`: how many runs were made at once."""
        config = self.config
        assert self.evaluation is not None  # the last epoch is always evaluated
        result = dataclasses.asdict(self.evaluation)
        return {
            **{name: result[name] for name in ("score_mean", "score_std", "return_mean", "return_std")},
            "scored_by": self.scored_by,
            "updates": self.sac.updates,
            "epochs": self.epoch,
            "seconds": {"fit": self.run.fit_seconds, **self.seconds, "total": self.elapsed()},
            "backend": self.engine.backend,
            "device": config.device,
            "dtype": config.rollout.dtype,
            "threads": self.engine.threads,
            "runs_together": together,
            "dataset": config.dataset,
            "transitions": len(self.data),
            "task": self.task.name,
            "seed": config.seed,
            "horizon": config.rollout.horizon,
            "penalty": config.rollout.penalty,
            "penalty_coef": config.rollout.penalty_coef,
            "versions": {
                "mopo_fast": __version__,
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in ("torch", "gymnasium", "mujoco")},
            },
        }

    def _roll_out(self, policy: Actor, epoch: int) -> Transitions:
        """The model rollouts of `epoch`, appended to the buffer."""
        config, device = self.config, self.data.device
        numbers = torch.arange(config.rollout.batch_size, device=device)
        seed = derive_seed(config.seed, START, epoch)
        rows = self.engine.rollout(
            policy,
            self.data.observations[random_choice(numbers, 0, BATCH_STREAM, len(self.data), seed)],
            self.horizon,
            seed=derive_seed(config.seed, ROLLOUT, epoch),
            out=self.buffer,
        )
        if len(rows) == 0:
            raise InputError(
                f"every model rollout of epoch {epoch} began with a prediction that is not finite; the"
                " ensemble does not fit this data, fit it again"
            )
        return rows

    def save(self, path: Path) -> None:
        """Write all that the next epoch depends on to `path`, then remove older checkpoints beside it."""
        state = {
            "format_version": FORMAT_VERSION,
            "epoch": self.epoch,
            "seconds": {**self.seconds, "total": self.elapsed()},
            "evaluation": dataclasses.asdict(self.evaluation) if self.evaluation else None,
            "rollouts": [
                {"epoch": rollout.epoch, "head": rollout.head, "rows": rollout.rows}
                for rollout in self.rollouts
            ],
            "pending": [[pending.row, pending.policy is not None] for pending in self.pending],
            "backends": {"rollout": self.engine.backend, "sac": self.sac.backend},
            "data_sha256": self.data_sha256,
            "dynamics_sha256": self.dynamics_sha256,
        }
        tensors = {f"sac.{name}": tensor for name, tensor in self.sac.state().items()}
        for rollout in self.rollouts:
            tensors |= {f"policy.{rollout.epoch}.{name}": value for name, value in rollout.policy.items()}
        for pending in self.pending:
            epoch = pending.row["epoch"]
            for name, value in (pending.policy or {}).items():
                tensors[f"evaluated.{epoch}.{name}"] = value
        save_tensors(path, tensors, {"state": json.dumps(state)})
        _remove_older(path)

    def restore(self, path: Path) -> None:
        """Continue from what `save` wrote: the buffer is filled again by the policies that filled it.

        Raises:
            InputError: the checkpoint is truncated or garbled, or its rollouts cannot be made again here.
        """
        try:
            tensors, state = load_tensors(path), load_metadata(path).get("state", "{}")
        except InputError as error:
            raise InputError(f"{error}; delete {path} to train from the start") from error
        version = parse_json_as(state, dict[str, Any], path).get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(
                f"{path} has format_version {_SHORT.repr(version)}, this package reads {FORMAT_VERSION}"
            )
        saved = parse_json_as(state, _Saved, path)
        if saved.data_sha256 != self.data_sha256:
            raise InputError(
                f"{self.config.dataset} is not the data that {path} was made with; bring that data back"
            )
        if saved.dynamics_sha256 != self.dynamics_sha256:
            raise InputError(
                f"the dynamics beside {path.parent} are not those that {path} was made with;"
                " resume with the dynamics that the run began with"
            )
        try:
            self._take(path, saved, tensors)
        except InputError as error:
            raise InputError(f"{error}; delete {path} to train from the start") from error
        self._refill(path)

    def _take(self, path: Path, saved: "_Saved", tensors: dict[str, torch.Tensor]) -> None:
        """Take over a checkpoint's values, all but the buffer's rows."""
        interval, steps = self.config.rollout.interval, self.config.steps
        self.engine = _engine(self.config, self.task, self.engine.ensemble, saved.backends["rollout"])
        self.sac = _sac(self.config, self.task, saved.backends["sac"])
        self.sac.load_state(_within(tensors, "sac."), path)
        self.epoch = saved.epoch
        epochs = math.ceil(steps / interval)
        if _checkpoints(path.parent).get(saved.epoch) != path or not 1 <= saved.epoch <= epochs:
            raise InputError(f"{path} holds epoch {saved.epoch}, which its name or the run does not have")
        if self.sac.updates != min(saved.epoch * interval, steps):
            raise InputError(f"{path} holds {self.sac.updates} updates, epoch {saved.epoch} does not")
        self.seconds = {name: saved.seconds[name] for name in ("rollout", "sac", "evaluate")}
        self.started -= saved.seconds["total"]
        self.evaluation = saved.evaluation

        def policy(prefix: str, epoch: int) -> dict[str, torch.Tensor]:
            targets = {name: torch.empty_like(value) for name, value in self.sac.actor.state_dict().items()}
            load_into(path, _within(tensors, f"{prefix}.{epoch}."), targets)
            return targets

        head, most = saved.rollouts[0]["head"], self.config.rollout.batch_size * self.horizon
        for number, made in enumerate(saved.rollouts, start=1 + saved.epoch - len(saved.rollouts)):
            if (made["epoch"], made["head"]) != (number, head) or not 1 <= made["rows"] <= most:
                raise InputError(f"{path}: the rollouts that filled the buffer do not follow each other")
            head = (head + made["rows"]) % self.buffer.capacity
            self.rollouts.append(_Rollout(**made, policy=policy("policy", number)))
        first, rows = self.rollouts[0], sum(made["rows"] for made in saved.rollouts)
        if not 0 <= first.head < self.buffer.capacity or first.epoch < 1:
            raise InputError(f"{path}: the buffer has no row {first.head}")
        # Rows were overwritten by later ones alone.
        whole = first.head == 0 if first.epoch == 1 else rows >= self.buffer.capacity
        if not whole:
            raise InputError(f"{path}: rollouts are missing of those that filled the buffer")
        known = COLUMNS.keys() - set(_EVALUATED)
        for number, (row, evaluated) in enumerate(saved.pending, start=1 + saved.epoch - len(saved.pending)):
            updates = min(number * interval, steps)
            if row.keys() != known or (row["epoch"], row["updates"]) != (number, updates) or number < 1:
                raise InputError(f"{path}: its rows of progress.csv do not follow each other")
            self.pending.append(_Pending(row, policy("evaluated", number) if evaluated else None))
        if saved.epoch == epochs and not (saved.evaluation or (saved.pending and saved.pending[-1][1])):
            raise InputError(f"{path}: the last policy was not evaluated")

    def _refill(self, path: Path) -> None:
        """Begin the evaluations that are pending, and make the buffer's rows again."""
        for pending in self.pending:
            if pending.policy is not None:
                self._evaluate(pending)
        actor = copy.deepcopy(self.sac.actor)
        self.buffer.head = self.rollouts[0].head
        with _Clock(self.seconds, "rollout"):
            for rollout in self.rollouts:
                actor.load_state_dict(rollout.policy)
                rows = len(self._roll_out(actor, rollout.epoch))
                if rows != rollout.rows:
                    raise InputError(
                        f"{path}: the rollout of epoch {rollout.epoch} gave {rows} rows, {rollout.rows} when"
                        " it was made; resume with the dynamics that the run began with"
                    )


class _Clock:
    """Adds the seconds spent inside to `seconds[name]`."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] += time.perf_counter() - self.started


def _within(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _log_fit(out: Path) -> None:
    """Write the fit's curves to TensorBoard, as a run of their own: their steps are epochs of the fit."""
    fit, folder = read_fit(out), out / "tensorboard-fit"
    # Those of a session that was killed before its first checkpoint.
    for events in event_files(folder):
        events.unlink()
    with contextlib.closing(Board(folder)) as board:
        for epoch, errors in enumerate(fit["holdout_mse"]):
            for member, error in enumerate(errors):
                board.add_scalar(f"holdout_mse/member_{member}", error, epoch)
            board.add_scalar("train_loss", fit["train_loss"][epoch], epoch)
