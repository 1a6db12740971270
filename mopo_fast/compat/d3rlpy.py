"""Adapter for d3rlpy 1.x: its `ProbabilisticEnsembleDynamics` and SAC updates on kernels, and its files.

    from mopo_fast.compat.d3rlpy import accelerate, fuse_updates
    mopo = d3rlpy.algos.MOPO(dynamics=accelerate(dynamics))
    mopo.build_with_dataset(dataset)
    fuse_updates(mopo)

d3rlpy's penalty is the largest sum of variances over the members. MOPO's is the square root of that sum.
d3rlpy computes it in the space of the scaled observations and rewards.

Source: d3rlpy 1.1.1.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mopo_fast.compat import Checkpoint
from mopo_fast.compat.models import (
    activation_of,
    actor_of,
    check_attributes,
    check_first_layer,
    check_kind,
    check_method,
    check_model,
    ensemble_of,
    unstored_activation,
    warn_of_changes,
)
from mopo_fast.compat.torch_files import as_state, load, save, take
from mopo_fast.compat.torch_sac import Modules, SharedSAC, as_flags, draw_all, shared_with, start_over
from mopo_fast.config import MAX_MEMBERS, Hints, SACConfig, TrainingDtype
from mopo_fast.data.transitions import Transitions
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine
from mopo_fast.utils.atomic import read_json_as
from mopo_fast.utils.pickles import brief

Prediction = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

VERSION = "d3rlpy 1.1.1"
# Attributes that are read here: of the dynamics' implementation, a member and an encoder, of SAC's
# implementation, and of a policy and a Q function.
_DYNAMICS = ("_dynamics", "_variance_type")
_MEMBER = ("_encoder", "_mu", "_logstd", "_max_logstd", "_min_logstd")
_ENCODER = ("_activation", "_use_batch_norm", "_dropout_rate", "_use_dense")
_IMPL = (
    *("_policy", "_q_func", "_targ_q_func", "_actor_optim", "_critic_optim", "_log_temp", "_gamma", "_tau"),
    *("update_temp", "update_actor_target", "scaler", "action_scaler", "reward_scaler"),
)
_POLICY = ("_encoder", "_mu", "_logstd", "_min_logstd", "_max_logstd", "_use_std_parameter")
_Q_FUNCTION = ("_encoder", "_fc")


def accelerate(
    dynamics: Any, *, backend: str = "auto", dtype: str = "float32", threads: int | None = None
) -> Any:
    """Replace the prediction of a ProbabilisticEnsembleDynamics by one kernel call.

    Scalers, files and training stay d3rlpy's. The weights are read at every call, with spectral norms divided
    out. Random numbers come from torch's global generator, as in d3rlpy. If `indices` does not name the
    members, members and noise come from a seed drawn from that generator.

    Args:
        dynamics: dynamics that have a model: fitted, loaded, or after `build_with_dataset`.
        backend: backend of `RolloutEngine`.
        dtype: precision of the matrix products, see `RolloutEngine`.
        threads: number of CPU threads, see `RolloutEngine`.

    Returns:
        `dynamics` itself.

    Raises:
        InputError: the dynamics have no model yet, or the kernels do not support its encoder; the message
            says why.
    """
    impl = getattr(dynamics, "_impl", None)
    if impl is None or not hasattr(impl, "_dynamics"):
        raise InputError("the dynamics have no model yet: fit or build them first (build_with_dataset)")
    check_attributes(impl, _DYNAMICS, VERSION)
    check_method(impl, "_predict", "d3rlpy", "leave accelerate out")
    options: dict[str, Any] = {"backend": backend, "dtype": dtype, "threads": threads}
    ensemble_over(impl._dynamics)

    def predict(x: torch.Tensor, action: torch.Tensor, indices: torch.Tensor | None) -> Prediction:
        engine = RolloutEngine(ensemble_over(impl._dynamics), penalty_coef=0.0, penalties=True, **options)
        return _predict(engine, x, action, indices, impl._variance_type)

    impl._predict = predict
    return dynamics


def _predict(
    engine: RolloutEngine,
    x: torch.Tensor,
    action: torch.Tensor,
    indices: torch.Tensor | None,
    variance_type: str,
) -> Prediction:
    """Return next observations [batch, obs_dim], rewards [batch, 1] and variances [batch, 1]."""
    if variance_type not in ("max", "data"):
        raise InputError(f'variance_type must be "max" or "data", got {variance_type!r}')
    seed = int(torch.randint(2**63 - 1, (1,)))
    sample_all = indices is not None or variance_type == "data"
    result = engine.step(x, action, seed=seed, distributions=sample_all)
    assert result.penalties is not None
    largest = result.penalties.square()[:, None]
    if not sample_all:
        return result.next_observations, result.raw_rewards[:, None], largest
    assert result.mean is not None and result.std is not None
    samples = result.mean + result.std * torch.randn_like(result.std)
    members, rows = len(samples), torch.arange(len(x), device=x.device)
    if indices is None:
        indices = torch.randint(members, size=(len(x),), device=x.device)
    drawn = samples[indices.long(), rows]
    # Samples are changes: adding the same observation to each would not change their variance.
    spread = samples.var(0).sum(1, keepdim=True)
    return x + drawn[:, :-1], drawn[:, -1:], largest if variance_type == "max" else spread


def ensemble_over(model: Any) -> EnsembleDynamics:
    """Convert a ProbabilisticEnsembleDynamicsModel, with its current weights, to this package's ensemble.

    Raises:
        InputError: an encoder is for pixels or discrete actions, has batch normalisation, dropout or dense
            connections, or has an activation that the kernels do not have.
    """
    check_method(model, "forward", "d3rlpy", "leave accelerate out")
    check_attributes(model, ("_models",), VERSION)
    members = list(model._models)
    for member in members:
        check_attributes(member, _MEMBER, VERSION)
        _check_encoder(member._encoder)
    return _ensemble(
        [member.state_dict() for member in members], activation_of(members[0]._encoder._activation)
    )


def _check_encoder(encoder: Any) -> None:
    if not hasattr(encoder, "_fcs"):
        raise InputError(f"the encoder is {type(encoder).__name__}; the kernels take vector observations")
    check_attributes(encoder, _ENCODER, VERSION)
    if encoder._use_batch_norm or encoder._dropout_rate is not None or encoder._use_dense:
        raise InputError(
            "the encoder has batch norms, dropout or dense connections; the kernels have none of these"
        )
    if getattr(encoder, "_discrete_action", False):
        raise InputError("the actions are discrete; the kernels take continuous ones")


def _weight(state: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return a layer's weight [in, out], with torch.nn.utils.spectral_norm divided out if it has one."""
    if f"{name}.weight" in state:
        return state[f"{name}.weight"].detach().T
    weight = state[f"{name}.weight_orig"].detach()
    norm = torch.dot(state[f"{name}.weight_u"], weight @ state[f"{name}.weight_v"])
    return (weight / norm).T


