"""Adapter for Polixir's OfflineRL: predictions of its ensemble on fused kernels, and its files.

In `offlinerl/algo/modelbase/mopo.py`, wrap the ensemble at the beginning of `train_policy`:

    from mopo_fast.compat.polixir import FastTransition
    transition = FastTransition(transition)

Source: github.com/polixir/OfflineRL, commit a7db458: offlinerl/utils/net/model/ensemble.py, tanhpolicy.py,
offlinerl/algo/modelbase/mopo.py.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mopo_fast.compat import Checkpoint
from mopo_fast.compat.models import (
    activation_of,
    check_activation,
    check_attributes,
    check_kind,
    check_method,
    check_model,
    clipped_log_stds,
    warn_of_changes,
)
from mopo_fast.compat.torch_files import load
from mopo_fast.config import Hints
from mopo_fast.ensemble import EnsembleDynamics, elites_of
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine
from mopo_fast.utils.atomic import atomic_path
from mopo_fast.utils.pickles import Inert, Pickler, brief
from mopo_fast.utils.tensors import check_layers

VERSION = "Polixir's OfflineRL at commit a7db458"
# Attributes that are read here: of an EnsembleTransition and of its last layer.
_TRANSITION = (
    *("backbones", "output_layer", "max_logstd", "min_logstd", "mode", "with_reward", "obs_dim"),
    *("obs_mean", "obs_std"),
)
_LAYER = ("weight", "bias", "select")

# Added to the standard deviation that observations are divided by.
_EPSILON = 1e-8
_LOG_STD_MIN, _LOG_STD_MAX = -5.0, 2.0
# Activations of Polixir's policies.
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": functools.partial(nn.ReLU, inplace=True),
    "tanh": nn.Tanh,
}


class FastTransition:
    """Wrapper of an `EnsembleTransition` that predicts a batch by this package's kernels.

    Calls that need gradients, calls with an own input for each member, and all other attributes are passed on
    to `transition`.

    Args:
        transition: Polixir's EnsembleTransition. Its weights are read at every call, so it may be trained in
            between. Its selected members make the predictions.
        backend: backend of `RolloutEngine`.
        dtype: precision of the matrix products, see `RolloutEngine`.
        threads: number of CPU threads, see `RolloutEngine`.

    Raises:
        InputError: the transition predicts no reward, an attribute is missing, or see `RolloutEngine`.
    """

    def __init__(
        self, transition: Any, *, backend: str = "auto", dtype: str = "float32", threads: int | None = None
    ) -> None:
        check_method(transition, "forward", "offlinerl", "use the transition without FastTransition")
        check_attributes(transition, _TRANSITION, VERSION)
        check_attributes(transition.output_layer, _LAYER, VERSION)
        self.transition = transition
        self._options: dict[str, Any] = {"backend": backend, "dtype": dtype, "threads": threads}
        self._engine = self._make_engine()

    def __call__(self, obs_action: torch.Tensor) -> torch.distributions.Normal:
        """Predict the distribution of the next observation and the reward.

        Samples of it come from torch's global generator, as in the original.

        Args:
            obs_action: observations and actions [batch, obs_dim + act_dim], finite.

        Returns:
            A Normal [selected, batch, obs_dim + 1].

        Raises:
            InputError: see `RolloutEngine.step`.
        """
        transition = self.transition
        parameters = (obs_action, *transition.parameters())
        needs_grad = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        if needs_grad or obs_action.ndim != 2:
            return transition(obs_action)  # type: ignore[no-any-return]
        members = list(transition.output_layer.select)
        if len(members) != self._engine.ensemble.members:
            self._engine = self._make_engine()
        ensemble = self._engine.ensemble
        _copy_weights(transition, members, ensemble)
        observations, actions = obs_action[:, : ensemble.obs_dim], obs_action[:, ensemble.obs_dim :]
        result = self._engine.step(observations, actions, seed=0, deterministic=True, distributions=True)
        assert result.mean is not None and result.std is not None
        result.mean[..., :-1] = ensemble.next_observations(observations, result.mean)
        return torch.distributions.Normal(result.mean, result.std)

    forward = __call__

    def __getattr__(self, name: str) -> Any:
        # copy.copy asks for attributes before `transition` is set.
        if name == "transition" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.transition, name)

    def _make_engine(self) -> RolloutEngine:
        ensemble = _make_ensemble(self.transition, len(self.transition.output_layer.select))
        return RolloutEngine(ensemble.to(self.transition.max_logstd.device), **self._options)


def from_transition(transition: Any) -> EnsembleDynamics:
    """Convert an `EnsembleTransition`, with its current weights, to this package's ensemble.

    The selected members become the elites.

    Raises:
        InputError: it predicts no reward, or `EnsembleDynamics` cannot represent its layers.
    """
    members = len(transition.output_layer.weight)
    model = _make_ensemble(transition, members)
    _copy_weights(transition, range(members), model)
    model.elites = torch.tensor(elites_of(list(transition.output_layer.select), members))
    return model


def _layers(transition: Any) -> list[Any]:
    return [*transition.backbones, transition.output_layer]


def _make_ensemble(transition: Any, members: int) -> EnsembleDynamics:
    """Make an ensemble of the transition's shape and kind; `_copy_weights` fills in its weights."""
    if not transition.with_reward:
        raise InputError("the EnsembleTransition predicts no reward; the kernels need one")
    check_layers([layer.weight for layer in _layers(transition)], ndim=3)
    shapes = [layer.weight.shape for layer in _layers(transition)]
    obs_dim = operator.index(transition.obs_dim)
    if not 0 < obs_dim < shapes[0][1] or shapes[-1][2] != 2 * (obs_dim + 1):
        raise InputError(f"its layers do not fit observations of {obs_dim} dimensions")
    delta = transition.mode in ("local", "normalize")
    return EnsembleDynamics(
        obs_dim,
        shapes[0][1] - obs_dim,
        members=members,
        elites=members,
        hidden=tuple(shape[2] for shape in shapes[:-1]),
        log_scale="std",
        absolute=() if delta else range(obs_dim),
        # A generator of its own, so that torch's global one stays as Polixir's code left it.
        generator=torch.Generator(),
    )


