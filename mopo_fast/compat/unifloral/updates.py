"""Unifloral's SAC updates on the kernels: its train step, and the loop around it."""

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mopo_fast.compat.models import check_attributes
from mopo_fast.compat.torch_sac import as_flags
from mopo_fast.compat.unifloral.arrays import dense_layers, load_jax, parameters_of, seed_of, shared
from mopo_fast.compat.unifloral.rollouts import LOG_STD_BOUNDS, Rollout
from mopo_fast.config import SACConfig, TrainingDtype
from mopo_fast.data.transitions import Transitions
from mopo_fast.errors import InputError
from mopo_fast.presets import preset
from mopo_fast.sac import SAC, Draws

_VERSION = "Unifloral's commit f2dc127"
_WITHOUT_UPDATES = "use mopo.py's make_train_step and jax.lax.scan"
# Updates of one kernel call. With more of them, Ctrl-C takes effect later.
_UPDATES_AT_ONCE = 100
_FIELDS = ("obs", "action", "reward", "next_obs", "done")


def make_train_step(
    args: Any,
    actor_apply_fn: Callable[..., Any],
    q_apply_fn: Callable[..., Any],
    alpha_apply_fn: Callable[..., Any],
    dataset: Any,
    rollout_fn: Callable[[Any, Any, Any], Any],
    *,
    by_steps: bool = False,
    log_std_bounds: tuple[float, float] = LOG_STD_BOUNDS,
    backend: str = "auto",
    dtype: TrainingDtype = "float32",
    threads: int | None = None,
) -> "_TrainStep":
    """Make what `scan` takes in the place of Unifloral's train step.

    The first six arguments are those of the `make_train_step` in mopo.py and morel.py.

    Args:
        args: hyperparameters: lr, batch_size, gamma, polyak_step_size, num_critics, rollout_interval and
            dataset_sample_ratio.
        actor_apply_fn: `apply` of a TanhGaussianActor.
        q_apply_fn: `apply` of a VectorQ whose networks have the actor's hidden layers.
        alpha_apply_fn: `apply` of an EntropyCoef.
        dataset: Unifloral's Transition of the data, on the CPU. The kernels read its arrays in place.
        rollout_fn: function that the original or this module's `make_rollout_fn` returns.
        by_steps: pass the policy to `rollout_fn` as a function. By default its parameters are passed where
            `rollout_fn` is this module's and has no `term_penalty_offset`, which fuses all steps.
        log_std_bounds: bounds of the log-stds in the TanhGaussianActor.
        backend: backend of `SAC`.
        dtype: precision of the matrix products of the updates, see `SACConfig.dtype`.
        threads: number of CPU threads, see `SAC`.

    Raises:
        InputError: a hyperparameter is missing or out of range.
    """
    names = ("lr", "batch_size", "gamma", "polyak_step_size", "num_critics")
    check_attributes(args, (*names, "rollout_interval", "dataset_sample_ratio"), _VERSION)
    check_attributes(dataset, _FIELDS, _VERSION)
    rate, (low, high) = float(args.lr), log_std_bounds
    config = dataclasses.replace(
        preset("unifloral", "").sac,
        critics=args.num_critics,
        actor_learning_rate=rate,
        critic_learning_rate=rate,
        alpha_learning_rate=rate,
        log_std_min=low,
        log_std_max=high,
        discount=float(args.gamma),
        polyak=float(args.polyak_step_size),
        batch_size=args.batch_size,
        real_ratio=float(args.dataset_sample_ratio),
        dtype=dtype,
    )
    config.validate()
    interval = _count("rollout_interval", args.rollout_interval)
    fused = isinstance(rollout_fn, Rollout) and rollout_fn.term_penalty_offset is None and not by_steps

    def roll(rng: Any, params: Any, buffer: Any) -> Any:
        def act(obs: Any, rng: Any) -> Any:
            return actor_apply_fn(params, obs).sample(seed=rng)

        return rollout_fn(rng, params if fused else act, buffer)

    return _TrainStep(
        config,
        interval,
        (actor_apply_fn, q_apply_fn, alpha_apply_fn),
        dataset,
        load_jax().jit(roll),
        {"backend": backend, "threads": threads},
    )


