"""Several runs at once, whose fits and SAC updates are made together.

A single run does not use this module. In PyTorch, the parameters of all runs are stacked in one tensor each,
and those of a run are views of it, so that a step multiplies one batch of matrices. With a kernel, runs share
the cores or multiprocessors. Each run gets the results that it would get alone: to rounding in PyTorch, bit
for bit with a kernel.
"""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from mopo_fast import backends
from mopo_fast.backends import checked
from mopo_fast.buffer import RingBuffer
from mopo_fast.config import DynamicsConfig, RunConfig, TrainConfig, check_runs
from mopo_fast.data.transitions import Transitions
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.evaluate import Evaluator
from mopo_fast.fit import (
    Fit,
    FitEpoch,
    PyTorchSteps,
    data_sha256,
    finish_and_save,
    fit_checkpoint,
    fit_folder,
    fit_log,
    fit_note,
    log_epoch,
)
from mopo_fast.report import write_report
from mopo_fast.run.dynamics import copy_fit, make_dynamics, training_backend
from mopo_fast.run.folder import (
    as_json,
    check_folder,
    first_difference,
    is_finished,
    lengthen,
    read_summary,
    suggest_resuming,
    write_config,
)
from mopo_fast.run.opening import open_runs
from mopo_fast.run.resolve import load_data, place_data, resolve, take_data
from mopo_fast.sac import SAC, sum_by_kernel, sum_parts
from mopo_fast.tasks import Task
from mopo_fast.train import EpochProgress, Training, evaluation_workers, progress_note, train_bar
from mopo_fast.utils.lock import locked
from mopo_fast.utils.progress import progress_bar

T = TypeVar("T")
_Run = TypeVar("_Run", Fit, Training)


class SacPopulation:
    """SACs that are updated together.

    Args:
        sacs: SACs of one config that have made the same number of updates.

    Raises:
        InputError: a SAC is given twice, or their configs, backends or sizes differ.
    """

    def __init__(self, sacs: Sequence[SAC]) -> None:
        self.sacs = _checked("SACs", sacs, lambda sac: (sac.config, sac.backend, sac.actor))
        self._whole: SAC | None = None

    def update_many(
        self,
        data: Transitions,
        buffers: Sequence[RingBuffer],
        updates: int,
        seeds: Sequence[int],
        on_progress: Callable[[float], None] = lambda _: None,
    ) -> list[dict[str, float]]:
        """Call `SAC.update_many` for all SACs at once, each with its own buffer and seed."""
        each = list(zip(self.sacs, buffers, seeds, strict=True))
        if len(each) == 1:
            return [sac.update_many(data, buffer, updates, seed, on_progress) for sac, buffer, seed in each]
        draws = [sac.begin(data, buffer, updates, seed) for sac, buffer, seed in each]
        pairs = list(zip(self.sacs, draws, strict=True))
        if kernels := backends.training_kernels(self.sacs[0].backend):
            calls = zip(*(sac.kernel_calls(some) for sac, some in pairs), strict=True)
            threads = self.sacs[0].threads
            sums = sum_parts((sum_by_kernel(kernels, some, threads) for some in calls), updates, on_progress)
        else:
            batches = zip(*(sac.batches(some) for sac, some in pairs), strict=True)
            sums = self._learn(batches, updates, on_progress)
        return [sac.means(total, updates) for sac, total in zip(self.sacs, sums.tolist(), strict=True)]

    def _learn(
        self,
        batches: Iterable[Sequence[Sequence[torch.Tensor]]],
        updates: int,
        on_progress: Callable[[float], None],
    ) -> torch.Tensor:
        """Update on the groups of batches that `SAC.batches` yields; return sums, [SACs, 6 + critics]."""
        whole = self._lay_together()
        try:
            stacked = ([torch.stack(arrays, 1) for arrays in zip(*each, strict=True)] for each in batches)
            return sum_parts(map(whole.learn, stacked), updates, on_progress)
        finally:
            # Also after an exception, since their parameters are views of the whole's.
            for sac in self.sacs:
                sac.updates = whole.updates

    def _lay_together(self) -> SAC:
        """Stack the parameters of all SACs into those of one, of which theirs become views; return it."""
        first = self.sacs[0]
        # Another population may have moved the parameters since.
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
                # All SACs have made the same number of steps.
                if not name.endswith(".step"):
                    tensor.data = _stack([state[name] for state in states])
        self._whole.updates = first.updates
        for name, optimizer in self._whole.optimizers.items():
            optimizer.learning_rate = first.optimizers[name].learning_rate
        return self._whole