def _ensemble(
    states: list[dict[str, torch.Tensor]], activation: Any, elites: tuple[int, ...] | None = None
) -> EnsembleDynamics:
    """Build the ensemble from each member's state dict, with its two heads as one layer."""
    depth = sum(name.startswith("_encoder._fcs.") and name.endswith(".bias") for name in states[0])
    layers = [[f"_encoder._fcs.{i}"] for i in range(depth)] + [["_mu", "_logstd"]]
    return ensemble_of(
        [torch.stack([torch.cat([_weight(s, n) for n in names], 1) for s in states]) for names in layers],
        [torch.stack([torch.cat([s[f"{n}.bias"] for n in names]) for s in states]) for names in layers],
        torch.stack([state["_max_logstd"][0] for state in states]),
        torch.stack([state["_min_logstd"][0] for state in states]),
        activation=activation,
        elites=elites,
        log_scale="std",
    )


# --- updates of SAC

# The algorithms whose `_update` is known, and the classes of the methods that it calls.
_ALGORITHMS, _IMPLS = ("MOPO", "SAC"), ("SACImpl", "DDPGBaseImpl")
_WITHOUT_UPDATES = "leave fuse_updates out: d3rlpy's own updates stay"


def fuse_updates(
    algo: Any, *, dtype: TrainingDtype = "float32", backend: str = "auto", threads: int | None = None
) -> Any:
    """Let MOPO or SAC step its critics, its actor and the target critics in one kernel call.

    The losses, the hyperparameters, the order of the steps and the metrics stay d3rlpy's. The temperature's
    step, which draws actions of its own, stays with `SACImpl.update_temp`. Parameters and the moments in the
    optimizers change in place, so that predictions and `save_model` see them as before. The noise of the
    kernel's actions is keyed by a seed from torch's global generator.

    Args:
        algo: MOPO or SAC on the CPU whose networks exist: after `build_with_dataset`, `fit` or `load_model`.
            Its encoders are vector encoders of equal widths with ReLU, its Q functions are "mean", n_steps
            and update_actor_interval are 1, and the optimizers of the actor and the critics are
            torch.optim.Adam with its defaults except for the learning rates.
        dtype: precision of the matrix products, see `SACConfig.dtype`.
        backend: backend of `SAC`.
        threads: number of CPU threads, see `SAC`.

    Returns:
        `algo` itself.

    Raises:
        InputError: the networks do not exist yet, or the kernels do not support the algorithm. The message
            names the reason.
    """
    check_method(algo, "_update", "d3rlpy", _WITHOUT_UPDATES, _ALGORITHMS)
    impl = getattr(algo, "_impl", None)
    if impl is None:
        raise InputError("the algorithm has no networks yet: build them first (build_with_dataset)")
    _check_updates(algo, impl)
    # On the implementation: get_params would take an attribute of the algorithm for a hyperparameter.
    start_over(impl, dtype, backend, threads)
    _shared_sac(impl)
    # A copy of the algorithm has a copy of this, for itself.
    algo._update = functools.partial(_update, algo)
    return algo


