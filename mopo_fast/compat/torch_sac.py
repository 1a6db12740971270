"""Another code base's SAC in PyTorch, whose updates are made by this package's SAC in place."""

import itertools
import math
import operator
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mopo_fast.config import SACConfig, TrainingDtype
from mopo_fast.data.transitions import Transitions
from mopo_fast.errors import InputError
from mopo_fast.sac import METRICS, SAC, Draws
from mopo_fast.utils.interrupts import deferred

_MOMENTS = ("exp_avg", "exp_avg_sq")
_LAYER_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OPTIMIZER_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
# Settings of torch.optim.Adam that `SAC` has. The learning rate may have any value.
_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False, "maximize": False}


@dataclass(frozen=True, eq=False)
class Modules:
    """The parts of another code base's SAC.

    Attributes:
        actor: linear layers of the actor, with ReLU after each hidden one. The last two map the last hidden
            layer to the means and to the log standard deviations.
        critics: linear layers of each critic, with ReLU between them.
        targets: likewise, of each target critic.
        actor_optimizer: optimizer of the actor.
        critic_optimizers: optimizers of the critics: one of all, or one of each.
        alpha: the temperature's logarithm, a leaf tensor with one element, and its optimizer; a number where
            `SAC` does not change the temperature.
    """

    actor: list[nn.Linear]
    critics: list[list[nn.Linear]]
    targets: list[list[nn.Linear]]
    actor_optimizer: torch.optim.Optimizer
    critic_optimizers: list[torch.optim.Optimizer]
    alpha: tuple[torch.Tensor, torch.optim.Optimizer] | float

    def optimizers(self) -> dict[str, list[torch.optim.Optimizer]]:
        """Return the optimizers by the names that `SAC` gives to its own."""
        alpha = [self.alpha[1]] if isinstance(self.alpha, tuple) else []
        return {"actor": [self.actor_optimizer], "critic": self.critic_optimizers, "alpha": alpha}

    def parts(self) -> list[Any]:
        """Return all objects that an SAC shares, but for the value of a fixed temperature."""
        alpha = self.alpha if isinstance(self.alpha, tuple) else ()
        layers = itertools.chain(self.actor, *self.critics, *self.targets)
        # A layer's parameters may be replaced while the layer stays.
        parameters = (one for layer in layers for one in (layer, layer.weight, layer.bias))
        return [*parameters, *self.critic_optimizers, *alpha, self.actor_optimizer]


@dataclass(frozen=True)
class Losses:
    """Results of some updates.

    Attributes:
        metrics: means over the updates of `sac.METRICS`.
        critics: means over the updates of each critic's loss.
        alpha: temperature after the last update.
        mean_alpha: mean over the updates of the temperature after each; `metrics` has that before each.
    """

    metrics: dict[str, float]
    critics: list[float]
    alpha: float
    mean_alpha: float


@dataclass(frozen=True, eq=False)
class _Link:
    """A parameter of the other side, and the parts of our tensors that hold its numbers.

    Attributes:
        parameter: the parameter.
        value: view of ours that is to be its data.
        moments: views of ours that are to be its moments; none for a target's parameter.
        optimizer: its optimizer; None for a target's.
    """

    parameter: torch.Tensor
    value: torch.Tensor
    moments: tuple[torch.Tensor, ...] = ()
    optimizer: torch.optim.Optimizer | None = None

    def take_value(self) -> None:
        """Make the parameter a view of ours again, with the number that it has now."""
        theirs, ours = self.parameter, self.value
        if theirs.is_set_to(ours):
            return
        if (theirs.shape, theirs.dtype, theirs.device) != (ours.shape, ours.dtype, ours.device):
            raise InputError(
                f"the updates take {ours.dtype} {list(ours.shape)} on the CPU, a parameter has become"
                f" {theirs.dtype} {list(theirs.shape)} on {theirs.device}"
            )
        ours.copy_(theirs.detach())
        theirs.data = ours


