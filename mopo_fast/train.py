"""The MOPO loop: fit the ensemble, then repeat model rollouts, SAC updates, evaluation and a checkpoint.

Source: softlearning/algorithms/mopo.py of the authors' code. The random numbers of an epoch depend on (seed,
epoch) alone.
"""

import contextlib
import copy
import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self, cast

import torch

from mopo_fast import backends
from mopo_fast.backends.philox import BATCH_STREAM, random_choice
from mopo_fast.buffer import RingBuffer
from mopo_fast.config import RunConfig, TrainConfig
from mopo_fast.data import Transitions
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.evaluate import Evaluator, evaluate_in_model
from mopo_fast.fit import data_sha256, log_recorded_fit, read_fit
from mopo_fast.policy import Actor
from mopo_fast.report import write_report
from mopo_fast.run import checkpoint
from mopo_fast.run.checkpoint import Rollout, Tensors
from mopo_fast.run.dynamics import make_dynamics, training_backend
from mopo_fast.run.folder import (
    SpentSeconds,
    check_folder,
    is_finished,
    lengthen,
    read_summary,
    suggest_resuming,
    write_config,
    write_summary,
)
from mopo_fast.run.kept import keep_policy
from mopo_fast.run.log import END_COLUMNS, PENALTY_COLUMNS, Clock, Log, Pending, read_rows
from mopo_fast.run.opening import open_runs
from mopo_fast.run.resolve import load_data, make_engine, make_sac, place_data, resolve, take_data
from mopo_fast.tasks import Task
from mopo_fast.utils.lock import locked
from mopo_fast.utils.machine import resolve_threads
from mopo_fast.utils.progress import Bar, progress_bar
from mopo_fast.utils.seeds import EVALUATE, MEASURE, ROLLOUT, START, derive_seed
from mopo_fast.utils.seeds import SAC as SAC_SEED
from mopo_fast.utils.tensors import load_into

# Parts of an epoch in their order, with the shares of the time that they take in a canonical run on a CPU.
_PARTS = {"rollout": 0.33, "sac": 0.5, "evaluate": 0.17}
# Number of start states of an evaluation in the model.
_MODEL_STARTS = 1000
# Number of start states whose rollouts are penalised for the mean penalty where no reward needs it.
_PENALISED_STARTS = 2000
# Numbers of rows that are measured once an epoch, far fewer than the updates of an epoch learn from.
_MEASURED_PENALTIES, _MEASURED_ROWS = 4096, 1024
_QUANTILES = (0.5, 0.9, 0.99)