def _check_updates(algo: Any, impl: Any) -> None:
    losses = ("compute_target", "compute_critic_loss", "compute_actor_loss")
    for method in ("update_critic", "update_actor", "update_critic_target", *losses):
        check_method(impl, method, "d3rlpy", _WITHOUT_UPDATES, _IMPLS)
    for name in ("n_steps", "update_actor_interval"):
        if (value := getattr(algo, f"_{name}", 1)) != 1:
            raise InputError(f"the updates take {name} 1, got {value}; {_WITHOUT_UPDATES}")
    check_attributes(algo, ("_temp_learning_rate",), VERSION)
    check_attributes(impl, _IMPL, VERSION)
    for q_func in (impl._q_func, impl._targ_q_func):
        check_attributes(q_func, ("_q_funcs",), VERSION)
    policy, critics = impl._policy, list(impl._q_func._q_funcs)
    for network in (policy, *critics):
        check_method(network, "forward", "d3rlpy", _WITHOUT_UPDATES)
    known = type(policy).__name__ == "SquashedNormalPolicy"
    if known:
        check_attributes(policy, _POLICY, VERSION)
    if not known or policy._use_std_parameter:
        raise InputError(f"the updates take a SquashedNormalPolicy, got {type(policy).__name__}")
    for network in (policy, *critics):
        if network is not policy and type(network).__name__ != "ContinuousMeanQFunction":
            raise InputError(f'the updates take the Q function "mean", got {type(network).__name__}')
        if network is not policy:
            check_attributes(network, _Q_FUNCTION, VERSION)
        _check_encoder(network._encoder)
        if sum(one._encoder is network._encoder for one in critics) > 1:
            raise InputError(f"the critics share an encoder, each needs its own; {_WITHOUT_UPDATES}")
        if activation_of(network._encoder._activation) != "relu":
            raise InputError(f"the updates take encoders with ReLU, got {network._encoder._activation}")


def _shared_sac(impl: Any) -> SharedSAC:
    if not hasattr(impl, "_mopo_fast"):
        raise InputError("the algorithm's networks have been built anew; call fuse_updates again")
    return shared_with(impl, _modules(impl), functools.partial(_sac_config, impl))


def _sac_config(impl: Any) -> SACConfig:
    """Return the hyperparameters that a SACImpl has now, without the learning rates."""
    policy = impl._policy
    return SACConfig(
        hidden=tuple(layer.out_features for layer in policy._encoder._fcs),
        critics=len(impl._q_func._q_funcs),
        log_std_min=policy._min_logstd,
        log_std_max=policy._max_logstd,
        target_entropy=0.0,
        critic_loss="mse",
        order="critic_first",
        discount=impl._gamma,
        polyak=impl._tau,
        dtype=impl._mopo_fast["dtype"],
    )


