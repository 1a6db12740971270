"""Several runs at once: their fits and their SAC updates are made together.

Opt-in: nothing else of the loop imports this module, and one run does without it. In PyTorch the parameters
of all runs lie in one tensor each, of which a run's own are views, and a step is one batch of matrices; with
a kernel the runs lie side by side on the cores or multiprocessors. Each run gets what it would get alone, to
rounding; with a kernel to the bit.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from mopo_fast import backends
from mopo_fast.backends import checked
from mopo_fast.buffer import RingBuffer
from mopo_fast.config import DynamicsConfig, RunConfig, TrainConfig, check_runs
from mopo_fast.data.transitions import Transitions
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.evaluate import Evaluator
from mopo_fast.fit import Fit, FitEpoch, PyTorchSteps, data_sha256, fit_checkpoint, save_fit
from mopo_fast.report import write_report
from mopo_fast.run.dynamics import copy_fit, make_dynamics, training_backend
from mopo_fast.run.folder import (
    as_json,
    check_folder,
    first_difference,
    read_summary,
    suggest_resuming,
    write_config,
)
from mopo_fast.run.resolve import load_data, resolve
from mopo_fast.sac import SAC, sum_by_kernel
from mopo_fast.tasks import Task
from mopo_fast.train import Training, evaluation_workers, progress_note
from mopo_fast.utils.atomic import refuse_links
from mopo_fast.utils.lock import locked
from mopo_fast.utils.progress import progress_bar

T = TypeVar("T", Fit, Training)


class SacPopulation:
    """SACs of one config and of equally many updates, that are updated together.

    Raises:
        InputError: they are not distinct, or of different configs, backends or sizes.
    """

    def __init__(self, sacs: Sequence[SAC]) -> None:
        self.sacs = list(sacs)
        kinds = [(sac.config, sac.backend, sac.actor.obs_dim, sac.actor.act_dim) for sac in self.sacs]
        _check_alike("SACs are updated", self.sacs, kinds)
        self._whole: SAC | None = None

    def update_many(
        self, data: Transitions, buffers: Sequence[RingBuffer], updates: int, seeds: Sequence[int]
    ) -> list[dict[str, float]]:
        """Do for each SAC what `SAC.update_many` does, with its own buffer and seed."""
        each = list(zip(self.sacs, buffers, seeds, strict=True))
        if len(each) == 1:
            return [sac.update_many(data, buffer, updates, seed) for sac, buffer, seed in each]
        draws = [sac.begin(data, buffer, updates, seed) for sac, buffer, seed in each]
        pairs = list(zip(self.sacs, draws, strict=True))
        if kernels := backends.training_kernels(self.sacs[0].backend):
            calls = zip(*(sac.kernel_runs(some) for sac, some in pairs), strict=True)
            threads = self.sacs[0].threads
            sums = sum((sum_by_kernel(kernels, runs, threads) for runs in calls), torch.zeros(()))
        else:
            sums = self._learn(zip(*(sac.batches(some) for sac, some in pairs), strict=True))
        return [sac.means(total, updates) for sac, total in zip(self.sacs, sums.tolist(), strict=True)]

    def _learn(self, batches: Iterable[Sequence[Sequence[torch.Tensor]]]) -> torch.Tensor:
        """Update on `SAC.batches` of each: the sums of `METRICS`, [runs, 6]."""
        whole = self._lay_together()
        try:
            stacked = ([torch.stack(arrays, 1) for arrays in zip(*each, strict=True)] for each in batches)
            return sum(map(whole.learn, stacked), torch.zeros(()))
        finally:
            # After an interruption too: their parameters are views of the whole's.
            for sac in self.sacs:
                sac.updates = whole.updates

    def _lay_together(self) -> SAC:
        """Return one SAC with the parameters of all, [runs, ...] each; theirs become views of these."""
        first = self.sacs[0]
        # Another population may have taken them since.
        if self._whole is None or not _are_views([sac.log_alpha for sac in self.sacs], self._whole.log_alpha):
            self._whole = SAC(
                first.actor.obs_dim,
                first.actor.act_dim,
                first.config,
                device=first.log_alpha.device,
                total_updates=first.total_updates,
                backend="reference",
            )
            states = [sac.live_state() for sac in self.sacs]
            for name, tensor in self._whole.live_state().items():
                # The numbers of steps are the same for all.
                if not name.endswith(".step"):
                    tensor.data = _stack([state[name] for state in states])
        self._whole.updates = first.updates
        for name, optimizer in self._whole.optimizers.items():
            optimizer.learning_rate = first.optimizers[name].learning_rate
        return self._whole


class FitPopulation:
    """Fits of one config to equally much data and of equally many steps, that are stepped together.

    Raises:
        InputError: they are not distinct, or of different configs, backends or sizes.
    """

    def __init__(self, fits: Sequence[Fit]) -> None:
        self.fits = list(fits)
        kinds = [(fit.config, fit.backend, fit.model.obs_dim, fit.model.act_dim) for fit in self.fits]
        _check_alike("fits are stepped", self.fits, kinds)
        self._whole: PyTorchSteps | None = None

    def run_epoch(self, on_progress: Callable[[float], None] = lambda _: None) -> list[FitEpoch]:
        """Do for each what `Fit.run_epoch` does; on_progress is told the share of it that is done."""
        started, totals = time.perf_counter(), [0.0] * len(self.fits)
        pieces = list(zip(*(fit.epoch_rows() for fit in self.fits), strict=True))
        for number, rows in enumerate(pieces, start=1):
            losses = self.steps(rows)
            totals = [total + loss for total, loss in zip(totals, losses, strict=True)]
            on_progress(number / len(pieces))
        return [fit.end_epoch(total, started) for fit, total in zip(self.fits, totals, strict=True)]

    def steps(self, rows: Sequence[torch.Tensor]) -> list[float]:
        """Do for each what `Fit.steps` does, with its own rows."""
        if len(self.fits) == 1:
            return [self.fits[0].steps(rows[0])]
        if kernels := backends.training_kernels(self.fits[0].backend):
            runs = [fit.kernel_run(some) for fit, some in zip(self.fits, rows, strict=True)]
            return checked.fit_steps(kernels, runs, self.fits[0].threads)
        batches = [fit.batches(some) for fit, some in zip(self.fits, rows, strict=True)]
        whole = self._lay_together()
        try:
            losses: list[float] = whole(*map(torch.stack, zip(*batches, strict=True))).tolist()
        finally:
            # After an interruption too: their parameters are views of the whole's.
            for fit in self.fits:
                fit.steps_made = int(whole.optimizer.steps[0])
        return losses

    def _lay_together(self) -> PyTorchSteps:
        """Return steps of the parameters of all, [fits, ...] each; theirs become views of these."""
        first, bounds = self.fits[0], [fit.parameters[-1] for fit in self.fits]
        # Another population may have taken them since.
        if self._whole is None or not _are_views(bounds, self._whole.parameters[-1]):
            parameters = [_stack(each) for each in zip(*(fit.parameters for fit in self.fits), strict=True)]
            self._whole = PyTorchSteps([each.requires_grad_() for each in parameters], first.config)
            for name in ("exp_avgs", "exp_avg_sqs"):
                moments = zip(*(getattr(fit.optimizer, name) for fit in self.fits), strict=True)
                setattr(self._whole.optimizer, name, list(map(_stack, moments)))
        for step in self._whole.optimizer.steps:
            step.fill_(first.steps_made)
        return self._whole


def _check_alike(what: str, several: Sequence[Any], kinds: Sequence[Any]) -> None:
    if len(set(map(id, several))) != len(several) or len(set(kinds)) != 1:
        raise InputError(f"{what} together where they are distinct, and of one config and size")


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack the tensors of several runs in one, of which they become views."""
    whole = torch.stack([tensor.data for tensor in tensors])
    for tensor, view in zip(tensors, whole, strict=True):
        tensor.data = view
    return whole