def scan(
    train_step: "_TrainStep", carry: tuple[Any, Any, Any], xs: None = None, length: int | None = None
) -> tuple[tuple[Any, Any, Any], dict[str, Any]]:
    """Make `length` updates and the rollouts between them, in the place of `jax.lax.scan` in mopo.py.

    Rollouts are made where the original makes them, with the original's keys. The updates between two of
    them are kernel calls of up to 100. Their rows and noise are drawn by the kernel, with a seed from `rng`.

    Args:
        train_step: result of this module's `make_train_step`.
        carry: (rng, agent_state, rollout_buffer), with all arrays on the CPU. They are not changed.
        xs: None.
        length: number of updates, `args.eval_interval` in mopo.py.

    Returns:
        The carry after the updates, with the original's rng; and the losses by the original's names, each an
        array [length]. Losses, entropy and alpha are means over the updates of a kernel call. The other
        values are those of its last batch, and q_min and q_std those of the networks after the call.

    Raises:
        InputError: the kernels do not serve the networks or their optimizers, an array is not on the CPU, or
            a loss is not finite.
    """
    if not isinstance(train_step, _TrainStep) or xs is not None:
        raise InputError("scan takes what mopo_fast.compat.unifloral.make_train_step returns, and no xs")
    return train_step.run(*carry, _count("length", length))


def _count(name: str, value: Any) -> int:
    """Return a whole number of at least 1, of Python, NumPy or JAX."""
    with contextlib.suppress(TypeError):
        if (count := operator.index(value)) >= 1:
            return count
    raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")


# Tensors of ours, by the names in a tree of parameters of Unifloral.
_Tree = dict[str, Any]


