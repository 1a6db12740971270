"""What the kernels that train are handed: csrc/sac.h and csrc/fit.h, the same for every device."""

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from mopo_fast.config import ACTIVATIONS, DynamicsConfig, SACConfig
from mopo_fast.data.transitions import Transitions
from mopo_fast.errors import InputError

# A parameter under training: its value, Adam's two moments and the target that follows it, if any.
Parameter = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True, eq=False)
class SacRun:
    """A run's SAC updates, made in place.

    Attributes:
        actor, critic: the weights of all layers, then the biases; the critics' with targets.
        real, model: to draw from, their first `sizes` rows; `rows` of each make a batch. float32, terminals
            bool, the numbers of a row side by side.
        updates_before: Adam's steps so far.
        first_draw: number of the first update for the random counters, with `seed` as their key.
    """

    actor: list[Parameter]
    critic: list[Parameter]
    log_alpha: Parameter
    config: SACConfig
    actor_learning_rate: float
    target_entropy: float
    real: Transitions
    model: Transitions
    sizes: tuple[int, int]
    rows: tuple[int, int]
    updates: int
    updates_before: int
    first_draw: int
    seed: int


@dataclass(frozen=True, eq=False)
class FitRun:
    """A run's steps of the ensemble's fit, made in place.

    Attributes:
        layers: the weights of all layers, then the biases.
        bounds: max_logvar and min_logvar.
        table: [n, obs + act + obs + 1 or more], the inputs, standardised, and the `dims` = obs + 1 targets.
        rows: int64 [members, count], the rows that each member sees; may be columns of a wider matrix.
        steps_before: Adam's steps so far.
    """

    layers: list[Parameter]
    bounds: tuple[Parameter, Parameter]
    activation: str
    table: torch.Tensor
    dims: int
    rows: torch.Tensor
    config: DynamicsConfig
    steps_before: int


@dataclass(frozen=True)
class Trainer:
    """Hands runs to the extension of a backend, whose tensors are on a type of device."""

    backend: str
    device: str

    def sac_call(self, extension: ModuleType, run: SacRun) -> Any:
        """Raises `InputError` where the kernel cannot read or train a tensor as it is."""
        config = run.config
        return extension.SacCall(
            obs_dim=run.real.obs_dim,
            act_dim=run.real.act_dim,
            critics=config.critics,
            actor=self._layers(run.actor),
            critic=self._layers(run.critic),
            log_alpha=[self._address(tensor) for tensor in run.log_alpha[:3]],
            learning_rates=[
                run.actor_learning_rate,
                config.critic_learning_rate,
                config.alpha_learning_rate,
            ],
            discount=config.discount,
            polyak=config.polyak,
            target_entropy=run.target_entropy,
            log_std_min=config.log_std_min,
            log_std_max=config.log_std_max,
            alpha_max=math.inf if config.alpha_max is None else config.alpha_max,
            critic_loss_scale=0.5 if config.critic_loss == "half_mse" else 1.0,
            simultaneous=config.simultaneous,
            real=self._source(run.real, run.sizes[0]),
            model=self._source(run.model, run.sizes[1]),
            real_rows=run.rows[0],
            model_rows=run.rows[1],
            updates=run.updates,
            updates_before=run.updates_before,
            first_draw=run.first_draw,
            seed=run.seed,
        )

    def fit_call(self, extension: ModuleType, run: FitRun) -> Any:
        """Likewise."""
        config, width = run.config, run.layers[0][0].shape[1]
        max_logvar, min_logvar = ([self._address(tensor) for tensor in bound[:3]] for bound in run.bounds)
        rows, rows_stride = self._array(run.rows, torch.int64)
        return extension.FitCall(
            members=run.rows.shape[0],
            dims=run.dims,
            layers=self._layers(run.layers),
            activation=ACTIVATIONS.index(run.activation),
            max_logvar=max_logvar,
            min_logvar=min_logvar,
            inputs=self._address(run.table),
            targets=self._address(run.table) + width * run.table.element_size(),
            stride=run.table.shape[1],
            rows=rows,
            count=run.rows.shape[1],
            rows_stride=rows_stride,
            batch=config.batch_size,
            learning_rate=config.learning_rate,
            logvar_bound_weight=config.logvar_bound_weight,
            weight_decay=list(config.weight_decay),
            steps_before=run.steps_before,
            bfloat16=config.dtype == "bfloat16",
        )

    def _address(self, tensor: torch.Tensor | None, dtype: torch.dtype = torch.float32) -> int:
        """Where a tensor's numbers are; 0 for None."""
        if tensor is None:
            return 0
        self._check(tensor, dtype, tensor.is_contiguous())
        return tensor.data_ptr()

    def _array(self, tensor: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
        """Where an array's rows are, and how many elements they are apart: it may be columns of a table."""
        self._check(tensor, dtype, tensor.ndim == 1 or tensor.shape[1] == 1 or tensor.stride(1) == 1)
        return tensor.data_ptr(), tensor.stride(0)

    def _check(self, tensor: torch.Tensor, dtype: torch.dtype, side_by_side: bool) -> None:
        if tensor.dtype != dtype or tensor.device.type != self.device or not side_by_side:
            raise InputError(
                f"the {self.backend} backend reads and trains contiguous {dtype} tensors where they are, got"
                f" {tensor.dtype}, strides {tensor.stride()}, on {tensor.device}; use backend reference"
            )

    def _layers(self, parameters: list[Parameter]) -> list[tuple[int, int, list[int]]]:
        """(in, out, addresses) of each layer, from all weights and then all biases."""
        depth = len(parameters) // 2
        return [
            (*weight[0].shape[-2:], [self._address(tensor) for tensor in (*weight, *bias)])
            for weight, bias in zip(parameters[:depth], parameters[depth:], strict=True)
        ]

    def _source(self, data: Transitions, size: int) -> tuple[list[tuple[int, int]], int]:
        floats = (data.observations, data.actions, data.rewards, data.next_observations)
        return [*map(self._array, floats), self._array(data.terminals, torch.bool)], size
