"""The MOPO loop: fit the ensemble, then, epoch after epoch, model rollouts, SAC, evaluation.

Source: softlearning/algorithms/mopo.py of the authors' code. Every epoch's randomness depends on (seed,
epoch) alone, and a rollout on (ensemble, policy, start states, seed): so a checkpoint keeps, in place of the
model buffer, the policies that filled it, and a resumed run makes the same rows again.
"""

import copy
import csv
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from mopo_fast import __version__
from mopo_fast.atomic import atomic_path, read_json, write_json
from mopo_fast.buffer import RingBuffer, row_bytes
from mopo_fast.config import TUNED, RolloutConfig, TrainConfig, check_finite, to_dict
from mopo_fast.data import Transitions, find_dataset, load_dataset
from mopo_fast.ensemble import EnsembleDynamics, mlp_bytes
from mopo_fast.errors import InputError
from mopo_fast.evaluate import Evaluation, evaluate
from mopo_fast.fit import check_config, data_sha256, fit_and_save
from mopo_fast.lock import locked
from mopo_fast.machine import check_device, check_memory
from mopo_fast.policy import Actor
from mopo_fast.progress import progress_bar
from mopo_fast.report import write_report
from mopo_fast.rollout import RolloutEngine
from mopo_fast.sac import METRICS, SAC
from mopo_fast.seeds import EVALUATE, ROLLOUT, START, derive_seed
from mopo_fast.seeds import SAC as SAC_SEED
from mopo_fast.tasks import Task, get_task, parse_dataset_name
from mopo_fast.tensors import load_metadata, load_tensors, save_tensors, tensors_sha256

FORMAT_VERSION = 2

# progress.csv's columns and the group of each in TensorBoard.
COLUMNS = {
    "epoch": "",
    "updates": "",
    **dict.fromkeys(("seconds_rollout", "seconds_sac", "seconds_evaluate", "seconds_total"), "time"),
    **dict.fromkeys(("score_mean", "score_std", "return_mean", "return_std"), "evaluation"),
    **dict.fromkeys(METRICS, "sac"),
    **dict.fromkeys(
        ("rows", "penalty", "raw_reward", "terminal_share", "non_finite", "buffer_size"), "rollout"
    ),
}


def train(
    config: TrainConfig, out: str | os.PathLike[str], *, resume: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """One MOPO run, from data set to report, in the folder `out`.

    Args:
        config: what to do; None in task, horizon and penalty_coef is replaced by what the data set's name
            says, and the result written to config.json.
        out: the run's folder.
        resume: go on from the last checkpoint, to the same final parameters, bit for bit, as a run that was
            never stopped; a folder without a run is a run stopped before its first file. A finished run
            is left as it is.
        quiet: no progress bars.

    Returns:
        What summary.json holds: score_mean, score_std, return_mean, return_std (of the last policy), updates,
        seconds {fit, rollout, sac, evaluate, total}, backend, device, dtype, dataset, task, seed, versions.

    Raises:
        InputError: a setting cannot be used, another process is at work in `out`, it holds a run and
            `resume` is False or the run's config is another, the data or a checkpoint is not sound, or the
            training diverged.
    """
    started = time.perf_counter()
    out = Path(out)
    config, task = resolve(config, out)
    with locked(out):
        _check_folder(out, config, resume)
        return _run(config, task, out, started, quiet)


def _run(config: TrainConfig, task: Task, out: Path, started: float, quiet: bool) -> dict[str, Any]:
    """What is left to do of the run in `out`."""
    summary_path, data = out / "summary.json", None
    if not summary_path.exists():
        data = load_dataset(config.dataset, quiet=quiet)
        if (data.obs_dim, data.act_dim) != (task.obs_dim, task.act_dim):
            raise InputError(
                f"{config.dataset} has {data.obs_dim} observation and {data.act_dim} action dimensions, the"
                f" task {task.name} has {task.obs_dim} and {task.act_dim}; name its own task with --task"
            )
        most = float(data.actions.abs().max())
        if most > 1.0 + 1e-3:
            raise InputError(
                f"{config.dataset}: actions reach {most:.4g}; scale the environment's range to [-1, 1]"
            )
        if not (out / "config.json").exists():
            write_json(out / "config.json", to_dict(config))
        fit_started = time.perf_counter()
        ensemble, fit_seconds = _dynamics(config, data, out, quiet)
        if _last_checkpoint(out) is None:
            # What an earlier, interrupted session spent on the fit is part of the total too.
            started -= max(0.0, fit_seconds - (time.perf_counter() - fit_started))
        try:
            summary = _train(config, task, data, ensemble, out, started, fit_seconds, quiet)
        except OSError as error:
            raise InputError(f"cannot go on with {out} ({error}); mend that, then --resume") from error
        write_json(summary_path, summary)
    if not (out / "report.html").exists():
        write_report(out, data=data)
    finished: dict[str, Any] = read_json(summary_path)
    return finished


def resolve(config: TrainConfig, out: Path | None = None) -> tuple[TrainConfig, Task]:
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
    config = dataclasses.replace(config, task=task.name, rollout=rollout)

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
        folder = config.dynamics_from if out is None or _last_checkpoint(out) is None else out
        ensemble = EnsembleDynamics.load(folder, config.device)
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
    _sac(config, task, config.backend)
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
        termination=task.box if rollout.termination is None else rollout.termination,
        backend=backend,
        dtype=rollout.dtype,
        threads=config.threads,
    )


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


