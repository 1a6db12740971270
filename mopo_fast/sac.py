"""Soft actor-critic on a mixture of real and model transitions.

Source: softlearning/algorithms/mopo.py of the authors' code; others' choices are options of `SACConfig`.
"""

import copy
import math
import os
from collections.abc import Iterable, Sequence

import torch
from torch.optim.adam import adam
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mopo_fast import backends
from mopo_fast.backends import cpu
from mopo_fast.backends.philox import (
    ACTION_STREAM,
    BATCH_STREAM,
    NEXT_ACTION_STREAM,
    random_choice,
    random_normals,
)
from mopo_fast.buffer import RingBuffer
from mopo_fast.config import SACConfig
from mopo_fast.data.transitions import Transitions, concatenate
from mopo_fast.errors import InputError
from mopo_fast.machine import resolve_threads
from mopo_fast.policy import Actor, Critic
from mopo_fast.seeds import INIT, derive_seed
from mopo_fast.tensors import require_shape

# Updates of one call of the kernel, or whose random numbers are drawn at once; an interrupt waits so long.
_UPDATES_AT_ONCE = 100
METRICS = ("critic_loss", "actor_loss", "alpha_loss", "q", "alpha", "entropy")


class Adam:
    """torch's fused Adam with its defaults, and its state in the open.

    `torch.optim.Adam` costs more than the arithmetic for networks of this size.

    Attributes:
        parameters: leaf tensors, changed in place.
        learning_rate: may be changed between steps.
        exp_avgs, exp_avg_sqs: running moments, shaped as the parameters.
        steps: float32 scalars, how many steps each has made.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], learning_rate: float) -> None:
        self.parameters, self.learning_rate = list(parameters), learning_rate
        self.exp_avgs = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.exp_avg_sqs = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.steps = [torch.zeros((), device=parameter.device) for parameter in self.parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor]) -> None:
        """Move the parameters against `gradients`, one for each."""
        adam(
            self.parameters,
            list(gradients),
            self.exp_avgs,
            self.exp_avg_sqs,
            [],
            self.steps,
            fused=True,
            lr=self.learning_rate,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0.0,
            amsgrad=False,
            maximize=False,
        )


class SAC:
    """An actor, its critics and their target, the temperature, and an Adam for each of the three.

    Args:
        obs_dim, act_dim: sizes of an observation and an action.
        config: hyperparameters.
        seed: of the initial parameters.
        device: where everything lives.
        total_updates: where the cosine schedule of the actor's learning rate reaches zero; needed by it only.
        backend: of `update_many`: "cpu", the fused kernel; "reference", `update` in a loop; or "auto".
        threads: of the CPU kernel; None: all cores that this process may use. The result is the same for any.

    Raises:
        InputError: a hyperparameter is out of range, or the backend cannot serve.
    """

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        config: SACConfig | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        total_updates: int | None = None,
        backend: str = "auto",
        threads: int | None = None,
    ) -> None:
        config = config or SACConfig()
        check_config(config)
        if config.actor_schedule == "cosine" and not total_updates:
            raise InputError("the cosine schedule needs total_updates, the number of updates it spans")
        self.config, self.total_updates, self.updates = config, total_updates, 0
        self.backend = backends.choose(backend, "float32", torch.device(device), training=True)
        self.threads = resolve_threads(threads)
        self.target_entropy = (
            -float(act_dim) if config.target_entropy == "act_dim" else float(config.target_entropy)
        )
        generator = torch.Generator().manual_seed(derive_seed(seed, INIT))
        self.actor = Actor(
            obs_dim,
            act_dim,
            hidden=config.hidden,
            log_std_min=config.log_std_min,
            log_std_max=config.log_std_max,
            generator=generator,
        ).to(device)
        self.critic = Critic(
            obs_dim, act_dim, critics=config.critics, hidden=config.hidden, generator=generator
        ).to(device)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = torch.zeros((), device=device, requires_grad=True)
        self.optimizers = {
            "actor": Adam(self.actor.parameters(), config.actor_learning_rate),
            "critic": Adam(self.critic.parameters(), config.critic_learning_rate),
            "alpha": Adam([self.log_alpha], config.alpha_learning_rate),
        }
        self._targets = list(self.target.parameters())
        self._polyak = get_ema_multi_avg_fn(1.0 - config.polyak)

    @property
    def batch_rows(self) -> tuple[int, int]:
        """How many rows of a batch are of the data set, and how many of the model."""
        real = int(self.config.real_ratio * self.config.batch_size)
        return real, self.config.batch_size - real

    @property
    def alpha(self) -> torch.Tensor:
        """The temperature, a scalar without gradient, clamped where the config says so."""
        return self.log_alpha.detach().exp().clamp(0.0, self.config.alpha_max)

    def update(self, batch: Transitions, noise: torch.Tensor, next_noise: torch.Tensor) -> torch.Tensor:
        """One step of critics, actor and temperature, then of the target.

        Args:
            batch: n transitions.
            noise, next_noise: standard normal [n, act_dim], for the actions at observations and at
                next_observations.

        Returns:
            The values of `METRICS` before the step, [6]; entropy is the mean of -log_prob.
        """
        config, alpha = self.config, self.alpha
        actor, critic, temperature = (self.optimizers[name] for name in ("actor", "critic", "alpha"))
        target_q = self._target_q(batch, next_noise, alpha)
        q = self.critic(batch.observations, batch.actions)
        critic_loss = (q - target_q).square().mean(dim=1).sum()
        if config.critic_loss == "half_mse":
            critic_loss = 0.5 * critic_loss
        critic_gradients = torch.autograd.grad(critic_loss, critic.parameters)
        if not config.simultaneous:
            critic.step(critic_gradients)

        actions, log_prob = self.actor.sample(batch.observations, noise)
        policy_q = self.critic(batch.observations, actions).min(dim=0).values
        actor_loss = (alpha * log_prob - policy_q).mean()
        # Naming the inputs spares the critics' weight gradients, which nobody needs here.
        actor_gradients = torch.autograd.grad(actor_loss, actor.parameters)

        entropy = -log_prob.detach().mean()
        alpha_loss = self.log_alpha * (entropy - self.target_entropy)
        alpha_gradients = torch.autograd.grad(alpha_loss, temperature.parameters)

        if config.simultaneous:
            critic.step(critic_gradients)
        actor.step(actor_gradients)
        temperature.step(alpha_gradients)
        self._polyak(self._targets, critic.parameters, None)
        self.updates += 1
        losses = (critic_loss.detach(), actor_loss.detach(), alpha_loss.detach())
        return torch.stack([*losses, q.detach().mean(), alpha, entropy])

    @torch.no_grad()
    def _target_q(self, batch: Transitions, noise: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        actions, log_prob = self.actor.sample(batch.next_observations, noise)
        q = self.target(batch.next_observations, actions).min(dim=0).values
        future = torch.where(batch.terminals, 0.0, q - alpha * log_prob)
        return batch.rewards + self.config.discount * future

    def update_many(
        self, data: Transitions, model_buffer: RingBuffer, updates: int, seed: int
    ) -> dict[str, float]:
        """`updates` steps on batches of int(real_ratio * batch_size) rows of `data` and else model rows.

        Rows are drawn uniformly with replacement. Row b of update i has the random counter (b, i) and the key
        `seed`: every backend draws the same, and the same call gives the same parameters.

        Returns:
            The mean over the updates of each of `METRICS`.

        Raises:
            InputError: rows of sizes that the networks do not take, none to draw from, or a loss that is
                not finite.
        """
        real, model = self.batch_rows
        if updates < 1:
            raise InputError(f"updates must be at least 1, got {updates}")
        sizes = (self.actor.obs_dim, self.actor.act_dim)
        for source in (data, model_buffer.storage):
            if (source.obs_dim, source.act_dim) != sizes:
                raise InputError(
                    f"the networks take {sizes[0]} observation and {sizes[1]} action dimensions,"
                    f" {source.name or 'the data'} has {source.obs_dim} and {source.act_dim}"
                )
        if (real and len(data) == 0) or (model and len(model_buffer) == 0):
            raise InputError(
                f"a batch takes {real} real and {model} model rows, but there are {len(data)} and"
                f" {len(model_buffer)} to draw from"
            )
        self._schedule()
        dtype = self.log_alpha.dtype
        update = self._update_fused if self.backend == "cpu" else self._update_by_autograd
        total = update(
            _learnable(data, dtype),
            _learnable(model_buffer.storage, dtype),
            (len(data), len(model_buffer)),
            updates,
            seed,
        )
        means = {name: value / updates for name, value in zip(METRICS, total, strict=True)}
        for name, value in means.items():
            if not math.isfinite(value):
                raise InputError(
                    f"SAC diverged before update {self.updates}: {name} is not finite;"
                    " lower the learning rates or raise the penalty coefficient"
                )
        return means

    def _update_by_autograd(
        self, real: Transitions, model: Transitions, sizes: tuple[int, int], updates: int, seed: int
    ) -> list[float]:
        total = torch.zeros(len(METRICS), device=real.device)
        for first in range(0, updates, _UPDATES_AT_ONCE):
            count = min(_UPDATES_AT_ONCE, updates - first)
            real_rows, model_rows, noise, next_noise = self._draw(sizes, first, count, seed)
            for i in range(count):
                batch = concatenate([real[real_rows[i]], model[model_rows[i]]])
                total += self.update(batch, noise[i], next_noise[i])
        return total.tolist()

    def _draw(self, sizes: tuple[int, int], first: int, count: int, seed: int) -> tuple[torch.Tensor, ...]:
        """Rows of the data and of the buffer [count, rows], noise and next_noise [count, batch, act_dim].

        Row b of the batch of update i has the random counter (b, first + i).
        """
        device, dtype = self.log_alpha.device, self.log_alpha.dtype
        batch, act_dim = self.config.batch_size, self.actor.act_dim
        rows = torch.arange(batch, device=device).repeat(count)
        steps = torch.arange(first, first + count, device=device).repeat_interleave(batch)
        choices = torch.tensor(sizes, device=device).repeat_interleave(
            torch.tensor(self.batch_rows, device=device)
        )
        drawn = random_choice(rows, steps, BATCH_STREAM, choices.repeat(count), seed).view(count, batch)
        noise = (
            random_normals(rows, steps, stream, act_dim, seed, dtype).view(count, batch, act_dim)
            for stream in (ACTION_STREAM, NEXT_ACTION_STREAM)
        )
        return *drawn.split(self.batch_rows, dim=1), *noise

    def _update_fused(
        self, real: Transitions, model: Transitions, sizes: tuple[int, int], updates: int, seed: int
    ) -> list[float]:
        total = [0.0] * len(METRICS)
        for first in range(0, updates, _UPDATES_AT_ONCE):
            count = min(_UPDATES_AT_ONCE, updates - first)
            sums = cpu.sac_updates(
                actor=self._parameters("actor"),
                critic=self._parameters("critic"),
                log_alpha=self._parameters("alpha")[0],
                config=self.config,
                actor_learning_rate=self.optimizers["actor"].learning_rate,
                target_entropy=self.target_entropy,
                real=real,
                model=model,
                sizes=sizes,
                rows=self.batch_rows,
                updates=count,
                updates_before=self.updates,
                first_draw=first,
                seed=seed,
                threads=self.threads,
            )
            self.updates += count
            total = [one + more for one, more in zip(total, sums, strict=True)]
            for optimizer in self.optimizers.values():
                for step in optimizer.steps:
                    step.fill_(self.updates)
        return total

    def _parameters(self, name: str) -> list[cpu.Parameter]:
        optimizer = self.optimizers[name]
        targets = self._targets if name == "critic" else [None] * len(optimizer.parameters)
        return list(
            zip(optimizer.parameters, optimizer.exp_avgs, optimizer.exp_avg_sqs, targets, strict=True)
        )

    def _schedule(self) -> None:
        if self.config.actor_schedule == "cosine" and self.total_updates:
            share = min(self.updates / self.total_updates, 1.0)
            rate = self.config.actor_learning_rate * 0.5 * (1.0 + math.cos(math.pi * share))
            self.optimizers["actor"].learning_rate = rate

    def state(self) -> dict[str, torch.Tensor]:
        """All that the next update depends on, by name: the live tensors, and `updates`."""
        tensors = {"log_alpha": self.log_alpha, "updates": torch.tensor(self.updates)}
        for name, module in (("actor", self.actor), ("critic", self.critic), ("target", self.target)):
            tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            states = zip(optimizer.exp_avgs, optimizer.exp_avg_sqs, optimizer.steps, strict=True)
            for i, state in enumerate(states):
                keys = ("exp_avg", "exp_avg_sq", "step")
                tensors |= {f"adam.{name}.{i}.{key}": value for key, value in zip(keys, state, strict=True)}
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor], source: str | os.PathLike[str] = "state") -> None:
        """Continue from what `state` returned; `source` names it in errors.

        Raises:
            InputError: a tensor is missing or has another shape.
        """
        for name, target in self.state().items():
            require_shape(source, tensors, name, target.shape)
            target.copy_(tensors[name])
        self.updates = int(tensors["updates"])


def _learnable(data: Transitions, dtype: torch.dtype) -> Transitions:
    """The five arrays that SAC learns from, copied only where they are not in that form already."""

    def floats(array: torch.Tensor) -> torch.Tensor:
        array = array.to(dtype)
        # The columns of a wider table will do.
        return array if array.ndim == 1 or array.stride(1) == 1 else array.contiguous()

    return Transitions(
        observations=floats(data.observations),
        actions=floats(data.actions),
        rewards=floats(data.rewards),
        next_observations=floats(data.next_observations),
        terminals=data.terminals,
    )


def check_config(config: SACConfig) -> None:
    """Raise `InputError` where a hyperparameter is out of range."""
    rates = (config.actor_learning_rate, config.critic_learning_rate, config.alpha_learning_rate)
    if config.batch_size < 1:
        raise InputError(f"SAC's batch_size must be at least 1, got {config.batch_size}")
    if not 0.0 <= config.real_ratio <= 1.0:
        raise InputError(f"real_ratio must be in [0, 1], got {config.real_ratio}")
    if not all(0.0 < rate < math.inf for rate in rates):
        raise InputError(f"learning rates must be positive, got {rates} for actor, critic and alpha")
    if config.critics < 1 or min(config.hidden, default=0) < 1:
        raise InputError(
            "SAC needs at least one critic and one hidden layer, each of positive size,"
            f" got {config.critics} critics and hidden sizes {config.hidden}"
        )
    if not (0.0 <= config.discount < 1.0 and 0.0 < config.polyak <= 1.0):
        raise InputError(
            f"discount must be in [0, 1) and polyak in (0, 1], got {config.discount} and {config.polyak}"
        )
    if config.alpha_max is not None and not config.alpha_max > 0.0:
        raise InputError(f"alpha_max must be positive or None, got {config.alpha_max}")
    if config.target_entropy != "act_dim" and not isinstance(config.target_entropy, (int, float)):
        raise InputError(f'target_entropy must be a number or "act_dim", got {config.target_entropy!r}')
    for name, known in (("critic_loss", ("half_mse", "mse")), ("actor_schedule", ("constant", "cosine"))):
        if getattr(config, name) not in known:
            raise InputError(f"unknown {name} {getattr(config, name)!r}; there are: {', '.join(known)}")