@torch.no_grad()
def _copy_weights(transition: Any, members: Sequence[int], model: EnsembleDynamics) -> None:
    for layer, weight, bias in zip(_layers(transition), model.weights, model.biases, strict=True):
        _fill(weight, layer.weight[members])
        _fill(bias, layer.bias[members, 0])
    _fill(model.max_logvar, transition.max_logstd)
    _fill(model.min_logvar, transition.min_logstd)
    if transition.mode == "normalize" and transition.obs_mean is not None:
        _fill(model.input_mean[: model.obs_dim], transition.obs_mean.reshape(-1))
        _fill(model.input_std[: model.obs_dim], transition.obs_std.reshape(-1) + _EPSILON)


def _fill(target: torch.Tensor, numbers: torch.Tensor) -> None:
    """Copy `numbers` into `target`; raise `InputError` if their shape differs or they are no floats."""
    if target.shape != numbers.shape or not numbers.is_floating_point():
        raise InputError(
            f"a layer has {numbers.dtype} of shape {list(numbers.shape)}, expected floats of shape"
            f" {list(target.shape)}"
        )
    target.copy_(numbers)


class _PickleModule:
    """The part of the pickle module that `torch.save` uses, with a pickler that imports no class."""

    Pickler = Pickler


def _as_namespace(module: Any, made: dict[int, Any]) -> Any:
    """Turn an unpickled stand-in of a module into a namespace of its parameters, buffers and submodules.

    Args:
        module: stand-in, or any other value, which is returned as it is.
        made: results by the id of their stand-in, since a module may occur in several others.

    Returns:
        A namespace whose `kind` is the name of the module's class; a list for ModuleList and Sequential.
    """
    # Unpickled sets are stand-ins too, without a state.
    if not isinstance(module, Inert) or module.state is None or id(module) in made:
        return made.get(id(module), module)
    kind, state = type(module).__name__, module.state
    if kind in ("ModuleList", "Sequential"):
        made[id(module)] = [_as_namespace(value, made) for value in state["_modules"].values()]
        return made[id(module)]
    made[id(module)] = SimpleNamespace(kind=kind)
    for part in (state, state["_parameters"], state["_buffers"], state["_modules"]):
        vars(made[id(module)]).update({name: _as_namespace(value, made) for name, value in part.items()})
    return made[id(module)]