class SharedSAC:
    """An `SAC` whose numbers are those of another code base's modules and optimizers.

    The parameters of the modules, and the moments in their optimizers, become views of the tensors of an
    `SAC`. Both sides see every change at once, and nothing is copied. If the other side puts tensors of its
    own in the place of these views, as loading a checkpoint does, their values are taken over before the next
    update.

    Args:
        modules: the code base's SAC.
        config: its hyperparameters, without the learning rates, which are those of the optimizers.
        backend: backend of `SAC`.
        threads: number of CPU threads, see `SAC`.

    Attributes:
        modules: the code base's SAC.
        sac: this package's.

    Raises:
        InputError: `SAC` cannot update these modules. The message says why.
    """

    def __init__(self, modules: Modules, config: SACConfig, *, backend: str, threads: int | None) -> None:
        _check_layers(modules)
        self.modules = modules
        obs_dim, act_dim = modules.actor[0].in_features, modules.actor[-1].out_features
        self.sac = SAC(obs_dim, act_dim, config, backend=backend, threads=threads)
        # Held, so that no new object can have an old one's identity.
        self._parts = modules.parts()
        self._links = list(self._pair_up())
        self._of_actor = [link for link in self._links if link.optimizer is modules.actor_optimizer]
        self._optimizers = modules.optimizers()
        # True while the parameters may be ahead of their optimizers' counts of steps.
        self._counts_are_due = False
        self.share(config, None if isinstance(modules.alpha, tuple) else modules.alpha)

    def consists_of(self, modules: Modules) -> bool:
        """Tell whether all parts of `modules` are the objects that are shared."""
        parts = modules.parts()
        return len(parts) == len(self._parts) and all(map(operator.is_, parts, self._parts))

    def _pair_up(self) -> Iterator[_Link]:
        modules, sac = self.modules, self.sac
        critic_optimizers = modules.critic_optimizers * (
            len(modules.critics) // len(modules.critic_optimizers)
        )

        def link(
            theirs: list[nn.Linear], name: str, network: nn.Module, optimizer: Any, views: Callable[..., Any]
        ) -> Iterator[_Link]:
            ours = sac.optimizers[name]
            moments = [views(ours.exp_avgs), views(ours.exp_avg_sqs)] if optimizer is not None else []
            values = views([parameter.data for parameter in network.parameters()])
            parameters = [one for layer in theirs for one in (layer.weight, layer.bias)]
            for parameter, value, *rest in zip(parameters, values, *moments, strict=True):
                yield _Link(parameter, value, tuple(rest), optimizer)

        yield from link(modules.actor, "actor", sac.actor, modules.actor_optimizer, _actor_views)
        for number, layers in enumerate(modules.critics):

            def views(tensors: list[torch.Tensor], number: int = number) -> list[torch.Tensor]:
                return _views([tensor[number] for tensor in tensors])

            yield from link(layers, "critic", sac.critic, critic_optimizers[number], views)
            yield from link(modules.targets[number], "critic", sac.target, None, views)
        if isinstance(modules.alpha, tuple):
            log_alpha, optimizer = modules.alpha
            ours, adam = sac.log_alpha.data, sac.optimizers["alpha"]
            each = (tensor.view(log_alpha.shape) for tensor in (ours, adam.exp_avgs[0], adam.exp_avg_sqs[0]))
            value, *moments = each
            yield _Link(log_alpha, value, tuple(moments), optimizer)

    def _check_parameters(self) -> None:
        for name, optimizers in self._optimizers.items():
            for optimizer in optimizers:
                given = [id(one) for group in optimizer.param_groups for one in group["params"]]
                linked = [id(link.parameter) for link in self._links if link.optimizer is optimizer]
                if len(optimizer.param_groups) != 1 or sorted(given) != sorted(linked):
                    raise InputError(
                        f"the optimizer of the {name} must have one group, of all its parameters"
                    )

    @torch.no_grad()
    def share(self, config: SACConfig, alpha: float | None = None) -> None:
        """Take over what the other side has changed since the last update.

        Args:
            config: its hyperparameters as they are now; sizes and dtype are those of before.
            alpha: a fixed temperature as it is now; None for that of the last update.

        Raises:
            InputError: it has made a change that `SAC` does not support.
        """
        config.validate()
        self._check_parameters()
        _check_hooks(self.modules, self._optimizers)
        sac = self.sac
        if self._counts_are_due:
            self._set_counts()
        if alpha is not None:
            if not 0.0 < alpha < math.inf:
                raise InputError(f"a fixed temperature must be positive, got {alpha}")
            sac.log_alpha.data.fill_(math.log(alpha))
        sac.config, sac.target_entropy = config, float(config.target_entropy)
        for name, optimizers in self._optimizers.items():
            rates = {learning_rate(name, optimizer) for optimizer in optimizers}
            if len(rates) > 1:
                raise InputError(f"the {name}s' optimizers have different learning rates: {sorted(rates)}")
            # A fixed temperature has no optimizer.
            sac.optimizers[name].learning_rate = rates.pop() if rates else 0.0
        steps = set()
        for link in self._links:
            link.take_value()
            if link.optimizer is None:
                continue
            state = link.optimizer.state[link.parameter]
            for key, ours in zip(_MOMENTS, link.moments, strict=True):
                theirs = state.get(key)
                if theirs is None:
                    state[key] = ours.zero_()
                elif not theirs.is_set_to(ours):
                    state[key] = ours.copy_(theirs)
            step = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32)
            state["step"] = step
            steps.add(float(step))
        if len(steps) != 1:
            raise InputError(f"the optimizers have made different numbers of steps: {sorted(steps)}")
        # A float32 count stops at 2^24, ours goes on.
        made = int(steps.pop())
        if made != min(sac.updates, 2**24):
            sac.updates = made

    def act(self, observations: Any, *, deterministic: bool) -> npt.NDArray[Any]:
        """Return the actor's actions.

        With one row, as in an evaluation, NumPy takes a fraction of the time of the code base's modules.

        Args:
            observations: [..., obs_dim], an array of numbers.
            deterministic: return tanh(mean); else sample, with noise from torch's global generator.

        Returns:
            Actions float32 [..., act_dim].
        """
        for link in self._of_actor:
            link.take_value()
        if isinstance(observations, torch.Tensor):
            observations = observations.numpy(force=True)
        x = np.asarray(observations, np.float32)
        # Taken anew at each call, since PyTorch may have moved their memory.
        weights, biases = (
            [one.detach().numpy() for one in some] for some in (self.sac.actor.weights, self.sac.actor.biases)
        )
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            x = np.maximum(x @ weight + bias, 0.0)
        mean, log_std = np.split(x @ weights[-1] + biases[-1], 2, axis=-1)
        if not deterministic:
            config, noise = self.sac.config, torch.randn(mean.shape).numpy()
            mean = mean + np.exp(np.clip(log_std, config.log_std_min, config.log_std_max)) * noise
        actions: npt.NDArray[Any] = np.tanh(mean)
        return actions

    def update(self, draws: Draws, config: SACConfig, alpha: float | None = None) -> Losses:
        """Make updates in place.

        Args:
            draws: the batches.
            config: see `share`.
            alpha: see `share`.

        Raises:
            InputError: as `share`; the batches are of other sizes than the networks; or a loss is not finite.
        """
        sizes = self.sac.actor.obs_dim, self.sac.actor.act_dim
        if (given := (draws.real.obs_dim, draws.real.act_dim)) != sizes:
            raise InputError(
                f"the networks take {sizes[0]} observation and {sizes[1]} action dimensions, the batches have"
                f" {given[0]} and {given[1]}"
            )
        # Ctrl-C must not come between the parameters and the counts of steps.
        with deferred():
            self.share(config, alpha)
            first_alpha = float(self.sac.alpha)
            # A second Ctrl-C does not wait.
            self._counts_are_due = True
            sums = self.sac.make(draws)
            self._set_counts()
            torch.autograd.graph.increment_version([link.parameter for link in self._links])
            for optimizer in itertools.chain(*self._optimizers.values()):
                # As `step` does; a schedule warns where nobody has set it.
                vars(optimizer)["_opt_called"] = True
        metrics = self.sac.means(sums, draws.updates)
        critics = [total / draws.updates for total in sums[len(METRICS) :]]
        alpha = float(self.sac.alpha)
        return Losses(metrics, critics, alpha, metrics["alpha"] + (alpha - first_alpha) / draws.updates)

    def _set_counts(self) -> None:
        for link in self._links:
            if link.optimizer is not None:
                link.optimizer.state[link.parameter]["step"].fill_(float(self.sac.updates))
        self._counts_are_due = False


