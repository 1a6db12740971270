"""Unifloral's files: a pickled EnsembleDynamics, called ensemble_dynamics_model_DATASET_TIME.pkl."""

import functools
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mopo_fast.compat import Checkpoint
from mopo_fast.compat.models import as_floats, check_first_layer, check_kind, check_model, warn_of_changes
from mopo_fast.compat.unifloral.rollouts import make_ensemble
from mopo_fast.config import Hints
from mopo_fast.ensemble import EnsembleDynamics, elites_of
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.utils.atomic import atomic_path
from mopo_fast.utils.pickles import NUMPY, from_buffer, load

# Unifloral's termination functions by the beginning of a data set's name, looked up in this order.
_TERMINATION_FUNCTIONS = {
    "halfcheetahvel": "termination_fn_halfcheetahveljump",
    "halfcheetah": "termination_fn_halfcheetah",
    "hopper": "termination_fn_hopper",
    "antangle": "termination_fn_antangle",
    "ant": "termination_fn_ant",
    "walker2d": "termination_fn_walker2d",
    "point2denv": "termination_fn_point2denv",
    "point2dwallenv": "termination_fn_point2dwallenv",
    "pendulum": "termination_fn_pendulum",
    "humanoid": "termination_fn_humanoid",
    "maze2d-open": "maze2d_open_termination_fn",
    "maze2d-umaze": "maze2d_umaze_termination_fn",
    "maze2d-medium": "maze2d_medium_termination_fn",
    "maze2d-large": "maze2d_large_termination_fn",
    "pen": "termination_fn_pen",
    "door": "terminaltion_fn_door",
    "relocate": "termination_fn_relocate",
    "kitchen": "termination_fn_kitchen",
}
# Names of the pickled class: dynamics.py was run as a script, or imported.
_CLASSES = ("__main__.EnsembleDynamics", "dynamics.EnsembleDynamics")
_INERT = {
    *_CLASSES,
    *(name + "Model" for name in _CLASSES),
    *(f"termination_fns.{name}" for name in _TERMINATION_FUNCTIONS.values()),
    # State of a Flax module.
    "flax.ids.FlaxId",
    "flax.linen.module.SetupState",
    "flax.linen.module._ModuleInternalState",
}


def _rebuild_jax_array(make: Any, arguments: Any, state: Any, _: Any) -> Any:
    """Rebuild the NumPy array that a pickled JAX array is made of."""
    array = make(*arguments)
    array.__setstate__(state)
    return array


_ALLOWED: dict[str, Callable[..., Any]] = {
    **NUMPY,
    "flax.core.frozen_dict.FrozenDict": lambda tree: tree,
    "jax._src.array._reconstruct_array": _rebuild_jax_array,
    # `write` pickles arrays by these two.
    "jax.numpy.asarray": lambda array: array,
    "numpy.ndarray": lambda shape, kind, content: from_buffer(content, kind, shape, "C"),
}


FILES: tuple[str, ...] = ()
"""A checkpoint is one file, so `read` takes no folder."""


def read(source: Path, hints: Hints = Hints()) -> Checkpoint:  # noqa: B008
    """Read a pickled EnsembleDynamics. It holds elites alone, so all members become elites.

    MOReL's statistics (discrepancy, min_r) are left out.

    Raises:
        InputError: see `Format.read`.
    """
    if hints.absolute:
        raise InputError("Unifloral's dynamics predict changes of the observation; leave absolute out")
    found = load(source, _ALLOWED, _INERT)
    if type(found).__name__ != "EnsembleDynamics" or not isinstance(found.state, dict):
        raise InputError(f"{source} holds no EnsembleDynamics of Unifloral")
    try:
        dynamics = make_ensemble(
            found.state.get("params"),
            functools.partial(as_floats, what="a parameter"),
            hints.activation or "relu",
        )
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    check_model(source, dynamics)
    if hints.elites is not None:
        dynamics.elites = torch.tensor(elites_of(hints.elites, dynamics.members))
    return Checkpoint(dynamics)