class FitPopulation:
    """Fits that are stepped together.

    Args:
        fits: fits of one config, to data sets of one size, that have made the same number of steps.

    Raises:
        InputError: a fit is given twice, or their configs, backends or sizes differ.
    """

    def __init__(self, fits: Sequence[Fit]) -> None:
        self.fits = _checked("fits", fits, lambda fit: (fit.config, fit.backend, fit.model))
        self._whole: PyTorchSteps | None = None

    def run_epoch(self, on_progress: Callable[[float], None] = lambda _: None) -> list[FitEpoch]:
        """Call `Fit.run_epoch` for all fits at once.

        Args:
            on_progress: called now and then with the share of the epoch that is done.
        """
        started, totals = time.perf_counter(), [0.0] * len(self.fits)
        pieces = list(zip(*(fit.epoch_rows() for fit in self.fits), strict=True))
        for number, rows in enumerate(pieces, start=1):
            losses = self.steps(rows)
            totals = [total + loss for total, loss in zip(totals, losses, strict=True)]
            on_progress(number / len(pieces))
        return [fit.end_epoch(total, started) for fit, total in zip(self.fits, totals, strict=True)]

    def steps(self, rows: Sequence[torch.Tensor]) -> list[float]:
        """Call `Fit.steps` for all fits at once, each with its own rows."""
        if len(self.fits) == 1:
            return [self.fits[0].steps(rows[0])]
        if kernels := backends.training_kernels(self.fits[0].backend):
            calls = [fit.kernel_call(some) for fit, some in zip(self.fits, rows, strict=True)]
            return checked.fit_steps(kernels, calls, self.fits[0].threads)
        batches = [fit.batches(some) for fit, some in zip(self.fits, rows, strict=True)]
        whole = self._lay_together()
        try:
            losses: list[float] = whole(*map(torch.stack, zip(*batches, strict=True))).tolist()
        finally:
            # Also after an exception, since their parameters are views of the whole's.
            for fit in self.fits:
                fit.steps_made = int(whole.optimizer.steps[0])
        return losses

    def _lay_together(self) -> PyTorchSteps:
        """Stack the parameters of all fits, which become views of the result; return its `PyTorchSteps`."""
        first, bounds = self.fits[0], [fit.parameters[-1] for fit in self.fits]
        # Another population may have moved the parameters since.
        if self._whole is None or not _are_views(bounds, self._whole.parameters[-1]):
            parameters = [_stack(each) for each in zip(*(fit.parameters for fit in self.fits), strict=True)]
            self._whole = PyTorchSteps([each.requires_grad_() for each in parameters], first.config)
            for name in ("exp_avgs", "exp_avg_sqs"):
                moments = zip(*(getattr(fit.optimizer, name) for fit in self.fits), strict=True)
                setattr(self._whole.optimizer, name, list(map(_stack, moments)))
        for step in self._whole.optimizer.steps:
            step.fill_(first.steps_made)
        return self._whole


