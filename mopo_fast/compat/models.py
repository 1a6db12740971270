"""Ensembles and actors built on the tensors of other code, without copies, and checks they share."""

import functools
import logging
import math
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from mopo_fast.compat import Checkpoint
from mopo_fast.config import Activation, LogScale
from mopo_fast.ensemble import EnsembleDynamics, elites_of
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.utils.pickles import as_array
from mopo_fast.utils.tensors import check_layers

logger = logging.getLogger("mopo_fast")

# Lower-case class and function names of torch and other libraries.
_ACTIVATIONS: dict[str, Activation] = {
    "swish": "silu",
    "silu": "silu",
    "relu": "relu",
    "tanh": "tanh",
}
_SPELLINGS: dict[Activation, str] = {"silu": "SiLU", "relu": "ReLU", "tanh": "tanh"}


def activation_of(module: object) -> Activation:
    """Return this package's name for an activation of other code.

    Args:
        module: an activation's module or function, or its name.

    Raises:
        InputError: it is not SiLU, ReLU or tanh.
    """
    given = module if isinstance(module, str) else getattr(module, "__name__", type(module).__name__)
    if given.lower() not in _ACTIVATIONS:
        raise InputError(f"the networks' activation is {given}; the kernels have SiLU (swish), ReLU and tanh")
    return _ACTIVATIONS[given.lower()]


def check_method(
    thing: object, method: str, package: str, advice: str, classes: Collection[str] | None = None
) -> None:
    """Raise `InputError` if a method that the kernels replace is not the code base's own.

    A subclass, or an assignment to the object or its class, may have replaced the method. An object without
    the method passes.

    Args:
        thing: object of another code base.
        method: name of the method.
        package: name of the code base's package.
        advice: instruction at the end of the error.
        classes: names of the package's classes whose method is known; None for all classes of the package.
    """
    assigned = vars(thing).get(method) if hasattr(thing, "__dict__") else None
    if assigned is not None:
        known = _homes(assigned) == {"mopo_fast"}
    else:
        owner = next((kind for kind in type(thing).__mro__ if method in vars(kind)), None)
        root = "" if owner is None else owner.__module__.partition(".")[0]
        known = owner is None or root == "torch"
        if owner is not None and root == package:
            # A function may have been assigned to the class. PyTorch has decorators of its own.
            own = _homes(vars(owner)[method]) <= {package, "torch"}
            known = own and (classes is None or owner.__name__ in classes)
    if not known:
        raise InputError(
            f"{type(thing).__name__} has a method {method} of its own, which the kernels would replace;"
            f" {advice}"
        )


def check_attributes(thing: object, names: Collection[str], version: str) -> None:
    """Raise `InputError` if an object of another code base lacks an attribute that its adapter reads.

    Args:
        thing: object of another code base.
        names: names of the attributes.
        version: version of the code base that the adapter was written for.
    """
    missing = [name for name in names if not hasattr(thing, name)]
    if missing:
        raise InputError(
            f"{type(thing).__name__} has no {', '.join(missing)}; this adapter was written for {version}:"
            " use that version"
        )


def _homes(function: Any) -> set[str]:
    """Return the packages that a function and all that it decorates were defined in."""
    found = set()
    while function is not None:
        function = getattr(function, "__func__", function)
        if isinstance(function, functools.partial):
            function = function.func
        # Unlike `__module__`, the globals are not copied by `functools.wraps`.
        name = getattr(function, "__globals__", {}).get("__name__", "")
        found.add(name.partition(".")[0])
        function = getattr(function, "__wrapped__", None)
    return found


def clipped_log_stds(policy: Actor, low: float, high: float, owner: str, advice: str = "") -> list[str]:
    """Describe the change of a policy whose log-stds another code base clips to other bounds.

    Args:
        policy: policy to be written in the code base's format.
        low: lower bound of the log-stds there.
        high: upper bound of the log-stds there.
        owner: name of the code base.
        advice: how to keep the policy's own bounds there, after a semicolon.

    Returns:
        One sentence, or nothing if the bounds are equal.
    """
    if (policy.log_std_min, policy.log_std_max) == (low, high):
        return []
    return [
        f"{owner} clips the policy's log standard deviations to [{low:g}, {high:g}], not to"
        f" [{policy.log_std_min:g}, {policy.log_std_max:g}]: standard deviations of sampled actions (before"
        f" tanh) are between {math.exp(low):.2g} and {math.exp(high):.2g}, deterministic actions stay the"
        f" same{advice}"
    ]


def warn_of_changes(
    checkpoint: Checkpoint,
    check_dynamics: Callable[[EnsembleDynamics], list[str]],
    check_policy: Callable[[Actor], list[str]],
) -> None:
    """Log as warnings all that a format cannot store of the models; call it before the first file is written.

    Args:
        checkpoint: models to be written.
        check_dynamics: `Format.check_dynamics`.
        check_policy: `Format.check_policy`.

    Raises:
        InputError: the format cannot store one of the models.
    """
    pairs: list[tuple[Callable[[Any], list[str]], Any]] = [
        (check_dynamics, checkpoint.dynamics),
        (check_policy, checkpoint.policy),
    ]
    changes = [change for check, model in pairs if model is not None for change in check(model)]
    for change in changes:
        logger.warning("%s", change)


def check_activation(model: EnsembleDynamics | Actor, models: str, *known: Activation) -> None:
    """Raise `InputError` if a model has an activation that another code base's models cannot have.

    Args:
        model: ensemble or actor to be written in the code base's format.
        models: name of the code base's models, for the message.
        known: activations that they may have.
    """
    if model.activation not in known:
        names = " or ".join(_SPELLINGS[name] for name in known)
        raise InputError(f"{models} have {names}, this one has {model.activation}")


