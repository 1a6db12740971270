"""The authors' SAC updates on the kernels, with the variables of their TensorFlow session."""

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mopo_fast.compat.models import check_attributes, check_method
from mopo_fast.compat.mopo_tf.fake_env import check_triton, draw_seed
from mopo_fast.compat.mopo_tf.files import VERSION
from mopo_fast.config import SACConfig, TrainingDtype
from mopo_fast.data.transitions import Transitions
from mopo_fast.errors import InputError
from mopo_fast.sac import SAC, Draws
from mopo_fast.utils.interrupts import deferred

# Updates of one kernel call. With more of them, Ctrl-C and the progress bar wait longer.
_UPDATES_AT_ONCE = 100
_WITHOUT = "leave fuse_updates out: the authors' own updates stay"

# Attributes that are read here: of MOPO, its policy, its critics' layers, its optimizers and its pools.
_ALGORITHM = (
    *("_policy", "_Qs", "_Q_targets", "_log_alpha", "_pool", "sampler", "_session", "_training_ops"),
    *("_policy_optimizer", "_Q_optimizers", "global_step", "_target_entropy", "_target_update_interval"),
    *("_discount", "_tau", "_reward_scale", "_action_prior", "_real_ratio", "_epoch_length"),
    *("_model_train_freq", "_do_training_repeats", "_do_training", "_training_batch"),
)
_POLICY = ("trainable_variables", "_squash", "_preprocessor", "_activation", "_output_activation")
_OPTIMIZER = ("_beta1", "_beta2", "_epsilon", "_lr_t", "get_slot", "_get_beta_accumulators")
_POOL = ("fields", "size", "random_batch")
# Ops of the original's update.
_OPS = {"increment_global_step", "policy_train_op", "temperature_alpha", "Q"}
_ADAM = {"_beta1": 0.9, "_beta2": 0.999, "_epsilon": 1e-8}
_COLUMNS = ("observations", "actions", "rewards", "next_observations")

# Methods whose work the kernels take over, and methods that may not see a variable before the updates that
# the loop has asked for.
_REPLACED = ("_do_training", "_training_batch", "_update_target", "_init_actor_update", "_init_critic_update")
_LOOKS = (
    "_rollout_model",
    "_reallocate_model_pool",
    "_evaluation_paths",
    "get_diagnostics",
    "_update_target",
)
_POLICY_LOOKS = ("actions_np", "log_pis_np", "get_weights", "set_weights", "get_diagnostics")
_HOOKS = ("_timestep_before_hook", "_timestep_after_hook")
# Number of steps whose powers of Adam's betas are 0 in float32.
_MANY = 200_000


def fuse_updates(
    algorithm: Any, *, dtype: TrainingDtype = "float32", backend: str = "auto", threads: int | None = None
) -> Any:
    """Let the loop of the authors' MOPO make up to 100 SAC updates in one kernel call.

    The loop stays the authors': `_do_training_repeats` decides at every timestep whether it trains, and how
    often. The updates that it asks for are made together: after 100 of them, before the next rollout, at the
    end of an epoch, and before anything of the algorithm or of its policy looks at a variable. Their batches
    are drawn in the kernel, uniformly with replacement, from the algorithm's two pools in place, with as many
    rows of each as `_training_batch` takes.

    Each kernel call begins with the values that the variables have in the session then, Adam's moments and
    powers of beta included, and ends with assigning the new ones. A direct call of `_do_training` is the
    original's, so both ways can be mixed. The noise and the rows are keyed by a seed from NumPy's global
    generator. The learning rates, `_discount`, `_tau`, `_target_entropy`, `_real_ratio` and the sampler's
    batch size are read at every kernel call.

    The kernels' Adam has PyTorch's epsilon, TensorFlow's is larger in the first steps: see docs/compat.md.

    Args:
        algorithm: MOPO on the CPU with a FeedforwardGaussianPolicy and Q functions of the policy's hidden
            layers, ReLU, and optimizers that are tf.train.AdamOptimizer with its defaults except for the
            learning rates. Its variables need not be initialised yet.
        dtype: precision of the matrix products, see `SACConfig.dtype`.
        backend: backend of `SAC`.
        threads: number of CPU threads, see `SAC`.

    Returns:
        `algorithm` itself.

    Raises:
        InputError: the kernels do not support the algorithm, or TensorFlow was loaded before Triton. The
            message names the reason. While it trains: a loss is not finite, or a pool is empty.
    """
    check_triton()
    check_attributes(algorithm, _ALGORITHM, VERSION)
    _check_settings(algorithm)
    # A subclass of an algorithm may be in any package, the methods may not.
    for method in _REPLACED:
        check_method(algorithm, method, "mopo", _WITHOUT)
    check_method(algorithm, "_do_training_repeats", "softlearning", _WITHOUT)
    policy = algorithm._policy
    _check_policy(policy)
    options = {"backend": backend, "threads": threads}
    updates = _Updates(algorithm, _networks(algorithm), dtype, options)
    for name in ("_do_training_repeats", "_do_training", "_training_batch"):
        setattr(algorithm, name, getattr(updates, name))
    hooks = [name for name in _HOOKS if hasattr(algorithm, name) and not _is_empty(algorithm, name)]
    looks = [(algorithm, (*_LOOKS, *hooks)), (policy, _POLICY_LOOKS)]
    for thing, names in looks:
        for name in names:
            if hasattr(type(thing), name):
                setattr(thing, name, functools.partial(_look, updates, thing, name))
    return algorithm


