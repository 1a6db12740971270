"""Files of the authors' code, and the networks that it keeps as lists of arrays."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from mopo_fast.compat import Checkpoint, matlab_files
from mopo_fast.compat.models import (
    activation_of,
    as_floats,
    check_activation,
    check_kind,
    check_method,
    clipped_log_stds,
    warn_of_changes,
)
from mopo_fast.config import Activation, DynamicsConfig, Hints
from mopo_fast.ensemble import EnsembleDynamics, elites_of
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.utils.atomic import atomic_path
from mopo_fast.utils.pickles import Pickler, load
from mopo_fast.utils.tensors import check_layers

logger = logging.getLogger("mopo_fast")

Array = npt.NDArray[Any]

VERSION = "the MOPO authors' code at commit e5efe3e"

# Names in the authors' .nns files.
_ACTIVATION_NAMES: dict[Activation, str] = {"silu": "swish", "relu": "ReLU", "tanh": "tanh"}
# Bytes of a .nns file; those of the authors have a few hundred.
_MAX_TEXT = 1 << 20


def common_activation(names: Sequence[str | None], what: str) -> Activation:
    """Return the one activation of all hidden layers.

    Args:
        names: the authors' names of the activations.
        what: name of the model in messages.

    Raises:
        InputError: there are several, or the kernels do not have it.
    """
    if len(set(names)) > 1:
        raise InputError(
            f"{what} has hidden layers of {', '.join(map(str, names))}; the kernels take one activation"
        )
    return activation_of(str(names[0])) if names else "silu"


def ensemble_from(
    arrays: Sequence[Any], activation: Activation, elites: Sequence[int] | None, what: str
) -> EnsembleDynamics:
    """Build an ensemble from a BNN's arrays.

    Args:
        arrays: the arrays in the BNN's order: scaler, weights and biases by layer, bounds.
        activation: activation of the hidden layers.
        elites: numbers of the elite members; None for all members.
        what: name of the model in messages.

    Raises:
        InputError: the arrays do not fit each other, or are not finite.
    """
    try:
        mean, std, *layers, high, low = map(as_floats, arrays)
        weights, biases = layers[0::2], [bias.squeeze(1) for bias in layers[1::2]]
        outputs = high.numel()
        if weights[-1].shape[-1] == outputs:
            # Two heads become one layer.
            *weights, mean_weight, std_weight = weights
            *biases, mean_bias, std_bias = biases
            weights.append(torch.cat((mean_weight, std_weight), -1))
            biases.append(torch.cat((mean_bias, std_bias), -1))
        # The BNN predicts the reward first, `EnsembleDynamics` last.
        order = torch.arange(outputs).roll(-1)
        for tensors in (weights, biases):
            tensors[-1] = torch.cat([head[..., order] for head in tensors[-1].chunk(2, -1)], -1)
        check_layers(weights, ndim=3)
        if weights[-1].shape[-1] != 2 * outputs or mean.numel() != weights[0].shape[1]:
            raise InputError("its scaler and its bounds do not fit its layers")
        model = EnsembleDynamics(
            outputs - 1,
            mean.numel() - outputs + 1,
            members=len(weights[0]),
            elites=len(weights[0]) if elites is None else len(elites),
            hidden=tuple(weight.shape[-1] for weight in weights[:-1]),
            activation=activation,
            generator=torch.Generator(),
        )
        pairs = [*zip(model.weights, weights, strict=True), *zip(model.biases, biases, strict=True)]
        pairs += [(model.input_mean, mean[0]), (model.input_std, std[0])]
        pairs += [(model.max_logvar, high[0, order]), (model.min_logvar, low[0, order])]
        with torch.no_grad():
            for target, values in pairs:
                if target.shape != values.shape:
                    raise InputError(
                        f"a layer has shape {tuple(values.shape)}, expected {tuple(target.shape)}"
                    )
                if not bool(torch.isfinite(values).all()):
                    raise InputError("there are numbers that are not finite")
                target.copy_(values)
            if elites is not None:
                model.elites = torch.tensor(elites_of(list(elites), model.members))
    except (InputError, ValueError, IndexError, TypeError, RuntimeError) as error:
        raise InputError(f"{what} cannot be read as an ensemble: {error}") from error
    if not bool((model.input_std > 0).all()):
        raise InputError(f"{what}: the scaler's deviations must be positive")
    return model


def actor_from(weights: Sequence[Any], policy: Any = None, what: str = "the policy") -> Actor:
    """Build an actor from Keras' list of weights: kernel, bias, kernel, bias, ...

    Args:
        weights: result of `get_weights`, or its copy in a file.
        policy: policy that the weights belong to, if there is one; its activation and squashing are read.
        what: name of the policy in messages.

    Raises:
        InputError: `Actor` cannot represent the policy.
    """
    activation: Activation = getattr(policy, "_activation", "relu")
    if not getattr(policy, "_squash", True):
        raise InputError(f"{what} is not squashed by tanh, as the kernels need it")
    if getattr(policy, "_deterministic", False):
        raise InputError(f"{what} is set to be deterministic; the kernels sample its actions")
    if (output := getattr(policy, "_output_activation", "linear")) != "linear":
        raise InputError(f"{what} has the output activation {output}; the kernels have none")
    check_method(policy, "actions_np", "softlearning", "keep the authors' loop over FakeEnv.step")
    try:
        arrays = [as_floats(array) for array in weights]
        kernels, biases = arrays[0::2], arrays[1::2]
        check_layers(kernels, ndim=2)
        actor = Actor(
            kernels[0].shape[0],
            kernels[-1].shape[1] // 2,
            hidden=tuple(kernel.shape[1] for kernel in kernels[:-1]),
            activation=activation,
        )
        pairs = [*zip(actor.weights, kernels, strict=True), *zip(actor.biases, biases, strict=True)]
        with torch.no_grad():
            for target, values in pairs:
                if target.shape != values.shape or not bool(torch.isfinite(values).all()):
                    raise InputError(
                        f"a layer must have finite numbers of shape {tuple(target.shape)}, got shape"
                        f" {tuple(values.shape)}"
                    )
                target.copy_(values)
    except (InputError, ValueError, IndexError, TypeError, RuntimeError) as error:
        raise InputError(f"{what} holds no feed-forward Gaussian policy: {error}") from error
    return actor


def _only(folder: Path, pattern: str) -> Path | None:
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise InputError(f"{folder} holds several models: {names}; name one of them")
    return found[0] if found else None


FILES = ("*.mat", "*.nns", "*.pkl")
"""Names of the files that `read` looks for in a folder."""


def read(source: Path, hints: Hints = Hints()) -> Checkpoint:  # noqa: B008
    """Read a model's NAME_STEP.mat, a checkpoint's .pkl, or a folder with at most one of each.

    The files do not store the elites: all members are elites unless `hints` names them. The activation is
    read from NAME_STEP.nns beside the .mat file. Without that file it is the one that `hints` names, or SiLU,
    the authors' default. Nothing in a pickle is run; only arrays are read from it.

    Raises:
        InputError: a file is missing or damaged, holds another kind of model, or the folder holds several.
    """
    if hints.absolute is not None:
        raise InputError("the authors' models predict changes of the observation; leave absolute out")
    if source.is_dir():
        mat, pkl = _only(source, "*.mat"), _only(source, "*.pkl")
    else:
        mat, pkl = (source, None) if source.suffix == ".mat" else (None, source)
    return Checkpoint(
        None if mat is None else _read_dynamics(mat, hints),
        None if pkl is None else _read_policy(pkl),
    )


def _read_dynamics(path: Path, hints: Hints) -> EnsembleDynamics:
    arrays = _load_mat(path)
    activation = hints.activation or "silu"
    structure = path.with_suffix(".nns")
    if structure.exists():
        if hints.activation is not None:
            raise InputError(f"{structure} stores the activation; leave it out")
        names = re.findall(r"activation='?(\w+)'?", _read_text(structure))
        if names[-1:] != ["None"]:
            raise InputError(f"{structure} does not end in a layer without activation")
        # The file of a model with one head repeats the last layer after every other one.
        activation = common_activation([name for name in names if name != "None"], str(structure))
    if hints.elites is None:
        logger.warning("%s does not store which members are elites: taking all of them", path)
    return ensemble_from(arrays, activation, hints.elites, str(path))


def _load_mat(path: Path) -> list[Array]:
    """Read the matrices named 0, 1, ... in a MATLAB file."""
    found = {name: array for name, array in matlab_files.load(path).items() if name.isdecimal()}
    for i in range(len(found)):
        if str(i) not in found:
            raise InputError(f"{path} lacks the array {i}")
        if found[str(i)] is None:
            raise InputError(f"{path}: the array {i} is no matrix of real floats")
    return [found[str(i)] for i in range(len(found))]


def _read_text(path: Path) -> str:
    try:
        if not path.is_file() or path.stat().st_size > _MAX_TEXT:
            raise InputError(f"{path} must be a text file of at most {_MAX_TEXT:,} bytes")
        return path.read_text(errors="replace")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _read_policy(path: Path) -> Actor:
    content = load(path, inert=None)
    if not isinstance(content, dict) or not isinstance(content.get("policy_weights"), list):
        raise InputError(f"{path} holds no list of policy_weights")
    return actor_from(content["policy_weights"], what=str(path))


def write(checkpoint: Checkpoint, target: Path) -> None:
    """Write a folder with BNN_0.mat, BNN_0.nns, BNN_0_var.nns and checkpoint.pkl.

    The authors' `construct_model(name="BNN_0", load_dir=target, separate_mean_var=True)` loads the model, and
    their simulate_policy.py the policy. The elites are not stored: the BNN chooses them at its next training.

    Raises:
        InputError: the authors' code cannot represent one of the models, or the folder cannot be
            written.
    """
    warn_of_changes(checkpoint, check_dynamics, check_policy)
    if checkpoint.dynamics is not None:
        _write_dynamics(checkpoint.dynamics, target)
    if checkpoint.policy is not None:
        _write_policy(checkpoint.policy, target / "checkpoint.pkl")


def check_dynamics(ensemble: EnsembleDynamics) -> list[str]:
    """Return a sentence about the elites if they are not all members.

    Raises:
        InputError: the authors' models lack a property of these dynamics.
    """
    check_kind(ensemble, "the authors' models", log_scale="variance")
    if len(ensemble.elites) == ensemble.members:
        return []
    elites = ensemble.elites.tolist()
    return [
        "the authors' files do not store the elites: the BNN chooses its own at its next training; to read"
        f" the files here, give --elites {' '.join(map(str, elites))}"
    ]


def check_policy(policy: Actor) -> list[str]:
    """Return a sentence about the bounds of the log-stds if they are not [-20, 2].

    Raises:
        InputError: the policy's activation is not ReLU.
    """
    check_activation(policy, "the authors' policies", "relu")
    return clipped_log_stds(policy, -20.0, 2.0, "the authors' code")


def _write_dynamics(model: EnsembleDynamics, folder: Path) -> None:
    # The import takes a tenth of a second, and no other function needs it.
    from scipy import io

    outputs = model.obs_dim + 1
    order = torch.arange(outputs).roll(1)

    def heads(tensor: torch.Tensor) -> list[torch.Tensor]:
        return [head[..., order] for head in tensor.chunk(2, -1)]

    weights = [*model.weights[:-1], *heads(model.weights[-1])]
    biases = [*model.biases[:-1], *heads(model.biases[-1])]
    tensors = [model.input_mean[None], model.input_std[None]]
    tensors += [t for w, b in zip(weights, biases, strict=True) for t in (w, b[:, None])]
    tensors += [model.max_logvar[None, order], model.min_logvar[None, order]]
    with atomic_path(folder / "BNN_0.mat") as temporary, open(temporary, "wb") as file:
        io.savemat(file, {str(i): tensor.detach().cpu().numpy() for i, tensor in enumerate(tensors)})
    names = [_ACTIVATION_NAMES[model.activation]] * len(model.hidden)
    decays: Sequence[float | None] = DynamicsConfig().weight_decay
    if len(decays) != len(model.weights):
        decays = [None] * len(model.weights)
    lines = [
        f"FC(output_dim={weight.shape[2]}, input_dim={weight.shape[1]}, activation={name!r},"
        f" weight_decay={decay!r}, ensemble_size={model.members})\n"
        for weight, name, decay in zip(weights, [*names, None, None], [*decays, decays[-1]], strict=True)
    ]
    for file_name, text in (("BNN_0.nns", lines[:-1]), ("BNN_0_var.nns", lines[-1:])):
        with atomic_path(folder / file_name) as temporary:
            temporary.write_text("".join(text))


def _write_policy(policy: Actor, path: Path) -> None:
    layers = zip(policy.weights, policy.biases, strict=True)
    weights = [tensor.detach().cpu().numpy() for layer in layers for tensor in layer]
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        # The newest protocol that Python 3.7, which the authors' code needs, can read.
        Pickler(file, protocol=4).dump({"policy_weights": weights})