FILES = ("dynamics.pt", "policy.pt")
"""Names of the files that `read` looks for in a folder."""


def read(source: Path, hints: Hints = Hints()) -> Checkpoint:  # noqa: B008
    """Read an `EnsembleTransition` or a `TanhGaussianPolicy` saved by `torch.save`.

    A folder, as `write` makes it, may hold one of each as dynamics.pt and policy.pt. The elites are the
    selected members, unless `hints` names others. Nothing in the pickle is run; only tensors are read.

    Raises:
        InputError: a file is missing or damaged, or holds another kind of model.
    """
    if hints.activation is not None or hints.absolute is not None:
        raise InputError(f"{source} stores activation and absolute; leave them out")
    if source.is_dir():
        both = [source / name for name in ("dynamics.pt", "policy.pt")]
        found = [read(path, hints) for path in both if path.exists()]
        models = [(one.dynamics, one.policy) for one in found]
        return Checkpoint(next((d for d, _ in models if d), None), next((p for _, p in models if p), None))
    content = load(source, inert=None)
    try:
        if not isinstance(content, Inert):
            raise InputError(f"it holds a {type(content).__name__}")
        module = _as_namespace(content, {})
        if module.kind == "EnsembleTransition":
            if module.activation.kind != "Swish":
                raise InputError(f"it has hidden layers of {module.activation.kind}, not Swish")
            dynamics = from_transition(module)
            if hints.elites is not None:
                dynamics.elites = torch.tensor(elites_of(hints.elites, dynamics.members))
            check_model(source, dynamics)
            return Checkpoint(dynamics)
        if module.kind == "TanhGaussianPolicy":
            policy = _actor(module)
            check_model(source, policy)
            return Checkpoint(policy=policy)
        raise InputError(f"it holds a {module.kind}")
    # A damaged or foreign file can raise anything.
    except Exception as error:
        raise InputError(
            f"{source} is no EnsembleTransition or TanhGaussianPolicy saved by torch.save: {brief(error)}"
        ) from error


def _actor(policy: Any) -> Actor:
    if not policy._c_sigma:
        raise InputError("its standard deviation must depend on the observation (conditioned_sigma=True)")
    kinds = {layer.kind for layer in policy.preprocess.model} - {"Linear"}
    if len(kinds) != 1:
        raise InputError(f"it has layers of {', '.join(sorted(kinds))}; the kernels take one activation")
    hidden = [layer for layer in policy.preprocess.model if layer.kind == "Linear"]
    weights = [layer.weight.T for layer in hidden]
    weights.append(torch.cat((policy.mu.weight, policy.sigma.weight)).T)
    biases = [layer.bias for layer in hidden] + [torch.cat((policy.mu.bias, policy.sigma.bias))]
    check_layers(weights, ndim=2)
    actor = Actor(
        weights[0].shape[0],
        len(policy.mu.bias),
        hidden=tuple(weight.shape[1] for weight in weights[:-1]),
        activation=activation_of(kinds.pop()),
        log_std_min=_LOG_STD_MIN,
        log_std_max=_LOG_STD_MAX,
    )
    with torch.no_grad():
        for target, tensor in zip([*actor.weights, *actor.biases], [*weights, *biases], strict=True):
            _fill(target, tensor)
    return actor


def _stand_in(module: str, name: str) -> type[nn.Module]:
    """Make an empty module class that is pickled under the name of one of Polixir's."""
    return type(name, (nn.Module,), {"__module__": f"offlinerl.utils.net.{module}"})


_EnsembleLinear = _stand_in("model.ensemble", "EnsembleLinear")
_EnsembleTransition = _stand_in("model.ensemble", "EnsembleTransition")
_Swish = _stand_in("common", "Swish")
_Net = _stand_in("common", "Net")
_TanhGaussianPolicy = _stand_in("tanhpolicy", "TanhGaussianPolicy")


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().cpu().clone())


