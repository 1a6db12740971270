"""Ensembles and actors on tensors that other code holds: nothing is copied where layouts agree."""

import os
from collections.abc import Sequence

import torch
from torch import nn

from mopo_fast.config import Activation, LogScale
from mopo_fast.ensemble import EnsembleDynamics, elites_of
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.utils.tensors import check_layers

# Names of torch's modules and of other libraries' functions.
_ACTIVATIONS: dict[str, Activation] = {
    "swish": "silu",
    "silu": "silu",
    "relu": "relu",
    "tanh": "tanh",
}


def activation_of(module: object) -> Activation:
    """Ours for a module of theirs, by its class; for a function or a name, by that.

    Raises:
        InputError: it is none that our networks have.
    """
    given = module if isinstance(module, str) else getattr(module, "__name__", type(module).__name__)
    if given.lower() not in _ACTIVATIONS:
        raise InputError(f"the networks' activation is {given}; ours have SiLU (swish), ReLU or tanh")
    return _ACTIVATIONS[given.lower()]


def check_kind(
    ensemble: EnsembleDynamics,
    models: str,
    *,
    log_scale: LogScale,
    member_bounds: bool = False,
    absolute: bool = False,
) -> None:
    """Raise `InputError` where an ensemble is of a kind that another code's `models` cannot be.

    Args:
        log_scale: what the logarithms of theirs are of.
        member_bounds: each member of theirs may have bounds of its own.
        absolute: theirs may predict next observations instead of changes.
    """
    lacking = {
        "log-variances" if log_scale == "std" else "log standard deviations": ensemble.log_scale != log_scale,
        "bounds of each member": ensemble.max_logvar.ndim == 2 and not member_bounds,
        "predictions of next observations": bool(ensemble.absolute.any()) and not absolute,
    }
    if any(lacking.values()):
        kinds = ", ".join(kind for kind, lacks in lacking.items() if lacks)
        raise InputError(f"{models} have no {kinds}; these dynamics do")


def ensemble_of(
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    max_logvar: torch.Tensor,
    min_logvar: torch.Tensor,
    *,
    activation: Activation,
    input_mean: torch.Tensor | None = None,
    input_std: torch.Tensor | None = None,
    elites: Sequence[int] | None = None,
    log_scale: LogScale = "variance",
    absolute: Sequence[int] = (),
) -> EnsembleDynamics:
    """An ensemble whose parameters are these tensors' memory: what is written there later, it sees.

    Args:
        weights, biases: [members, in, out], [members, out] of each layer; the last has 2 (obs_dim + 1)
            outputs: means of (observation, reward), then logarithms.
        max_logvar, min_logvar: [obs_dim + 1] or [members, obs_dim + 1].
        input_mean, input_std: [obs_dim + act_dim]; None: 0 and 1.
        elites: None: every member.

    Raises:
        InputError: shapes that do not fit each other, or what `EnsembleDynamics` refuses.
    """
    check_layers(weights, ndim=3)
    members, inputs, _ = weights[0].shape
    obs_dim = weights[-1].shape[-1] // 2 - 1
    chosen = range(members) if elites is None else elites_of(elites, members)
    # Without memory of its own, and without the time to fill it.
    with torch.device("meta"):
        ensemble = EnsembleDynamics(
            obs_dim,
            inputs - obs_dim,
            members=members,
            elites=len(chosen),
            hidden=tuple(weight.shape[-1] for weight in weights[:-1]),
            activation=activation,
            log_scale=log_scale,
            member_bounds=max_logvar.ndim == 2,
            absolute=absolute,
        )
    _use(ensemble.weights, weights)
    _use(ensemble.biases, biases)
    for name, bound in (("max_logvar", max_logvar), ("min_logvar", min_logvar)):
        setattr(ensemble, name, _as_parameter(getattr(ensemble, name), bound))
    device = weights[0].device
    for name, values, default in (("input_mean", input_mean, 0.0), ("input_std", input_std, 1.0)):
        given = torch.full((inputs,), default) if values is None else values.detach().float()
        if given.numel() != inputs:
            raise InputError(f"{name} has {given.numel()} values, the networks have {inputs} inputs")
        setattr(ensemble, name, given.reshape(inputs).to(device))
    ensemble.elites = torch.tensor(chosen, device=device)
    mask = torch.zeros(obs_dim, dtype=torch.bool)
    mask[list(absolute)] = True
    ensemble.absolute = mask.to(device)
    return ensemble


def actor_of(
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    *,
    activation: Activation,
    log_std_min: float,
    log_std_max: float,
) -> Actor:
    """An actor whose parameters are these tensors' memory: [in, out], [out] of each layer, means first.

    Raises:
        InputError: shapes that do not fit each other, or what `Actor` refuses.
    """
    check_layers(weights, ndim=2)
    with torch.device("meta"):
        actor = Actor(
            weights[0].shape[0],
            weights[-1].shape[1] // 2,
            hidden=tuple(weight.shape[1] for weight in weights[:-1]),
            activation=activation,
            log_std_min=log_std_min,
            log_std_max=log_std_max,
        )
    _use(actor.weights, weights)
    _use(actor.biases, biases)
    return actor


def check_model(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Raise `InputError`, which names `path`, unless all numbers are finite and scales are positive."""
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{path}: {name} holds values that are not finite")
    if isinstance(model, EnsembleDynamics) and not bool((model.input_std > 0).all()):
        raise InputError(f"{path}: input_std must be positive everywhere")


def check_first_layer(weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Raise `InputError` where a model's scales were too small to be divided out of its first layer."""
    if not bool(weight.isfinite().all() and bias.isfinite().all()):
        raise InputError("the scales of its inputs are too small to be divided out of the first layer")


def _use(ours: nn.ParameterList, theirs: Sequence[torch.Tensor]) -> None:
    if len(ours) != len(theirs):
        raise InputError(f"there are {len(theirs)} biases, but {len(ours)} layers")
    for layer, tensor in enumerate(theirs):
        ours[layer] = _as_parameter(ours[layer], tensor)


def _as_parameter(ours: torch.Tensor, theirs: torch.Tensor) -> nn.Parameter:
    if ours.shape != theirs.shape:
        raise InputError(f"a layer's tensor has shape {list(theirs.shape)}, expected {list(ours.shape)}")
    if not theirs.is_floating_point():
        raise InputError(f"a layer's tensor holds {theirs.dtype}, expected floats")
    return nn.Parameter(theirs.detach(), requires_grad=False)
