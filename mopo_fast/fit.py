"""Maximum-likelihood fit of the ensemble: bootstrap, early stop, elites.

Source: mopo/models/bnn.py of the authors' code (BNN.train, _save_best, _compile_losses).
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from mopo_fast import backends
from mopo_fast.backends import checked
from mopo_fast.backends.interface import FitSteps, Need, Parameter
from mopo_fast.config import DynamicsConfig, to_dict
from mopo_fast.data.transitions import Transitions
from mopo_fast.ensemble import (
    EnsembleDynamics,
    mlp_bytes,
    soft_clamp_logvar,
    trained_mlp,
)
from mopo_fast.errors import InputError
from mopo_fast.run.fit_log import FitLog, open_fit_log
from mopo_fast.utils.adam import Adam
from mopo_fast.utils.atomic import read_json_as, refuse_links, write_json
from mopo_fast.utils.cuda_graphs import Recorder, records
from mopo_fast.utils.interrupts import deferred
from mopo_fast.utils.kinds import Count, Number, Seconds
from mopo_fast.utils.lock import locked
from mopo_fast.utils.machine import (
    check_device,
    check_memory,
    file_backed,
    large_zeros,
    resolve_threads,
)
from mopo_fast.utils.progress import progress_bar
from mopo_fast.utils.seeds import FIT, derive_seed
from mopo_fast.utils.tensors import load_into, load_tensors, save_tensors, tensors_sha256

# Last element of the path that `derive_seed` takes: the purpose of the draw.
_SPLIT, _WEIGHTS, _BOOTSTRAP, _SHUFFLE = range(4)

# Steps of one kernel call: enough to amortise it, few enough for the progress bar and for Ctrl-C.
_STEPS_AT_ONCE = 64
# The fields of `FitEpoch` that a checkpoint's history holds.
_HISTORY = ("train_loss", "holdout_mse", "improved", "seconds")


@dataclass(frozen=True)
class FitEpoch:
    """The results of one epoch of a fit.

    Attributes:
        epoch: number of the epoch, from 0.
        train_loss: mean loss of the epoch's steps, weight decay left out.
        holdout_mse: [members], mean squared error of the predicted means over rows and dimensions, raw units.
        improved: [members], True where the member's weights were kept.
        seconds: wall time of the epoch, the evaluation on the holdout included.
    """

    epoch: int
    train_loss: float
    holdout_mse: tuple[float, ...]
    improved: tuple[bool, ...]
    seconds: float


def split_holdout(n: int, seed: int, config: DynamicsConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the rows to hold out, k = min(floor(holdout_fraction * n), holdout_max) of n.

    The result is a function of (n, seed, config), so a report finds the held-out rows again.

    Returns:
        The row numbers of training [n - k] and holdout [k], int64.

    Raises:
        InputError: either side would be empty.
    """
    count = count_holdout(n, config)
    order = torch.from_numpy(np.random.default_rng(derive_seed(seed, FIT, _SPLIT)).permutation(n))
    return order[count:], order[:count]


def count_holdout(n: int, config: DynamicsConfig) -> int:
    """Return how many of `n` transitions are held out; raise `InputError` if it is none or all of them."""
    count = min(int(n * config.holdout_fraction), config.holdout_max)
    if not 1 <= count < n:
        raise InputError(
            f"{n} transitions with holdout_fraction {config.holdout_fraction} and holdout_max"
            f" {config.holdout_max} leave {count} to hold out; both sides need at least one transition"
        )
    return count


def dynamics_inputs_targets(data: Transitions) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (observation, action) [n, obs + act] and (delta observation, reward) [n, obs + 1], raw units."""
    inputs = torch.cat([data.observations, data.actions], dim=-1)
    delta = data.next_observations - data.observations
    return inputs, torch.cat([delta, data.rewards.unsqueeze(-1)], dim=-1)


def _block(data: Transitions) -> int:
    """Return how many rows to work on at a time: a few megabytes of them."""
    return max(1, 2**20 // (data.obs_dim + data.act_dim))


def _moments(data: Transitions, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each input's mean and standard deviation over `rows`, float64, with 1 for a deviation of 0."""

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
    """Return a digest of the arrays that a fit depends on."""
    names = ("observations", "actions", "rewards", "next_observations")
    return tensors_sha256({name: getattr(data, name) for name in names})