def _are_views(tensors: Sequence[torch.Tensor], whole: torch.Tensor) -> bool:
    """Tell whether `_stack` of the tensors gave `whole`, and nothing has moved them since."""
    return all(tensor.data_ptr() == view.data_ptr() for tensor, view in zip(tensors, whole, strict=True))


def fit_and_save_many(
    data: Transitions,
    folders: Sequence[str | os.PathLike[str]],
    *,
    seeds: Sequence[int],
    config: DynamicsConfig | None = None,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    threads: int | None = None,
    quiet: bool = True,
) -> list[tuple[EnsembleDynamics, dict[str, Any]]]:
    """Do what `fit_and_save` does for each of `seeds` into its own of `folders`, all at once."""
    paths = [Path(folder) for folder in folders]
    with contextlib.ExitStack() as stack:
        for folder in paths:
            stack.enter_context(locked(folder))
            refuse_links(folder / "checkpoint")
        data.validate()
        fits = [Fit(data, seed, config, device, backend, threads) for seed in seeds]
        digest = data_sha256(data)
        fingerprints = [fit.fingerprint(digest) for fit in fits]
        checkpoints = [fit_checkpoint(folder) for folder in paths]
        for fit, checkpoint, fingerprint in zip(fits, checkpoints, fingerprints, strict=True):
            if checkpoint.exists():
                fit.restore(checkpoint, fingerprint)
        bar = stack.enter_context(progress_bar("fit: epochs", None, quiet=quiet))
        population: FitPopulation | None = None
        while some := _behind([fit for fit in fits if len(fit.history) < fit.expected_epochs]):
            if population is None or population.fits != some:
                population = FitPopulation(some)
            bar.update(total=sum(fit.expected_epochs for fit in fits))

            def on_progress(share: float, done: int = sum(map(_epochs, fits)), more: int = len(some)) -> None:
                bar.update(completed=done + share * more)

            records = population.run_epoch(on_progress)
            for fit, checkpoint, fingerprint in zip(fits, checkpoints, fingerprints, strict=True):
                if fit in some:
                    fit.save(checkpoint, fingerprint)
            elites = [sorted(record.holdout_mse)[: some[0].config.elites] for record in records]
            bar.update(note=f"holdout MSE {np.mean(elites):.4g}")
        return [
            (fit.finish(), save_fit(fit, data, digest, folder))
            for fit, folder in zip(fits, paths, strict=True)
        ]


