"""The files of OfflineRL-Kit: dynamics.pth, mu.npy, std.npy and policy.pth."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mopo_fast.compat import Checkpoint
from mopo_fast.compat.models import (
    actor_of,
    check_activation,
    check_kind,
    check_model,
    clipped_log_stds,
    ensemble_of,
    unstored_activation,
    warn_of_changes,
)
from mopo_fast.compat.torch_files import load_state, save, take
from mopo_fast.config import Hints
from mopo_fast.ensemble import EnsembleDynamics as Ensemble
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.utils.atomic import atomic_path
from mopo_fast.utils.machine import check_memory
from mopo_fast.utils.pickles import brief

Array = npt.NDArray[Any]

VERSION = "OfflineRL-Kit at commit e3ce697"
"""Version of the code base that this package was written for."""

FILES = ("dynamics.pth", "mu.npy", "std.npy", "policy.pth")
"""Names of the files that `read` looks for in a folder."""

# Default bounds of the log-stds in OfflineRL-Kit's TanhDiagGaussian.
_LOG_STD_BOUNDS = (-5.0, 2.0)


def as_floats(array: Any) -> torch.Tensor:
    """Return any numeric array as a float32 tensor, on the same memory where possible."""
    if isinstance(array, torch.Tensor):
        return array.to(torch.float32)
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.require(array, np.float32, ["C", "W"]))


def load_array(path: Path) -> Array:
    """Read an array of finite floats from a .npy file.

    Raises:
        InputError: the file is missing or damaged, or holds something else.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        # Mapped, so that a header that claims more data than the file has allocates nothing.
        mapped = np.lib.format.open_memmap(path, mode="r")
        # Twice: the array, and the temporary of its check.
        check_memory(f"{path}", 2 * mapped.nbytes, "cpu", "its size")
        array: Array = np.array(mapped)
    except InputError:
        raise
    # A damaged file can raise anything.
    except Exception as error:
        raise InputError(
            f"{path} is not a whole .npy file ({brief(error)}); download or make it again"
        ) from error
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise InputError(f"{path} must hold finite floats")
    return array


def save_files(folder: Path, state: dict[str, torch.Tensor], mu: Any, std: Any) -> None:
    """Write dynamics.pth, mu.npy and std.npy, each atomically."""
    save(folder / "dynamics.pth", state)
    for name, value in (("mu", mu), ("std", std)):
        content = io.BytesIO()
        np.save(content, np.asarray(value), allow_pickle=False)
        with atomic_path(folder / f"{name}.npy") as temporary:
            temporary.write_bytes(content.getbuffer())


def read(source: Path, hints: Hints = Hints()) -> Checkpoint:  # noqa: B008
    """Read the dynamics and the policy in a folder; either may be missing.

    The dynamics are dynamics.pth, mu.npy and std.npy; the policy is policy.pth, of which only the actor is
    read. The files do not store the activation of the dynamics: it is SiLU (Swish) unless `hints` names
    another.

    Raises:
        InputError: a file is damaged, or holds another kind of model.
    """
    dynamics = policy = None
    if (source / "dynamics.pth").exists():
        dynamics = _read_dynamics(source, hints)
    if (source / "policy.pth").exists():
        policy = _read_policy(source / "policy.pth")
    return Checkpoint(dynamics, policy)


def _read_dynamics(source: Path, hints: Hints) -> Ensemble:
    path = source / "dynamics.pth"
    state = load_state(path)
    depth = sum(name.startswith("backbones.") and name.endswith(".weight") for name in state)
    names = [*(f"backbones.{i}" for i in range(depth)), "output_layer"]
    mean, std = (as_floats(load_array(source / f"{name}.npy")) for name in ("mu", "std"))
    biases = [take(path, state, f"{name}.bias", 3) for name in names]
    if any(bias.shape[1] != 1 for bias in biases):
        raise InputError(f"{path}: biases must be [members, 1, out]")
    if hints.elites is None and "elites" not in state:
        raise InputError(f"{path} lacks elites")
    dynamics = ensemble_of(
        [take(path, state, f"{name}.weight", 3) for name in names],
        [bias[:, 0] for bias in biases],
        take(path, state, "max_logvar", 1),
        take(path, state, "min_logvar", 1),
        activation=hints.activation or "silu",
        input_mean=mean,
        input_std=std,
        elites=state["elites"].tolist() if hints.elites is None else hints.elites,
        absolute=hints.absolute or (),
    )
    check_model(path, dynamics)
    return dynamics