@dataclass(eq=False)
class _TrainStep:
    """Result of `make_train_step`: the updates of one training.

    Attributes:
        config: hyperparameters, but for the sizes of the hidden layers.
        interval: number of updates from one rollout to the next.
        apply_fns: functions of the actor, the critics and the temperature.
        dataset: Unifloral's Transition of the data.
        roll: function (rng, the actor's parameters, rollout_buffer) -> rollout_buffer.
        options: other arguments of `SAC`.
    """

    config: SACConfig
    interval: int
    apply_fns: tuple[Callable[..., Any], ...]
    dataset: Any
    roll: Callable[[Any, Any, Any], Any]
    options: dict[str, Any]
    _sac: SAC | None = None
    _checked: list[Any] | None = None

    @functools.cached_property
    def data(self) -> Transitions:
        """The data set, in place."""
        return _transitions("the dataset", self.dataset)

    def run(self, rng: Any, agent_state: Any, buffer: Any, length: int) -> tuple[Any, dict[str, Any]]:
        """Call `scan` with the parts of its carry."""
        jax, (first_keys, walk) = load_jax(), _keys()
        if isinstance(rng, jax.core.Tracer):
            raise InputError("scan calls kernels, so it cannot be compiled; call it outside of jax.jit")
        sac = self.take_over(agent_state)
        before, made = int(agent_state.actor.step), 0
        params, model = agent_state.actor.params, None
        counts: list[int] = []
        losses: list[dict[str, float]] = []
        while made < length:
            since = (before + made) % self.interval
            rollout_key, halves = first_keys(rng)
            if since == 0:
                params = _like(params, _trees(sac)["actor"][0])
                buffer, model = jax.block_until_ready(self.roll(rollout_key, params, buffer)), None
            if model is None:
                model = _transitions("the rollout buffer", buffer)
            count = min(self.interval - since, length - made, _UPDATES_AT_ONCE)
            sizes, seed = (len(self.data), len(model)), seed_of(_copied(halves))
            losses.append(_learn(sac, Draws(self.data, model, sizes, sac.batch_rows, count, seed)))
            counts.append(count)
            rng, made = walk(rng, count), made + count
        columns = {name: np.array([some[name] for some in losses], np.float32) for name in losses[0]}
        repeated = {name: jax.numpy.asarray(column.repeat(counts)) for name, column in columns.items()}
        return (rng, _give_back(agent_state, sac, length), buffer), repeated

    @torch.no_grad()
    def take_over(self, agent_state: Any) -> SAC:
        """Return an SAC with the parameters and the moments of `agent_state`, whose kind is checked."""
        check_attributes(agent_state, (*_PARTS, "_replace"), _VERSION)
        states = {part: getattr(agent_state, part) for part in _PARTS}
        for state in states.values():
            check_attributes(state, ("step", "params", "opt_state", "tx", "replace"), _VERSION)
        sac, counts = self._sac_of(states["actor"].params), {}
        trees = _trees(sac)
        for part, (name, module) in _PARTS.items():
            theirs, ours = [states[part].params], trees[name]
            if name != "target":
                adam = _adam_of(states[part])
                theirs += [adam.mu, adam.nu]
                counts[part] = int(adam.count)
            with parameters_of(module):
                for mine, other in zip(ours, theirs, strict=True):
                    _copy(mine, other, module)
        if len(set(counts.values())) > 1:
            raise InputError(f"the optimizers have made different numbers of steps: {counts}")
        sac.updates = counts["actor"]
        optimizers = [states[part].tx for part in counts]
        if self._checked is None or any(map(operator.is_not, optimizers, self._checked)):
            for part, optimizer in zip(counts, optimizers, strict=True):
                _check_optimizer(part, optimizer, self.config)
            self._check_networks(states, sac)
            self._checked = optimizers
        return sac

    def _sac_of(self, params: Any) -> SAC:
        """Return an SAC with the sizes of a TanhGaussianActor's parameters, the last one if it has them."""
        with parameters_of("a TanhGaussianActor"):
            *layers, _, (last, _) = dense_layers(params["params"], shared)
            sizes, hidden = (len(layers[0][0]), last.shape[1]), tuple(len(bias) for _, bias in layers)
        sac = self._sac
        if sac is None or (sac.actor.obs_dim, sac.actor.act_dim, sac.config.hidden) != (*sizes, hidden):
            sac = self._sac = SAC(*sizes, dataclasses.replace(self.config, hidden=hidden), **self.options)
        return sac

    def _check_networks(self, states: dict[str, Any], sac: SAC) -> None:
        """Raise `InputError` where a network is not the one that `SAC` has, on some rows of the data."""
        actor_apply, q_apply, alpha_apply = self.apply_fns
        rows = slice(0, 16)
        obs, inputs = self.dataset.obs[rows], (self.data.observations[rows], self.data.actions[rows])
        sizes = (sac.actor.obs_dim, sac.actor.act_dim)
        if (given := (self.data.obs_dim, self.data.act_dim)) != sizes:
            raise InputError(
                f"the networks take {sizes[0]} observation and {sizes[1]} action dimensions, the dataset has"
                f" {given[0]} and {given[1]}"
            )
        low, high = self.config.log_std_min, self.config.log_std_max
        bounded = f"a TanhGaussianActor with ReLU and log-stds in [{low:g}, {high:g}]"

        def check(what: str, theirs: Any, ours: torch.Tensor) -> None:
            if not ours.isfinite().all():
                raise InputError(
                    f"the updates take {what}, and this one's outputs are not finite on the first rows of the"
                    " dataset; check its parameters and the dataset"
                )
            given, scale = _copied(theirs), 1.0 + float(ours.abs().sum()) / max(1, ours.numel())
            if given.shape != ours.shape or not torch.allclose(given, ours, rtol=1e-3, atol=1e-3 * scale):
                raise InputError(f"the updates take {what}, and this is another network; {_WITHOUT_UPDATES}")

        tree = _trees(sac)["actor"][0]
        log_std_bias = tree["params"][f"Dense_{len(sac.config.hidden)}"]["bias"]
        given = log_std_bias.clone()
        # The log-stds beyond each bound, and then as they are.
        for shift in (-100.0, 100.0, 0.0):
            log_std_bias.copy_(given + shift)
            pi, (mean, log_std) = actor_apply(_like(states["actor"].params, tree), obs), sac.actor(inputs[0])
            check_attributes(pi, ("distribution", "sample_and_log_prob"), _VERSION)
            check_attributes(pi.distribution, ("loc", "scale"), _VERSION)
            check(bounded, pi.distribution.loc, mean)
            check(bounded, pi.distribution.scale, log_std.exp())
        sampled, log_prob = map(_copied, pi.sample_and_log_prob(seed=load_jax().random.PRNGKey(0)))
        _, expected = sac.actor.sample(inputs[0], (sampled.atanh() - mean) / log_std.exp())
        # The inverse of tanh is inaccurate near its ends.
        inside = (sampled.abs() < 0.99).all(-1)
        check(bounded, log_prob.sum(-1)[inside], expected[inside])
        q = q_apply(states["vec_q"].params, obs, self.dataset.action[rows])
        check("a VectorQ with ReLU", q, sac.critic(*inputs).T)
        check("an EntropyCoef", alpha_apply(states["alpha"].params), sac.log_alpha)


