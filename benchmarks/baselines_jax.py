"""Baselines in JAX: all updates of a round in one jitted scan, as Unifloral does them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from benchmarks.baselines import ARRAYS, BETAS, EPS
from benchmarks.baselines_rollout import CHUNK, PENALTY_COEF
from mopo_fast import Actor, EnsembleDynamics
from mopo_fast.buffer import RingBuffer
from mopo_fast.data.transitions import Transitions
from mopo_fast.fit import Fit
from mopo_fast.sac import SAC

Tree = Any


class JaxSAC:
    """SAC with critics under vmap; rows and noise are drawn inside the scan."""

    def __init__(self, sac: SAC, data: Transitions, buffer: RingBuffer, updates: int) -> None:
        self.config, self.target_entropy = sac.config, sac.target_entropy
        self.rows, self.act_dim = sac.batch_rows, sac.actor.act_dim
        self.sources = [
            [_array(getattr(source, name)) for name in ARRAYS]
            for source in (data, buffer.storage[: len(buffer)])
        ]
        parameters = {
            "actor": _layers(sac.actor),
            "critic": _layers(sac.critic),
            "log_alpha": _array(sac.log_alpha),
        }
        self.carry = (_adam_state(parameters), _layers(sac.target))
        self.key = jax.random.key(0)
        self.update_jitted = jax.jit(self._update)

        def run(carry: Tree, key: jax.Array, sources: Tree) -> Tree:
            keys = jax.random.split(key, updates)
            return lax.scan(lambda carry, key: (self._drawn_update(carry, key, sources), None), carry, keys)[
                0
            ]

        self.run = jax.jit(run, donate_argnums=0)

    def __call__(self) -> None:
        self.key, key = jax.random.split(self.key)
        self.carry = jax.block_until_ready(self.run(self.carry, key, self.sources))

    def update(
        self,
        batch: list[torch.Tensor],
        noise: torch.Tensor,
        next_noise: torch.Tensor,
        drawn: torch.Tensor | None = None,
    ) -> None:
        arrays = [_array(array) for array in batch]
        critics = None if drawn is None else _array(drawn)
        self.carry = self.update_jitted(self.carry, arrays, _array(noise), _array(next_noise), critics)

    def _drawn_update(self, carry: Tree, key: jax.Array, sources: Tree) -> Tree:
        *row_keys, noise_key, critics_key = jax.random.split(key, 4)
        drawn = []
        for arrays, count, row_key in zip(sources, self.rows, row_keys, strict=True):
            rows = jax.random.randint(row_key, (count,), 0, len(arrays[0]))
            drawn.append([array[rows] for array in arrays])
        batch = [jnp.concatenate(pair) for pair in zip(*drawn, strict=True)]
        noise, next_noise = jax.random.normal(noise_key, (2, sum(self.rows), self.act_dim))
        count, drawn = self.config.target_critics, None
        if count is not None:
            drawn = jax.random.permutation(critics_key, self.config.critics)[:count]
        return self._update(carry, batch, noise, next_noise, drawn)

    def _update(
        self, carry: Tree, batch: Tree, noise: jax.Array, next_noise: jax.Array, drawn: jax.Array | None
    ) -> Tree:
        adam, target = carry
        config = self.config
        some = target if drawn is None else jax.tree.map(lambda array: array[drawn], target)
        gradients = jax.grad(self._loss)(adam["parameters"], some, batch, noise, next_noise)
        rates = {
            "actor": config.actor_learning_rate,
            "critic": config.critic_learning_rate,
            "log_alpha": config.alpha_learning_rate,
        }
        adam = _adam_step(adam, gradients, rates)
        critic = adam["parameters"]["critic"]
        return adam, jax.tree.map(lambda old, new: old + config.polyak * (new - old), target, critic)

    def _loss(
        self, parameters: Tree, target: Tree, batch: Tree, noise: jax.Array, next_noise: jax.Array
    ) -> jax.Array:
        """Return the sum of the three losses, of which none depends on the others' parameters."""
        observations, actions, rewards, next_observations, terminals = batch
        held = lax.stop_gradient(parameters)
        alpha = jnp.exp(held["log_alpha"])
        next_actions, next_log_prob = self._sample(held["actor"], next_observations, next_noise)
        next_q = _values(target, next_observations, next_actions).min(0)
        future = jnp.where(terminals, 0.0, next_q - alpha * next_log_prob)
        target_q = rewards + self.config.discount * future
        q = _values(parameters["critic"], observations, actions)
        policy_actions, log_prob = self._sample(parameters["actor"], observations, noise)
        each_q = _values(held["critic"], observations, policy_actions)
        policy_q = each_q.mean(0) if self.config.actor_q == "mean" else each_q.min(0)
        entropy_gap = (lax.stop_gradient(log_prob) + self.target_entropy).mean()
        return (
            0.5 * jnp.square(q - target_q).mean(1).sum()
            + (alpha * log_prob - policy_q).mean()
            - parameters["log_alpha"] * entropy_gap
        )

    def _sample(self, actor: Tree, observations: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, log_std = jnp.split(_mlp(actor, observations, jax.nn.relu), 2, axis=-1)
        log_std = jnp.clip(log_std, self.config.log_std_min, self.config.log_std_max)
        raw = mean + jnp.exp(log_std) * noise
        squash = 2.0 * (math.log(2.0) - raw - jax.nn.softplus(-2.0 * raw))
        log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2.0 * math.pi) - squash
        return jnp.tanh(raw), log_prob.sum(-1)

    def state(self) -> dict[str, torch.Tensor]:
        adam, target = self.carry
        nets = {
            "actor": adam["parameters"]["actor"],
            "critic": adam["parameters"]["critic"],
            "target": target,
        }
        tensors = {"log_alpha": _tensor(adam["parameters"]["log_alpha"])}
        for name, layers in nets.items():
            tensors |= _named(layers, f"{name}.")
        return tensors


