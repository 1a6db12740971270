"""Soft actor-critic on a mixture of real and model transitions.

Source: softlearning/algorithms/mopo.py of the authors' code; others' choices are options of `SACConfig`.
"""

import copy
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mopo_fast import backends
from mopo_fast.backends import checked
from mopo_fast.backends.interface import Backend, Parameter, SacRun
from mopo_fast.backends.philox import (
    ACTION_STREAM,
    BATCH_STREAM,
    NEXT_ACTION_STREAM,
    random_choice,
    random_normals,
)
from mopo_fast.buffer import RingBuffer
from mopo_fast.config import SACConfig
from mopo_fast.data.transitions import Transitions
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor, Critic
from mopo_fast.utils.adam import Adam
from mopo_fast.utils.cuda_graphs import Recorder, records
from mopo_fast.utils.interrupts import deferred
from mopo_fast.utils.machine import resolve_threads
from mopo_fast.utils.seeds import INIT, derive_seed
from mopo_fast.utils.tensors import load_into

# Updates of one call of the kernel, or whose random numbers are drawn at once; an interrupt waits so long.
_UPDATES_AT_ONCE = 100
_LEARNED_FROM = ("observations", "actions", "rewards", "next_observations", "terminals")
# To draw from: the data, the model's rows, and how many of each there are.
_Source = tuple[Transitions, Transitions, tuple[int, int]]
METRICS = ("critic_loss", "actor_loss", "alpha_loss", "q", "alpha", "entropy")