# Fields of AgentTrainState: the names that `SAC` has for them, and the modules that they belong to.
_PARTS = {
    "actor": ("actor", "a TanhGaussianActor"),
    "vec_q": ("critic", "a VectorQ"),
    "vec_q_target": ("target", "a VectorQ"),
    "alpha": ("alpha", "an EntropyCoef"),
}


@functools.cache
def _keys() -> tuple[Callable[[Any], Any], Callable[[Any, int], Any]]:
    """Return two functions of the original's rng before an update.

    The first returns the key of the update's rollout, and two halves of a seed from the key of its rows. The
    second returns the rng after a number of updates.
    """
    jax = load_jax()
    split = jax.random.split

    def walk(rng: Any) -> tuple[Any, Any, Any]:
        # As in _train_step: of the rollout, of the two parts of the batch, and of three losses.
        rng, rollout_key = split(rng)
        rng, rows_key, _ = split(rng, 3)
        for _ in range(3):
            rng, _ = split(rng)
        return rng, rollout_key, rows_key

    def first(rng: Any) -> Any:
        _, rollout_key, rows_key = walk(rng)
        return rollout_key, jax.random.bits(rows_key, (2,), jax.numpy.uint32)

    def after(rng: Any, count: int) -> Any:
        return jax.lax.fori_loop(0, count, lambda _, rng: walk(rng)[0], rng)

    return jax.jit(first), jax.jit(after)


def _copied(array: Any) -> torch.Tensor:
    """Return a tensor with the numbers of a JAX array."""
    return torch.from_numpy(np.asarray(array).copy())


def _transitions(what: str, batch: Any) -> Transitions:
    """Return Unifloral's Transition in this package's form; only `done` is copied."""
    check_attributes(batch, _FIELDS, _VERSION)
    if np.shape(batch.reward) == (0,):
        raise InputError(f"{what} has no transitions; give one with some")
    arrays = [shared(getattr(batch, name), what) for name in _FIELDS if name != "done"]
    obs, action, reward, next_obs = arrays
    return Transitions(obs, action, reward, next_obs, as_flags(f"{what}'s done", _copied(batch.done)))


def _trees(sac: SAC) -> dict[str, list[_Tree]]:
    """Return views of an SAC's parameters, and of both moments, as trees of Unifloral's.

    A tree of the critics lacks the module that a VectorQ has its layers in.
    """

    def tree(name: str, tensors: Sequence[torch.Tensor]) -> _Tree:
        if name == "alpha":
            return {"params": {"log_ent_coef": tensors[0]}}
        # All weights, then all biases.
        depth = len(tensors) // 2
        layers = list(zip(tensors[:depth], tensors[depth:], strict=True))
        if name == "actor":
            # Unifloral has a layer for each head, the log-std first.
            (mean, log_std), (mean_bias, log_std_bias) = (whole.chunk(2, dim=-1) for whole in layers.pop())
            layers += [(log_std, log_std_bias), (mean, mean_bias)]
        return {"params": {f"Dense_{i}": {"kernel": w, "bias": b} for i, (w, b) in enumerate(layers)}}

    result = {"target": [tree("target", [parameter.data for parameter in sac.target.parameters()])]}
    for name, adam in sac.optimizers.items():
        parameters = [parameter.data for parameter in adam.parameters]
        result[name] = [tree(name, some) for some in (parameters, adam.exp_avgs, adam.exp_avg_sqs)]
    return result


def _adam_of(state: Any) -> Any:
    """Return the state of optax.adam in a TrainState."""
    chain = state.opt_state
    adam = chain[0] if isinstance(chain, tuple) and chain else chain
    check_attributes(adam, ("count", "mu", "nu", "_replace"), "optax.adam")
    return adam


def _copy(ours: _Tree, theirs: Any, module: str) -> None:
    """Copy the numbers of a tree of Unifloral's to ours."""

    def pairs(mine: Any, other: Any) -> Iterator[tuple[torch.Tensor, Any]]:
        if isinstance(mine, torch.Tensor):
            yield mine, other
            return
        if mine.keys() != other.keys():
            raise InputError(f"the updates take {module} with {sorted(mine)}, got {sorted(other)}")
        for key in mine:
            yield from pairs(mine[key], other[key])

    inner = theirs["params"]
    if module == "a VectorQ":
        # The layers are in its only module.
        (inner,) = inner.values()
    for mine, other in pairs(ours["params"], inner):
        if tuple(mine.shape) != other.shape or str(other.dtype) != "float32":
            raise InputError(
                f"the updates take {module} with args.num_critics critics and the actor's hidden layers, in"
                f" float32: a parameter must be float32 {list(mine.shape)}, got {other.dtype}"
                f" {list(other.shape)}"
            )
        mine.copy_(shared(other))