def check_dynamics(ensemble: EnsembleDynamics) -> list[str]:
    """Return a sentence about members that are no elites, which Unifloral's files leave out.

    Raises:
        InputError: Unifloral's dynamics lack a property of these dynamics.
    """
    if ensemble.activation != "relu" or len(set(ensemble.hidden)) != 1:
        raise InputError(
            "Unifloral's dynamics have ReLU and hidden layers of one width; these have"
            f" {ensemble.activation} and widths {ensemble.hidden}"
        )
    check_kind(ensemble, "Unifloral's dynamics", log_scale="variance")
    if len(ensemble.elites) == ensemble.members:
        return []
    return [
        f"Unifloral's files hold elites alone: {ensemble.members - len(ensemble.elites)} of"
        f" {ensemble.members} members are left out, and its penalty is the maximum over the elites alone"
    ]


def check_policy(policy: Actor) -> list[str]:
    """Refuse every policy.

    Raises:
        InputError: always.
    """
    raise InputError("Unifloral has no file for a policy alone")


def write(checkpoint: Checkpoint, target: Path) -> None:
    """Write a pickle for Unifloral's `load_dynamics_model`, without importing Unifloral, Flax or JAX.

    As in Unifloral's files, it holds the elites alone. The input scale is moved into the first layer.

    Args:
        checkpoint: dynamics, without a policy: Unifloral has no file for one.
        target: file whose name contains the data set's name, as in Unifloral. It decides the termination
            function.

    Raises:
        InputError: see `Format.write`.
    """
    model = checkpoint.dynamics
    if model is None:
        raise InputError("Unifloral's files hold dynamics, and there are none")
    dataset = target.name.removeprefix("ensemble_dynamics_model_")
    beginning = next((known for known in _TERMINATION_FUNCTIONS if dataset.startswith(known)), None)
    if beginning is None:
        raise InputError(
            f"{target.name} must name the data set, which decides the termination function; for example"
            " ensemble_dynamics_model_hopper-medium-v2.pkl"
        )
    warn_of_changes(checkpoint, check_dynamics, check_policy)
    weights = [weight.detach()[model.elites] for weight in model.weights]
    biases = [bias.detach()[model.elites] for bias in model.biases]
    biases[0] = biases[0] - (model.input_mean / model.input_std) @ weights[0]
    weights[0] = weights[0] / model.input_std.unsqueeze(-1)
    check_first_layer(weights[0], biases[0])
    layers = {
        f"Dense_{i}": {"kernel": w, "bias": b} for i, (w, b) in enumerate(zip(weights, biases, strict=True))
    }
    params = {"ensemble": layers, "max_logvar": model.max_logvar, "min_logvar": model.min_logvar}
    members, sizes = len(model.elites), (len(model.hidden), model.hidden[0])
    state = {
        "num_ensemble": members,
        "dynamics_model": _Call(
            "dynamics.EnsembleDynamicsModel", (model.obs_dim, model.act_dim, members, *sizes)
        ),
        "params": _Call("flax.core.frozen_dict.FrozenDict", ({"params": params},)),
        "termination_fn": _Global(f"termination_fns.{_TERMINATION_FUNCTIONS[beginning]}"),
        "discrepancy": None,
        "min_r": None,
        "dataset": None,
    }
    made = _encode(_Global("dynamics.EnsembleDynamics")) + pickle.EMPTY_TUPLE + pickle.NEWOBJ
    with atomic_path(target) as temporary:
        temporary.write_bytes(pickle.PROTO + b"\x03" + made + _encode(state) + pickle.BUILD + pickle.STOP)


class _Global(str):
    """Global that a pickle refers to, as "module.name"."""


@dataclass(frozen=True)
class _Call:
    """Call that a pickle makes when it is loaded."""

    function: str
    arguments: tuple[Any, ...]


def _encode(value: Any) -> bytes:
    """Return the pickle opcodes that push `value` on the stack.

    Python's own pickler is not used because it imports every class that it names.
    """
    if isinstance(value, _Global):
        return pickle.GLOBAL + "{}\n{}\n".format(*value.rsplit(".", 1)).encode()
    if isinstance(value, _Call):
        arguments = b"".join(map(_encode, value.arguments))
        return _encode(_Global(value.function)) + pickle.MARK + arguments + pickle.TUPLE + pickle.REDUCE
    if isinstance(value, dict):
        items = b"".join(_encode(key) + _encode(entry) for key, entry in value.items())
        return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    if isinstance(value, torch.Tensor):
        array = value.detach().cpu().numpy().astype("<f4")
        return _encode(
            _Call("jax.numpy.asarray", (_Call("numpy.ndarray", (array.shape, "<f4", array.tobytes())),))
        )
    return pickle.dumps(value, protocol=3)[2:-1]
