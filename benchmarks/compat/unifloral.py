"""The rollout and the epoch of Unifloral: its MOPO, of halfcheetah's sizes, on random data."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from examples.unifloral import import_theirs, make_dynamics, make_training
from mopo_fast.compat import unifloral

OBS_DIM, ACT_DIM, HORIZON = 17, 6, 5


def contenders(
    checkout: Path, *, batch_size: int, updates: int, **options: Any
) -> dict[str, Callable[[], object]]:
    """Return calls by name; each is a rollout of 5 steps into their buffer, or that and `updates`.

    An update has 10 critics. "by steps" has the first change of examples/unifloral.py, so that JAX runs the
    policy; "fused" has its fused rollouts; "fused and updates" makes the updates on the kernels too, and its
    epoch is called once beforehand. All other calls are compiled beforehand.
    """
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    sizes = ((10_000, dim) for dim in (OBS_DIM, ACT_DIM, OBS_DIM))
    obs, action, next_obs = (jax.random.normal(key, size) for key, size in zip(keys, sizes, strict=True))
    scalars = jnp.zeros(len(obs))
    rollouts: dict[str, Callable[[], object]] = {}
    epochs: dict[str, Callable[[], object]] = {}
    for name in ("as shipped", "by steps", "fused"):
        dynamics, mopo = import_theirs(checkout, name == "fused")
        dataset = dynamics.Transition(obs, jnp.tanh(action), scalars, next_obs, jnp.tanh(action), scalars)
        model = make_dynamics(dynamics, dataset, "halfcheetah-medium-v2", epochs=0)
        ours = {} if name == "as shipped" else options
        if name != "as shipped":
            model = unifloral.EnsembleDynamics(model)
        args = mopo.Args(rollout_interval=updates, rollout_batch_size=batch_size, rollout_length=HORIZON)
        step, carry, rollout_fn = make_training(mopo, model, dataset, args, **ours)
        apply = None if name == "fused" else mopo.TanhGaussianActor(ACT_DIM).apply
        rollouts[f"rollout, {name}"] = _Repeated(functools.partial(_rollout, rollout_fn, apply), carry)
        epochs[f"epoch, {name}"] = _Repeated(functools.partial(_epoch, step, updates), carry)
        if name == "fused":
            make_train_step = functools.partial(unifloral.make_train_step, **options)
            step, carry, _ = make_training(mopo, model, dataset, args, make_train_step, **ours)
            epochs["epoch, fused and updates"] = _Epochs(step, carry, updates)
    return rollouts | epochs


def _rollout(rollout_fn: Any, apply: Any, carry: Any) -> Any:
    key, agent, buffer = carry
    key, rollout_key = jax.random.split(key)
    params = agent.actor.params
    policy = params if apply is None else lambda obs, rng: apply(params, obs).sample(seed=rng)
    return key, agent, rollout_fn(rollout_key, policy, buffer)


def _epoch(step: Any, updates: int, carry: Any) -> Any:
    return jax.lax.scan(step, carry, None, updates)[0]


class _Epochs:
    """Epochs of `unifloral.scan`, each from the state of the one before."""

    def __init__(self, step: Any, carry: Any, updates: int) -> None:
        self.step, self.carry, self.updates = step, carry, updates
        self()

    def __call__(self) -> None:
        carry, _ = unifloral.scan(self.step, self.carry, None, self.updates)
        self.carry = jax.block_until_ready(carry)


class _Repeated:
    """A compiled function of its own last result, which it overwrites, as in their loop."""

    def __init__(self, function: Any, carry: Any) -> None:
        self.carry = jax.tree.map(jnp.copy, carry)
        self.compiled = jax.jit(function, donate_argnums=0).lower(carry).compile()

    def __call__(self) -> None:
        self.carry = jax.block_until_ready(self.compiled(self.carry))