def _check_folder(out: Path, config: TrainConfig, resume: bool) -> None:
    """Refuse a folder that holds another run."""
    if resume:
        # What atomic_path had not renamed yet when the run was killed; a folder below may be a live run's.
        for folder in (out, out / "checkpoint"):
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink()
    # config.json is the first file of a run.
    if not (out / "config.json").exists():
        return
    if not resume:
        raise InputError(f"{out} holds a run already; go on with it by --resume, or choose another --out")
    difference = _first_difference(read_json(out / "config.json"), _as_json(config))
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
            difference = _first_difference(theirs.get(key), ours.get(key), f"{name}.{key}".lstrip("."))
            if difference:
                return difference
        return None
    return None if theirs == ours else f"{name} = {theirs!r}, not {ours!r}"


def _dynamics(
    config: TrainConfig, data: Transitions, out: Path, quiet: bool
) -> tuple[EnsembleDynamics, float]:
    """The run's ensemble, in `out` from now on, and the seconds that its fit took this run."""
    if config.dynamics_from is not None:
        for name in ("dynamics.safetensors", "dynamics.json", "fit.json"):
            source = Path(config.dynamics_from, name)
            # An ensemble that was not fitted here has no fit.json.
            missing = name == "fit.json" and not source.exists()
            if _last_checkpoint(out) is None and not missing:
                with atomic_path(out / name) as temporary:
                    shutil.copyfile(source, temporary)
        return EnsembleDynamics.load(out, config.device), 0.0
    if not (out / "fit.json").exists():
        fit_and_save(
            data,
            out,
            seed=config.seed,
            config=config.dynamics,
            device=config.device,
            backend=config.backend,
            threads=config.threads,
            quiet=quiet,
        )
    fit = read_json(out / "fit.json")
    ours = {"data_sha256": data_sha256(data), "seed": config.seed, "config": _as_json(config.dynamics)}
    difference = _first_difference({name: fit.get(name) for name in ours}, ours)
    if difference:
        raise InputError(f"{out / 'fit.json'} was made with {difference}; choose another --out")
    # Still there where a run was killed between the two.
    (out / "checkpoint" / "fit.safetensors").unlink(missing_ok=True)
    return EnsembleDynamics.load(out, config.device), float(fit["seconds"])


def _last_checkpoint(out: Path) -> Path | None:
    return max((out / "checkpoint").glob("epoch-*.safetensors"), default=None)


def _remove_older(checkpoint: Path) -> None:
    for other in checkpoint.parent.glob("epoch-*.safetensors"):
        if other < checkpoint:
            other.unlink()