def negative_log_likelihood(
    parameters: Sequence[torch.Tensor], inputs: torch.Tensor, targets: torch.Tensor, config: DynamicsConfig
) -> torch.Tensor:
    """Compute the loss of an ensemble on one batch: the oracle of the kernels that fit.

    It is the sum over members of the mean over batch and dimensions of (mu - y)^2 exp(-lv) + lv, plus
    logvar_bound_weight * (sum(max) - sum(min)). The optimizer adds the weight decay.

    For several ensembles at once every tensor has one more dimension, the first, and so has the loss.

    Args:
        parameters: all layers' weights [members, in, out], then all biases [members, out]; with
            `config.layer_norm` all scales [members, out] of the hidden layers' norms, then all shifts; then
            max_logvar and min_logvar [obs + 1].
        inputs: [members, batch, obs + act], standardised.
        targets: [members, batch, obs + 1], raw units.
        config: hyperparameters.

    Returns:
        The loss, a scalar.
    """
    *layers, max_logvar, min_logvar = parameters
    hidden = len(config.hidden)
    kinds = [hidden + 1, hidden + 1, *([hidden, hidden] if config.layer_norm else [])]
    ends = list(itertools.accumulate(kinds))
    weights, biases, *norms = (layers[end - kind : end] for kind, end in zip(kinds, ends, strict=True))
    network = trained_mlp(config.dtype)
    heads = network(inputs, weights, biases, config.activation, norms=tuple(norms) or None)
    mean, raw_logvar = heads.chunk(2, dim=-1)
    logvar = soft_clamp_logvar(raw_logvar, max_logvar[..., None, None, :], min_logvar[..., None, None, :])
    likelihood = ((mean - targets).square() * torch.exp(-logvar) + logvar).mean((-2, -1)).sum(-1)
    return likelihood + config.logvar_bound_weight * (max_logvar - min_logvar).sum(-1)