# The SAC of each object that `shared_with` was called for. A copy of an object gets one of its own.
_shared: weakref.WeakKeyDictionary[Any, SharedSAC] = weakref.WeakKeyDictionary()


# Two threads may use an object for the first time at once.
_sharing = threading.Lock()


def shared_with(owner: Any, modules: Modules, config: Callable[[], SACConfig]) -> SharedSAC:
    """Return the `SharedSAC` of an object of the other code base that `start_over` was called for.

    Args:
        owner: the object.
        modules: its SAC as it is now. If a part has been replaced since the last call, a new `SharedSAC` is
            made.
        config: function that returns its hyperparameters, see `SharedSAC`; called for a new one.

    Raises:
        InputError: as `SharedSAC`.
    """
    with _sharing:
        shared = _shared.get(owner)
        if shared is None or not shared.consists_of(modules):
            options = {name: owner._mopo_fast[name] for name in ("backend", "threads")}
            shared = _shared[owner] = SharedSAC(modules, config(), **options)
    return shared


def start_over(owner: Any, dtype: TrainingDtype, backend: str, threads: int | None) -> None:
    """Keep the options of an object's updates, so that `shared_with` makes a new `SharedSAC` with them.

    They are an attribute `_mopo_fast` of the object, so that a copy of it has them too.

    Args:
        owner: object of the other code base.
        dtype: precision of the matrix products, for the adapter's `SACConfig`.
        backend: backend of `SAC`.
        threads: number of CPU threads, see `SAC`.
    """
    owner._mopo_fast = {"dtype": dtype, "backend": backend, "threads": threads}
    _shared.pop(owner, None)