def _look(updates: "_Updates", thing: Any, name: str, *arguments: Any, **options: Any) -> Any:
    """Call a method after all updates that the loop has asked for."""
    updates.make()
    return getattr(type(thing), name)(thing, *arguments, **options)


def _is_empty(algorithm: Any, hook: str) -> bool:
    """Tell whether a hook is the original's, which does nothing."""
    try:
        check_method(algorithm, hook, "softlearning", "")
    except InputError:
        return False
    return True


@dataclass(frozen=True, eq=False)
class _Networks:
    """The variables of MOPO's networks: a weight and a bias of each layer in turn.

    Attributes:
        policy: those of the policy.
        critics: those of each critic.
        targets: those of each target critic.
    """

    policy: list[Any]
    critics: list[list[Any]]
    targets: list[list[Any]]


class _Updates:
    """Updates that a loop has asked for, and the SAC that makes them.

    Args:
        algorithm: MOPO.
        networks: its variables.
        dtype: precision of the matrix products.
        options: backend and threads of `SAC`.
    """

    def __init__(
        self, algorithm: Any, networks: _Networks, dtype: TrainingDtype, options: dict[str, Any]
    ) -> None:
        self._algorithm, self._dtype = algorithm, dtype
        self._hidden = tuple(_width(weight) for weight in networks.policy[:-2:2])
        self._log_std_bounds = _log_std_bounds(algorithm._policy)
        obs_dim, act_dim = int(networks.policy[0].shape[0]), _width(networks.policy[-2]) // 2
        self._sac = SAC(obs_dim, act_dim, self._config(), **options)
        _check_pool(algorithm._pool, self._sac)
        optimizers = {"actor": [algorithm._policy_optimizer], "critic": list(algorithm._Q_optimizers)}
        if "temperature_alpha" in algorithm._training_ops:
            check_attributes(algorithm, ("_alpha_optimizer",), VERSION)
            optimizers["alpha"] = [algorithm._alpha_optimizer]
        every = [(name, optimizer) for name, some in optimizers.items() for optimizer in some]
        for name, optimizer in every:
            _check_optimizer(name, optimizer)
        self._links = self._pair_up(networks)
        self._powers = [power for _, optimizer in every for power in optimizer._get_beta_accumulators()]
        self._rates = [(name, optimizer._lr_t) for name, optimizer in every]
        self._asked = 0
        self._counts = False

    # --- in the place of the original's methods

    def _do_training_repeats(self, timestep: int) -> None:
        """Let the original decide on the updates of a timestep; make them where it will look at them."""
        algorithm = self._algorithm
        self._counts = True
        try:
            type(algorithm)._do_training_repeats(algorithm, timestep)
        finally:
            self._counts = False
        following = timestep + 1
        if following >= algorithm._epoch_length or following % algorithm._model_train_freq == 0:
            self.make()

    def _training_batch(self, batch_size: int | None = None) -> Any:
        """Draw a batch, but none for an update that is only counted."""
        if self._counts:
            return None
        return type(self._algorithm)._training_batch(self._algorithm, batch_size)

    def _do_training(self, iteration: int, batch: Any) -> None:
        """Count an update of `_do_training_repeats`; make any other as the original does."""
        algorithm = self._algorithm
        if not self._counts:
            self.make()
            type(algorithm)._do_training(algorithm, iteration, batch)
            return
        algorithm._training_progress.update()
        algorithm._training_progress.set_description()
        self._asked += 1
        if self._asked >= _UPDATES_AT_ONCE:
            self.make()

    # --- the updates

    def make(self) -> None:
        """Make all updates that have been asked for."""
        updates = self._asked
        if not updates:
            return
        algorithm, sac = self._algorithm, self._sac
        _check_settings(algorithm)
        sac.config = self._config()
        sac.config.validate()
        sac.target_entropy = float(sac.config.target_entropy)
        draws = self._draws(updates)
        # Ctrl-C must not come between the updates and the assignment.
        with deferred():
            powers, step = self._fetch()
            self._asked = 0
            sac.means(sac.make(draws), updates)
            beta = [np.float32(_ADAM[name]) for name in ("_beta1", "_beta2")] * (len(powers) // 2)
            # As TensorFlow does, so that the powers stay the original's to the bit.
            for _ in range(updates):
                powers = [power * factor for power, factor in zip(powers, beta, strict=True)]
            variables = [variable for variable, _ in self._links]
            # TensorFlow may keep a fed array as the variable's memory, so each gets a copy.
            values = [ours.numpy().copy() for _, ours in self._links]
            self._assign(
                [*variables, *self._powers, algorithm.global_step], [*values, *powers, step + updates]
            )

    def _fetch(self) -> tuple[list[np.float32], Any]:
        """Take over all variables; return the powers of Adam's betas and the global step."""
        algorithm, sac = self._algorithm, self._sac
        count, depth = len(self._powers), len(self._links)
        tensors = [*(variable for variable, _ in self._links), *self._powers]
        tensors += [*(rate for _, rate in self._rates), algorithm.global_step]
        values = algorithm._session.run(tensors)
        for (_, ours), value in zip(self._links, values[:depth], strict=True):
            ours.copy_(torch.as_tensor(value))
        powers = [np.float32(value) for value in values[depth : depth + count]]
        steps = {_steps(second) for second in powers[1::2]}
        if len(steps) > 1:
            raise InputError(f"the optimizers have made different numbers of steps: {sorted(steps)}")
        sac.updates = steps.pop()
        rates: dict[str, set[float]] = {name: set() for name in sac.optimizers}
        for (name, _), value in zip(self._rates, values[depth + count : -1], strict=True):
            rates[name].add(float(value))
        for name, some in rates.items():
            if len(some) > 1:
                raise InputError(f"the {name}s' optimizers have different learning rates: {sorted(some)}")
            # A fixed temperature has no optimizer.
            sac.optimizers[name].learning_rate = some.pop() if some else 0.0
        return powers, values[-1]

    def _assign(self, variables: Sequence[Any], values: Sequence[Any]) -> None:
        # As `Variable.load` does it for one variable; this adds nothing to the graph.
        fed = {
            variable.initializer.inputs[1]: value for variable, value in zip(variables, values, strict=True)
        }
        self._algorithm._session.run([variable.initializer for variable in variables], feed_dict=fed)

    def _config(self) -> SACConfig:
        """Return the hyperparameters that the algorithm has now, without the learning rates."""
        algorithm = self._algorithm
        low, high = self._log_std_bounds
        automatic = "temperature_alpha" in algorithm._training_ops
        return SACConfig(
            hidden=self._hidden,
            critics=len(algorithm._Qs),
            log_std_min=low,
            log_std_max=high,
            target_entropy=float(algorithm._target_entropy) if automatic else 0.0,
            discount=float(algorithm._discount),
            polyak=float(algorithm._tau),
            dtype=self._dtype,
        )

    def _draws(self, updates: int) -> Draws:
        """Return the sources of the batches of some updates: the pools, in place."""
        algorithm = self._algorithm
        batch_size = algorithm.sampler._batch_size
        real = int(batch_size * algorithm._real_ratio)
        rows = real, batch_size - real
        pools = algorithm._pool, algorithm._model_pool if rows[1] else algorithm._pool
        for pool, taken in zip(pools, rows, strict=True):
            _check_pool(pool, self._sac)
            if taken and not pool.size:
                raise InputError(f"a batch takes {taken} rows of a pool that is empty")
        data, model = map(_rows, pools)
        return Draws(data, model, (len(data), len(model)), rows, updates, draw_seed())

    def _pair_up(self, networks: _Networks) -> list[tuple[Any, torch.Tensor]]:
        """Return each variable with the tensor, or the part of one, that holds its numbers here."""
        algorithm, sac = self._algorithm, self._sac
        links: list[tuple[Any, torch.Tensor]] = []

        def link(
            variables: list[Any],
            network: torch.nn.Module,
            name: str,
            optimizer: Any,
            view: Callable[..., Any],
        ) -> None:
            ours = sac.optimizers[name]
            states: list[tuple[list[Any], list[torch.Tensor]]] = [
                (variables, [one.data for one in network.parameters()])
            ]
            if optimizer is not None:
                for slot, tensors in (("m", ours.exp_avgs), ("v", ours.exp_avg_sqs)):
                    states.append(([optimizer.get_slot(one, slot) for one in variables], tensors))
            for theirs, tensors in states:
                depth = len(tensors) // 2
                layers = zip(tensors[:depth], tensors[depth:], strict=True)
                views = [view(one) for layer in layers for one in layer]
                links.extend(_checked(zip(theirs, views, strict=True)))

        link(networks.policy, sac.actor, "actor", algorithm._policy_optimizer, lambda tensor: tensor)
        for number, optimizer in enumerate(algorithm._Q_optimizers):
            view = functools.partial(torch.select, dim=0, index=number)
            link(networks.critics[number], sac.critic, "critic", optimizer, view)
            link(networks.targets[number], sac.target, "critic", None, view)
        links.append((algorithm._log_alpha, sac.log_alpha.data))
        if "temperature_alpha" in algorithm._training_ops:
            ours = sac.optimizers["alpha"]
            for slot, tensor in (("m", ours.exp_avgs[0]), ("v", ours.exp_avg_sqs[0])):
                links.append((algorithm._alpha_optimizer.get_slot(algorithm._log_alpha, slot), tensor))
        return links


def _checked(links: Any) -> list[tuple[Any, torch.Tensor]]:
    found = list(links)
    for variable, ours in found:
        if tuple(variable.shape) != tuple(ours.shape):
            raise InputError(
                f"the updates take critics with the policy's hidden layers, got a variable"
                f" {list(map(int, variable.shape))} where they have {list(ours.shape)}; {_WITHOUT}"
            )
    return found


def _steps(power: np.float32) -> int:
    """Return the number of Adam's steps from its power of beta2."""
    # Close to 0, the power no longer tells the number, and no longer changes the steps.
    if power < 1e-30:
        return _MANY
    return round(math.log(power) / math.log(np.float32(_ADAM["_beta2"]))) - 1


def _width(weight: Any) -> int:
    return int(weight.shape[1])


def _check_pool(pool: Any, sac: SAC) -> None:
    """Raise `InputError` if the kernels cannot draw from a pool as the original does."""
    check_attributes(pool, _POOL, VERSION)
    for method in ("random_batch", "random_indices", "batch_by_indices"):
        check_method(pool, method, "softlearning", _WITHOUT)
    widths = {"observations": sac.actor.obs_dim, "next_observations": sac.actor.obs_dim, "rewards": 1}
    for name in (*_COLUMNS, "terminals"):
        array, width = pool.fields[name], widths.get(name, sac.actor.act_dim)
        kind, width = (np.bool_, 1) if name == "terminals" else (np.float32, width)
        if array.dtype != kind or array.ndim != 2 or array.shape[1] != width:
            raise InputError(
                f"the updates take pools whose {name} are {np.dtype(kind)} [rows, {width}], got {array.dtype}"
                f" {list(array.shape)}; {_WITHOUT}"
            )


def _rows(pool: Any) -> Transitions:
    """Return the rows of a pool in place."""
    rows: dict[str, Any] = {
        name: torch.from_numpy(pool.fields[name][: pool.size]) for name in (*_COLUMNS, "terminals")
    }
    rows |= {name: rows[name][:, 0] for name in ("rewards", "terminals")}
    return Transitions(**rows)


def _check_settings(algorithm: Any) -> None:
    """Raise `InputError` where MOPO has settings that the kernels' update lacks."""
    for name, known in (("action_prior", "uniform"), ("reward_scale", 1.0), ("target_update_interval", 1)):
        if (value := getattr(algorithm, f"_{name}")) != known:
            raise InputError(f"the updates take {name} {known!r}, got {value!r}; {_WITHOUT}")
    if unknown := algorithm._training_ops.keys() - _OPS:
        raise InputError(f"the updates do not run the ops {', '.join(sorted(unknown))}; {_WITHOUT}")


def _check_policy(policy: Any) -> None:
    if not any(kind.__name__ == "FeedforwardGaussianPolicy" for kind in type(policy).__mro__):
        raise InputError(f"the updates take a FeedforwardGaussianPolicy, got {type(policy).__name__}")
    check_attributes(policy, _POLICY, VERSION)
    for method in ("actions", "log_pis", "_shift_and_log_scale_diag_net"):
        check_method(policy, method, "softlearning", _WITHOUT)
    known = {"squash": True, "preprocessor": None, "activation": "relu", "output_activation": "linear"}
    for name, value in known.items():
        if (given := getattr(policy, f"_{name}")) != value:
            raise InputError(f"the updates take a policy with {name}={value!r}, got {given!r}; {_WITHOUT}")


def _log_std_bounds(policy: Any) -> tuple[float, float]:
    """Return the bounds of the log-stds, which are a constant of the module of GaussianPolicy."""
    kind = next(kind for kind in type(policy).__mro__ if kind.__name__ == "FeedforwardGaussianPolicy")
    module = sys.modules[kind.__module__]
    check_attributes(module, ("SCALE_DIAG_MIN_MAX",), VERSION)
    low, high = module.SCALE_DIAG_MIN_MAX
    return float(low), float(high)


def _check_optimizer(name: str, optimizer: Any) -> None:
    check_attributes(optimizer, _OPTIMIZER, VERSION)
    settings = {setting: getattr(optimizer, setting) for setting in _ADAM}
    if type(optimizer).__name__ != "AdamOptimizer" or settings != _ADAM:
        raise InputError(
            "the updates take tf.train.AdamOptimizer with its defaults except for the learning rate; the"
            f" optimizer of the {name} is {type(optimizer).__name__} with {settings}"
        )


def _networks(algorithm: Any) -> _Networks:
    """Return the variables of MOPO's networks after a check of their layers."""
    for critic in (*algorithm._Qs, *algorithm._Q_targets):
        check_attributes(critic, ("layers", "trainable_variables"), VERSION)
        kinds = [type(layer).__name__ for layer in critic.layers]
        dense = [layer for layer in critic.layers if type(layer).__name__ == "Dense"]
        if set(kinds) - {"InputLayer", "Lambda", "Dense"} or kinds.count("Lambda") != 1:
            raise InputError(
                f"the updates take critics of dense layers on observations and actions, got {kinds};"
                f" {_WITHOUT}"
            )
        activations = [getattr(layer.activation, "__name__", "None") for layer in dense]
        if activations != ["relu"] * (len(dense) - 1) + ["linear"]:
            raise InputError(f"the updates take critics with ReLU, got {', '.join(activations)}; {_WITHOUT}")
    networks = _Networks(
        list(algorithm._policy.trainable_variables),
        [list(critic.trainable_variables) for critic in algorithm._Qs],
        [list(critic.trainable_variables) for critic in algorithm._Q_targets],
    )
    depth = len(networks.policy)
    for variables in (*networks.critics, *networks.targets):
        if len(variables) != depth:
            raise InputError(
                f"the updates take critics with the policy's {depth // 2 - 1} hidden layers, got"
                f" {len(variables) // 2 - 1}; {_WITHOUT}"
            )
    return networks