def _train(
    config: TrainConfig,
    task: Task,
    data: Transitions,
    ensemble: EnsembleDynamics,
    out: Path,
    started: float,
    fit_seconds: float,
    quiet: bool,
) -> dict[str, Any]:
    """All epochs that are left; the summary."""
    last = _last_checkpoint(out)
    loop = _Loop(config, task, data.to(config.device), ensemble, started)
    if last is not None:
        loop.restore(last)
        _remove_older(last)
    progress = out / "progress.csv"
    _cut_back(progress, loop.epoch)
    epochs = math.ceil(config.steps / config.rollout.interval)
    with (
        SummaryWriter(str(out), purge_step=loop.sac.updates + 1) as board,
        progress_bar("train: epochs", epochs, quiet=quiet) as bar,
    ):
        bar.update(completed=loop.epoch)
        if last is None and (out / "fit.json").exists():
            _log_fit(out)
        while loop.epoch < epochs:
            row = loop.run_epoch(last=loop.epoch + 1 == epochs)
            _append_row(progress, row)
            for name, value in row.items():
                if value is not None and COLUMNS[name]:
                    board.add_scalar(f"{COLUMNS[name]}/{name}", value, row["updates"])
            board.flush()
            loop.sac.actor.save(out)
            loop.save(out / "checkpoint" / f"epoch-{loop.epoch:06}.safetensors")
            score = loop.evaluation.score_mean if loop.evaluation else None
            note = f"penalty {row['penalty']:.3g}, Q {row['q']:.4g}"
            bar.update(completed=loop.epoch, note=note if score is None else f"score {score:.1f}, {note}")
    assert loop.evaluation is not None  # the last epoch is always evaluated
    result = dataclasses.asdict(loop.evaluation)
    return {
        **{name: result[name] for name in ("score_mean", "score_std", "return_mean", "return_std")},
        "updates": loop.sac.updates,
        "epochs": loop.epoch,
        "seconds": {"fit": fit_seconds, **loop.seconds, "total": loop.elapsed()},
        "backend": loop.engine.backend,
        "device": config.device,
        "dtype": config.rollout.dtype,
        "threads": loop.engine.threads,
        "dataset": config.dataset,
        "transitions": len(data),
        "task": task.name,
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


class _Loop:
    """The state of the training between two epochs, and the epoch itself."""

    def __init__(
        self, config: TrainConfig, task: Task, data: Transitions, ensemble: EnsembleDynamics, started: float
    ) -> None:
        rollout = config.rollout
        assert rollout.horizon is not None
        self.config, self.task, self.data, self.started = config, task, data, started
        self.data_sha256 = data_sha256(data)
        named = {f"{ensemble.activation}.{name}": value for name, value in ensemble.state_dict().items()}
        self.dynamics_sha256 = tensors_sha256(named)
        self.horizon = rollout.horizon
        self.engine = _engine(config, task, ensemble, config.backend)
        self.buffer = RingBuffer(_capacity(rollout), task.obs_dim, task.act_dim, config.device)
        self.sac = _sac(config, task, config.backend)
        self.rollouts: list[_Rollout] = []
        self.evaluation: Evaluation | None = None
        self.epoch = 0
        self.seconds = {"rollout": 0.0, "sac": 0.0, "evaluate": 0.0}

    def elapsed(self) -> float:
        """Seconds since the run's start, the time between sessions left out."""
        return time.perf_counter() - self.started

    def run_epoch(self, last: bool) -> dict[str, Any]:
        """Rollout, `interval` updates, evaluation where it is due; the row of progress.csv."""
        config, epoch = self.config, self.epoch + 1
        before = dict(self.seconds)
        policy = {name: value.clone() for name, value in self.sac.actor.state_dict().items()}
        head = self.buffer.head
        with _Clock(self.seconds, "rollout"):
            rows = self._roll_out(self.sac.actor, epoch)
        self.rollouts.append(_Rollout(epoch, head, len(rows), policy))
        # One stays as long as any of its rows does: made again in order, they fill the buffer as it is.
        while sum(rollout.rows for rollout in self.rollouts[1:]) >= self.buffer.capacity:
            del self.rollouts[0]
        with _Clock(self.seconds, "sac"):
            metrics = self.sac.update_many(
                self.data,
                self.buffer,
                min(config.rollout.interval, config.steps - self.sac.updates),
                derive_seed(config.seed, SAC_SEED, epoch),
            )
        evaluation = None
        if last or epoch % config.evaluation.interval == 0:
            with _Clock(self.seconds, "evaluate"):
                evaluation = self.evaluation = evaluate(
                    self.sac.actor,
                    self.task,
                    episodes=config.evaluation.episodes,
                    seed=derive_seed(config.seed, EVALUATE, epoch),
                    deterministic=config.evaluation.deterministic,
                )
        self.epoch = epoch
        assert rows.penalties is not None and rows.raw_rewards is not None
        row = {
            "epoch": epoch,
            "updates": self.sac.updates,
            **{f"seconds_{name}": self.seconds[name] - before[name] for name in before},
            "seconds_total": self.elapsed(),
            **metrics,
            "rows": len(rows),
            "penalty": rows.penalties.mean().item(),
            "raw_reward": rows.raw_rewards.mean().item(),
            "terminal_share": rows.terminals.float().mean().item(),
            "non_finite": rows.info["non_finite"],
            "buffer_size": self.buffer.size,
        }
        for name in ("score_mean", "score_std", "return_mean", "return_std"):
            row[name] = getattr(evaluation, name, None)
        return {name: row[name] for name in COLUMNS}

    def _roll_out(self, policy: Actor, epoch: int) -> Transitions:
        """The model rollouts of `epoch`, appended to the buffer."""
        config = self.config
        generator = torch.Generator().manual_seed(derive_seed(config.seed, START, epoch))
        start = torch.randint(len(self.data), (config.rollout.batch_size,), generator=generator)
        rows = self.engine.rollout(
            policy,
            self.data.observations[start.to(self.data.device)],
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
            "backends": {"rollout": self.engine.backend, "sac": self.sac.backend},
            "data_sha256": self.data_sha256,
            "dynamics_sha256": self.dynamics_sha256,
        }
        tensors = {f"sac.{name}": tensor for name, tensor in self.sac.state().items()}
        for rollout in self.rollouts:
            tensors |= {f"policy.{rollout.epoch}.{name}": value for name, value in rollout.policy.items()}
        save_tensors(path, tensors, {"state": json.dumps(state)})
        _remove_older(path)

    def restore(self, path: Path) -> None:
        """Continue from what `save` wrote: the buffer is filled again by the policies that filled it.

        Raises:
            InputError: the checkpoint is truncated or garbled, or its rollouts cannot be made again here.
        """
        tensors = load_tensors(path)
        try:
            state = json.loads(load_metadata(path)["state"])
            if state["format_version"] != FORMAT_VERSION:
                raise InputError(
                    f"{path} has format_version {state['format_version']},"
                    f" this package reads {FORMAT_VERSION}"
                )
            self._restore(path, state, tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path} is not a whole checkpoint ({error}); delete it to train from the start"
            ) from error

    def _restore(self, path: Path, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        if state["data_sha256"] != self.data_sha256:
            raise InputError(
                f"{self.config.dataset} is not the data that {path} was made with; bring that data back"
            )
        if state["dynamics_sha256"] != self.dynamics_sha256:
            raise InputError(
                f"the dynamics beside {path.parent} are not those that {path} was made with;"
                " resume with the dynamics that the run began with"
            )
        chosen = state["backends"]
        self.engine = _engine(self.config, self.task, self.engine.ensemble, chosen["rollout"])
        self.sac = _sac(self.config, self.task, chosen["sac"])
        self.sac.load_state(_within(tensors, "sac."), path)
        self.epoch = state["epoch"]
        self.seconds = {name: float(state["seconds"][name]) for name in self.seconds}
        self.started -= float(state["seconds"]["total"])
        self.evaluation = Evaluation(**state["evaluation"]) if state["evaluation"] else None
        self.rollouts = [
            _Rollout(**rollout, policy=_within(tensors, f"policy.{rollout['epoch']}."))
            for rollout in state["rollouts"]
        ]
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


def _append_row(path: Path, row: dict[str, Any]) -> None:
    """Add one line to progress.csv; the header first, where the file is new."""
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(COLUMNS))
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


def _cut_back(path: Path, epochs: int) -> None:
    """Leave only the rows of progress.csv up to the checkpoint's epoch."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)[: 1 + epochs]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(lines) if epochs else "")


def _log_fit(out: Path) -> None:
    """Write the fit's curves to TensorBoard, as a run of their own: their steps are epochs of the fit."""
    fit, folder = read_json(out / "fit.json"), out / "tensorboard-fit"
    # Those of a session that was killed before its first checkpoint.
    for events in folder.glob("events.out.tfevents.*"):
        events.unlink()
    with SummaryWriter(str(folder)) as board:
        for epoch, errors in enumerate(fit["holdout_mse"]):
            for member, error in enumerate(errors):
                board.add_scalar(f"holdout_mse/member_{member}", error, epoch)
            board.add_scalar("train_loss", fit["train_loss"][epoch], epoch)