def _epochs(one: Fit | Training) -> int:
    return len(one.history) if isinstance(one, Fit) else one.epoch


def _behind(several: Sequence[T]) -> list[T]:
    """Return those that are behind the others, as after an interruption: they catch up first."""
    least = min(map(_epochs, several), default=0)
    return [one for one in several if _epochs(one) == least]


def train_many(
    configs: Sequence[TrainConfig],
    outs: Sequence[str | os.PathLike[str]],
    *,
    resume: bool = False,
    memory_map: bool = False,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Train several runs at once, each in a folder of its own: do for each what `train` does.

    Runs of one seed share the fit. A run's numbers are those that it would have alone, to rounding, with the
    kernels of the "cpu" backend to the bit; and it can be gone on with alone.

    Args:
        configs: they may differ in `seed` and `rollout.penalty_coef`.
        outs: the runs' folders.

    Raises:
        InputError: as `train`; or the configs differ in anything else, or two folders are one.
    """
    started = time.perf_counter()
    check_runs(configs)
    paths = [Path(out) for out in outs]
    resolved = [resolve(config, out) for config, out in zip(configs, paths, strict=True)]
    runs = {out: config for (config, _), out in zip(resolved, paths, strict=True)}
    _check_together([config for config, _ in resolved], paths)
    with contextlib.ExitStack() as stack:
        for out, config in runs.items():
            stack.enter_context(locked(out))
            check_folder(out, config, resume)
        data, task = None, resolved[0][1]
        if unfinished := {out: config for out, config in runs.items() if not (out / "summary.json").exists()}:
            data = load_data(next(iter(unfinished.values())), task, memory_map=memory_map, quiet=quiet)
            with suggest_resuming(*unfinished):
                _train_all(unfinished, task, data, started, quiet)
        for out in runs:
            if not (out / "report.html").exists():
                write_report(out, data=data)
        return [read_summary(out) for out in runs]


def _check_together(configs: Sequence[RunConfig], outs: Sequence[Path]) -> None:
    def shared(config: RunConfig) -> Any:
        rollout = dataclasses.replace(config.rollout, penalty_coef=0.0)
        return as_json(dataclasses.replace(config, seed=0, rollout=rollout))

    for config, out in zip(configs, outs, strict=True):
        difference = first_difference(shared(configs[0]), shared(config))
        if difference:
            raise InputError(
                f"runs made together may differ in seed and penalty_coef alone: {outs[0]} has"
                f" {difference} as {out} has"
            )
    if len({out.resolve() for out in outs}) < len(outs):
        raise InputError("every run needs a folder of its own; no seed or penalty_coef may be given twice")


def _train_all(
    configs: dict[Path, RunConfig], task: Task, data: Transitions, started: float, quiet: bool
) -> None:
    """Do what is left of the runs, given by their folders."""
    for out, one in configs.items():
        write_config(out, one)
    digest, config = data_sha256(data), next(iter(configs.values()))
    if config.dynamics_from is None:
        _fit_seeds(configs, data, quiet)
    for out, one in configs.items():
        make_dynamics(one, out, data, digest, quiet)
    on_device = data.to(config.device)
    with (
        Evaluator(evaluation_workers(config)) as evaluator,
        progress_bar("train: epochs", config.epochs * len(configs), quiet=quiet) as bar,
        contextlib.ExitStack() as stack,
    ):
        runs = [
            stack.enter_context(Training(one, task, out, on_device, digest, evaluator, started))
            for out, one in configs.items()
        ]
        population: SacPopulation | None = None
        bar.update(completed=sum(map(_epochs, runs)))
        while some := _behind([run for run in runs if run.epoch < config.epochs]):
            sacs = [run.sac for run in some]
            if population is None or population.sacs != sacs:
                population = SacPopulation(sacs)
            _run_epoch(some, population)
            bar.update(completed=sum(map(_epochs, runs)), note=progress_note(runs))
        for run in runs:
            run.finish(together=len(runs))


def _fit_seeds(configs: dict[Path, RunConfig], data: Transitions, quiet: bool) -> None:
    """Fit once for each seed, in the folder that has its fit already or in the first; copy it to others."""
    folders: dict[int, Path] = {}
    for out in sorted(configs, key=lambda out: not (out / "fit.json").exists()):
        folders.setdefault(configs[out].seed, out)
    config = next(iter(configs.values()))
    if missing := {seed: out for seed, out in folders.items() if not (out / "fit.json").exists()}:
        fit_and_save_many(
            data,
            list(missing.values()),
            seeds=list(missing),
            config=config.dynamics,
            device=config.device,
            backend=training_backend(config),
            threads=config.threads,
            quiet=quiet,
        )
    for out, one in configs.items():
        if not (out / "fit.json").exists():
            copy_fit(folders[one.seed], out)


def _run_epoch(runs: Sequence[Training], population: SacPopulation) -> None:
    """Make an epoch of each, the updates together."""
    rows = [run.roll_out() for run in runs]
    with contextlib.ExitStack() as clocks:
        for run in runs:
            clocks.enter_context(run.clock("sac"))
        updates, seeds = zip(*(run.updates_due() for run in runs), strict=True)
        metrics = population.update_many(runs[0].data, [run.buffer for run in runs], updates[0], seeds)
    for run, some, values in zip(runs, rows, metrics, strict=True):
        run.evaluate(some, values)
        run.save()