def _checked(what: str, several: Sequence[T], parts: Callable[[T], tuple[Any, str, Any]]) -> list[T]:
    """Return `several` as a list.

    Args:
        what: names them in the error.
        several: SACs or fits.
        parts: the config, the backend and the network of one.

    Raises:
        InputError: one is given twice, or their configs, backends or sizes differ.
    """
    kinds = {(config, backend, net.obs_dim, net.act_dim) for config, backend, net in map(parts, several)}
    if len(set(map(id, several))) != len(several) or len(kinds) != 1:
        raise InputError(f"only different {what} of one config, backend and size can be trained together")
    return list(several)


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack tensors into a new one, of which they become views."""
    whole = torch.stack([tensor.data for tensor in tensors])
    for tensor, view in zip(tensors, whole, strict=True):
        tensor.data = view
    return whole


def _are_views(tensors: Sequence[torch.Tensor], whole: torch.Tensor) -> bool:
    """Tell whether `_stack` made the tensors views of `whole`, and they still are."""
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
    quiet: bool = False,
) -> list[tuple[EnsembleDynamics, dict[str, Any]]]:
    """Call `fit_and_save` for several seeds at once, each with its own folder.

    Args:
        data: as in `fit_and_save`.
        folders: folders of the fits' files.
        seeds: seeds of the fits.
        config: as in `fit_and_save`.
        device: as in `fit_and_save`.
        backend: as in `fit_and_save`.
        threads: as in `fit_and_save`.
        quiet: as in `fit_and_save`.

    Returns:
        What `fit_and_save` returns, for each fit.

    Raises:
        InputError: as `fit_and_save`.
    """
    paths = [Path(folder) for folder in folders]
    with contextlib.ExitStack() as stack:
        for folder in paths:
            stack.enter_context(fit_folder(folder))
        data.validate()
        fits = [Fit(data, seed, config, device, backend, threads) for seed in seeds]
        digest = data_sha256(data)
        for fit, folder in zip(fits, paths, strict=True):
            fit.use_checkpoint(fit_checkpoint(folder), digest)
        logs = {id(fit): stack.enter_context(fit_log(out)) for fit, out in zip(fits, paths, strict=True)}
        for fit in fits:
            for record in fit.history:
                log_epoch(logs[id(fit)], record)
        done = sum(map(_epochs, fits))
        expected, most = sum(fit.expected_epochs for fit in fits), fits[0].config.max_epochs
        bar = stack.enter_context(
            progress_bar(
                "fit",
                expected,
                completed=done,
                unit="epoch",
                open_ended=True,
                at_most=None if most is None else most * len(fits),
                quiet=quiet,
            )
        )
        population: FitPopulation | None = None
        while some := _behind([fit for fit in fits if len(fit.history) < fit.expected_epochs]):
            if population is None or population.fits != some:
                population = FitPopulation(some)

            def on_progress(share: float, done: int = sum(map(_epochs, fits)), more: int = len(some)) -> None:
                bar.update(completed=done + share * more)

            records = population.run_epoch(on_progress)
            for fit, record in zip(some, records, strict=True):
                log_epoch(logs[id(fit)], record)
            bar.update(
                completed=sum(map(_epochs, fits)),
                total=sum(fit.expected_epochs for fit in fits),
                note=fit_note(records, some[0].config),
            )
            bar.report()
        return [finish_and_save(fit, data, digest, folder) for fit, folder in zip(fits, paths, strict=True)]


def _epochs(one: Fit | Training) -> int:
    return len(one.history) if isinstance(one, Fit) else one.epoch


def _behind(several: Sequence[_Run]) -> list[_Run]:
    """Return those with the fewest epochs: after an interruption they catch up with the others first."""
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
    """Call `train` for several runs at once, each in its own folder.

    Runs with the same seed share the fit. Each run gets the results that it would get alone, to rounding, and
    bit for bit with the kernels of the "cpu" backend. A run can later be resumed alone.

    Args:
        configs: the runs' configs, which may differ in `seed` and `rollout.penalty_coef`.
        outs: the runs' folders.
        resume: as in `train`.
        memory_map: as in `train`.
        quiet: as in `train`.

    Returns:
        The results of `train`, one for each run.

    Raises:
        InputError: as `train`, or the configs differ in another setting, or a folder is given twice.
    """
    started = time.perf_counter()
    check_runs(configs)
    paths = [Path(out) for out in outs]
    first, data = take_data(configs[0], memory_map=memory_map)
    if data is not None:
        if any(config.dataset is not configs[0].dataset for config in configs):
            raise InputError("runs made together share their data; give every config the same object")
        configs = [dataclasses.replace(config, dataset=first.dataset) for config in configs]
    resolved = [resolve(config, out, data) for config, out in zip(configs, paths, strict=True)]
    runs = {out: config for (config, _), out in zip(resolved, paths, strict=True)}
    _check_together([config for config, _ in resolved], paths)
    with contextlib.ExitStack() as stack:
        for out, config in runs.items():
            stack.enter_context(locked(out))
            check_folder(out, config, resume)
        task = resolved[0][1]
        if unfinished := {out: config for out, config in runs.items() if not is_finished(out, config)}:
            data = load_data(next(iter(unfinished.values())), task, data, memory_map=memory_map, quiet=quiet)
            open_runs(configs, runs, task, data, quiet=quiet)
            with suggest_resuming(*unfinished):
                digest = _make_all_dynamics(unfinished, data, quiet)
                # The name is bound anew, which frees data that nobody else holds.
                data = place_data(data, next(iter(unfinished.values())).device)
                _train_all(unfinished, task, data, digest, started, quiet)
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
                f"runs made together may differ only in seed and penalty_coef: {outs[0]} has"
                f" {difference} as {out} has"
            )
    if len({out.resolve() for out in outs}) < len(outs):
        raise InputError("every run needs a folder of its own; no seed or penalty_coef may be given twice")


def _make_all_dynamics(configs: dict[Path, RunConfig], data: Transitions, quiet: bool) -> str:
    """Make the remaining fits of the runs, and return the data's digest; `configs` are theirs by folder."""
    for out, one in configs.items():
        write_config(out, one)
    digest, config = data_sha256(data), next(iter(configs.values()))
    if config.dynamics_from is None:
        _fit_seeds(configs, data, quiet)
    for out, one in configs.items():
        make_dynamics(one, out, data, digest, quiet)
    return digest


