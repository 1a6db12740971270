"""The tanh-Gaussian actor and the critics.

Source: softlearning/policies and value_functions of the authors' code: two hidden layers of 256, ReLU.
"""

import itertools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from mopo_fast.config import ACTIVATIONS, Activation
from mopo_fast.ensemble import layer_tensors, mlp, mlp_bytes
from mopo_fast.errors import InputError
from mopo_fast.utils.atomic import read_json_as, write_json
from mopo_fast.utils.machine import check_memory
from mopo_fast.utils.tensors import (
    as_float32,
    check_sizes,
    layer_weights,
    load_into,
    load_tensors,
    save_tensors,
)

FORMAT_VERSION = 1

# `mlp`, or a function that computes the same in another precision.
Network = Callable[..., torch.Tensor]


def _xavier_uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> torch.Tensor:
    # The authors' networks have Keras' default initialisation.
    bound = math.sqrt(6.0 / (shape[-2] + shape[-1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True)
class _Declared:
    """The fields of policy.json."""

    format_version: int
    obs_dim: int
    act_dim: int
    activation: Activation
    log_std_min: float
    log_std_max: float


class Actor(nn.Module):
    """A Gaussian over actions, squashed by tanh into [-1, 1].

    Args:
        obs_dim: size of an observation.
        act_dim: size of an action.
        hidden: sizes of the hidden layers.
        activation: one of `config.ACTIVATIONS`.
        log_std_min: lower bound that log standard deviations are clipped to.
        log_std_max: upper bound that log standard deviations are clipped to.
        generator: random numbers of the initial weights; None takes torch's.

    Attributes:
        weights: [in, out] of each layer. The last one's outputs are act_dim means, then as many log standard
            deviations.
        biases: [out] of each layer.

    Raises:
        InputError: a size or a bound is out of range.
    """

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        *,
        hidden: tuple[int, ...] = (256, 256),
        activation: Activation = "relu",
        log_std_min: float = -20.0,
        log_std_max: float = 2.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise InputError(f"unknown activation {activation!r}; there are: {', '.join(ACTIVATIONS)}")
        sizes = (obs_dim, act_dim, *hidden) if isinstance(hidden, tuple | list) else (None,)
        if not all(isinstance(size, int | np.integer) and size >= 1 for size in sizes):
            raise InputError(
                f"sizes must be whole numbers, 1 or more, got obs {obs_dim}, act {act_dim}, hidden {hidden}"
            )
        if not log_std_min < log_std_max:
            raise InputError(f"log_std_min {log_std_min} must be below log_std_max {log_std_max}")
        if any(
            torch.finfo(torch.float32).max < abs(bound) < math.inf for bound in (log_std_min, log_std_max)
        ):
            raise InputError(f"log_std_min {log_std_min} and log_std_max {log_std_max} must fit into float32")
        self.obs_dim, self.act_dim, self.activation = obs_dim, act_dim, activation
        self.log_std_min, self.log_std_max = float(log_std_min), float(log_std_max)
        widths = [obs_dim, *hidden, 2 * act_dim]
        what = f"an actor with obs {obs_dim}, act {act_dim}, hidden {hidden}"
        check_memory(what, mlp_bytes(1, widths), "cpu", "these sizes")
        self.weights = nn.ParameterList(
            nn.Parameter(_xavier_uniform(pair, generator)) for pair in itertools.pairwise(widths)
        )
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(out)) for out in widths[1:])

    @property
    def hidden(self) -> tuple[int, ...]:
        """Sizes of the hidden layers."""
        return tuple(weight.shape[1] for weight in self.weights[:-1])

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
        return f"Actor({settings}, device='{self.biases[0].device}')"

    def settings(self) -> dict[str, Any]:
        """Return the arguments that make an actor like this one."""
        names = ("obs_dim", "act_dim", "hidden", "activation", "log_std_min", "log_std_max")
        return {name: getattr(self, name) for name in names}

    def forward(
        self, observations: torch.Tensor, network: Network = mlp
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and clipped log standard deviation before the tanh, each [batch, act_dim]."""
        mean, log_std = network(observations, self.weights, self.biases, self.activation).chunk(2, dim=-1)
        return mean, log_std.clamp(self.log_std_min, self.log_std_max)

    def sample(
        self, observations: torch.Tensor, noise: torch.Tensor, network: Network = mlp, epsilon: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return actions [batch, act_dim] from standard normal `noise`, and log-probabilities [batch].

        `epsilon` is added to 1 - tanh^2 in the log-probabilities, see `SACConfig.log_prob_epsilon`.
        """
        mean, log_std = self(observations, network)
        raw = mean + log_std.exp() * noise
        # log(1 - tanh(x)^2), in a form that does not cancel.
        squash = 2.0 * (math.log(2.0) - raw - functional.softplus(-2.0 * raw))
        if epsilon:
            squash = (squash.exp() + epsilon).log()
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi) - squash
        return torch.tanh(raw), log_prob.sum(-1)

    def act(self, observations: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Return actions [batch, act_dim] in [-1, 1]: from standard normal `noise`, or tanh(mean)."""
        return self.acting()(observations, noise)

    def acting(self) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
        """Return `act` as a function that has looked up the parameters.

        It takes about half of the time for a few rows. Parameters that are updated in place are seen.
        """
        weights = [weight.detach() for weight in self.weights]
        biases = [bias.detach() for bias in self.biases]

        @torch.no_grad()
        def act(observations: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
            mean, log_std = mlp(observations, weights, biases, self.activation).chunk(2, dim=-1)
            if noise is None:
                return torch.tanh(mean)
            return torch.tanh(mean + log_std.clamp(self.log_std_min, self.log_std_max).exp() * noise)

        return act

    def predict(
        self, observations: Any, *, deterministic: bool = True, generator: torch.Generator | None = None
    ) -> npt.NDArray[Any]:
        """Return the actions for one observation or many, as NumPy arrays.

        Args:
            observations: [obs_dim] or [n, obs_dim], an array of numbers or a list; it is converted to the
                type and device of the parameters.
            deterministic: return tanh(mean) instead of sampling.
            generator: random numbers on the CPU of the sampled actions; None takes torch's.

        Returns:
            Actions [act_dim] or [n, act_dim] in [-1, 1], which stands for the environment's range. They are a
            new array.

        Raises:
            InputError: the observations are not numbers, have another shape or are not finite.
        """
        parameter = self.biases[0]
        given = observations.numpy(force=True) if isinstance(observations, torch.Tensor) else observations
        try:
            # A copy is taken, since tensors support neither read-only memory nor negative strides.
            batch = torch.from_numpy(np.array(given, dtype=np.float64)).to(parameter)
        except (TypeError, ValueError) as error:
            raise InputError(f"observations must be numbers ({error})") from error
        if batch.ndim not in (1, 2) or batch.shape[-1] != self.obs_dim:
            raise InputError(
                f"observations must be [{self.obs_dim}] or [n, {self.obs_dim}], got shape {list(batch.shape)}"
            )
        if not bool(torch.isfinite(batch).all()):
            raise InputError("observations must be finite")
        rows, noise = torch.atleast_2d(batch), None
        if not deterministic:
            noise = torch.randn(len(rows), self.act_dim, generator=generator).to(parameter)
        actions = self.act(rows, noise).cpu().numpy()
        return actions[0] if batch.ndim == 1 else actions

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write policy.safetensors and policy.json, each atomically.

        Raises:
            InputError: the folder cannot be written.
        """
        folder = Path(folder)
        self.save_tensors(folder / "policy.safetensors")
        write_json(
            folder / "policy.json",
            {
                "format_version": FORMAT_VERSION,
                "obs_dim": self.obs_dim,
                "act_dim": self.act_dim,
                "activation": self.activation,
                "log_std_min": self.log_std_min,
                "log_std_max": self.log_std_max,
            },
        )

    def save_tensors(self, path: str | os.PathLike[str]) -> None:
        """Write the parameters alone to a safetensors file, atomically.

        Raises:
            InputError: the file cannot be written.
        """
        save_tensors(path, layer_tensors(self.weights, self.biases))

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        *,
        tensors_from: str | os.PathLike[str] | None = None,
    ) -> "Actor":
        """Read an actor that `save` wrote.

        Args:
            folder: folder of policy.json and policy.safetensors.
            device: device of the actor.
            tensors_from: file with the parameters, in place of policy.safetensors, such as one that
                `train --keep-policies` has kept.

        Raises:
            InputError: a file is missing, truncated or of another version, or its shapes do not agree.
        """
        folder = Path(folder)
        meta = read_json_as(folder / "policy.json", _Declared)
        path = Path(folder / "policy.safetensors" if tensors_from is None else tensors_from)
        tensors = as_float32(path, load_tensors(path))
        if meta.format_version != FORMAT_VERSION:
            raise InputError(f"{folder / 'policy.json'} is not of format_version {FORMAT_VERSION}")
        weights = layer_weights(path, tensors, ndim=2)
        check_sizes(path, weights, meta.obs_dim, 2 * meta.act_dim)
        actor = cls(
            meta.obs_dim,
            meta.act_dim,
            hidden=tuple(weight.shape[-1] for weight in weights[:-1]),
            activation=meta.activation,
            log_std_min=meta.log_std_min,
            log_std_max=meta.log_std_max,
        )
        load_into(path, tensors, layer_tensors(actor.weights, actor.biases))
        return actor.to(device)


