"""Maximum-likelihood fit of the ensemble: bootstrap, early stop, elites.

Source: mopo/models/bnn.py of the authors' code (BNN.train, _save_best, _compile_losses).
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from mopo_fast import backends
from mopo_fast.backends import checked, cpu
from mopo_fast.backends.training import FitRun, Parameter
from mopo_fast.config import FIT_DTYPES, DynamicsConfig, check_finite, to_dict
from mopo_fast.data.transitions import Transitions
from mopo_fast.ensemble import (
    EnsembleDynamics,
    activate,
    mlp,
    mlp_bytes,
    round_factor,
    soft_clamp_logvar,
)
from mopo_fast.errors import InputError
from mopo_fast.run.folder import Count, Number, Seconds
from mopo_fast.utils.adam import Adam
from mopo_fast.utils.atomic import read_json_as, refuse_links, write_json
from mopo_fast.utils.cuda_graphs import Recorder, records
from mopo_fast.utils.interrupts import deferred
from mopo_fast.utils.lock import locked
from mopo_fast.utils.machine import check_device, check_memory, file_backed, resolve_threads
from mopo_fast.utils.progress import progress_bar
from mopo_fast.utils.seeds import FIT, derive_seed
from mopo_fast.utils.tensors import load_into, load_tensors, save_tensors, tensors_sha256

# Second element of a seed's path: which draw of the fit.
_SPLIT, _WEIGHTS, _BOOTSTRAP, _SHUFFLE = range(4)

# Steps of one call: long enough to amortise it, short enough that progress is told and interrupts are heard.
_STEPS_AT_ONCE = 64
# The columns of a checkpoint's history: fields of `FitEpoch`.
_HISTORY = ("train_loss", "holdout_mse", "improved", "seconds")


@dataclass(frozen=True)
class FitEpoch:
    """What one epoch of `fit_dynamics` did.

    Attributes:
        epoch: from 0.
        train_loss: mean over the epoch's steps of the loss, weight decay left out.
        holdout_mse: [members] mean squared error of the mean prediction, raw units, over rows and dims.
        improved: [members] True where the member's weights were kept.
        seconds: wall time, evaluation on the holdout included.
    """

    epoch: int
    train_loss: float
    holdout_mse: tuple[float, ...]
    improved: tuple[bool, ...]
    seconds: float


def split_holdout(n: int, seed: int, config: DynamicsConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers (train [n - k], holdout [k]), k = min(floor(holdout_fraction * n), holdout_max), int64.

    The same for the same (n, seed, config): a report finds the held-out rows again with it.

    Raises:
        InputError: either side would be empty.
    """
    count = count_holdout(n, config)
    order = torch.from_numpy(np.random.default_rng(derive_seed(seed, FIT, _SPLIT)).permutation(n))
    return order[count:], order[:count]


def count_holdout(n: int, config: DynamicsConfig) -> int:
    """How many of `n` transitions are held out; raise `InputError` where that is none or all of them."""
    count = min(int(n * config.holdout_fraction), config.holdout_max)
    if not 1 <= count < n:
        raise InputError(
            f"{n} transitions with holdout_fraction {config.holdout_fraction} and holdout_max"
            f" {config.holdout_max} leave {count} to hold out; both sides need at least one transition"
        )
    return count


def dynamics_inputs_targets(data: Transitions) -> tuple[torch.Tensor, torch.Tensor]:
    """(observation, action) [n, obs + act] and (delta observation, reward) [n, obs + 1], raw units."""
    inputs = torch.cat([data.observations, data.actions], dim=-1)
    delta = data.next_observations - data.observations
    return inputs, torch.cat([delta, data.rewards.unsqueeze(-1)], dim=-1)