def _like(theirs: Any, ours: _Tree) -> Any:
    """Return the numbers of ours in JAX, in a tree of the structure of theirs."""
    jax = load_jax()
    # JAX orders the entries of every mapping by their keys, so the names of inner modules do not matter.
    leaves = [jax.numpy.array(tensor.numpy()) for tensor in jax.tree.leaves(ours)]
    return jax.tree.unflatten(jax.tree.structure(theirs), leaves)


def _give_back(agent_state: Any, sac: SAC, updates: int) -> Any:
    """Return `agent_state` after `updates` updates, with the numbers of an SAC."""
    numpy, trees, states = load_jax().numpy, _trees(sac), {}
    for part, (name, _) in _PARTS.items():
        state, (values, *moments) = getattr(agent_state, part), trees[name]
        change = {"step": numpy.asarray(int(state.step) + updates, numpy.int32)}
        if moments:
            adam = _adam_of(state)
            mu, nu = map(_like, (adam.mu, adam.nu), moments)
            count = numpy.asarray(sac.updates, adam.count.dtype)
            change["opt_state"] = (adam._replace(count=count, mu=mu, nu=nu), *state.opt_state[1:])
        states[part] = state.replace(params=_like(state.params, values), **change)
    return agent_state._replace(**states)


def _learn(sac: SAC, draws: Draws) -> dict[str, float]:
    """Make updates; return Unifloral's losses."""
    means = sac.means(sac.make(draws), draws.updates)
    batch, noise, *_ = sac.batch(draws, draws.updates - 1)
    with torch.no_grad():
        actions, _ = sac.actor.sample(batch.observations, noise)
        q = sac.critic(batch.observations, actions)
    done = float(batch.terminals.sum())
    names = ("critic_loss", "actor_loss", "alpha_loss", "entropy", "alpha")
    return {
        **{name: means[name] for name in names},
        "q_min": float(q.min(0).values.mean()),
        "q_std": float(q.std(0, correction=0).mean()),
        "terminations/num_done": done,
        "terminations/done_ratio": done / len(batch),
    }


def _check_optimizer(part: str, transformation: Any, config: SACConfig) -> None:
    """Raise `InputError` unless an optimizer makes the steps of Adam as `SAC` has it.

    optax has functions in the place of settings, so two of its steps are compared.
    """
    jax = load_jax()
    rate, epsilon = config.actor_learning_rate, config.adam_epsilon
    # Numbers on both sides of epsilon, and large ones, which a limit of the gradients would change.
    first = np.array([1e-7, -3e-5, 2e-3, -0.7, 90.0, 0.0], np.float32)
    mu = nu = np.zeros(first.shape)

    def tree(numbers: Any) -> Any:
        # Weight decay may have a mask by the name or by the number of dimensions.
        row = jax.numpy.asarray(numbers, jax.numpy.float32)
        return {"params": {"Dense_0": {"kernel": row.reshape(2, 3), "bias": row}}}

    value = tree([1.0, -1.0, 0.5, 2.0, 0.0, 3.0])
    state, right = transformation.init(value), True
    # Two steps do not tell a schedule.
    if jax.tree.leaves(state[1:]):
        raise InputError(
            f"the updates take optax.adam({rate:g}, eps={epsilon:g}), and the optimizer of {part} has a state"
            f" besides Adam's, as a schedule has; {_WITHOUT_UPDATES}"
        )
    for step, gradient in enumerate((first, 3.0 * first[::-1]), start=1):
        mu, nu = 0.9 * mu + 0.1 * gradient, 0.999 * nu + 0.001 * np.square(gradient.astype(float))
        divisor = np.sqrt(nu / (1 - 0.999**step)) + epsilon
        expected = -rate * mu / (1 - 0.9**step) / divisor
        given, state = transformation.update(tree(gradient), state, value)
        for some in jax.tree.leaves(given):
            right &= np.allclose(np.ravel(some), expected, rtol=1e-3, atol=1e-6 * rate)
    if not right:
        raise InputError(
            f"the updates take optax.adam({rate:g}, eps={epsilon:g}), and the optimizer of {part}"
            f" makes other steps; {_WITHOUT_UPDATES}"
        )