def _modules(impl: Any) -> Modules:
    """Return the layers and the optimizers of a SACImpl."""
    policy = impl._policy
    critics, targets = (
        [[*one._encoder._fcs, one._fc] for one in q_func._q_funcs]
        for q_func in (impl._q_func, impl._targ_q_func)
    )
    return Modules(
        actor=[*policy._encoder._fcs, policy._mu, policy._logstd],
        critics=critics,
        targets=targets,
        actor_optimizer=impl._actor_optim,
        critic_optimizers=[impl._critic_optim],
        alpha=_alpha(impl),
    )


def _alpha(impl: Any) -> float:
    return math.exp(impl._log_temp.data.item())


def _update(algo: Any, batch: Any) -> dict[str, Any]:
    """Stand in for `_update` of MOPO or SAC."""
    impl = algo._impl
    shared, rows = _shared_sac(impl), _rows(impl, batch)
    owner = next(kind for kind in type(algo).__mro__ if "_update" in vars(kind))
    metrics: dict[str, Any] = {}

    def update_temp() -> None:
        if algo._temp_learning_rate > 0:
            metrics["temp_loss"], metrics["temp"] = impl.update_temp(batch)

    if owner.__name__ == "SAC":
        update_temp()
    draws = draw_all(rows, int(torch.randint(2**63 - 1, (1,))))
    losses = shared.update(draws, _sac_config(impl), _alpha(impl)).metrics
    metrics |= {name: np.float32(losses[name]) for name in ("critic_loss", "actor_loss")}
    if owner.__name__ == "MOPO":
        update_temp()
    impl.update_actor_target()
    return metrics


def _rows(impl: Any, batch: Any) -> Transitions:
    """Return a TransitionMiniBatch, scaled as d3rlpy scales it.

    Raises:
        InputError: a terminal is neither 0 nor 1, or rewards are sums over several steps.
    """
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "n_steps")
    arrays: dict[str, Any] = {
        name: torch.as_tensor(getattr(batch, name), dtype=torch.float32) for name in names
    }
    for name, scaler in {
        "observations": impl.scaler,
        "next_observations": impl.scaler,
        "actions": impl.action_scaler,
        "rewards": impl.reward_scaler,
    }.items():
        if scaler:
            arrays[name] = scaler.transform(arrays[name]).float().contiguous()
    if not bool((arrays.pop("n_steps") == 1.0).all()):
        raise InputError("the updates take transitions of one step; leave n_steps at 1")
    arrays["rewards"] = arrays["rewards"][:, 0]
    arrays["terminals"] = as_flags("terminals", arrays["terminals"][:, 0])
    return Transitions(**arrays)


# --- files


FILES: tuple[str, ...] = ()
"""A checkpoint is one file, so `read` takes no folder."""


def read(source: Path, hints: Hints = Hints()) -> Checkpoint:  # noqa: B008
    """Read a file written by `save_model` of dynamics, or of an algorithm with a SAC or MOPO policy.

    If params.json lies beside it, its scalers become part of the dynamics. The dynamics then take and return
    unscaled observations, actions and rewards, and their penalties are in unscaled units. The file does not
    store the activation: it is ReLU unless `hints` names another.

    Raises:
        InputError: the file is damaged, holds something else, or has a scaler that cannot become part of a
            model.
    """
    content = load(source)
    if not isinstance(content, dict) or not {"_dynamics", "_policy"} & content.keys():
        raise InputError(f"{source} holds neither dynamics nor a policy saved by save_model")
    model: EnsembleDynamics | Actor
    try:
        if "_policy" in content:
            model = _read_policy(_floats(source, content["_policy"]))
        else:
            states = _members(_floats(source, content["_dynamics"]))
            model = _ensemble(states, hints.activation or "relu", hints.elites)
    except InputError:
        raise
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{source} lacks a tensor or holds a damaged one ({brief(error)})") from error
    check_model(source, model)
    if isinstance(model, Actor):
        return Checkpoint(policy=model)
    if hints.absolute:
        raise InputError("d3rlpy's models predict changes; leave absolute out")
    path = source.parent / "params.json"
    if path.exists():
        _unscale(path, model, read_json_as(path, _Parameters))
        check_model(path, model)
    return Checkpoint(model)


_DIMENSIONS = {
    "weight": 2,
    "weight_orig": 2,
    **dict.fromkeys(("bias", "weight_u", "weight_v"), 1),
    **dict.fromkeys(("_max_logstd", "_min_logstd"), 2),
}