class PyTorchSteps:
    """Makes steps of the fit in plain PyTorch, for one ensemble or for several.

    Args:
        parameters: as `negative_log_likelihood` takes them; they are changed in place.
        config: hyperparameters.

    Attributes:
        optimizer: the parameters' Adam.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], config: DynamicsConfig) -> None:
        self.parameters, self.config = parameters, config
        # Adam's weight_decay adds coef * W to the gradient, the gradient of coef * 0.5 ||W||^2.
        others = [0.0] * (len(parameters) - len(config.weight_decay))
        self.optimizer = Adam(parameters, config.learning_rate, [*config.weight_decay, *others])
        self._recorder = Recorder()

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Make a step on each batch of [members, count, ...]; return the sum of the losses, float64."""
        if not records(inputs.device):
            return self._steps(inputs, targets)
        adam = self.optimizer
        state = [*self.parameters, *adam.exp_avgs, *adam.exp_avg_sqs, *adam.steps]
        with deferred():
            return self._recorder.play(self._steps, (inputs, targets), state)

    def _steps(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = self.parameters[-1].new_zeros(self.parameters[-1].shape[:-1], dtype=torch.float64)
        size = self.config.batch_size
        with deferred() as interrupts:
            for x, y in zip(inputs.split(size, -2), targets.split(size, -2), strict=True):
                loss = negative_log_likelihood(self.parameters, x, y, self.config)
                self.optimizer.step(torch.autograd.grad(loss.sum(), self.parameters))
                total += loss.detach()
                interrupts.look()
        return total


def make_ensemble(
    obs_dim: int, act_dim: int, config: DynamicsConfig, generator: torch.Generator | None = None
) -> EnsembleDynamics:
    """Make the ensemble that a fit begins with."""
    names = ("members", "elites", "hidden", "activation", "layer_norm", "max_logvar", "min_logvar")
    settings = {name: getattr(config, name) for name in names}
    return EnsembleDynamics(obs_dim, act_dim, generator=generator, **settings)


class Fit:
    """A fit of an ensemble, made epoch by epoch.

    Args:
        data: n transitions, validated.
        seed: seed of all random numbers.
        config: hyperparameters; None takes `DynamicsConfig()`.
        device: device of the fit.
        backend: as in `fit_dynamics`.
        threads: as in `fit_dynamics`.
        initial: as in `fit_dynamics`.

    Attributes:
        model: the ensemble; its weights are those of the last step until `finish`.
        history: the epochs made.
        parameters: the weights, the biases, the layer norms' scales and shifts, and the two bounds of the
            log-variance.
        optimizer: the parameters' Adam.
        table: [rows, obs + act + obs + 1 or more], the standardised inputs and the targets of training.

    Raises:
        InputError: unusable config, seed or device, too little data or memory, or `initial` is an ensemble
            of another kind.
    """

    def __init__(
        self,
        data: Transitions,
        seed: int,
        config: DynamicsConfig | None = None,
        device: torch.device | str = "cpu",
        backend: str = "auto",
        threads: int | None = None,
        initial: EnsembleDynamics | None = None,
    ) -> None:
        config = config or DynamicsConfig()
        check_device(device)
        config.validate()
        check_fit_memory(config, device)
        if seed < 0:
            raise InputError(f"seed must not be negative, got {seed}")
        config = dataclasses.replace(config, dtype=config.dtype or "float32")
        self.seed, self.config = seed, config
        self.backend = choose_backend(backend, data.obs_dim, data.act_dim, config, device)
        self.threads = resolve_threads(threads)
        train, holdout = split_holdout(len(data), seed, config)
        data = data.to("cpu")
        mean, std = _moments(data, train)

        generator = torch.Generator().manual_seed(derive_seed(seed, FIT, _WEIGHTS))
        model = make_ensemble(data.obs_dim, data.act_dim, config, generator)
        if initial is not None:
            _copy_parameters(initial, model)
        model.input_mean.copy_(mean)
        model.input_std.copy_(std)
        self.model = model.to(device)

        inputs, targets = dynamics_inputs_targets(data[holdout])
        self.holdout_inputs, self.holdout_targets = inputs.float().to(device), targets.float().to(device)
        # Rows are drawn at random: a row whose numbers lie together touches the fewest pages and cache lines.
        split, width = inputs.shape[1], inputs.shape[1] + targets.shape[1]
        # Tables grow with the data, so they lie in files where the data do.
        self.mapped = bool(data.info.get("memory_mapped")) and torch.device(device).type == "cpu"
        shape = len(train), width + -width % 16
        if self.mapped:
            self.table = torch.from_numpy(file_backed(shape, np.float32))
        else:
            self.table = large_zeros(shape, device=device)
        self.inputs, self.targets = self.table[:, :split], self.table[:, split:width]
        for rows, some in zip(self.table.split(_block(data)), train.split(_block(data)), strict=True):
            inputs, targets = dynamics_inputs_targets(data[some])
            rows[:, :split] = (inputs.float().to(device) - model.input_mean) / model.input_std
            rows[:, split:width] = targets.to(device)

        # All members share the bounds of the log-variance, so a member's best weights do not include them.
        self.layers = [*model.weights, *model.biases, *model.norm_scales, *model.norm_shifts]
        self.best = [layer.detach().clone() for layer in self.layers]
        self.parameters = [*self.layers, model.max_logvar, model.min_logvar]
        self.pytorch_steps = PyTorchSteps(self.parameters, config)
        self.optimizer = self.pytorch_steps.optimizer
        self.history: list[FitEpoch] = []
        self._checkpoint: tuple[Path, torch.Tensor] | None = None

    def bootstrap(self) -> np.ndarray:
        """Draw each member's training rows with replacement, the same ones at each call.

        They are not kept: of many members they take more memory than the data.

        Returns:
            Row numbers, int32 [members, rows].
        """
        shape = self.config.members, len(self.table)
        rows = file_backed(shape, np.int32) if self.mapped else np.empty(shape, np.int32)
        generator = np.random.default_rng(derive_seed(self.seed, FIT, _BOOTSTRAP))
        for member in rows:
            member[:] = generator.integers(len(member), size=len(member))
        return rows

    def live_state(self) -> dict[str, torch.Tensor]:
        """Return every tensor that the next epoch depends on, by name; they are not copies."""
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
        """Number of steps made. Setting it sets Adam's step counts."""
        return int(self.optimizer.steps[0])

    @steps_made.setter
    def steps_made(self, value: int) -> None:
        for step in self.optimizer.steps:
            step.fill_(value)

    @property
    def best_mse(self) -> list[float]:
        """Holdout MSE of the kept weights, [members]; infinite before the first epoch (authors: 1e10)."""
        best = [math.inf] * self.config.members
        for record in self.history:
            for member in np.flatnonzero(record.improved):
                best[member] = record.holdout_mse[member]
        return best

    @property
    def expected_epochs(self) -> int:
        """Number of epochs after which the fit ends if no member improves any more."""
        improved = [record.epoch + 1 for record in self.history if any(record.improved)]
        end = max(improved, default=0) + self.config.patience + 1
        return end if self.config.max_epochs is None else min(end, self.config.max_epochs)

    def run_epoch(self, on_progress: Callable[[float], None] = lambda _: None) -> FitEpoch:
        """Pass once over every member's bootstrap rows, then evaluate on the holdout.

        Args:
            on_progress: called now and then with the share of the epoch that is done.
        """
        started, total, pieces = time.perf_counter(), 0.0, self.epoch_rows()
        for number, rows in enumerate(pieces, start=1):
            total += self.steps(rows)
            on_progress(number / len(pieces))
        return self.end_epoch(total, started)

    def epoch_rows(self) -> tuple[torch.Tensor, ...]:
        """Return the rows of the next epoch for each member in its order, in pieces for `steps`.

        A piece is int32 [members, rows of up to 64 batches].
        """
        return torch.split(self._shuffled(len(self.history)), self.config.batch_size * _STEPS_AT_ONCE, dim=1)

    def _shuffled(self, epoch: int) -> torch.Tensor:
        seed, device = derive_seed(self.seed, FIT, _SHUFFLE, epoch), self.inputs.device
        if device.type == "cpu":
            rows = self.bootstrap()
            return torch.from_numpy(np.random.default_rng(seed).permuted(rows, axis=1, out=rows))
        generator = torch.Generator(device).manual_seed(seed)
        keys = torch.randint(2**62, self._rows_on_device.shape, generator=generator, device=device)
        return self._rows_on_device.gather(1, keys.argsort(dim=1, stable=True))

    @functools.cached_property
    def _rows_on_device(self) -> torch.Tensor:
        return torch.from_numpy(self.bootstrap()).to(self.inputs.device)

    def end_epoch(self, total_loss: float, started: float) -> FitEpoch:
        """Evaluate on the holdout and keep the weights of members that improved.

        Args:
            total_loss: sum of the epoch's losses.
            started: time when the epoch began, by `time.perf_counter`.

        Raises:
            InputError: the loss or a member's error is not finite.
        """
        epoch, mse = len(self.history), self._holdout_mse()
        train_loss = total_loss / math.ceil(len(self.table) / self.config.batch_size)
        if not np.isfinite([train_loss, *mse]).all():
            raise InputError(
                f"the fit diverged in epoch {epoch}: loss {train_loss}, holdout MSE {mse};"
                " check the data's scale or lower the learning rate"
            )
        improved = self._keep_best(mse)
        record = FitEpoch(epoch, train_loss, tuple(mse), tuple(improved), time.perf_counter() - started)
        self.history.append(record)
        if self._checkpoint is not None:
            self.save(*self._checkpoint)
        return record

    def batches(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather the inputs and targets [members, count, ...] of rows [members, count], int32."""
        flat = rows.flatten()
        inputs, targets = self.inputs.index_select(0, flat), self.targets.index_select(0, flat)
        return inputs.view(*rows.shape, -1), targets.view(*rows.shape, -1)

    def steps(self, rows: torch.Tensor) -> float:
        """Make a step on each batch of rows [members, count], int32; return the sum of the losses."""
        if kernels := backends.training_kernels(self.backend):
            return checked.fit_steps(kernels, [self.kernel_call(rows)], self.threads)[0]
        return float(self.pytorch_steps(*self.batches(rows)))

    def kernel_call(self, rows: torch.Tensor) -> FitSteps:
        """Return the kernel call that makes `steps`."""
        adam, count, plain = self.optimizer, len(self.layers), 2 * len(self.model.weights)

        def parameter(i: int) -> Parameter:
            # A detached tensor keeps the memory that a kernel writes to.
            return self.parameters[i].detach(), adam.exp_avgs[i], adam.exp_avg_sqs[i], None

        return FitSteps(
            layers=[parameter(i) for i in range(plain)],
            norms=[parameter(i) for i in range(plain, count)],
            bounds=(parameter(count), parameter(count + 1)),
            activation=self.model.activation,
            table=self.table,
            dims=self.targets.shape[1],
            # A copy, since row numbers that were checked must not change before the kernel reads them.
            rows=rows.clone(),
            config=self.config,
            steps_before=self.steps_made,
            steps=adam.steps,
        )

    @torch.no_grad()
    def _holdout_mse(self) -> list[float]:
        mean, _ = self.model.raw_heads(self.holdout_inputs)
        mse: list[float] = (mean - self.holdout_targets).square().mean((1, 2)).tolist()
        return mse

    def _improved(self, mse: list[float]) -> list[bool]:
        """Tell for each member whether `mse` is better than all in the history."""
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
        """Put every member's best weights and the elites, best first, into the model; return it."""
        for best, layer in zip(self.best, self.layers, strict=True):
            layer.copy_(best)
        order = np.argsort(self._holdout_mse(), kind="stable")
        self.model.elites.copy_(torch.from_numpy(order[: self.config.elites].copy()))
        return self.model

    def fingerprint(self, data_digest: str) -> torch.Tensor:
        """Return a digest, uint8 [32], of the data's `data_sha256`, the seed and the config."""
        settings = to_dict(self.config)
        # Fits without layer norms keep the digests of earlier versions.
        if not settings["layer_norm"]:
            del settings["layer_norm"]
        what = json.dumps([data_digest, self.seed, settings])
        return torch.tensor(list(hashlib.sha256(what.encode()).digest()), dtype=torch.uint8)

    def use_checkpoint(self, path: Path, data_digest: str) -> None:
        """Continue from the checkpoint at `path` where it exists, and write it after every epoch.

        Args:
            path: the checkpoint.
            data_digest: `data_sha256` of the fit's data.

        Raises:
            InputError: as `restore`.
        """
        self._checkpoint = path, self.fingerprint(data_digest)
        if path.exists():
            self.restore(*self._checkpoint)

    def save(self, path: Path, fingerprint: torch.Tensor) -> None:
        """Write a checkpoint atomically."""
        columns = {name: [getattr(record, name) for record in self.history] for name in _HISTORY}
        history = {
            f"history.{name}": torch.tensor(column, dtype=torch.float64) for name, column in columns.items()
        }
        save_tensors(path, {**self.live_state(), **history, "fingerprint": fingerprint})

    def restore(self, path: Path, fingerprint: torch.Tensor) -> None:
        """Continue from what `save` wrote.

        Raises:
            InputError: the file is truncated, not a fit's checkpoint, or of other data, seed or config.
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
                " use those that it was made with"
            )
        load_into(path, tensors, self.live_state())
        self.optimizer.check_moments(path)
        if not bool((self.model.input_std > 0).all()):
            raise InputError(f"{path}: input_std must be positive everywhere")
        # Adam's step count gives the number of epochs, and so the length of the history.
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
                raise InputError(f"{path}: its history is inconsistent at epoch {len(self.history)}")
            self.history.append(
                FitEpoch(len(self.history), loss, tuple(mse), tuple(map(bool, improved)), took)
            )


def choose_backend(
    name: str, obs_dim: int, act_dim: int, config: DynamicsConfig, device: torch.device | str
) -> str:
    """Return the backend that fits an ensemble of these sizes; raise `InputError` as `backends.choose`."""
    widest = max(obs_dim + act_dim, 2 * (obs_dim + 1), *config.hidden)
    dtype = config.dtype or "float32"
    need = Need(dtype, torch.device(device), training=widest, layer_norm=config.layer_norm)
    return backends.choose(name, need)


def check_fit_memory(config: DynamicsConfig, device: torch.device | str) -> None:
    """Raise `InputError` where `device` has too little memory for a fit."""
    # A lower bound: inputs and outputs are at least one wide, and each array has a gradient and a copy.
    size = 3 * mlp_bytes(config.members, (1, *config.hidden, 1), config.batch_size)
    check_memory("the ensemble's fit", size, device, "batch_size, members or hidden")


def _copy_parameters(source: EnsembleDynamics, target: EnsembleDynamics) -> None:
    theirs, ours = dict(source.named_parameters()), dict(target.named_parameters())
    shapes = [{name: tuple(value.shape) for name, value in some.items()} for some in (theirs, ours)]
    if shapes[0] != shapes[1] or (source.log_scale, source.activation) != ("variance", target.activation):
        raise InputError(f"a fit of {shapes[1]} cannot begin with an ensemble of {shapes[0]}")
    if bool(source.absolute.any()):
        raise InputError(
            "a fit of observations' changes cannot begin with an ensemble that predicts next observations"
        )
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
    quiet: bool = False,
    on_epoch: Callable[[FitEpoch], None] | None = None,
) -> EnsembleDynamics:
    """Fit the ensemble to `data` by maximum likelihood with early stopping (authors: BNN.train).

    Every member sees its own bootstrap of the training rows, reshuffled each epoch. A member's weights
    are kept when its holdout MSE falls by more than `config.improvement`; training stops when more than
    `config.patience` epochs have passed since any member improved, and the kept weights are restored.

    Args:
        data: n transitions in raw units, 5 or more with the default holdout.
        seed: seed of all random numbers. The result is a function of (data, seed, config) on one machine
            and backend.
        config: hyperparameters; None takes `DynamicsConfig()`.
        device: device of the fit.
        backend: "cpu" and "cuda" are fused kernels, "reference" is PyTorch on any device, "auto" takes the
            best one available.
        threads: threads of the CPU kernel; None takes all cores that this process may use. The result does
            not depend on it.
        checkpoint: file that is written after every epoch. A fit continues from it where it exists, with the
            same final bits as a fit that was never stopped. It is not removed at the end.
        initial: ensemble whose weights and bounds the fit begins with; None draws new ones.
        quiet: show no progress bar.
        on_epoch: called after every epoch, and at the start for every epoch of a checkpoint.

    Returns:
        The ensemble on `device`, elites best first.

    Raises:
        InputError: unusable data, config, device or checkpoint; or the loss became not finite.
    """
    fit = Fit(data.validate(), seed, config, device, backend, threads, initial)
    if checkpoint is not None:
        fit.use_checkpoint(Path(checkpoint), data_sha256(data))
    _run_to_end(fit, quiet, on_epoch)
    return fit.finish()


def _run_to_end(fit: Fit, quiet: bool, on_epoch: Callable[[FitEpoch], None] | None) -> None:
    """Run a fit's remaining epochs; call `on_epoch` with those of its history first."""
    report = on_epoch or (lambda _: None)
    for record in fit.history:
        report(record)
    # The fit lasts at least until the epoch where it would stop without further improvement.
    done = len(fit.history)
    with progress_bar(
        "fit",
        fit.expected_epochs,
        completed=done,
        unit="epoch",
        open_ended=True,
        at_most=fit.config.max_epochs,
        quiet=quiet,
    ) as bar:
        while len(fit.history) < fit.expected_epochs:
            record = fit.run_epoch(lambda share: bar.update(completed=len(fit.history) + share))
            report(record)
            bar.update(total=fit.expected_epochs, note=fit_note([record], fit.config))
            bar.report()


def fit_note(records: Sequence[FitEpoch], config: DynamicsConfig) -> str:
    """Describe an epoch of one or more fits for the progress bar: the mean holdout MSE of the elites."""
    elites = [sorted(record.holdout_mse)[: config.elites] for record in records]
    return f"holdout MSE {np.mean(elites):.4g}"


def fit_and_save(
    data: Transitions,
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    config: DynamicsConfig | None = None,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    threads: int | None = None,
    quiet: bool = False,
    on_epoch: Callable[[FitEpoch], None] | None = None,
) -> tuple[EnsembleDynamics, dict[str, Any]]:
    """Fit as `fit_dynamics` does, and write dynamics.safetensors, dynamics.json and fit.json.

    Every epoch is added to fit.csv and to TensorBoard's events in tensorboard-fit when it ends.

    Called again after it was killed, it continues from checkpoint/fit.safetensors in the folder. fit.json is
    written last, and the checkpoint is removed then: a folder with fit.json holds a finished fit.

    Args:
        data: as in `fit_dynamics`.
        folder: folder of the files.
        seed: as in `fit_dynamics`.
        config: as in `fit_dynamics`.
        device: as in `fit_dynamics`.
        backend: as in `fit_dynamics`.
        threads: as in `fit_dynamics`.
        quiet: as in `fit_dynamics`.
        on_epoch: as in `fit_dynamics`.

    Returns:
        The ensemble, and the contents of fit.json: dataset, data_sha256, transitions, holdout (rows), seed,
        config, device, backend, isa, threads, epochs, seconds, elites, best_mse [member] of the kept weights,
        train_loss [epoch], holdout_mse and improved [epoch, member].

    Raises:
        InputError: as `fit_dynamics`, or the folder cannot be written, or another process is at work in it.
    """
    folder = Path(folder)
    with fit_folder(folder):
        fit, digest = Fit(data.validate(), seed, config, device, backend, threads), data_sha256(data)
        fit.use_checkpoint(fit_checkpoint(folder), digest)
        with fit_log(folder) as log:

            def report(record: FitEpoch) -> None:
                log_epoch(log, record)
                if on_epoch is not None:
                    on_epoch(record)

            _run_to_end(fit, quiet, report)
        return finish_and_save(fit, data, digest, folder)


@contextlib.contextmanager
def fit_log(folder: Path) -> Iterator[FitLog]:
    """Write fit.csv and TensorBoard's events of a fit in `folder` anew.

    Raises:
        InputError: a file cannot be written, or tensorboard-fit is a link.
    """
    try:
        with open_fit_log(folder) as log:
            yield log
    except OSError as error:
        raise InputError(
            f"the log of the fit in {folder} cannot be written ({error}); remove the cause, then give the"
            " same command again, `train` with --resume"
        ) from error


def log_epoch(log: FitLog, record: FitEpoch) -> None:
    """Add an epoch to a fit's log."""
    log.add(record.epoch, record.train_loss, record.holdout_mse, record.seconds)


def log_recorded_fit(folder: Path) -> None:
    """Write the log of a finished fit from its fit.json, for a fit that was copied."""
    fit = read_fit(folder)
    with fit_log(folder) as log:
        for epoch, (loss, errors) in enumerate(zip(fit["train_loss"], fit["holdout_mse"], strict=True)):
            log.add(epoch, loss, errors)


@contextlib.contextmanager
def fit_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that a fit writes to.

    Raises:
        InputError: another process holds it, or the folder cannot be written or has a link in it.
    """
    with locked(folder):
        refuse_links(folder / "checkpoint")
        yield


def fit_checkpoint(folder: Path) -> Path:
    """Return the path of a fit's checkpoint in its folder; the file exists until the fit is finished."""
    return folder / "checkpoint" / "fit.safetensors"


@with_config(ConfigDict(extra="allow"))
class _RecordedConfig(TypedDict):
    holdout_fraction: Annotated[float, Field(gt=0, lt=1)]
    holdout_max: Annotated[int, Field(ge=1)]


class FitRecord(TypedDict):
    """The fields of fit.json that are read; see `fit_and_save`."""

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
    """Read fit.json of a finished fit.

    Raises:
        InputError: the file is missing, or does not describe a fit.
    """
    path = folder / "fit.json"
    fit = read_json_as(path, FitRecord)
    members, lengths = len(fit["best_mse"]), {len(errors) for errors in fit["holdout_mse"]}
    if lengths != {members} or max(fit["elites"]) >= members:
        raise InputError(f"{path}: holdout_mse, best_mse and elites are not of the same members")
    if not len(fit["holdout_mse"]) == len(fit["train_loss"]) == fit["epochs"]:
        raise InputError(f"{path}: holdout_mse and train_loss are not of {fit['epochs']} epochs")
    return fit


def finish_and_save(
    fit: Fit, data: Transitions, data_digest: str, folder: Path
) -> tuple[EnsembleDynamics, dict[str, Any]]:
    """Finish a fit, write its files and remove its checkpoint; return what `fit_and_save` does."""
    model, config, history = fit.finish(), fit.config, fit.history
    record = {
        "dataset": data.name,
        "data_sha256": data_digest,
        "transitions": len(data),
        "holdout": count_holdout(len(data), config),
        "seed": fit.seed,
        "config": to_dict(config),
        "device": str(fit.inputs.device),
        "backend": fit.backend,
        "isa": backends.isa_of(fit.backend),
        "threads": fit.threads,
        "epochs": len(history),
        "seconds": sum(epoch.seconds for epoch in history),
        "elites": model.elites.tolist(),
        "best_mse": fit.best_mse,
        "train_loss": [epoch.train_loss for epoch in history],
        "holdout_mse": [list(epoch.holdout_mse) for epoch in history],
        "improved": [list(epoch.improved) for epoch in history],
    }
    model.save(folder)
    write_json(folder / "fit.json", record)
    fit_checkpoint(folder).unlink(missing_ok=True)
    return model, record