def as_flags(name: str, numbers: torch.Tensor) -> torch.Tensor:
    """Return numbers 0 and 1 as bool.

    Args:
        name: name of the numbers in errors.
        numbers: the numbers.

    Raises:
        InputError: there is another number.
    """
    flags = numbers != 0
    if not torch.equal(flags.to(numbers.dtype), numbers):
        raise InputError(f"the updates take {name} that are 0 or 1")
    return flags


def draw_all(rows: Transitions, seed: int, updates: int = 1) -> Draws:
    """Return updates on equal parts of `rows`, in their order."""
    size = len(rows) // updates
    return Draws(rows, rows, (len(rows), len(rows)), (size, 0), updates, seed, in_order=True)


def _check_layers(modules: Modules) -> None:
    hidden = [layer.out_features for layer in modules.actor[:-2]]
    for layers in (*modules.critics, *modules.targets):
        if [layer.out_features for layer in layers[:-1]] != hidden:
            raise InputError(
                f"the critics must have the actor's hidden layers {hidden}, got"
                f" {[layer.out_features for layer in layers[:-1]]}"
            )
    every = [one for layers in (modules.actor, *modules.critics, *modules.targets) for one in layers]
    if len({id(layer.weight) for layer in every}) < len(every):
        raise InputError("the updates take an actor, critics and target critics that share no layer")
    for layer in every:
        weight = layer.weight
        if type(layer) is not nn.Linear:
            raise InputError(f"the updates take layers that are torch.nn.Linear, got {type(layer).__name__}")
        if weight.device.type != "cpu":
            raise InputError(
                f"the updates take networks on the CPU, got {layer} on {weight.device}; choose the device cpu"
                " where the networks are made"
            )
        if layer.bias is None or weight.dtype != torch.float32:
            raise InputError(
                f"the updates take linear layers with biases, in float32, got {layer} in {weight.dtype}"
            )


def _check_hooks(modules: Modules, optimizers: dict[str, list[torch.optim.Optimizer]]) -> None:
    """Raise `InputError` if something is to happen in an update that the kernels would leave out."""
    for layer in itertools.chain(modules.actor, *modules.critics):
        for parameter in (layer.weight, layer.bias):
            if not parameter.requires_grad:
                raise InputError(f"the updates train all parameters; one of {layer} has requires_grad=False")
            if parameter._backward_hooks:
                raise InputError(f"the updates call no hooks, but a parameter of {layer} has one")
        if any(getattr(layer, name) for name in _LAYER_HOOKS):
            raise InputError(f"the updates call no hooks, but {layer} has one")
    for optimizer in itertools.chain(*optimizers.values()):
        if any(getattr(optimizer, name, None) for name in _OPTIMIZER_HOOKS):
            raise InputError("the updates call no hooks, but an optimizer has one")


def learning_rate(name: str, optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate of an optimizer that `SAC` can replace.

    Args:
        name: name of its parameters in errors.
        optimizer: the optimizer.

    Raises:
        InputError: it is not Adam, or has settings other than the defaults.
    """
    group = optimizer.param_groups[0]
    settings = {key: group.get(key) for key in _ADAM}
    settings["betas"] = tuple(settings["betas"] or ())
    if type(optimizer) is not torch.optim.Adam or settings != _ADAM:
        raise InputError(
            "the updates take torch.optim.Adam with its defaults except for the learning rate; the optimizer"
            f" of the {name} is {type(optimizer).__name__} with {settings}"
        )
    return float(group["lr"])


def _views(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return our weights [in, out], then biases, as each layer's weight [out, in] and bias."""
    depth = len(tensors) // 2
    layers = zip(tensors[:depth], tensors[depth:], strict=True)
    return [view for weight, bias in layers for view in (weight.T, bias)]


def _actor_views(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return `_views` with the last layer split into that of the means and that of the log-stds."""
    *others, weight, bias = _views(tensors)
    return [
        *others,
        *(half for halves in zip(weight.chunk(2), bias.chunk(2), strict=True) for half in halves),
    ]
