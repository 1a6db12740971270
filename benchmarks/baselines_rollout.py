"""Baselines of the rollout in PyTorch, each as fast as its way of doing it allows.

A baseline takes an ensemble, an actor, start states and a horizon; calling it does the whole rollout, with
stochastic actions, the penalty `max_aleatoric` and a sample of a random elite; no rollout terminates.
`model_step` makes one step with given random numbers, so that tests can compare it with the reference.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from benchmarks.baselines import linears
from mopo_fast import Actor, EnsembleDynamics
from mopo_fast.ensemble import mlp, soft_clamp_logvar, soft_clamp_variance

# Rows at a time, so that the activations of a member fit the second-level cache.
CHUNK = 2000
PENALTY_COEF = 1.0

_Chunk = tuple[torch.Tensor, ...]


class _Model(nn.Module):
    """One step of a chunk of rows, with the actor and each member as a perceptron of nn.Linear."""

    def __init__(self, ensemble: EnsembleDynamics, actor: Actor, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.actor = linears(actor.weights, actor.biases, partial(nn.ReLU, inplace=True)).to(dtype)
        silu = partial(nn.SiLU, inplace=True)
        self.members = nn.ModuleList(
            linears([w[i] for w in ensemble.weights], [b[i] for b in ensemble.biases], silu).to(dtype)
            for i in range(ensemble.members)
        )
        self.log_std_bounds = actor.log_std_min, actor.log_std_max
        for name in ("input_mean", "input_std", "max_logvar", "min_logvar", "elites"):
            self.register_buffer(name, getattr(ensemble, name).detach().clone())

    def forward(
        self, observations: torch.Tensor, action_noise: torch.Tensor, draw: torch.Tensor, noise: torch.Tensor
    ) -> _Chunk:
        """Make a step with these random numbers.

        Returns:
            (observations, actions, penalised rewards, next observations).
        """
        mean, log_std = self._in_dtype(self.actor, observations).chunk(2, dim=-1)
        actions = torch.tanh(mean + log_std.clamp(*self.log_std_bounds).exp() * action_noise)
        inputs = (torch.cat([observations, actions], dim=-1) - self.input_mean) / self.input_std
        means, logvars = self._heads(inputs).chunk(2, dim=-1)
        variances = soft_clamp_variance(logvars, self.max_logvar, self.min_logvar)
        penalties = variances.sum(-1).amax(0).sqrt()
        chosen = self.elites[draw], torch.arange(len(observations), device=observations.device)
        sample = means[chosen] + variances[chosen].sqrt() * noise
        rewards = sample[:, -1] - PENALTY_COEF * penalties
        return observations, actions, rewards, observations + sample[:, :-1]

    def _in_dtype(self, network: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return network(x.to(self.dtype)).to(x.dtype)

    def _heads(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the members' outputs [members, rows, 2 (obs + 1)]."""
        return torch.stack([self._in_dtype(member, inputs) for member in self.members])


class _BatchedModel(_Model):
    """_Model with the members as one batch of matrices."""

    def __init__(self, ensemble: EnsembleDynamics, actor: Actor, dtype: torch.dtype) -> None:
        super().__init__(ensemble, actor, dtype)
        self.activation = ensemble.activation
        self.weights, self.biases = (
            nn.ParameterList(parameter.detach().to(dtype) for parameter in parameters)
            for parameters in (ensemble.weights, ensemble.biases)
        )

    def _heads(self, inputs: torch.Tensor) -> torch.Tensor:
        return mlp(inputs.to(self.dtype), self.weights, self.biases, self.activation).to(inputs.dtype)


class LinearRollout:
    """Rollouts with members one after the other, activations in place, 2000 rows at a time."""

    dtype = torch.float32
    options: ClassVar[dict[str, Any] | None] = None
    model: ClassVar[type[_Model]] = _Model
    chunk = CHUNK

    def __init__(self, ensemble: EnsembleDynamics, actor: Actor, start: torch.Tensor, horizon: int) -> None:
        self.start, self.horizon, self.act_dim = start, horizon, actor.act_dim
        dtype = start.dtype if self.dtype == torch.float32 else self.dtype
        model = self.model(ensemble, actor, dtype).to(start.device).eval().requires_grad_(False)
        self.elites = len(ensemble.elites)
        self.model_step: Callable[..., _Chunk] = (
            model if self.options is None else torch.compile(model, options=self.options, dynamic=False)
        )

    @torch.no_grad()
    def __call__(self) -> dict[str, torch.Tensor]:
        chunks = [self._roll_out(rows) for rows in self.start.split(self.chunk)]
        names = ("observations", "actions", "rewards", "next_observations")
        arrays = {
            name: torch.cat(parts) for name, parts in zip(names, zip(*chunks, strict=True), strict=True)
        }
        return arrays | {"terminals": torch.zeros_like(arrays["rewards"], dtype=torch.bool)}

    def _roll_out(self, observations: torch.Tensor) -> list[torch.Tensor]:
        steps = []
        for _ in range(self.horizon):
            (count, obs_dim), device = observations.shape, observations.device
            action_noise = torch.randn(count, self.act_dim, device=device)
            noise = torch.randn(count, obs_dim + 1, device=device)
            draw = torch.randint(self.elites, (count,), device=device)
            step = self.model_step(observations, action_noise, draw, noise)
            # Copied, because the next call of a recorded graph overwrites the result of this one.
            recorded = self.options is not None and "triton.cudagraphs" in self.options
            steps.append(tuple(array.clone() for array in step) if recorded else step)
            observations = steps[-1][-1]
        return [torch.cat(parts) for parts in zip(*steps, strict=True)]