def unstored_activation(ensemble: EnsembleDynamics, file: str, model: str, default: Activation) -> list[str]:
    """Describe the loss of an activation that another code base's file does not store.

    Args:
        ensemble: ensemble to be written in the code base's format.
        file: name of the file.
        model: class of the code base that is built before the file is loaded.
        default: activation that the class has by default.

    Returns:
        One sentence, or nothing if the ensemble has the default.
    """
    if ensemble.activation == default:
        return []
    return [
        f"{file} does not store the activation of the dynamics; build {model} with the activation"
        f" {ensemble.activation} to load it, not with the default {_SPELLINGS[default]}"
    ]


def check_kind(
    ensemble: EnsembleDynamics,
    models: str,
    *,
    log_scale: LogScale,
    member_bounds: bool = False,
    absolute: bool = False,
) -> None:
    """Raise `InputError` if an ensemble has a property that another code base's models cannot have.

    Args:
        ensemble: ensemble to be written in the code base's format.
        models: name of the code base's models, for the message.
        log_scale: quantity whose logarithm its models predict, "variance" or "std".
        member_bounds: whether each of its members may have log-variance bounds of its own.
        absolute: whether its models may predict next observations instead of their changes.
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
    """Build an ensemble whose parameters share these tensors' memory.

    Later changes to the tensors change the ensemble.

    Args:
        weights: weight [members, in, out] of each layer. The last layer has 2 (obs_dim + 1) outputs: means of
            (observation, reward), then their log-variances or log-stds.
        biases: bias [members, out] of each layer.
        max_logvar: upper bound of the logarithms, [obs_dim + 1] or [members, obs_dim + 1].
        min_logvar: lower bound, of the same shape.
        activation: activation of the hidden layers.
        input_mean: mean of the inputs [obs_dim + act_dim]; None for 0.
        input_std: standard deviation of the inputs [obs_dim + act_dim]; None for 1.
        elites: numbers of the elite members; None for all members.
        log_scale: quantity whose logarithm the last layer predicts, "variance" or "std".
        absolute: observation dimensions whose next value is predicted instead of the change.

    Raises:
        InputError: shapes do not fit each other, or `EnsembleDynamics` refuses a value.
    """
    check_layers(weights, ndim=3)
    members, inputs, _ = weights[0].shape
    obs_dim = weights[-1].shape[-1] // 2 - 1
    chosen = range(members) if elites is None else elites_of(elites, members)
    # On the meta device: its own parameters would only be replaced.
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
    _replace(ensemble.weights, weights)
    _replace(ensemble.biases, biases)
    for name, bound in (("max_logvar", max_logvar), ("min_logvar", min_logvar)):
        setattr(ensemble, name, _as_parameter(bound, getattr(ensemble, name).shape))
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
    """Build an actor whose parameters share these tensors' memory.

    Args:
        weights: weight [in, out] of each layer. The last layer has 2 act_dim outputs: means, then log-stds.
        biases: bias [out] of each layer.
        activation: activation of the hidden layers.
        log_std_min: lower bound of the log-stds.
        log_std_max: upper bound of the log-stds.

    Raises:
        InputError: shapes do not fit each other, or `Actor` refuses a value.
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
    _replace(actor.weights, weights)
    _replace(actor.biases, biases)
    return actor


def check_model(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Raise `InputError` unless every parameter of a model is finite and its input scale is positive.

    Args:
        path: file of the model, for the message.
        model: ensemble or actor.
    """
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{path}: {name} holds values that are not finite")
    if isinstance(model, EnsembleDynamics) and not bool((model.input_std > 0).all()):
        raise InputError(f"{path}: input_std must be positive everywhere")


def check_first_layer(weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Raise `InputError` if dividing a first layer by the input scale has overflowed.

    Args:
        weight: weights of the first layer, after the division.
        bias: biases of the first layer, after the division.
    """
    if not bool(weight.isfinite().all() and bias.isfinite().all()):
        raise InputError("the scales of its inputs are too small to be divided out of the first layer")


def _replace(parameters: nn.ParameterList, tensors: Sequence[torch.Tensor]) -> None:
    if len(parameters) != len(tensors):
        raise InputError(f"there are {len(tensors)} biases, but {len(parameters)} layers")
    for layer, tensor in enumerate(tensors):
        parameters[layer] = _as_parameter(tensor, parameters[layer].shape)


def as_floats(array: Any, what: str = "it") -> torch.Tensor:
    """Return a pickled array of floats as a float32 tensor.

    Args:
        array: the array, as `utils.pickles` reads it.
        what: name of the array in errors.

    Raises:
        InputError: it is no array, or holds something else than floats.
    """
    array = as_array(array)
    if array.dtype.kind != "f":
        raise InputError(f"{what} holds {array.dtype}, expected floats")
    # A number beyond float32 becomes infinite, which no reader of models takes.
    with np.errstate(over="ignore"):
        return torch.from_numpy(array.astype(np.float32))


def _as_parameter(tensor: torch.Tensor, shape: torch.Size) -> nn.Parameter:
    if tensor.shape != shape:
        raise InputError(f"a layer's tensor has shape {list(tensor.shape)}, expected {list(shape)}")
    if not tensor.is_floating_point():
        raise InputError(f"a layer's tensor holds {tensor.dtype}, expected floats")
    return nn.Parameter(tensor.detach(), requires_grad=False)