def _train_all(
    configs: dict[Path, RunConfig], task: Task, data: Transitions, digest: str, started: float, quiet: bool
) -> None:
    """Make the remaining epochs of the runs; `configs` are theirs by folder."""
    config = next(iter(configs.values()))
    with (
        Evaluator(evaluation_workers(config)) as evaluator,
        contextlib.ExitStack() as stack,
    ):
        runs = [
            stack.enter_context(Training(one, task, out, data, digest, evaluator, started))
            for out, one in configs.items()
        ]
        for out, one in configs.items():
            lengthen(out, one)
        bar = stack.enter_context(train_bar(runs, quiet))
        population: SacPopulation | None = None
        while some := _behind([run for run in runs if run.epoch < config.epochs]):
            sacs = [run.sac for run in some]
            if population is None or population.sacs != sacs:
                population = SacPopulation(sacs)
            _run_epoch(some, population, EpochProgress(bar, runs, some))
            bar.update(note=progress_note(runs))
            bar.report()
        for run in runs:
            run.finish(together=len(runs))


def _fit_seeds(configs: dict[Path, RunConfig], data: Transitions, quiet: bool) -> None:
    """Fit once for each seed, in the first folder or where its fit already is; copy it to the others."""
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


def _run_epoch(runs: Sequence[Training], population: SacPopulation, progress: EpochProgress) -> None:
    """Make an epoch of each run, with the updates together."""
    rows = []
    for number, run in enumerate(runs, start=1):
        rows.append(run.roll_out())
        progress("rollout", number / len(runs))
    with contextlib.ExitStack() as clocks:
        for run in runs:
            clocks.enter_context(run.clock("sac"))
        updates, seeds = zip(*(run.updates_due() for run in runs), strict=True)
        metrics = population.update_many(
            runs[0].data,
            [run.buffer for run in runs],
            updates[0],
            seeds,
            functools.partial(progress, "sac"),
        )
    for number, (run, some, values) in enumerate(zip(runs, rows, metrics, strict=True), start=1):
        run.evaluate(some, values)
        run.save()
        progress("evaluate", number / len(runs))