class SAC:
    """An actor, its critics and their target, the temperature, and an Adam for each of the three.

    Args:
        obs_dim, act_dim: sizes of an observation and an action.
        config: hyperparameters.
        seed: of the initial parameters.
        device: where everything lives.
        total_updates: where the cosine schedule of the actor's learning rate reaches zero; needed by it only.
        backend: of `update_many`: "cpu" or "cuda", the fused kernels; "reference", `update` in a loop; or
            "auto".
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
        self.config, self.total_updates = config, total_updates
        # A tensor, for kernels to count in.
        self._updates = torch.zeros((), dtype=torch.int64, device="cpu")
        widest = max(obs_dim + act_dim, 2 * act_dim, *config.hidden)
        self.backend = backends.choose(backend, "float32", torch.device(device), training=widest)
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
    def updates(self) -> int:
        """How many updates have been made."""
        return int(self._updates)

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
        # Of several runs side by side, every tensor has one dimension more, the first.
        config, alpha = self.config, self.alpha
        actor, critic, temperature = (self.optimizers[name] for name in ("actor", "critic", "alpha"))
        target_q = self._target_q(batch, next_noise, alpha)
        q = self.critic(batch.observations, batch.actions)
        critic_loss = (q - target_q.unsqueeze(-2)).square().mean(dim=-1).sum(dim=-1)
        if config.critic_loss == "half_mse":
            critic_loss = 0.5 * critic_loss
        critic_gradients = torch.autograd.grad(critic_loss.sum(), critic.parameters)
        if not config.simultaneous:
            critic.step(critic_gradients)

        actions, log_prob = self.actor.sample(batch.observations, noise)
        policy_q = self.critic(batch.observations, actions).min(dim=-2).values
        actor_loss = (alpha.unsqueeze(-1) * log_prob - policy_q).mean(dim=-1)
        # Naming the inputs spares the critics' weight gradients, which nobody needs here.
        actor_gradients = torch.autograd.grad(actor_loss.sum(), actor.parameters)

        entropy = -log_prob.detach().mean(dim=-1)
        alpha_loss = self.log_alpha * (entropy - self.target_entropy)
        alpha_gradients = torch.autograd.grad(alpha_loss.sum(), temperature.parameters)

        if config.simultaneous:
            critic.step(critic_gradients)
        actor.step(actor_gradients)
        temperature.step(alpha_gradients)
        self._polyak(self._targets, critic.parameters, None)
        self._updates += 1
        losses = (critic_loss.detach(), actor_loss.detach(), alpha_loss.detach())
        return torch.stack([*losses, q.detach().mean(dim=(-2, -1)), alpha, entropy], dim=-1)

    @torch.no_grad()
    def _target_q(self, batch: Transitions, noise: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        actions, log_prob = self.actor.sample(batch.next_observations, noise)
        q = self.target(batch.next_observations, actions).min(dim=-2).values
        future = torch.where(batch.terminals, 0.0, q - alpha.unsqueeze(-1) * log_prob)
        return batch.rewards + self.config.discount * future

    @functools.cached_property
    def _alone(self) -> "Population":
        return Population([self])

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
        return self._alone.update_many(data, [model_buffer], updates, [seed])[0]

    def _check_sources(self, data: Transitions, model_buffer: RingBuffer) -> None:
        real, model = self.batch_rows
        sizes = (self.actor.obs_dim, self.actor.act_dim)
        for source in (data, model_buffer.storage):
            if (source.obs_dim, source.act_dim) != sizes:
                raise InputError(
                    f"the networks take {sizes[0]} observation and {sizes[1]} action dimensions,"
                    f" {source.name or 'the data'} has {source.obs_dim} and {source.act_dim}"
                )
        size = model_buffer.size
        if not isinstance(size, int) or not 0 <= size <= model_buffer.capacity:
            raise InputError(f"the buffer's size must be 0 to {model_buffer.capacity}, got {size!r}")
        if (real and len(data) == 0) or (model and len(model_buffer) == 0):
            raise InputError(
                f"a batch takes {real} real and {model} model rows, but there are {len(data)} and"
                f" {len(model_buffer)} to draw from"
            )

    def _means(self, total: Sequence[float], updates: int) -> dict[str, float]:
        means = {name: value / updates for name, value in zip(METRICS, total, strict=True)}
        for name, value in means.items():
            if not math.isfinite(value):
                raise InputError(
                    f"SAC diverged before update {self.updates}: {name} is not finite;"
                    " lower the learning rates or raise the penalty coefficient"
                )
        return means

    def _batches(
        self,
        real: Transitions,
        model: Transitions,
        sizes: tuple[int, int],
        first: int,
        count: int,
        seed: int,
    ) -> list[torch.Tensor]:
        """`_LEARNED_FROM`, noise and next_noise of `count` updates, the first of number `first`.

        Each [count, batch, ...].
        """
        *rows, noise, next_noise = self._draw(sizes, first, count, seed)
        arrays = [
            torch.cat(
                [getattr(source, name)[row] for source, row in zip((real, model), rows, strict=True)], 1
            )
            for name in _LEARNED_FROM
        ]
        return [*arrays, noise, next_noise]

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

    def _run(
        self,
        real: Transitions,
        model: Transitions,
        sizes: tuple[int, int],
        first: int,
        count: int,
        seed: int,
    ) -> SacRun:
        """`count` updates, the first of number `first`, for a kernel."""
        return SacRun(
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
            steps=[step for optimizer in self.optimizers.values() for step in optimizer.steps],
            count=self._updates,
            first_draw=first,
            seed=seed,
        )

    def _count(self, updates: int) -> None:
        """Take over a number of updates that others have made of the same parameters."""
        self._updates.fill_(updates)
        for optimizer in self.optimizers.values():
            for step in optimizer.steps:
                step.fill_(updates)

    def _parameters(self, name: str) -> list[Parameter]:
        optimizer = self.optimizers[name]
        targets = self._targets if name == "critic" else [None] * len(optimizer.parameters)
        # Detached, they keep the memory that a kernel writes to, even if they are given another meanwhile.
        parameters = [parameter.detach() for parameter in optimizer.parameters]
        followers = [None if target is None else target.detach() for target in targets]
        return list(zip(parameters, optimizer.exp_avgs, optimizer.exp_avg_sqs, followers, strict=True))

    def _schedule(self) -> None:
        if self.config.actor_schedule == "cosine" and self.total_updates:
            share = min(self.updates / self.total_updates, 1.0)
            rate = self.config.actor_learning_rate * 0.5 * (1.0 + math.cos(math.pi * share))
            self.optimizers["actor"].learning_rate = rate

    def state(self) -> dict[str, torch.Tensor]:
        """All that the next update depends on, by name: the live tensors, and `updates`."""
        state = {name: tensor.detach() for name, tensor in self._live_state().items()}
        return state | {"updates": torch.tensor(self.updates)}

    def _live_state(self) -> dict[str, torch.Tensor]:
        """The tensors themselves, to be given other memory."""
        tensors: dict[str, torch.Tensor] = {"log_alpha": self.log_alpha}
        for name, module in (("actor", self.actor), ("critic", self.critic), ("target", self.target)):
            tensors |= {f"{name}.{key}": value for key, value in module.named_parameters()}
        for name, optimizer in self.optimizers.items():
            states = zip(optimizer.exp_avgs, optimizer.exp_avg_sqs, optimizer.steps, strict=True)
            for i, state in enumerate(states):
                keys = ("exp_avg", "exp_avg_sq", "step")
                tensors |= {f"adam.{name}.{i}.{key}": value for key, value in zip(keys, state, strict=True)}
        return tensors

    def load_state(self, tensors: dict[str, torch.Tensor], source: str | os.PathLike[str] = "state") -> None:
        """Continue from what `state` returned; `source` names it in errors.

        Raises:
            InputError: a tensor is missing, or has another shape or type; Adam's steps or its second moments
                are not those of so many updates.
        """
        load_into(source, tensors, self._live_state() | {"updates": self._updates})
        steps = [float(step) for optimizer in self.optimizers.values() for step in optimizer.steps]
        # float32 counts no further by ones.
        if self.updates < 0 or any(min(step, 2**24) != min(self.updates, 2**24) for step in steps):
            raise InputError(f"{source}: Adam's steps are not its {self.updates} updates")
        for optimizer in self.optimizers.values():
            optimizer.check_moments(source)


class Population:
    """SACs of one config and of equally many updates, that are updated together.

    In PyTorch as one batch of networks, on a GPU with many updates recorded in one graph; with a kernel side
    by side on the cores or multiprocessors. Each gets the parameters that it would get alone, to rounding;
    with a kernel to the bit.
    """

    def __init__(self, sacs: Sequence[SAC]) -> None:
        self.sacs = list(sacs)
        kinds = {(sac.config, sac.backend, sac.actor.obs_dim, sac.actor.act_dim) for sac in self.sacs}
        if len({id(sac) for sac in self.sacs}) != len(self.sacs) or len(kinds) != 1:
            raise InputError("SACs are updated together where they are distinct, and of one config and size")
        self._batch: SAC | None = None
        self._recorder = Recorder()

    def update_many(
        self, data: Transitions, buffers: Sequence[RingBuffer], updates: int, seeds: Sequence[int]
    ) -> list[dict[str, float]]:
        """What `SAC.update_many` does, for each with its own buffer and seed."""
        if updates < 1:
            raise InputError(f"updates must be at least 1, got {updates}")
        for sac, buffer in zip(self.sacs, buffers, strict=True):
            sac._check_sources(data, buffer)
            sac._schedule()
        dtype = self.sacs[0].log_alpha.dtype
        real = _learnable(data, dtype)
        sources = [(real, _learnable(buffer.storage, dtype), (len(data), len(buffer))) for buffer in buffers]
        kernels = backends.training_kernels(self.sacs[0].backend)
        totals = (
            self._fused(kernels, sources, updates, seeds)
            if kernels
            else self._by_autograd(sources, updates, seeds)
        )
        return [sac._means(total, updates) for sac, total in zip(self.sacs, totals, strict=True)]

    def _fused(
        self, kernels: Backend, sources: list[_Source], updates: int, seeds: Sequence[int]
    ) -> list[list[float]]:
        totals = [[0.0] * len(METRICS) for _ in self.sacs]
        for first in range(0, updates, _UPDATES_AT_ONCE):
            count = min(_UPDATES_AT_ONCE, updates - first)
            runs = [
                sac._run(*source, first, count, seed)
                for sac, source, seed in zip(self.sacs, sources, seeds, strict=True)
            ]
            sums = checked.sac_updates(kernels, runs, self.sacs[0].threads)
            totals = [
                [one + more for one, more in zip(total, some, strict=True)]
                for total, some in zip(totals, sums, strict=True)
            ]
        return totals

    def _by_autograd(self, sources: list[_Source], updates: int, seeds: Sequence[int]) -> list[list[float]]:
        batch = self._side_by_side()
        recorded = records(batch.log_alpha.device)
        # Drawing takes as many launches for few updates as for many.
        at_once = _UPDATES_AT_ONCE * (10 if recorded else 1)
        total = batch.log_alpha.new_zeros(*batch.log_alpha.shape, len(METRICS))
        try:
            for first in range(0, updates, at_once):
                count = min(at_once, updates - first)
                each = [
                    sac._batches(*source, first, count, seed)
                    for sac, source, seed in zip(self.sacs, sources, seeds, strict=True)
                ]
                arrays = (
                    each[0]
                    if batch is self.sacs[0]
                    else [torch.stack(array, 1) for array in zip(*each, strict=True)]
                )
                for some in zip(*(array.split(_UPDATES_AT_ONCE) for array in arrays), strict=True):
                    total += self._play(some) if recorded else self._updates(*some)
        finally:
            # After an interruption too: their parameters are views of the batch's.
            if batch is not self.sacs[0]:
                for sac in self.sacs:
                    sac._count(batch.updates)
        totals: list[list[float]] = total.reshape(-1, len(METRICS)).tolist()
        return totals

    def _side_by_side(self) -> SAC:
        """One SAC with the parameters of all, [runs, ...] each; theirs become views of these."""
        first = self.sacs[0]
        if len(self.sacs) == 1:
            return first
        # Another population may have taken them since.
        if self._batch is None or any(
            sac.log_alpha.data_ptr() != log_alpha.data_ptr()
            for sac, log_alpha in zip(self.sacs, self._batch.log_alpha, strict=True)
        ):
            self._batch = SAC(
                first.actor.obs_dim,
                first.actor.act_dim,
                first.config,
                device=first.log_alpha.device,
                total_updates=first.total_updates,
                backend="reference",
            )
            states = [sac._live_state() for sac in self.sacs]
            for name, tensor in self._batch._live_state().items():
                # The numbers of steps are the same for all.
                if not name.endswith(".step"):
                    tensor.data = torch.stack([state[name].data for state in states])
                    for state, view in zip(states, tensor.data, strict=True):
                        state[name].data = view
        self._batch._count(first.updates)
        for name, optimizer in self._batch.optimizers.items():
            optimizer.learning_rate = first.optimizers[name].learning_rate
        return self._batch

    def _updates(self, *arrays: torch.Tensor) -> torch.Tensor:
        """An update for each of the first dimension of what `SAC._batches` gives; the metrics' sum."""
        batch = self._batch or self.sacs[0]
        total = batch.log_alpha.new_zeros(*batch.log_alpha.shape, len(METRICS))
        for *learned_from, noise, next_noise in zip(*arrays, strict=True):
            with deferred():
                total += batch.update(Transitions(*learned_from), noise, next_noise)
        return total

    def _play(self, arrays: Sequence[torch.Tensor]) -> torch.Tensor:
        """`_updates`, recorded."""
        batch = self._batch or self.sacs[0]
        updates, state = batch.updates, list(batch._live_state().values())
        with deferred():
            total = self._recorder.play(self._updates, arrays, state)
            # The run that warms up and the recording have counted theirs.
            batch._updates.fill_(updates + len(arrays[0]))
        return total


def _learnable(data: Transitions, dtype: torch.dtype) -> Transitions:
    """The five arrays that SAC learns from, copied only where they are not in that form already."""

    def in_form(array: torch.Tensor) -> torch.Tensor:
        if array.dtype != torch.bool:
            array = array.to(dtype)
        # The columns of a wider table will do.
        return array if array.ndim == 1 or array.stride(1) == 1 else array.contiguous()

    arrays: dict[str, Any] = {name: in_form(getattr(data, name)) for name in _LEARNED_FROM}
    return Transitions(**arrays)


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