def _read_policy(path: Path) -> Actor:
    state = load_state(path)
    # Linear layers have even numbers; the odd ones are activations.
    depth = sum(name.startswith("actor.backbone.model.") and name.endswith(".weight") for name in state)
    names = [f"actor.backbone.model.{2 * i}" for i in range(depth)]
    heads = [
        [take(path, state, f"actor.dist_net.{head}.{kind}", ndim) for head in ("mu", "sigma")]
        for kind, ndim in (("weight", 2), ("bias", 1))
    ]
    if any(mu.shape != sigma.shape for mu, sigma in heads):
        raise InputError(f"{path}: mu and sigma must have layers of the same shape")
    weight, bias = map(torch.cat, heads)
    return actor_of(
        [take(path, state, f"{name}.weight", 2).T.contiguous() for name in names] + [weight.T.contiguous()],
        [take(path, state, f"{name}.bias", 1) for name in names] + [bias],
        activation="relu",
        log_std_min=_LOG_STD_BOUNDS[0],
        log_std_max=_LOG_STD_BOUNDS[1],
    )


def write(checkpoint: Checkpoint, target: Path) -> None:
    """Write dynamics.pth, mu.npy and std.npy for `EnsembleDynamics.load`, and policy.pth.

    A `Checkpoint` has no critics, so policy.pth holds the actor alone. Load it by
    `policy.load_state_dict(state, strict=False)`.

    Raises:
        InputError: OfflineRL-Kit cannot represent one of the models.
    """
    warn_of_changes(checkpoint, check_dynamics, check_policy)
    ensemble = checkpoint.dynamics
    if ensemble is not None:
        scale = (values.numpy()[None] for values in (ensemble.input_mean, ensemble.input_std))
        save_files(target, _dynamics_state(ensemble), *scale)
    if checkpoint.policy is not None:
        save(target / "policy.pth", _policy_state(checkpoint.policy))


def check_dynamics(ensemble: Ensemble) -> list[str]:
    """Return a sentence about the activation if it is not SiLU, which dynamics.pth does not store.

    Raises:
        InputError: OfflineRL-Kit's models lack a property of these dynamics.
    """
    check_kind(ensemble, "OfflineRL-Kit's models", log_scale="variance")
    return unstored_activation(ensemble, "dynamics.pth", "EnsembleDynamicsModel", "silu")


def check_policy(policy: Actor) -> list[str]:
    """Return a sentence about the bounds of the log-stds if they are not [-5, 2].

    Raises:
        InputError: the policy's activation is not ReLU.
    """
    check_activation(policy, "OfflineRL-Kit's policies", "relu")
    low, high = policy.log_std_min, policy.log_std_max
    advice = f"; to keep the bounds, build TanhDiagGaussian with sigma_min={low:g} and sigma_max={high:g}"
    return clipped_log_stds(policy, *_LOG_STD_BOUNDS, "OfflineRL-Kit", advice)


def _dynamics_state(ensemble: Ensemble) -> dict[str, torch.Tensor]:
    names = [*(f"backbones.{i}" for i in range(len(ensemble.hidden))), "output_layer"]
    state: dict[str, torch.Tensor] = {
        "max_logvar": ensemble.max_logvar.detach(),
        "min_logvar": ensemble.min_logvar.detach(),
        "elites": ensemble.elites,
    }
    for name, weight, bias in zip(names, ensemble.weights, ensemble.biases, strict=True):
        for prefix in ("", "saved_"):
            state[f"{name}.{prefix}weight"] = weight.detach()
            state[f"{name}.{prefix}bias"] = bias.detach()[:, None]
    return state


def _policy_state(policy: Actor) -> dict[str, torch.Tensor]:
    state = {}
    for i, (weight, bias) in enumerate(zip(policy.weights[:-1], policy.biases[:-1], strict=True)):
        state[f"actor.backbone.model.{2 * i}.weight"] = weight.detach().T.contiguous()
        state[f"actor.backbone.model.{2 * i}.bias"] = bias.detach()
    for kind, value in (("weight", policy.weights[-1].detach().T), ("bias", policy.biases[-1].detach())):
        for head, half in zip(("mu", "sigma"), value.chunk(2), strict=True):
            state[f"actor.dist_net.{head}.{kind}"] = half.contiguous()
    return state