def train(
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    memory_map: bool = False,
    quiet: bool = False,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train one MOPO run in the folder `out`, from the data set to the report.

    Args:
        config: settings of the run. Where task, horizon or penalty_coef is None, the data set's name decides.
            The completed settings are written to config.json. `config.dataset` may also be data in memory:
            `Transitions`, a dictionary of arrays, or any other source of `load_dataset`. Their task must be
            given, and config.json records `memory:NAME` and a digest; a run resumes with the same data alone.
        out: folder of the run.
        resume: continue from the last checkpoint. The final parameters are bit for bit those of a run that
            was never stopped. A folder without a run starts from the beginning. A finished run is kept, and
            trained on where `config.steps` are more than it was made with. `run.folder.read_config` reads the
            settings of a run.
        memory_map: leave the data in their file, see `load_dataset`. The fit then keeps the arrays that it
            derives from them in temporary files. The result is the same.
        quiet: show no progress bars, and not what the run is about to do.
        on_epoch: called after every epoch with its row of progress.csv, a dictionary from columns to numbers,
            texts, or None in an epoch without an evaluation. It waits for the evaluation, so that several
            epochs may have passed with `evaluation.workers`. An exception that it raises ends the training. A
            resumed run calls it again for an epoch that is repeated.

    Returns:
        The contents of summary.json: score_mean, score_std, return_mean, return_std (of the last policy),
        scored_by ("environment" or "model"), updates, epochs, seconds {fit, rollout, sac, evaluate, total},
        backend, isa (instruction set of the CPU's kernels, else None), threads, runs_together, transitions
        (of the data set), device, dataset, task, seed, dtype (of the rollouts), dtypes {fit, rollout, sac},
        horizon, penalty, penalty_coef, versions {mopo_fast, python, torch, gymnasium, mujoco}, rollouts
        {truncate_at, and of the last epoch: length (mean number of steps), and the shares ended_terminal,
        ended_truncated and ended_horizon}.

    Raises:
        InputError: a setting or argument cannot be used, another process works in `out`, `out` holds a run
            while `resume` is False, it holds a run with another config, the data or a checkpoint are damaged,
            or the training diverged.
    """
    if not os.fspath(out):
        raise InputError('out is "", which would be the current folder; name a folder, or give "."')
    if on_epoch is not None and not callable(on_epoch):
        raise InputError(f"on_epoch must be a function of a row of progress.csv, got {on_epoch!r}")
    started, out = time.perf_counter(), Path(out)
    config, data = take_data(config, memory_map=memory_map)
    given = config
    config, task = resolve(config, out, data)
    with locked(out):
        check_folder(out, config, resume)
        if not is_finished(out, config):
            data = load_data(config, task, data, memory_map=memory_map, quiet=quiet)
            open_runs([given], {out: config}, task, data, quiet=quiet)
            with suggest_resuming(out):
                write_config(out, config)
                digest = data_sha256(data)
                make_dynamics(config, out, data, digest, quiet)
                # The name is bound anew, which frees data that nobody else holds.
                data = place_data(data, config.device)
                with (
                    Evaluator(evaluation_workers(config)) as evaluator,
                    Training(config, task, out, data, digest, evaluator, started, on_epoch) as run,
                    train_bar([run], quiet) as bar,
                ):
                    lengthen(out, config)
                    while run.epoch < config.epochs:
                        progress = EpochProgress(bar, [run], [run])
                        rows = run.roll_out()
                        progress("rollout", 1.0)
                        metrics = run.update(functools.partial(progress, "sac"))
                        run.evaluate(rows, metrics)
                        run.save()
                        progress("evaluate", 1.0)
                        bar.update(note=progress_note([run]))
                        bar.report()
                    run.finish()
        if not (out / "report.html").exists():
            write_report(out, data=data)
        return read_summary(out)


def evaluation_workers(config: TrainConfig) -> int:
    """Return the number of processes that evaluate while the training goes on."""
    if config.evaluation.workers is not None:
        return config.evaluation.workers
    on_cpu = torch.device(config.device).type == "cpu"
    return 0 if on_cpu else min(4, max(1, resolve_threads(None) - 1))


class Training:
    """The training of one run after the fit, as a context manager that restores the last checkpoint.

    An epoch consists of `roll_out`, `update`, `evaluate` and `save`, in this order.

    Args:
        config: completed settings of the run.
        task: task of the run.
        out: folder of the run, which holds the ensemble.
        data: transitions of the data set, as `place_data` returns them.
        data_digest: their `data_sha256`.
        evaluator: evaluates the policies.
        started: value of `time.perf_counter` when the run began.
        on_epoch: as in `train`.

    Attributes:
        epoch: number of the latest epoch that has begun, from 1; 0 before the first.
        rollouts: rollouts whose rows are in the buffer, oldest first.
        policies: parameters of the actors that made these rollouts, by epoch.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        out: Path,
        data: Transitions,
        data_digest: str,
        evaluator: Evaluator,
        started: float,
        on_epoch: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        assert config.rollout.horizon is not None
        self.config, self.task, self.out, self.data = config, task, out, data
        self.data_sha256, self.evaluator = data_digest, evaluator
        ensemble = EnsembleDynamics.load(out, config.device)
        self.dynamics_sha256, self.horizon = ensemble.sha256(), config.rollout.horizon
        self.fit_seconds = 0.0 if config.dynamics_from is not None else read_fit(out)["seconds"]
        self.engine = make_engine(config, task, ensemble, config.backend, data)
        self.buffer = RingBuffer(
            *(config.rollout.buffer_rows, task.obs_dim, task.act_dim, config.device),
            penalties=config.rollout.penalty_coef != 0.0 or config.rollout.truncates,
        )
        self.sac = make_sac(config, task, training_backend(config))
        self.rollouts: list[Rollout] = []
        self.policies: dict[int, Tensors] = {}
        self.clock = Clock(started)
        self._seconds_before_epoch = dict(self.clock.seconds)
        # Without an environment the model evaluates the policy.
        self.log = Log(out, self.clock, "environment" if task.env_id else "model", on_epoch)
        self.epoch = 0

    def __enter__(self) -> Self:
        last = checkpoint.last_checkpoint(self.out)
        if last is None:
            # The total includes a fit that an earlier session made.
            self.clock.started = min(self.clock.started, time.perf_counter() - self.fit_seconds)
            if (self.out / "fit.json").exists() and not (self.out / "fit.csv").exists():
                log_recorded_fit(self.out)
        else:
            self.restore(last)
            checkpoint.remove_older(last)
        self.log.open(self.epoch, self.sac.updates)
        return self

    def __exit__(self, *_: object) -> None:
        self.log.close()

    def roll_out(self) -> Transitions:
        """Begin an epoch: add its model rollouts to the buffer, and return them."""
        self.epoch += 1
        self._seconds_before_epoch, head = dict(self.clock.seconds), self.buffer.head
        self.policies[self.epoch] = self._policy()
        with self.clock("rollout"):
            rows = self._fill_buffer(self.sac.actor, self.epoch)
            self._penalty = self._describe_penalties(rows)
            self._ends = self._describe_ends(rows)
        self.rollouts.append(Rollout(self.epoch, head, len(rows)))
        # Keep every rollout with rows in the buffer: repeated in order, they restore it.
        while sum(rollout.rows for rollout in self.rollouts[1:]) >= self.buffer.capacity:
            del self.policies[self.rollouts.pop(0).epoch]
        return rows

    def update(self, on_progress: Callable[[float], None] = lambda _: None) -> dict[str, float]:
        """Make the SAC updates of the epoch, and return the means of `sac.METRICS`.

        Args:
            on_progress: called now and then with the share of the updates that is made.
        """
        with self.clock("sac"):
            return self.sac.update_many(self.data, self.buffer, *self.updates_due(), on_progress)

    def updates_due(self) -> tuple[int, int]:
        """Return the number of updates of the epoch, and their seed."""
        updates = self.config.updates_after(self.epoch) - self.sac.updates
        return updates, derive_seed(self.config.seed, SAC_SEED, self.epoch)

    def evaluate(self, rows: Transitions, metrics: dict[str, float]) -> None:
        """Start the evaluation of the policy, where it is due, and add the epoch to the log."""
        assert rows.raw_rewards is not None
        row = {
            "epoch": self.epoch,
            "updates": self.sac.updates,
            **metrics,
            "rows": len(rows),
            **self._penalty,
            "raw_reward": rows.raw_rewards.mean().item(),
            **self._ends,
            "terminal_share": rows.terminals.float().mean().item(),
            "non_finite": rows.info["non_finite"],
            "buffer_size": self.buffer.size,
            **self.sac.measure(self.data, self.buffer, _MEASURED_ROWS, self._measure_seed()),
        }
        pending = Pending(row)
        if self.epoch == self.config.epochs or self.epoch % self.config.evaluation.interval == 0:
            pending.policy = self._policy()
            self._begin_evaluation(pending)
        spent = {
            name: seconds - self._seconds_before_epoch[name] for name, seconds in self.clock.seconds.items()
        }
        row |= {f"seconds_{name}": seconds for name, seconds in spent.items()}
        row["seconds_total"] = self.clock.elapsed()
        self.log.add(pending)

    def save(self) -> None:
        """Write the policy and a checkpoint, which ends the epoch."""
        self.sac.actor.save(self.out)
        if self.config.keep_policies is not None and self.epoch % self.config.keep_policies == 0:
            keep_policy(self.out, self.sac.actor, self.sac.updates)
        state = checkpoint.State(
            self.epoch,
            cast(SpentSeconds, self.clock.seconds | {"total": self.clock.elapsed()}),
            self.log.evaluation,
            self.rollouts,
            [(pending.row, pending.policy is not None) for pending in self.log.pending],
            self._backends(),
            self.data_sha256,
            self.dynamics_sha256,
        )
        tensors = {f"policy.{epoch}": policy for epoch, policy in self.policies.items()}
        tensors |= {f"evaluated.{one.row['epoch']}": one.policy or {} for one in self.log.pending}
        checkpoint.save_checkpoint(self.out, state, {"sac": self.sac.state(), **tensors})

    def _backends(self) -> checkpoint.Backends:
        names = checkpoint.Backends(rollout=self.engine.backend, sac=self.sac.backend)
        isa = backends.isa_of(names["rollout"]) or backends.isa_of(names["sac"])
        return names if isa is None else {**names, "isa": isa}

    def finish(self, together: int = 1) -> None:
        """Wait for all evaluations and write summary.json.

        Args:
            together: number of runs that were trained at once.
        """
        self.log.write()
        assert self.log.evaluation is not None  # The last epoch is always evaluated.
        write_summary(
            self.out,
            self.config,
            self.log.evaluation,
            scored_by=self.log.scored_by,
            updates=self.sac.updates,
            epochs=self.epoch,
            seconds={"fit": self.fit_seconds, **self.clock.seconds, "total": self.clock.elapsed()},
            backend=self.engine.backend,
            isa=backends.isa_of(self.engine.backend),
            threads=self.engine.threads,
            runs_together=together,
            transitions=len(self.data),
            rollouts=self._last_rollouts(),
        )

    def _last_rollouts(self) -> dict[str, float | None]:
        """Describe the last epoch's rollouts by its row of progress.csv, and the penalty that ends them."""
        at, last = self.engine.truncation.at, read_rows(self.out / "progress.csv")[-1]
        # An epoch of an earlier version has no such columns.
        numbers = {name: float(last[name]) for name in ("length", *END_COLUMNS) if last.get(name)}
        return {"truncate_at": at if at < math.inf else None, **numbers}

    def restore(self, path: Path) -> None:
        """Restore the state in a checkpoint, and refill the buffer by the policies that filled it.

        Raises:
            InputError: the checkpoint is damaged, or this machine cannot repeat its rollouts.
        """
        config = self.config
        saved, tensors = checkpoint.load_checkpoint(path, config, self.data_sha256, self.dynamics_sha256)

        def policy(group: str) -> Tensors:
            parameters = self._policy()
            load_into(path, checkpoint.select_group(tensors, group), parameters)
            return parameters

        with checkpoint.suggest_deleting(path):
            self.engine = make_engine(
                config, self.task, self.engine.ensemble, saved.backends["rollout"], self.data
            )
            self.sac = make_sac(config, self.task, saved.backends["sac"])
            checkpoint.warn_of_other_isa(path, saved.backends)
            self.sac.load_state(checkpoint.select_group(tensors, "sac"), path)
            if self.sac.updates != config.updates_after(saved.epoch):
                raise InputError(
                    f"{path} holds {self.sac.updates} updates, but epoch {saved.epoch} ends after"
                    f" {config.updates_after(saved.epoch)}"
                )
            self.policies = {one.epoch: policy(f"policy.{one.epoch}") for one in saved.rollouts}
            self.log.pending = [
                Pending(row, policy(f"evaluated.{row['epoch']}") if evaluated else None)
                for row, evaluated in saved.pending
            ]
        self.epoch, self.log.evaluation, self.rollouts = saved.epoch, saved.evaluation, saved.rollouts
        self.clock.seconds = dict(cast(dict[str, float], saved.seconds))
        self.clock.started -= self.clock.seconds.pop("total")
        for pending in self.log.pending:
            if pending.policy is not None:
                self._begin_evaluation(pending)
        self._refill(path)

    def _refill(self, path: Path) -> None:
        """Generate the rows of the buffer again."""
        actor = copy.deepcopy(self.sac.actor)
        self.buffer.head = self.rollouts[0].head
        with self.clock("rollout"):
            for rollout in self.rollouts:
                actor.load_state_dict(self.policies[rollout.epoch])
                rows = len(self._fill_buffer(actor, rollout.epoch))
                if rows != rollout.rows:
                    raise InputError(
                        f"the rollout of epoch {rollout.epoch} gave {rows} rows, but {path} recorded"
                        f" {rollout.rows}; resume on the kind of machine that the run began on"
                    )

    def _fill_buffer(self, policy: Actor, epoch: int) -> Transitions:
        """Add the model rollouts of `epoch` to the buffer, and return them."""
        rows = self._rollouts_of(policy, epoch, self.config.rollout.batch_size, self.buffer)
        if len(rows) == 0:
            raise InputError(
                f"no model rollout of epoch {epoch} began with a finite prediction; fit the ensemble again"
            )
        return rows

    def _describe_penalties(self, rows: Transitions) -> dict[str, float]:
        """Return the mean penalty of an epoch's rollouts, quantiles of it, and its share of the reward.

        They are from some of the start states if no penalties are stored. Quantiles are those of a sample.
        With the mean penalty u and the mean |r| of the model's rewards, the share is
        lambda * u / (lambda * u + |r|).
        """
        size = rows.raw_rewards.abs().mean().item() if rows.raw_rewards is not None else 0.0
        if rows.penalties is None:
            count = min(_PENALISED_STARTS, self.config.rollout.batch_size)
            ring = RingBuffer(count * self.horizon, rows.obs_dim, rows.act_dim, self.config.device)
            # The same start states and random numbers: the same transitions.
            rows = self._rollouts_of(self.sac.actor, self.epoch, count, ring)
        assert rows.penalties is not None
        mean = rows.penalties.mean().item()
        numbers = torch.arange(_MEASURED_PENALTIES, device=rows.device)
        drawn = random_choice(numbers, 0, BATCH_STREAM, len(rows), self._measure_seed())
        sample = rows.penalties[drawn].double()
        quantiles = torch.quantile(sample, sample.new_tensor(_QUANTILES)).tolist()
        lost = self.engine.penalty_coef * mean
        share = lost / (lost + size) if lost else 0.0
        return {"penalty": mean, **dict(zip(PENALTY_COLUMNS, [*quantiles, share], strict=True))}

    def _describe_ends(self, rows: Transitions) -> dict[str, float]:
        """Return the mean number of steps of an epoch's rollouts, and the share of them for each end.

        A rollout whose last step is terminal and has a penalty above the limit counts as truncated.
        """
        count, truncated = self.config.rollout.batch_size, rows.info["truncated"]
        terminals = rows.terminals
        if rows.penalties is not None:
            terminals = terminals & ~(rows.penalties > self.engine.truncation.at)
        terminal = int(terminals.sum())
        ends = terminal, truncated, count - terminal - truncated - rows.info["non_finite"]
        return {"length": len(rows) / count, **dict(zip(END_COLUMNS, (n / count for n in ends), strict=True))}

    def _measure_seed(self) -> int:
        """Return the seed of what is measured in this epoch, which training does not use."""
        return derive_seed(self.config.seed, MEASURE, self.epoch)

    def _rollouts_of(self, policy: Actor, epoch: int, count: int, out: RingBuffer) -> Transitions:
        """Make the model rollouts of the first `count` start states of `epoch`."""
        return self.engine.rollout(
            policy,
            self._draw_starts(count, derive_seed(self.config.seed, START, epoch)),
            self.horizon,
            seed=derive_seed(self.config.seed, ROLLOUT, epoch),
            out=out,
        )

    def _draw_starts(self, count: int, seed: int) -> torch.Tensor:
        numbers = torch.arange(count, device=self.data.device)
        return self.data.observations[random_choice(numbers, 0, BATCH_STREAM, len(self.data), seed)]

    def _policy(self) -> Tensors:
        """Return a copy of the actor's parameters."""
        return {name: value.clone() for name, value in self.sac.actor.state_dict().items()}

    def _begin_evaluation(self, pending: Pending) -> None:
        """Start the evaluation of a row's policy: in the environment, or in the model where there is none."""
        assert pending.policy is not None
        config, actor = self.config, copy.deepcopy(self.sac.actor)
        actor.load_state_dict(pending.policy)
        with self.clock("evaluate"):
            if self.task.env_id:
                pending.evaluation = self.evaluator.submit(
                    actor,
                    self.task,
                    episodes=config.evaluation.episodes,
                    seed=derive_seed(config.seed, EVALUATE, pending.row["epoch"]),
                    deterministic=config.evaluation.deterministic,
                    threads=config.threads,
                )
            else:
                # Every epoch starts from the same states.
                seed = derive_seed(config.seed, EVALUATE)
                starts = self._draw_starts(_MODEL_STARTS, seed)
                pending.evaluation = Future()
                pending.evaluation.set_result(
                    evaluate_in_model(self.engine, actor, starts, self.horizon, seed=seed)
                )


class EpochProgress:
    """Moves the bar of a training within an epoch, each part by the share of the time that it takes.

    Args:
        bar: bar whose unit is an epoch of one run.
        runs: all runs of the training.
        some: those that are about to make the epoch.
    """

    def __init__(self, bar: Bar, runs: Sequence[Training], some: Sequence[Training]) -> None:
        self._bar, self._count = bar, len(some)
        self._begin = sum(run.epoch for run in runs)
        self._weights = dict(_PARTS)
        if all(run.epoch for run in some):
            for name in self._weights:
                self._weights[name] = sum(run.clock.seconds[name] for run in some)

    def __call__(self, part: str, share: float) -> None:
        """Say that this share of a part, "rollout", "sac" or "evaluate", is done."""
        names = list(self._weights)
        done = sum(self._weights[name] for name in names[: names.index(part)]) + share * self._weights[part]
        whole = sum(self._weights.values())
        last = part == names[-1] and share == 1.0
        self._bar.update(
            completed=self._begin + self._count * (1.0 if last else done / whole),
            note=None if self._bar.note else "first epoch",
        )


def train_bar(runs: Sequence[Training], quiet: bool) -> contextlib.AbstractContextManager[Bar]:
    """Return the progress bar of the training of these runs; its unit is an epoch of one run."""
    total, done = sum(run.config.epochs for run in runs), sum(run.epoch for run in runs)
    return progress_bar("train", total, completed=done, unit="epoch", quiet=quiet)


def progress_note(runs: Sequence[Training]) -> str:
    """Describe the latest epoch for the progress bar, averaged over the runs.

    It is the score, or the return where there is no score, the penalty, the steps of a rollout where a
    penalty can end it, and the Q-value. A score of an earlier epoch is named as such, and one of an earlier
    session is left out.
    """
    evaluated = sorted({run.log.evaluated or 0 for run in runs})
    evaluations = [run.log.evaluation for run in runs if run.log.evaluation is not None]
    rows = [run.log.row for run in runs if run.log.row is not None]
    parts = []
    if evaluations and evaluated[0]:
        scores = [one.score_mean for one in evaluations if one.score_mean is not None]
        returns = [one.return_mean for one in evaluations]
        name, values = ("score", scores) if len(scores) == len(evaluations) else ("return", returns)
        new = evaluated == sorted({row["epoch"] for row in rows})
        span = " to ".join(map(str, dict.fromkeys((evaluated[0], evaluated[-1]))))
        when = "" if new else f" at epoch {span}"
        parts.append(f"{name} {sum(values) / len(values):.1f}{when}")
    truncates = any(run.config.rollout.truncates for run in runs)
    for name, form in (("penalty", ".3g"), *([("length", ".1f")] if truncates else []), ("q", ".4g")):
        parts.append(f"{name} {sum(row[name] for row in rows) / len(rows):{form}}")
    return ", ".join(parts)