Policy = Actor | Callable[[Any], Any] | Literal["uniform", "behavior"]
"""An `Actor`, a function of observations [n, obs_dim] that returns actions [n, act_dim], or a name."""


class Critic(nn.Module):
    """Independent Q-functions, computed as one batch of matrices.

    Args:
        obs_dim: size of an observation.
        act_dim: size of an action.
        critics: number of Q-functions.
        hidden: sizes of the hidden layers.
        generator: random numbers of the initial weights; None takes torch's.

    Attributes:
        weights: [critics, in, out] of each layer.
        biases: [critics, out] of each layer.

    Raises:
        InputError: the parameters would take more memory than is available.
    """

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        *,
        critics: int = 2,
        hidden: tuple[int, ...] = (256, 256),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = [obs_dim + act_dim, *hidden, 1]
        what = f"a critic with obs {obs_dim}, act {act_dim}, hidden {hidden}"
        check_memory(what, mlp_bytes(critics, sizes), "cpu", "critics or these sizes")
        self.weights = nn.ParameterList(
            nn.Parameter(_xavier_uniform((critics, *pair), generator)) for pair in itertools.pairwise(sizes)
        )
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(critics, out)) for out in sizes[1:])

    def forward(
        self,
        observations: torch.Tensor,
        actions: torch.Tensor,
        network: Network = mlp,
        some: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return Q-values [critics, batch], of the critics whose numbers are in `some`; None takes all."""
        weights, biases = list(self.weights), list(self.biases)
        if some is not None:
            weights = [torch.take_along_dim(weight, some[..., None, None], dim=-3) for weight in weights]
            biases = [torch.take_along_dim(bias, some[..., None], dim=-2) for bias in biases]
        x = torch.cat([observations, actions], dim=-1).unsqueeze(-3)
        return network(x, weights, biases, "relu").squeeze(-1)