def _block(data: Transitions) -> int:
    """Rows at a time: a few megabytes of them."""
    return max(1, 2**20 // (data.obs_dim + data.act_dim))


def _moments(data: Transitions, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the inputs over `rows`, float64; a constant's deviation is 1."""

    def mean(function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        total = torch.zeros(data.obs_dim + data.act_dim, dtype=torch.float64)
        for some in rows.split(_block(data)):
            inputs = torch.cat([data.observations[some], data.actions[some]], dim=-1)
            total += function(inputs.double()).sum(0)
        return total / len(rows)

    centre = mean(lambda inputs: inputs)
    std = mean(lambda inputs: (inputs - centre).square()).sqrt()
    std[std < 1e-12] = 1.0
    return centre, std


def data_sha256(data: Transitions) -> str:
    """Digest of the arrays that a fit sees, to recognise the same data again."""
    names = ("observations", "actions", "rewards", "next_observations")
    return tensors_sha256({name: getattr(data, name) for name in names})


def negative_log_likelihood(
    parameters: Sequence[torch.Tensor], inputs: torch.Tensor, targets: torch.Tensor, config: DynamicsConfig
) -> torch.Tensor:
    """Compute the loss of an ensemble on one batch: the oracle of the kernels that fit.

    The sum over members of [mean over batch and dims of (mu - y)^2 exp(-lv) + lv]
    + logvar_bound_weight * (sum(max) - sum(min)), a scalar. Weight decay is the optimiser's.

    For several ensembles at once every tensor has one dimension more, the first, and so has the loss.

    Args:
        parameters: weights [members, in, out] and biases [members, out] of all layers; max_logvar and
            min_logvar [obs + 1].
        inputs: [members, batch, obs + act], standardised.
        targets: [members, batch, obs + 1], raw units.
    """
    *layers, max_logvar, min_logvar = parameters
    weights, biases = layers[: len(layers) // 2], layers[len(layers) // 2 :]
    network = mlp if config.dtype == "float32" else _rounded_mlp
    mean, raw_logvar = network(inputs, weights, biases, config.activation).chunk(2, dim=-1)
    logvar = soft_clamp_logvar(raw_logvar, max_logvar[..., None, None, :], min_logvar[..., None, None, :])
    likelihood = ((mean - targets).square() * torch.exp(-logvar) + logvar).mean((-2, -1)).sum(-1)
    return likelihood + config.logvar_bound_weight * (max_logvar - min_logvar).sum(-1)


def _rounded_mlp(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor], activation: str
) -> torch.Tensor:
    """Compute `mlp` with all factors of products in bfloat16, also in the backward pass, as the kernels do."""
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = _round(activate(x, activation) if layer else x) @ _round(weight) + bias.unsqueeze(-2)
        x.register_hook(_to_bfloat16)
    return x


def _round(x: torch.Tensor) -> torch.Tensor:
    """Round to bfloat16, and pass the gradient on as it is."""
    return x + (_to_bfloat16(x) - x).detach()


def _to_bfloat16(x: torch.Tensor) -> torch.Tensor:
    return round_factor(x, "bfloat16")


@dataclass(frozen=True, eq=False)
class ReferenceSteps:
    """Steps of the fit in plain PyTorch, of one ensemble or of several.

    Attributes:
        parameters: as `negative_log_likelihood` takes them, changed in place.
        optimizer: theirs.
    """

    parameters: Sequence[torch.Tensor]
    optimizer: Adam
    config: DynamicsConfig
    _recorder: Recorder = field(default_factory=Recorder)

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Make a step on each batch of [members, count, ...]: the sum of the losses, float64."""
        if not records(inputs.device):
            return self._steps(inputs, targets)
        adam = self.optimizer
        state = [*self.parameters, *adam.exp_avgs, *adam.exp_avg_sqs, *adam.steps]
        with deferred():
            return self._recorder.play(self._steps, (inputs, targets), state)

    def _steps(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = self.parameters[-1].new_zeros(self.parameters[-1].shape[:-1], dtype=torch.float64)
        size = self.config.batch_size
        for x, y in zip(inputs.split(size, -2), targets.split(size, -2), strict=True):
            with deferred():
                loss = negative_log_likelihood(self.parameters, x, y, self.config)
                self.optimizer.step(torch.autograd.grad(loss.sum(), self.parameters))
                total += loss.detach()
        return total


class Fit:
    """The state of a fit between two epochs: what a checkpoint holds, and the epoch itself."""

    def __init__(
        self,
        data: Transitions,
        seed: int,
        config: DynamicsConfig,
        device: torch.device | str = "cpu",
        backend: str = "auto",
        threads: int | None = None,
        initial: EnsembleDynamics | None = None,
    ) -> None:
        check_device(device)
        check_config(config, device)
        if seed < 0:
            raise InputError(f"seed must not be negative, got {seed}")
        self.seed, self.config = seed, config
        widest = max(data.obs_dim + data.act_dim, 2 * (data.obs_dim + 1), *config.hidden)
        self.backend = backends.choose(backend, config.dtype, torch.device(device), training=widest)
        self.threads = resolve_threads(threads)
        train, holdout = split_holdout(len(data), seed, config)
        data = data.to("cpu")
        mean, std = _moments(data, train)

        generator = torch.Generator().manual_seed(derive_seed(seed, FIT, _WEIGHTS))
        model = EnsembleDynamics(
            data.obs_dim,
            data.act_dim,
            members=config.members,
            elites=config.elites,
            hidden=config.hidden,
            activation=config.activation,
            max_logvar=config.max_logvar,
            min_logvar=config.min_logvar,
            generator=generator,
        )
        if initial is not None:
            _copy_parameters(initial, model)
        model.input_mean.copy_(mean)
        model.input_std.copy_(std)
        self.model = model.to(device)

        inputs, targets = dynamics_inputs_targets(data[holdout])
        self.holdout_inputs, self.holdout_targets = inputs.float().to(device), targets.float().to(device)
        # Side by side: rows are drawn at random, and each lies in one page and as few cache lines as it can.
        split, width = inputs.shape[1], inputs.shape[1] + targets.shape[1]
        # What grows with the data is in files where the data are.
        self.mapped = bool(data.info.get("memory_mapped")) and torch.device(device).type == "cpu"
        shape = len(train), width + -width % 16
        if self.mapped:
            self.table = torch.from_numpy(file_backed(shape, np.float32))
        else:
            self.table = torch.zeros(shape, dtype=torch.float32, device=device)
            if self.table.device.type == "cpu":
                cpu.use_large_pages(self.table)
        self.inputs, self.targets = self.table[:, :split], self.table[:, split:width]
        for rows, some in zip(self.table.split(_block(data)), train.split(_block(data)), strict=True):
            inputs, targets = dynamics_inputs_targets(data[some])
            rows[:, :split] = (inputs.float().to(device) - model.input_mean) / model.input_std
            rows[:, split:width] = targets.to(device)
        bootstrap = np.random.default_rng(derive_seed(seed, FIT, _BOOTSTRAP))
        self.rows = self._indices()
        for member in self.rows:
            member[:] = bootstrap.integers(len(train), size=len(train))

        # The bounds of the log-variance are shared by all members and not part of a snapshot (authors too).
        self.layers = [*model.weights, *model.biases]
        self.best = [layer.detach().clone() for layer in self.layers]
        self.parameters = [*self.layers, model.max_logvar, model.min_logvar]
        self.optimizer = _adam(self.parameters, config)
        self.reference = ReferenceSteps(self.parameters, self.optimizer, config)
        self.history: list[FitEpoch] = []

    def _indices(self) -> np.ndarray:
        """Room for a row number for each member and training row."""
        shape = self.config.members, len(self.table)
        return file_backed(shape, np.int64) if self.mapped else np.empty(shape, np.int64)

    def _live_state(self) -> dict[str, torch.Tensor]:
        """Every tensor that the next epoch depends on, itself and not a copy."""
        adam, places = self.optimizer, {id(parameter): i for i, parameter in enumerate(self.parameters)}
        state = {**self.model.state_dict(), **{f"best_{i}": best for i, best in enumerate(self.best)}}
        for name, parameter in self.model.named_parameters():
            i = places[id(parameter)]
            state |= {
                f"{name}.step": adam.steps[i],
                f"{name}.exp_avg": adam.exp_avgs[i],
                f"{name}.exp_avg_sq": adam.exp_avg_sqs[i],
            }
        return state

    @property
    def steps_made(self) -> int:
        """Of Adam, so far."""
        return int(self.optimizer.steps[0])

    @property
    def best_mse(self) -> list[float]:
        """[members] holdout MSE of the kept weights. Any first epoch improves (authors start from 1e10)."""
        best = [math.inf] * self.config.members
        for record in self.history:
            for member in np.flatnonzero(record.improved):
                best[member] = record.holdout_mse[member]
        return best

    @property
    def last_epoch(self) -> int:
        """How many epochs there will be if no member improves any more."""
        improved = [record.epoch + 1 for record in self.history if any(record.improved)]
        end = max(improved, default=0) + self.config.patience + 1
        return end if self.config.max_epochs is None else min(end, self.config.max_epochs)

    @functools.cached_property
    def _alone(self) -> "Population":
        return Population([self])

    def run_epoch(self, on_progress: Callable[[float], None]) -> FitEpoch:
        """One pass over every member's bootstrap rows, then the holdout.

        on_progress is told, now and then, how many epochs are done, with fractions.
        """
        return self._alone.run_epoch(lambda share: on_progress(len(self.history) + share))[0]

    def shuffled(self, epoch: int) -> torch.Tensor:
        """The rows that each member sees in `epoch`, in its order: int64 [members, n]."""
        seed, device = derive_seed(self.seed, FIT, _SHUFFLE, epoch), self.inputs.device
        if device.type == "cpu":
            out = self._indices()[:, : self.rows.shape[1]]
            return torch.from_numpy(np.random.default_rng(seed).permuted(self.rows, axis=1, out=out))
        generator = torch.Generator(device).manual_seed(seed)
        keys = torch.randint(2**62, self.rows.shape, generator=generator, device=device)
        return self._rows_on_device.gather(1, keys.argsort(dim=1, stable=True))

    @functools.cached_property
    def _rows_on_device(self) -> torch.Tensor:
        return torch.from_numpy(self.rows).to(self.inputs.device)

    def end_epoch(self, train_loss: float, started: float) -> FitEpoch:
        """Look at the holdout and keep what is better."""
        epoch, mse = len(self.history), self._holdout_mse()
        if not np.isfinite([train_loss, *mse]).all():
            raise InputError(
                f"the fit diverged in epoch {epoch}: loss {train_loss}, holdout MSE {mse};"
                " check the data's scale or lower the learning rate"
            )
        improved = self._keep_best(mse)
        record = FitEpoch(epoch, train_loss, tuple(mse), tuple(improved), time.perf_counter() - started)
        self.history.append(record)
        return record

    def batches(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of rows [members, count], int64: [members, count, ...] each."""
        flat = rows.flatten()
        inputs, targets = self.inputs.index_select(0, flat), self.targets.index_select(0, flat)
        return inputs.view(*rows.shape, -1), targets.view(*rows.shape, -1)

    def steps(self, rows: torch.Tensor) -> float:
        """A step on each batch of rows [members, count], int64: the sum of the losses."""
        return self._alone.steps([rows])[0]

    def run(self, rows: torch.Tensor) -> FitRun:
        """`steps` for a kernel."""
        adam, count = self.optimizer, len(self.layers)

        def parameter(i: int) -> Parameter:
            # Detached, it keeps the memory alive that a kernel writes to.
            return self.parameters[i].detach(), adam.exp_avgs[i], adam.exp_avg_sqs[i], None

        return FitRun(
            layers=[parameter(i) for i in range(count)],
            bounds=(parameter(count), parameter(count + 1)),
            activation=self.model.activation,
            table=self.table,
            dims=self.targets.shape[1],
            # A copy: numbers that address memory must stay what was checked.
            rows=rows.clone(),
            config=self.config,
            steps_before=self.steps_made,
            steps=adam.steps,
        )

    def count(self, steps: int) -> None:
        """Take over a number of steps that another optimiser has made of the same parameters."""
        for step in self.optimizer.steps:
            step.fill_(steps)

    @torch.no_grad()
    def _holdout_mse(self) -> list[float]:
        mean, _ = self.model.raw_heads(self.holdout_inputs)
        mse: list[float] = (mean - self.holdout_targets).square().mean((1, 2)).tolist()
        return mse

    def _improved(self, mse: list[float]) -> list[bool]:
        """[members] Whether the last epoch, of this holdout MSE, is better than those in the history."""
        return [
            current < (1.0 - self.config.improvement) * best
            for best, current in zip(self.best_mse, mse, strict=True)
        ]

    @torch.no_grad()
    def _keep_best(self, mse: list[float]) -> list[bool]:
        improved = self._improved(mse)
        for member in np.flatnonzero(improved):
            for best, layer in zip(self.best, self.layers, strict=True):
                best[member].copy_(layer[member])
        return improved

    @torch.no_grad()
    def finish(self) -> EnsembleDynamics:
        """The model with every member's best weights and the elites, best first."""
        for best, layer in zip(self.best, self.layers, strict=True):
            layer.copy_(best)
        order = np.argsort(self._holdout_mse(), kind="stable")
        self.model.elites.copy_(torch.from_numpy(order[: self.config.elites].copy()))
        return self.model

    def fingerprint(self, data_digest: str) -> torch.Tensor:
        """uint8 [32]: which data (of this `data_sha256`), seed and config a checkpoint belongs to."""
        what = json.dumps([data_digest, self.seed, to_dict(self.config)])
        return torch.tensor(list(hashlib.sha256(what.encode()).digest()), dtype=torch.uint8)

    def save(self, path: Path, fingerprint: torch.Tensor) -> None:
        """Write all that the next epoch depends on, atomically."""
        columns = {name: [getattr(record, name) for record in self.history] for name in _HISTORY}
        history = {
            f"history.{name}": torch.tensor(column, dtype=torch.float64) for name, column in columns.items()
        }
        save_tensors(path, {**self._live_state(), **history, "fingerprint": fingerprint})

    def restore(self, path: Path, fingerprint: torch.Tensor) -> None:
        """Continue from what `save` wrote.

        Raises:
            InputError: truncated, not a fit's checkpoint, or of other data, seed or config.
        """
        try:
            self._restore(path, fingerprint)
        except InputError as error:
            raise InputError(f"{error}; delete {path} to start afresh") from error

    def _restore(self, path: Path, fingerprint: torch.Tensor) -> None:
        tensors = load_tensors(path)
        theirs = torch.empty_like(fingerprint)
        load_into(path, tensors, {"fingerprint": theirs})
        if not torch.equal(theirs, fingerprint):
            raise InputError(
                f"{path} belongs to a fit of other data, another seed or another config;"
                " give what it was made with"
            )
        load_into(path, tensors, self._live_state())
        self.optimizer.check_moments(path)
        if not bool((self.model.input_std > 0).all()):
            raise InputError(f"{path}: input_std must be positive everywhere")
        # Every step is one of Adam's: how long the history must be follows.
        steps = {float(step) for step in self.optimizer.steps}
        made = steps.pop()
        epochs, left = divmod(made, math.ceil(len(self.inputs) / self.config.batch_size))
        if steps or left or not 0 <= epochs < 2**24:
            raise InputError(f"{path}: Adam's steps are not those of whole epochs")
        epochs = int(epochs)
        shapes = (epochs,), (epochs, self.config.members), (epochs, self.config.members), (epochs,)
        columns = [torch.empty(shape, dtype=torch.float64) for shape in shapes]
        names = [f"history.{name}" for name in _HISTORY]
        load_into(path, tensors, dict(zip(names, columns, strict=True)))
        for loss, mse, improved, took in zip(*(column.tolist() for column in columns), strict=True):
            if took < 0 or min(mse) < 0 or self._improved(mse) != [flag == 1.0 for flag in improved]:
                raise InputError(f"{path}: its history does not agree with itself at {len(self.history)}")
            self.history.append(
                FitEpoch(len(self.history), loss, tuple(mse), tuple(map(bool, improved)), took)
            )


class Population:
    """Fits of one config to equally much data and of equally many steps, that are stepped together.

    In PyTorch as one batch of networks, on a GPU with many steps recorded in one graph; with the CPU's kernel
    one after the other, with a GPU's side by side. Each gets what it would get alone, to rounding; with a
    kernel to the bit.
    """

    def __init__(self, fits: Sequence[Fit]) -> None:
        self.fits = list(fits)
        kinds = {(fit.config, fit.backend, fit.model.obs_dim, fit.model.act_dim) for fit in self.fits}
        if len({id(fit) for fit in self.fits}) != len(self.fits) or len(kinds) != 1:
            raise InputError("fits are stepped together where they are distinct, and of one config and size")
        self._batch: ReferenceSteps | None = None

    def run_epoch(self, on_progress: Callable[[float], None]) -> list[FitEpoch]:
        """What `Fit.run_epoch` does, for each; on_progress is told the share of it that is done."""
        started = time.perf_counter()
        rows = [fit.shuffled(len(fit.history)) for fit in self.fits]
        size, length = self.fits[0].config.batch_size, rows[0].shape[1]
        totals = [0.0] * len(self.fits)
        for first in range(0, length, size * _STEPS_AT_ONCE):
            last = min(length, first + size * _STEPS_AT_ONCE)
            losses = self.steps([each[:, first:last] for each in rows])
            totals = [total + loss for total, loss in zip(totals, losses, strict=True)]
            on_progress(last / length)
        steps = math.ceil(length / size)
        return [fit.end_epoch(total / steps, started) for fit, total in zip(self.fits, totals, strict=True)]

    def steps(self, rows: Sequence[torch.Tensor]) -> list[float]:
        """What `Fit.steps` does, for each with its own rows."""
        if kernels := backends.training_kernels(self.fits[0].backend):
            runs = [fit.run(some) for fit, some in zip(self.fits, rows, strict=True)]
            return checked.fit_steps(kernels, runs, self.fits[0].threads)
        each = [fit.batches(some) for fit, some in zip(self.fits, rows, strict=True)]
        if len(each) == 1:
            return [float(self.fits[0].reference(*each[0]))]
        batch = self._side_by_side()
        inputs, targets = map(torch.stack, zip(*each, strict=True))
        try:
            losses: list[float] = batch(inputs, targets).tolist()
        finally:
            # After an interruption too: their parameters are views of the batch's.
            for fit in self.fits:
                fit.count(int(batch.optimizer.steps[0]))
        return losses

    def _side_by_side(self) -> ReferenceSteps:
        """The parameters of all fits, [fits, ...] each; theirs become views of these."""
        first = self.fits[0]
        # Another population may have taken them since.
        if self._batch is None or any(
            fit.parameters[-1].data_ptr() != bound.data_ptr()
            for fit, bound in zip(self.fits, self._batch.parameters[-1], strict=True)
        ):
            parameters = [
                _lay_together(each).requires_grad_()
                for each in zip(*(fit.parameters for fit in self.fits), strict=True)
            ]
            optimizer = _adam(parameters, first.config)
            for name in ("exp_avgs", "exp_avg_sqs"):
                moments = zip(*(getattr(fit.optimizer, name) for fit in self.fits), strict=True)
                setattr(optimizer, name, [_lay_together(each) for each in moments])
            self._batch = ReferenceSteps(parameters, optimizer, first.config)
        for step in self._batch.optimizer.steps:
            step.copy_(first.optimizer.steps[0])
        return self._batch


def _lay_together(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack several fits' tensors in one, of which they become views."""
    whole = torch.stack([tensor.data for tensor in tensors])
    for tensor, view in zip(tensors, whole, strict=True):
        tensor.data = view
    return whole


def _adam(parameters: Sequence[torch.Tensor], config: DynamicsConfig) -> Adam:
    # Adam's weight_decay adds coef * W to the gradient: that of coef * 0.5 ||W||^2 in the loss.
    others = [0.0] * (len(parameters) - len(config.weight_decay))
    return Adam(parameters, config.learning_rate, [*config.weight_decay, *others])


def check_config(config: DynamicsConfig, device: torch.device | str = "cpu") -> None:
    """Raise `InputError` where a hyperparameter of the fit is out of range, or `device` too small for it."""
    if len(config.weight_decay) != len(config.hidden) + 1:
        raise InputError(
            f"weight_decay needs one value per layer, {len(config.hidden) + 1}, got {config.weight_decay}"
        )
    if config.dtype not in FIT_DTYPES:
        raise InputError(f"unknown dtype {config.dtype!r} of the fit; there are: {', '.join(FIT_DTYPES)}")
    for name in ("batch_size", "members"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.patience < 0 or (config.max_epochs is not None and config.max_epochs < 1):
        raise InputError(
            f"patience must be at least 0 and max_epochs at least 1,"
            f" got {config.patience} and {config.max_epochs}"
        )
    if not (config.learning_rate > 0 and min(config.weight_decay) >= 0 and 0 <= config.improvement < 1):
        raise InputError(
            f"learning_rate must be positive, weight_decay not negative and improvement in [0, 1),"
            f" got {config.learning_rate}, {config.weight_decay}, {config.improvement}"
        )
    if not (0 < config.holdout_fraction < 1 and config.holdout_max >= 1):
        raise InputError(
            f"holdout_fraction must be in (0, 1) and holdout_max at least 1,"
            f" got {config.holdout_fraction} and {config.holdout_max}"
        )
    check_finite(config)
    if not config.min_logvar < config.max_logvar:
        raise InputError(
            f"min_logvar must be less than max_logvar, got {config.min_logvar} and {config.max_logvar}"
        )
    # Inputs and outputs are one wide at least; everything has a gradient and one or two arrays more.
    size = 3 * mlp_bytes(config.members, (1, *config.hidden, 1), config.batch_size)
    check_memory("the ensemble's fit", size, device, "batch_size, members or hidden")


def _copy_parameters(source: EnsembleDynamics, target: EnsembleDynamics) -> None:
    theirs, ours = dict(source.named_parameters()), dict(target.named_parameters())
    shapes = [{name: tuple(value.shape) for name, value in some.items()} for some in (theirs, ours)]
    if shapes[0] != shapes[1] or (source.log_scale, source.activation) != ("variance", target.activation):
        raise InputError(f"a fit of {shapes[1]} cannot begin with an ensemble of {shapes[0]}")
    if bool(source.absolute.any()):
        raise InputError("a fit of changes of the observation cannot begin with an ensemble that predicts it")
    with torch.no_grad():
        for name, value in ours.items():
            value.copy_(theirs[name])


def fit_dynamics(
    data: Transitions,
    *,
    seed: int = 0,
    config: DynamicsConfig | None = None,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    threads: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    initial: EnsembleDynamics | None = None,
    quiet: bool = True,
    on_epoch: Callable[[FitEpoch], None] | None = None,
) -> EnsembleDynamics:
    """Fit the ensemble to `data` by maximum likelihood with early stopping (authors: BNN.train).

    Every member sees its own bootstrap of the training rows, reshuffled each epoch. A member's weights
    are kept when its holdout MSE falls by more than `config.improvement`; training stops when more than
    `config.patience` epochs have passed since any member improved, and the kept weights are restored.

    Args:
        data: n transitions, 5 or more with the default holdout; rewards and observations in raw units.
        seed: the whole result is a function of (data, seed, config) on one machine and backend.
        config: `DynamicsConfig()` if None.
        backend: "cpu" or "cuda", the fused kernels; "reference", PyTorch on any device; or "auto".
        threads: of the CPU kernel; None: all cores that this process may use. The result is the same for any.
        checkpoint: a file that is written after every epoch and continued from where it exists, with the
            same final bits as a fit that was never stopped. It is left there at the end.
        initial: an ensemble whose weights and bounds the fit begins with; None: fresh ones.
        quiet: no progress bar.
        on_epoch: called after every epoch, and first of all with the epochs that a checkpoint holds.

    Returns:
        The ensemble on `device`, elites best first.

    Raises:
        InputError: unusable data, config, device or checkpoint; or the loss became not finite.
    """
    fit = Fit(data.validate(), seed, config or DynamicsConfig(), device, backend, threads, initial)
    _run([fit], data_sha256(data), [None if checkpoint is None else Path(checkpoint)], quiet, on_epoch)
    return fit.finish()


def _run(
    fits: Sequence[Fit],
    data_digest: str,
    checkpoints: Sequence[Path | None],
    quiet: bool,
    on_epoch: Callable[[FitEpoch], None] | None = None,
) -> None:
    """What is left to do of the fits, together; on_epoch hears of each."""
    fingerprints = [fit.fingerprint(data_digest) for fit in fits]
    for fit, checkpoint, fingerprint in zip(fits, checkpoints, fingerprints, strict=True):
        if checkpoint is not None and checkpoint.exists():
            fit.restore(checkpoint, fingerprint)
    report = on_epoch or (lambda record: None)
    for fit in fits:
        for record in fit.history:
            report(record)
    population: Population | None = None

    def ends() -> int:
        return sum(fit.last_epoch for fit in fits)

    # The bar's end is where the fits stop if nothing improves any more: it moves while they get better.
    with progress_bar("fit: epochs", ends(), quiet=quiet) as bar:
        while unfinished := [fit for fit in fits if len(fit.history) < fit.last_epoch]:
            # Those that are behind the others, when they are taken up again, catch up first.
            least = min(len(fit.history) for fit in unfinished)
            some = [fit for fit in unfinished if len(fit.history) == least]
            if population is None or population.fits != some:
                population = Population(some)
            done, count = sum(len(fit.history) for fit in fits), len(some)

            def on_progress(share: float, done: int = done, count: int = count) -> None:
                bar.update(completed=done + share * count)

            records = population.run_epoch(on_progress)
            for fit, record in zip(some, records, strict=True):
                place = fits.index(fit)
                checkpoint = checkpoints[place]
                if checkpoint is not None:
                    fit.save(checkpoint, fingerprints[place])
                report(record)
            elites = [sorted(record.holdout_mse)[: some[0].config.elites] for record in records]
            bar.update(total=ends(), note=f"holdout MSE {np.mean(elites):.4g}")


def fit_and_save(
    data: Transitions,
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    config: DynamicsConfig | None = None,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    threads: int | None = None,
    quiet: bool = True,
    on_epoch: Callable[[FitEpoch], None] | None = None,
) -> tuple[EnsembleDynamics, dict[str, Any]]:
    """`fit_dynamics`, then dynamics.safetensors, dynamics.json and fit.json in `folder`: what a run does.

    Killed at any point and called again, it continues from `folder`/checkpoint/fit.safetensors, which is
    removed once fit.json, the last file, is written: a folder with fit.json is a finished fit.

    Returns:
        The ensemble and what fit.json holds: dataset, data_sha256, transitions, holdout (rows), seed,
        config, device, backend, threads, epochs, seconds, elites, best_mse [member], of the kept weights,
        train_loss [epoch], holdout_mse and improved [epoch][member].

    Raises:
        InputError: as `fit_dynamics`, or the folder cannot be written, or another process is at work in it.
    """
    return fit_and_save_many(
        data,
        [folder],
        seeds=[seed],
        config=config,
        device=device,
        backend=backend,
        threads=threads,
        quiet=quiet,
        on_epoch=on_epoch,
    )[0]


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
    on_epoch: Callable[[FitEpoch], None] | None = None,
) -> list[tuple[EnsembleDynamics, dict[str, Any]]]:
    """`fit_and_save` for each of `seeds` into its own of `folders`, all at once: see `Population`."""
    config, paths = config or DynamicsConfig(), [Path(folder) for folder in folders]
    checkpoints = [folder / "checkpoint" / "fit.safetensors" for folder in paths]
    with contextlib.ExitStack() as stack:
        for folder in paths:
            stack.enter_context(locked(folder))
            refuse_links(folder / "checkpoint")
        data.validate()
        fits = [Fit(data, seed, config, device, backend, threads) for seed in seeds]
        digest = data_sha256(data)
        _run(fits, digest, checkpoints, quiet, on_epoch)
        return [
            (fit.finish(), _save(fit, data, digest, folder)) for fit, folder in zip(fits, paths, strict=True)
        ]


@with_config(ConfigDict(extra="allow"))
class _RecordedConfig(TypedDict):
    holdout_fraction: Annotated[float, Field(gt=0, lt=1)]
    holdout_max: Annotated[int, Field(ge=1)]


class FitRecord(TypedDict):
    """The part of fit.json that is read; see `fit_and_save`."""

    dataset: str
    data_sha256: str
    transitions: Count
    holdout: Count
    seed: Annotated[int, Field(ge=0)]
    config: _RecordedConfig
    device: str
    epochs: Count
    seconds: Seconds
    elites: Annotated[list[Count], Field(min_length=1)]
    best_mse: list[Seconds]
    train_loss: list[Number]
    holdout_mse: Annotated[list[list[Seconds]], Field(min_length=1)]


def read_fit(folder: Path) -> FitRecord:
    """A finished fit's fit.json.

    Raises:
        InputError: it is missing, or is not a fit's.
    """
    path = folder / "fit.json"
    fit = read_json_as(path, FitRecord)
    members, lengths = len(fit["best_mse"]), {len(errors) for errors in fit["holdout_mse"]}
    if lengths != {members} or max(fit["elites"]) >= members:
        raise InputError(f"{path}: holdout_mse, best_mse and elites are not of the same members")
    if not len(fit["holdout_mse"]) == len(fit["train_loss"]) == fit["epochs"]:
        raise InputError(f"{path}: holdout_mse and train_loss are not of {fit['epochs']} epochs")
    return fit


def _save(fit: Fit, data: Transitions, data_digest: str, folder: Path) -> dict[str, Any]:
    """Write a finished fit; what fit.json holds."""
    config, history = fit.config, fit.history
    record = {
        "dataset": data.name,
        "data_sha256": data_digest,
        "transitions": len(data),
        "holdout": count_holdout(len(data), config),
        "seed": fit.seed,
        "config": to_dict(config),
        "device": str(fit.inputs.device),
        "backend": fit.backend,
        "threads": fit.threads,
        "epochs": len(history),
        "seconds": sum(epoch.seconds for epoch in history),
        "elites": fit.model.elites.tolist(),
        "best_mse": fit.best_mse,
        "train_loss": [epoch.train_loss for epoch in history],
        "holdout_mse": [list(epoch.holdout_mse) for epoch in history],
        "improved": [list(epoch.improved) for epoch in history],
    }
    fit.model.save(folder)
    write_json(folder / "fit.json", record)
    (folder / "checkpoint" / "fit.safetensors").unlink(missing_ok=True)
    return record