def _module(kind: type[nn.Module], **attributes: Any) -> nn.Module:
    """Make a module of a stand-in class, with these attributes."""
    made = kind()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def check_dynamics(ensemble: EnsembleDynamics) -> list[str]:
    """Return no sentence: the files store all properties of the dynamics that they can hold.

    Raises:
        InputError: Polixir's models lack a property of these dynamics.
    """
    obs_dim = ensemble.obs_dim
    check_kind(ensemble, "Polixir's models", log_scale="std", absolute=True)
    check_activation(ensemble, "Polixir's models", "silu")
    if bool((ensemble.input_mean[obs_dim:] != 0).any() or (ensemble.input_std[obs_dim:] != 1).any()):
        raise InputError("Polixir's models do not scale actions; this one does")
    if bool(ensemble.absolute.any()) and (_is_scaled(ensemble) or not bool(ensemble.absolute.all())):
        raise InputError(
            "Polixir's models predict changes of all dimensions, or next values of all without scaling them;"
            " this one does not"
        )
    return []


def _is_scaled(model: EnsembleDynamics) -> bool:
    return bool((model.input_mean != 0).any() or (model.input_std != 1).any())


def check_policy(policy: Actor) -> list[str]:
    """Return a sentence about the bounds of the log-stds if they are not [-5, 2].

    Raises:
        InputError: the policy's activation is neither ReLU nor tanh.
    """
    check_activation(policy, "Polixir's policies", "relu", "tanh")
    advice = f"; to keep the bounds, set LOG_SIG_MIN = {policy.log_std_min:g} and LOG_SIG_MAX ="
    advice += f" {policy.log_std_max:g} in its TanhGaussianPolicy"
    return clipped_log_stds(policy, _LOG_STD_MIN, _LOG_STD_MAX, "Polixir's OfflineRL", advice)


def write(checkpoint: Checkpoint, target: Path) -> None:
    """Write a folder with dynamics.pt for `dynamics_path` and policy.pt for `BaseAlgo.load_model`.

    Polixir's package need not be installed. It loads these files, as its own, with torch before 2.6 or by
    `torch.load(path, weights_only=False)`.

    Raises:
        InputError: Polixir's code cannot represent one of the models, or the folder cannot be written.
    """
    warn_of_changes(checkpoint, check_dynamics, check_policy)
    modules: dict[str, nn.Module] = {}
    if checkpoint.dynamics is not None:
        modules["dynamics.pt"] = _transition(checkpoint.dynamics)
    if checkpoint.policy is not None:
        modules["policy.pt"] = _policy(checkpoint.policy)
    for name, module in modules.items():
        with atomic_path(target / name) as temporary, open(temporary, "wb") as file:
            torch.save(module, file, pickle_module=_PickleModule)


def _transition(model: EnsembleDynamics) -> nn.Module:
    absolute, scaled, obs_dim = bool(model.absolute.any()), _is_scaled(model), model.obs_dim
    elites = model.elites.tolist()

    def linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
        bias = bias[:, None]
        return _module(
            _EnsembleLinear,
            ensemble_size=model.members,
            weight=_parameter(weight),
            bias=_parameter(bias),
            saved_weight=_parameter(weight),
            saved_bias=_parameter(bias),
            select=elites,
        )

    *backbones, output_layer = map(linear, model.weights, model.biases)
    return _module(
        _EnsembleTransition,
        obs_dim=obs_dim,
        mode="normalize" if scaled else "global" if absolute else "local",
        with_reward=True,
        ensemble_size=model.members,
        activation=_Swish(),
        backbones=nn.ModuleList(backbones),
        output_layer=output_layer,
        obs_mean=model.input_mean[:obs_dim].cpu() if scaled else None,
        obs_std=model.input_std[:obs_dim].cpu() - _EPSILON if scaled else None,
        max_logstd=_parameter(model.max_logvar),
        min_logstd=_parameter(model.min_logvar),
    )


def _policy(actor: Actor) -> nn.Module:
    def linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
        made = nn.Linear(*weight.shape)
        made.weight, made.bias = _parameter(weight.T.contiguous()), _parameter(bias)
        return made

    *hidden, last = zip(actor.weights, actor.biases, strict=True)
    heads = zip(*(tensor.chunk(2, -1) for tensor in last), strict=True)
    mu, sigma = (linear(weight, bias) for weight, bias in heads)
    layers = [layer for pair in hidden for layer in (linear(*pair), _ACTIVATIONS[actor.activation]())]
    net = _module(_Net, dueling=None, softmax=False, output_shape=0, model=nn.Sequential(*layers))
    return _module(
        _TanhGaussianPolicy, preprocess=net, mu=mu, sigma=sigma, _c_sigma=True, _max=1.0, _unbounded=False
    )