def _floats(source: Path, state: Any) -> dict[str, torch.Tensor]:
    """Return a state dict after checking each known tensor's type and number of dimensions."""
    found = as_state(source, state)
    for name in found:
        if (kind := name.rpartition(".")[2]) in _DIMENSIONS:
            take(source, found, name, _DIMENSIONS[kind])
    return found


def _members(state: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Split the tensors named _models.MEMBER.NAME into one state dict for each member."""
    states: list[dict[str, torch.Tensor]] = []
    for name, value in state.items():
        _, member, parameter = name.split(".", 2)
        if int(member) == len(states) < MAX_MEMBERS:
            states.append({})
        states[int(member)][parameter] = value
    return states


def _read_policy(state: dict[str, torch.Tensor]) -> Actor:
    depth = sum(name.startswith("_encoder._fcs.") and name.endswith(".bias") for name in state)
    layers = [[f"_encoder._fcs.{i}"] for i in range(depth)] + [["_mu", "_logstd"]]
    return actor_of(
        [torch.cat([state[f"{n}.weight"].T for n in names], 1) for names in layers],
        [torch.cat([state[f"{n}.bias"] for n in names]) for names in layers],
        activation="relu",
        log_std_min=-20.0,
        log_std_max=2.0,
    )


@dataclass(frozen=True)
class _Scaler:
    type: str
    params: dict[str, float | list[float] | None]


@dataclass(frozen=True)
class _Parameters:
    """The fields of params.json that are read."""

    scaler: _Scaler | None = None
    action_scaler: _Scaler | None = None
    reward_scaler: _Scaler | None = None


# For each type of scaler, a function of its parameters. It returns the offset and the scale in
# value = offset + scale * scaled_value.
Numbers = Callable[[str], torch.Tensor]
Scalers = dict[str, Callable[[Numbers], tuple[torch.Tensor, torch.Tensor]]]
_OBSERVATION: Scalers = {
    "standard": lambda p: (p("mean"), p("std") + p("eps")),
    "min_max": lambda p: (p("minimum"), p("maximum") - p("minimum")),
}
_ACTION: Scalers = {
    "min_max": lambda p: ((p("maximum") + p("minimum")) / 2, (p("maximum") - p("minimum")) / 2),
}
_REWARD: Scalers = {
    "standard": lambda p: (p("mean"), (p("std") + p("eps")) / p("multiplier")),
    "min_max": lambda p: (p("minimum"), (p("maximum") - p("minimum")) / p("multiplier")),
    "multiply": lambda p: (torch.zeros(1), 1.0 / p("multiplier")),
}


@torch.no_grad()
def _unscale(path: Path, ensemble: EnsembleDynamics, parameters: _Parameters) -> None:
    """Move the scalers into the input scale, the last layer and the bounds of an ensemble."""

    def scale(key: str, known: Scalers, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        scaler: _Scaler | None = getattr(parameters, key)
        if scaler is None:
            return torch.zeros(size), torch.ones(size)
        if scaler.type not in known:
            raise InputError(
                f"{path}: {key} {scaler.type[:50]} cannot be part of a model: only {', '.join(known)}"
            )

        def numbers(name: str) -> torch.Tensor:
            values = scaler.params.get(name)
            tensor = torch.tensor([] if values is None else values, dtype=torch.float64).reshape(-1)
            if len(tensor) not in (1, size):
                raise InputError(f"{path}: {key} has {len(tensor)} numbers in {name}, expected {size}")
            return tensor.expand(size)

        offset, factor = (values.float() for values in known[scaler.type](numbers))
        if not bool(offset.isfinite().all() and factor.isfinite().all() and (factor > 0).all()):
            raise InputError(f"{path}: {key} must have finite numbers, and scales above 0")
        return offset, factor

    obs_offset, obs_scale = scale("scaler", _OBSERVATION, ensemble.obs_dim)
    act_offset, act_scale = scale("action_scaler", _ACTION, ensemble.act_dim)
    reward_offset, reward_scale = scale("reward_scaler", _REWARD, 1)
    ensemble.input_mean = torch.cat([obs_offset, act_offset])
    ensemble.input_std = torch.cat([obs_scale, act_scale])
    dims = ensemble.obs_dim + 1
    factor = torch.cat([obs_scale, reward_scale])
    weight, bias = ensemble.weights[-1], ensemble.biases[-1]
    weight[..., :dims] *= factor
    bias[..., :dims] *= factor
    bias[..., dims - 1] += reward_offset
    # Shifting the log-std and both soft bounds by the same amount shifts the bounded log-std by it.
    for shifted in (bias[..., dims:], ensemble.max_logvar, ensemble.min_logvar):
        shifted += factor.log()


def check_dynamics(ensemble: EnsembleDynamics) -> list[str]:
    """Return a sentence about each property of the dynamics that the file loses.

    Raises:
        InputError: d3rlpy's models lack a property of these dynamics.
    """
    check_kind(ensemble, "d3rlpy's models", log_scale="std", member_bounds=True)
    changes = unstored_activation(ensemble, "d3rlpy's file", "ProbabilisticEnsembleDynamics", "relu")
    if len(ensemble.elites) < ensemble.members:
        changes.append(
            "d3rlpy has no elites: it draws from all"
            f" {ensemble.members} members, not from {len(ensemble.elites)} of them"
        )
    return changes


def check_policy(policy: Actor) -> list[str]:
    """Refuse every policy.

    Raises:
        InputError: always.
    """
    raise InputError("d3rlpy has no file for a policy without its critics and optimizers")


def write(checkpoint: Checkpoint, target: Path) -> None:
    """Write a file for `load_model` of a ProbabilisticEnsembleDynamics with as many members and layers.

    d3rlpy normalises the mean's layer by its spectral norm. The stored vectors make that norm 1, so that the
    loaded weights equal the ensemble's; further training in d3rlpy uses the true norm. The optimizer's
    state is a new one.

    Raises:
        InputError: d3rlpy cannot represent the dynamics, or there is a policy, which d3rlpy stores only
            together with its critics and optimizers.
    """
    ensemble = checkpoint.dynamics
    if ensemble is None:
        raise InputError("d3rlpy's file holds dynamics, and there are none")
    warn_of_changes(checkpoint, check_dynamics, check_policy)
    scaled = bool((ensemble.input_mean != 0).any() or (ensemble.input_std != 1).any())
    state: dict[str, torch.Tensor] = {}
    weights, biases = (
        [w.detach().clone() for w in ensemble.weights],
        [b.detach().clone() for b in ensemble.biases],
    )
    if scaled:
        # d3rlpy's model has no input scale: move it into the first layer.
        weights[0] /= ensemble.input_std[:, None]
        biases[0] -= torch.einsum("i,mio->mo", ensemble.input_mean, weights[0])
        check_first_layer(weights[0], biases[0])
    for member in range(ensemble.members):
        prefix = f"_models.{member}"
        for layer in range(len(weights) - 1):
            # d3rlpy leaves the encoder's layers without a spectral norm.
            name = f"{prefix}._encoder._fcs.{layer}"
            state[f"{name}.weight"] = weights[layer][member].T.contiguous()
            state[f"{name}.bias"] = biases[layer][member].clone()
        mean, log = weights[-1][member].chunk(2, dim=1)
        mean_bias, log_bias = biases[-1][member].chunk(2)
        _write_normed(state, f"{prefix}._mu", mean, mean_bias)
        state[f"{prefix}._logstd.weight"] = log.T.contiguous()
        state[f"{prefix}._logstd.bias"] = log_bias.clone()
        for name in ("max", "min"):
            bound = getattr(ensemble, f"{name}_logvar").detach().expand(ensemble.members, -1)
            state[f"{prefix}._{name}_logstd"] = bound[member][None].clone()
    trained = [value for name, value in state.items() if not name.endswith(("_u", "_v"))]
    optimizer = torch.optim.Adam([torch.nn.Parameter(value) for value in trained], lr=1e-3, weight_decay=1e-4)
    save(target, {"_dynamics": state, "_optim": optimizer.state_dict()})


def _write_normed(
    state: dict[str, torch.Tensor], name: str, weight: torch.Tensor, bias: torch.Tensor
) -> None:
    """Write a layer under torch.nn.utils.spectral_norm with vectors u, v such that its norm u W v is 1."""
    matrix = weight.T.contiguous()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    # A layer that comes from d3rlpy has norm 1 already, and so keeps unit vectors.
    root = math.sqrt(float(values[0])) if float(values[0]) > 0 else 1.0
    state[f"{name}.bias"] = bias.clone()
    state[f"{name}.weight_orig"] = matrix
    state[f"{name}.weight_u"] = left[:, 0] / root
    state[f"{name}.weight_v"] = right[0] / root
