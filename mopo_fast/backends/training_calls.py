"""The arguments of the kernels that train, csrc/sac.h and csrc/fit.h, the same for every device."""

import math
from types import ModuleType
from typing import Any

from mopo_fast.backends.interface import FitRun, Parameter, SacRun
from mopo_fast.config import ACTIVATIONS
from mopo_fast.data.transitions import Transitions


def sac_call(extension: ModuleType, run: SacRun) -> Any:
    """Pack a run that `checked.sac_updates` has looked at."""
    config = run.config
    return extension.SacCall(
        obs_dim=run.real.obs_dim,
        act_dim=run.real.act_dim,
        critics=config.critics,
        actor=_layers(run.actor),
        critic=_layers(run.critic),
        log_alpha=_addresses(run.log_alpha)[:3],
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
        real=_source(run.real, run.sizes[0]),
        model=_source(run.model, run.sizes[1]),
        real_rows=run.rows[0],
        model_rows=run.rows[1],
        updates=run.updates,
        updates_before=run.updates_before,
        steps=[step.data_ptr() for step in run.steps],
        count=run.count.data_ptr(),
        first_draw=run.first_draw,
        seed=run.seed,
    )


def fit_call(extension: ModuleType, run: FitRun) -> Any:
    """Pack a run that `checked.fit_steps` has looked at."""
    config, width = run.config, run.layers[0][0].shape[1]
    max_logvar, min_logvar = (_addresses(bound)[:3] for bound in run.bounds)
    return extension.FitCall(
        members=run.rows.shape[0],
        dims=run.dims,
        layers=_layers(run.layers),
        activation=ACTIVATIONS.index(run.activation),
        max_logvar=max_logvar,
        min_logvar=min_logvar,
        inputs=run.table.data_ptr(),
        targets=run.table.data_ptr() + width * run.table.element_size(),
        stride=run.table.shape[1],
        rows=run.rows.data_ptr(),
        count=run.rows.shape[1],
        rows_stride=run.rows.stride(0),
        batch=config.batch_size,
        learning_rate=config.learning_rate,
        logvar_bound_weight=config.logvar_bound_weight,
        weight_decay=list(config.weight_decay),
        steps_before=run.steps_before,
        steps=[step.data_ptr() for step in run.steps],
        bfloat16=config.dtype == "bfloat16",
    )


def _addresses(parameter: Parameter) -> list[int]:
    """Addresses of a parameter, its moments and its target; 0 for none."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in parameter]


def _layers(parameters: list[Parameter]) -> list[tuple[int, int, list[int]]]:
    """(in, out, addresses) of each layer, from all weights and then all biases."""
    depth = len(parameters) // 2
    return [
        (*weight[0].shape[-2:], _addresses(weight) + _addresses(bias))
        for weight, bias in zip(parameters[:depth], parameters[depth:], strict=True)
    ]


def _source(data: Transitions, size: int) -> tuple[list[tuple[int, int]], int]:
    """(address, elements from a row to the next) of each array: it may be columns of a table."""
    arrays = (data.observations, data.actions, data.rewards, data.next_observations, data.terminals)
    return [(array.data_ptr(), array.stride(0)) for array in arrays], size