class JaxRollout:
    """Rollouts with all steps of a chunk of rows in one scan, and the ensemble under vmap."""

    def __init__(self, ensemble: EnsembleDynamics, actor: Actor, start: torch.Tensor, horizon: int) -> None:
        self.log_std_bounds, self.obs_dim = (actor.log_std_min, actor.log_std_max), ensemble.obs_dim
        self.model = {"actor": _layers(actor), "members": _layers(ensemble)} | {
            name: _array(getattr(ensemble, name))
            for name in ("input_mean", "input_std", "max_logvar", "min_logvar", "elites")
        }
        self.key = jax.random.key(0)
        size = next(size for size in range(min(CHUNK, len(start)), 0, -1) if len(start) % size == 0)
        self.start = _array(start).reshape(-1, size, ensemble.obs_dim)

        def roll_out(model: Tree, start: jax.Array, key: jax.Array) -> Tree:
            def step(observations: jax.Array, key: jax.Array) -> Tree:
                action_key, draw_key, noise_key = jax.random.split(key, 3)
                results = self.model_step(
                    observations,
                    jax.random.normal(action_key, (size, actor.act_dim)),
                    jax.random.randint(draw_key, (size,), 0, len(model["elites"])),
                    jax.random.normal(noise_key, (size, self.obs_dim + 1)),
                    model,
                )
                return results[-1], results

            return lax.scan(step, start, jax.random.split(key, horizon))[1]

        def run(model: Tree, start: jax.Array, key: jax.Array) -> Tree:
            keys = jax.random.split(key, len(start))
            results = lax.map(lambda chunk: roll_out(model, *chunk), (start, keys))
            # [chunks, horizon, rows] becomes [horizon, all rows].
            return [jnp.moveaxis(array, 1, 0).reshape(-1, *array.shape[3:]) for array in results]

        self.run = jax.jit(run)

    def __call__(self) -> dict[str, np.ndarray]:
        self.key, key = jax.random.split(self.key)
        arrays = jax.block_until_ready(self.run(self.model, self.start, key))
        names = ("observations", "actions", "rewards", "next_observations")
        named = {name: np.array(array) for name, array in zip(names, arrays, strict=True)}
        return named | {"terminals": np.zeros(len(named["rewards"]), dtype=bool)}

    def model_step(
        self, observations: Tree, action_noise: Tree, draw: Tree, noise: Tree, model: Tree = None
    ) -> Tree:
        """Make one step, as `baselines_rollout._Model.forward` does."""
        model = model or self.model
        mean, log_std = jnp.split(_mlp(model["actor"], observations, jax.nn.relu), 2, axis=-1)
        actions = jnp.tanh(mean + jnp.exp(jnp.clip(log_std, *self.log_std_bounds)) * action_noise)
        inputs = jnp.concatenate([observations, actions], axis=-1)
        inputs = (inputs - model["input_mean"]) / model["input_std"]
        heads = jax.vmap(lambda layers: _mlp(layers, inputs, jax.nn.silu))(model["members"])
        means, logvars = jnp.split(heads, 2, axis=-1)
        variances = jnp.exp(model["min_logvar"]) + 1.0 / (jnp.exp(-model["max_logvar"]) + jnp.exp(-logvars))
        penalties = jnp.sqrt(variances.sum(-1).max(0))
        chosen = model["elites"][draw], jnp.arange(len(observations))
        sample = means[chosen] + jnp.sqrt(variances[chosen]) * noise
        rewards = sample[:, -1] - PENALTY_COEF * penalties
        return observations, actions, rewards, observations + sample[:, :-1]