class CompiledRollout(LinearRollout):
    """LinearRollout by torch.compile, the weights frozen into the graph."""

    options: ClassVar = {"freezing": True}


class BFloat16Rollout(LinearRollout):
    """LinearRollout in bfloat16: PyTorch's fastest products on processors that have them."""

    dtype = torch.bfloat16


class CompiledBFloat16Rollout(BFloat16Rollout):
    """BFloat16Rollout by torch.compile: weights packed, each product's implementation chosen by trial."""

    options: ClassVar = {"freezing": True, "max_autotune": True}


class BatchedFloat16Rollout(LinearRollout):
    """Rollouts for a GPU in float16: members as one batch of matrices, many rows a launch."""

    dtype = torch.float16
    model = _BatchedModel
    chunk = 2**17


class CompiledFloat16Rollout(BatchedFloat16Rollout):
    """BatchedFloat16Rollout by torch.compile, with its launches recorded in CUDA graphs.

    Products' implementations are not chosen by trial, which would take minutes at these sizes.
    """

    options: ClassVar = {"triton.cudagraphs": True}


class BatchedBFloat16Rollout(BatchedFloat16Rollout):
    """BatchedFloat16Rollout in bfloat16."""

    dtype = torch.bfloat16


class CompiledBatchedBFloat16Rollout(CompiledFloat16Rollout):
    """CompiledFloat16Rollout in bfloat16."""

    dtype = torch.bfloat16


class NumpyRollout:
    """Rollouts as OfflineRL-Kit does them: the whole batch at once, an einsum a layer, NumPy in between."""

    def __init__(self, ensemble: EnsembleDynamics, actor: Actor, start: torch.Tensor, horizon: int) -> None:
        self.ensemble, self.actor = ensemble, actor
        self.start, self.horizon = start.numpy(), horizon
        self.random = np.random.default_rng(0)

    def __call__(self) -> dict[str, np.ndarray]:
        names = ("observations", "actions", "rewards", "next_observations", "terminals")
        steps: dict[str, list[np.ndarray]] = {name: [] for name in names}
        observations = self.start
        for _ in range(self.horizon):
            count, obs_dim = observations.shape
            action_noise = torch.randn(count, self.actor.act_dim).numpy()
            draw = self.random.integers(len(self.ensemble.elites), size=count)
            noise = self.random.normal(size=(self.ensemble.members, count, obs_dim + 1))
            step = self.model_step(observations, action_noise, draw, noise)
            terminals = np.zeros(count, dtype=bool)
            for name, array in zip(names, (*step, terminals), strict=True):
                steps[name].append(array)
            observations = step[-1]
        return {name: np.concatenate(parts) for name, parts in steps.items()}

    @torch.no_grad()
    def model_step(
        self, observations: np.ndarray, action_noise: np.ndarray, draw: np.ndarray, noise: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Make one step, as `_Model.forward` does; noise is [members, rows, obs_dim + 1]."""
        ensemble = self.ensemble
        mean, log_std = self.actor(torch.as_tensor(observations))
        actions = torch.tanh(mean + log_std.exp() * torch.as_tensor(action_noise)).numpy()
        inputs = np.concatenate([observations, actions], axis=-1)
        scaled = (inputs - ensemble.input_mean.numpy()) / ensemble.input_std.numpy()
        x = torch.as_tensor(scaled)
        for i, (weight, bias) in enumerate(zip(ensemble.weights, ensemble.biases, strict=True)):
            if i > 0:
                x = x * torch.sigmoid(x)
            x = torch.einsum("ij,bjk->bik" if i == 0 else "bij,bjk->bik", x, weight) + bias.unsqueeze(1)
        means, logvars = x.chunk(2, dim=-1)
        std = np.sqrt(np.exp(soft_clamp_logvar(logvars, ensemble.max_logvar, ensemble.min_logvar).numpy()))
        means = means.numpy()
        means[..., :-1] += observations
        samples = (means + noise * std).astype(observations.dtype)
        sample = samples[ensemble.elites.numpy()[draw], np.arange(len(observations))]
        penalties = np.amax(np.linalg.norm(std, axis=2), axis=0)
        return observations, actions, sample[:, -1] - PENALTY_COEF * penalties, sample[:, :-1]
