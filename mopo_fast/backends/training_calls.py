"""The arguments of the training kernels (csrc/sac.h and csrc/fit.h), the same for CPU and CUDA."""

import math
from types import ModuleType
from typing import Any

from mopo_fast.backends.interface import FitSteps, Parameter, SacUpdates, address
from mopo_fast.config import ACTIVATIONS, UPDATE_ORDERS
from mopo_fast.data.transitions import DATA_ARRAYS, Transitions


def sac_call(extension: ModuleType, call: SacUpdates, precision: int = 0) -> Any:
    """Pack a call that `checked.sac_updates` has checked, and a Precision of csrc/common.h, into a struct."""
    config = call.config
    return extension.SacCall(
        obs_dim=call.real.obs_dim,
        act_dim=call.real.act_dim,
        critics=config.critics,
        target_critics=config.target_critics or config.critics,
        actor=_layers(call.actor),
        critic=_layers(call.critic),
        log_alpha=_addresses(call.log_alpha)[:3],
        learning_rates=call.learning_rates,
        discount=config.discount,
        polyak=config.polyak,
        target_entropy=call.target_entropy,
        log_std_min=config.log_std_min,
        log_std_max=config.log_std_max,
        log_prob_epsilon=config.log_prob_epsilon,
        alpha_max=math.inf if config.alpha_max is None else config.alpha_max,
        critic_loss_scale=config.critic_loss_scale,
        target_min=-math.inf if config.target_min is None else config.target_min,
        entropy_backup=config.entropy_backup,
        mean_actor=config.actor_q == "mean",
        order=UPDATE_ORDERS.index(config.order),
        adam_epsilon=config.adam_epsilon,
        precision=precision,
        real=_source(call.real, call.sizes[0]),
        model=_source(call.model, call.sizes[1]),
        real_rows=call.rows[0],
        model_rows=call.rows[1],
        in_order=call.in_order,
        updates=call.updates,
        updates_before=call.updates_before,
        steps=[step.data_ptr() for step in call.steps],
        count=call.count.data_ptr(),
        first_draw=call.first_draw,
        seed=call.seed,
    )


def fit_call(extension: ModuleType, call: FitSteps, precision: int = 0) -> Any:
    """Pack a call that `checked.fit_steps` has checked, and a Precision of csrc/common.h, into a struct."""
    config, width = call.config, call.layers[0][0].shape[1]
    max_logvar, min_logvar = (_addresses(bound)[:3] for bound in call.bounds)
    return extension.FitCall(
        members=call.rows.shape[0],
        dims=call.dims,
        layers=_layers(call.layers),
        norms=_norms(call.norms),
        activation=ACTIVATIONS.index(call.activation),
        max_logvar=max_logvar,
        min_logvar=min_logvar,
        inputs=call.table.data_ptr(),
        targets=call.table.data_ptr() + width * call.table.element_size(),
        stride=call.table.shape[1],
        rows=call.rows.data_ptr(),
        count=call.rows.shape[1],
        rows_stride=call.rows.stride(0),
        batch=config.batch_size,
        learning_rate=config.learning_rate,
        logvar_bound_weight=config.logvar_bound_weight,
        weight_decay=list(config.weight_decay),
        steps_before=call.steps_before,
        steps=[step.data_ptr() for step in call.steps],
        precision=precision,
    )


def _addresses(parameter: Parameter) -> list[int]:
    """Return the addresses of a parameter, its moments and its target, 0 without a target."""
    return [address(tensor) for tensor in parameter]


def _layers(parameters: list[Parameter]) -> list[tuple[int, int, list[int]]]:
    """Return (in, out, addresses) of each layer, from all weights, then all biases."""
    depth = len(parameters) // 2
    return [
        (*weight[0].shape[-2:], _addresses(weight) + _addresses(bias))
        for weight, bias in zip(parameters[:depth], parameters[depth:], strict=True)
    ]


def _norms(parameters: list[Parameter]) -> list[tuple[list[int], list[int]]]:
    """Return the addresses of each layer norm, from all scales, then all shifts."""
    depth = len(parameters) // 2
    return [
        (_addresses(scale)[:3], _addresses(shift)[:3])
        for scale, shift in zip(parameters[:depth], parameters[depth:], strict=True)
    ]


def _source(data: Transitions, size: int) -> tuple[list[tuple[int, int]], int]:
    """Return (address, elements between two rows) of each array, and the number of rows to draw from."""
    arrays = [getattr(data, name) for name in DATA_ARRAYS]
    return [(array.data_ptr(), array.stride(0)) for array in arrays], size