class JaxFit:
    """The fit with the ensemble under vmap; all steps of a round in one scan, which gathers the rows."""

    def __init__(self, fit: Fit, rows: torch.Tensor) -> None:
        self.config, model = fit.config, fit.model
        self.activation = {"silu": jax.nn.silu, "relu": jax.nn.relu, "tanh": jnp.tanh}[model.activation]
        self.rows, self.inputs, self.targets = _array(rows), _array(fit.inputs), _array(fit.targets)
        self.adam = _adam_state(
            {
                "layers": _layers(model),
                "max_logvar": _array(model.max_logvar),
                "min_logvar": _array(model.min_logvar),
            }
        )
        size = self.config.batch_size

        def run(adam: Tree, rows: jax.Array, inputs: jax.Array, targets: jax.Array) -> Tree:
            batches = rows.reshape(len(rows), -1, size).swapaxes(0, 1)
            adam, _ = lax.scan(lambda adam, b: (self._step(adam, inputs[b], targets[b]), None), adam, batches)
            return adam

        self.run = jax.jit(run, donate_argnums=0)

    def __call__(self) -> None:
        self.adam = jax.block_until_ready(self.run(self.adam, self.rows, self.inputs, self.targets))

    def _step(self, adam: Tree, inputs: jax.Array, targets: jax.Array) -> Tree:
        gradients = jax.grad(self._loss)(adam["parameters"], inputs, targets)
        # The derivative of coef * 0.5 ||W||^2.
        gradients["layers"] = [
            (weight_gradient + decay * weight, bias_gradient)
            for (weight_gradient, bias_gradient), (weight, _), decay in zip(
                gradients["layers"], adam["parameters"]["layers"], self.config.weight_decay, strict=True
            )
        ]
        rate = self.config.learning_rate
        return _adam_step(adam, gradients, dict.fromkeys(("layers", "max_logvar", "min_logvar"), rate))

    def _loss(self, parameters: Tree, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        low, high = parameters["min_logvar"], parameters["max_logvar"]
        heads = jax.vmap(lambda layers, x: _mlp(layers, x, self.activation))(parameters["layers"], inputs)
        mean, logvar = jnp.split(heads, 2, axis=-1)
        logvar = high - jax.nn.softplus(high - logvar)
        logvar = low + jax.nn.softplus(logvar - low)
        likelihood = (jnp.square(mean - targets) * jnp.exp(-logvar) + logvar).mean((1, 2)).sum()
        return likelihood + self.config.logvar_bound_weight * (high.sum() - low.sum())

    def state(self) -> dict[str, torch.Tensor]:
        parameters = self.adam["parameters"]
        bounds = {name: _tensor(parameters[name]) for name in ("max_logvar", "min_logvar")}
        return bounds | _named(parameters["layers"])


def _mlp(layers: Tree, x: jax.Array, activation: Any) -> jax.Array:
    *hidden, (weight, bias) = layers
    for hidden_weight, hidden_bias in hidden:
        x = activation(x @ hidden_weight + hidden_bias)
    return x @ weight + bias


def _values(critics: Tree, observations: jax.Array, actions: jax.Array) -> jax.Array:
    inputs = jnp.concatenate([observations, actions], axis=-1)
    return jax.vmap(lambda layers: _mlp(layers, inputs, jax.nn.relu))(critics).squeeze(-1)


def _adam_state(parameters: Tree) -> Tree:
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    return {
        "parameters": parameters,
        "exp_avg": zeros,
        # Other arrays than before: a donated array may be passed only once.
        "exp_avg_sq": jax.tree.map(jnp.zeros_like, parameters),
        "step": jnp.zeros(()),
    }


def _adam_step(adam: Tree, gradients: Tree, rates: dict[str, float]) -> Tree:
    """Make one step of torch's Adam with its defaults and a learning rate for each parameter."""
    step = adam["step"] + 1.0
    first, second = BETAS
    exp_avg = jax.tree.map(lambda m, g: first * m + (1.0 - first) * g, adam["exp_avg"], gradients)
    exp_avg_sq = jax.tree.map(lambda v, g: second * v + (1.0 - second) * g * g, adam["exp_avg_sq"], gradients)
    scale, scale_sq = 1.0 - first**step, 1.0 - second**step

    def moved(rate: float) -> Any:
        return lambda p, m, v: p - rate * (m / scale) / (jnp.sqrt(v / scale_sq) + EPS)

    parameters = {
        name: jax.tree.map(moved(rate), adam["parameters"][name], exp_avg[name], exp_avg_sq[name])
        for name, rate in rates.items()
    }
    return {"parameters": parameters, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "step": step}


def _layers(model: torch.nn.Module) -> Tree:
    return [(_array(w), _array(b)) for w, b in zip(model.weights, model.biases, strict=True)]


def _array(tensor: torch.Tensor) -> jax.Array:
    return jnp.array(tensor.detach().numpy())


def _tensor(array: jax.Array) -> torch.Tensor:
    return torch.tensor(jax.device_get(array))


def _named(layers: Tree, prefix: str = "") -> dict[str, torch.Tensor]:
    tensors = {}
    for i, (weight, bias) in enumerate(layers):
        tensors |= {f"{prefix}weights.{i}": _tensor(weight), f"{prefix}biases.{i}": _tensor(bias)}
    return tensors
