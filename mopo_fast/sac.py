"""Soft actor-critic on a mixture of real and model transitions.

Source: softlearning/algorithms/mopo.py of the authors' code. `SACConfig` has other code's choices as options.
"""

import copy
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mopo_fast import backends
from mopo_fast.backends import checked
from mopo_fast.backends.interface import Backend, Need, Parameter, SacUpdates
from mopo_fast.backends.philox import (
    ACTION_STREAM,
    BATCH_STREAM,
    CRITIC_STREAM,
    NEXT_ACTION_STREAM,
    random_choice,
    random_normals,
    random_subset,
)
from mopo_fast.buffer import RingBuffer
from mopo_fast.config import SACConfig
from mopo_fast.data.transitions import DATA_ARRAYS, Transitions
from mopo_fast.ensemble import trained_mlp
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor, Critic
from mopo_fast.utils.adam import Adam
from mopo_fast.utils.cuda_graphs import Recorder, records
from mopo_fast.utils.interrupts import deferred
from mopo_fast.utils.machine import resolve_threads
from mopo_fast.utils.seeds import INIT, derive_seed
from mopo_fast.utils.tensors import load_into

# Updates that one kernel call makes, or that random numbers are drawn for at once. With more of them, Ctrl-C
# takes effect later.
_UPDATES_AT_ONCE = 100
METRICS = ("critic_loss", "actor_loss", "alpha_loss", "q", "alpha", "entropy")
# Values of `SAC.measure`.
MEASURES = ("q_std", "td_error_real", "td_error_model", "log_std", "saturation")
# Size of an action from which on it counts as saturated.
_SATURATED = 0.99


@dataclass(frozen=True, eq=False)
class Draws:
    """The sources of the batches of one call of `SAC.update_many`.

    Attributes:
        real: the data set.
        model: the model buffer's rows.
        sizes: numbers of rows to draw from, the first ones of `real` and of `model`.
        rows: numbers of rows in a batch that come from `real` and from `model`.
        updates: number of batches.
        seed: key of the random numbers.
        in_order: True takes the next rows of each source for each batch, False draws them.
    """

    real: Transitions
    model: Transitions
    sizes: tuple[int, int]
    rows: tuple[int, int]
    updates: int
    seed: int
    in_order: bool = False


class SAC:
    """An actor, its critics with their target, the temperature, and an optimizer for each of the three.

    Args:
        obs_dim: size of an observation.
        act_dim: size of an action.
        config: hyperparameters; None takes `SACConfig()`.
        seed: seed of the initial parameters.
        device: device of all tensors.
        total_updates: number of updates after which the actor's learning rate is zero. Only the cosine
            schedule needs it.
        backend: implementation of `update_many`. "cpu" and "cuda" are fused kernels, "reference" calls
            `update` in a loop, "auto" takes the best one available.
        threads: threads of the CPU kernel; None takes all cores that this process may use. The result does
            not depend on it.

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
        config.validate()
        config = dataclasses.replace(config, dtype=config.dtype or "float32")
        if config.actor_schedule == "cosine" and not total_updates:
            raise InputError("the cosine schedule needs total_updates, the number of updates it spans")
        self.config, self.total_updates = config, total_updates
        # A tensor, so that kernels can count in it.
        self._updates = torch.zeros((), dtype=torch.int64, device="cpu")
        widest = max(obs_dim + act_dim, 2 * act_dim, *config.hidden)
        need = Need(config.dtype or "float32", torch.device(device), training=widest)
        self.backend = backends.choose(backend, need)
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
        parts = {
            "actor": (self.actor.parameters(), config.actor_learning_rate),
            "critic": (self.critic.parameters(), config.critic_learning_rate),
            "alpha": ([self.log_alpha], config.alpha_learning_rate),
        }
        self.optimizers = {
            name: Adam(some, rate, epsilon=config.adam_epsilon) for name, (some, rate) in parts.items()
        }
        self._network = trained_mlp(config.dtype, first="float32", last="float32")
        self._targets = list(self.target.parameters())
        self._recorder = Recorder()

    @property
    def updates(self) -> int:
        """Number of updates made. Setting it sets Adam's step counts too."""
        return int(self._updates)

    @updates.setter
    def updates(self, value: int) -> None:
        self._updates.fill_(value)
        for optimizer in self.optimizers.values():
            for step in optimizer.steps:
                step.fill_(value)

    @property
    def batch_rows(self) -> tuple[int, int]:
        """Numbers of rows in a batch that come from the data set and from the model."""
        real = int(self.config.real_ratio * self.config.batch_size)
        return real, self.config.batch_size - real

    @property
    def alpha(self) -> torch.Tensor:
        """The temperature, a scalar without gradient, at most `config.alpha_max`."""
        return self.log_alpha.detach().exp().clamp(0.0, self.config.alpha_max)

    def update(
        self,
        batch: Transitions,
        noise: torch.Tensor,
        next_noise: torch.Tensor,
        drawn: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Update the critics, the actor, the temperature and the target once, in `SACConfig.order`.

        One draw of actions at the observations serves the actor's and the temperature's gradient.

        Args:
            batch: n transitions.
            noise: standard normal [n, act_dim], for the actions at observations.
            next_noise: standard normal [n, act_dim], for the actions at next_observations.
            drawn: numbers of the critics that the targets are taken from, int64 [target_critics]; None if
                `SACConfig.target_critics` is None.

        Returns:
            The values of `METRICS`, then each critic's loss, [6 + critics]. A loss is the one before its
            step. Alpha is that of the actor's loss: with actor_first after its step, else before. Entropy is
            the mean of -log_prob.

        Raises:
            InputError: `drawn` does not have the critics that the config asks for.
        """
        asked, given = self.config.target_critics, None if drawn is None else drawn.shape[-1]
        if given != asked:
            raise InputError(f"an update with target_critics={asked} needs as many numbers, got {given}")
        # Several agents at once (run/population.py) add a leading dimension to every tensor.
        actor, critic, temperature = (self.optimizers[name] for name in ("actor", "critic", "alpha"))
        order, alpha = self.config.order, self.alpha
        if order == "actor_first":
            actions, log_prob = self._sample(batch.observations, noise)
            alpha_loss, entropy, alpha_gradients = self._alpha_loss(log_prob)
            temperature.step(alpha_gradients)
            alpha = self.alpha
            actor_loss, actor_gradients = self._actor_loss(batch, actions, log_prob, alpha)
            actor.step(actor_gradients)
            self._move_target()
            critic_losses, q, critic_gradients = self._critic_losses(batch, next_noise, drawn, alpha)
            critic.step(critic_gradients)
        else:
            critic_losses, q, critic_gradients = self._critic_losses(batch, next_noise, drawn, alpha)
            if order == "critic_first":
                critic.step(critic_gradients)
            actions, log_prob = self._sample(batch.observations, noise)
            actor_loss, actor_gradients = self._actor_loss(batch, actions, log_prob, alpha)
            alpha_loss, entropy, alpha_gradients = self._alpha_loss(log_prob)
            if order == "simultaneous":
                critic.step(critic_gradients)
            actor.step(actor_gradients)
            temperature.step(alpha_gradients)
            self._move_target()
        self._updates += 1
        losses = (critic_losses.sum(dim=-1), actor_loss, alpha_loss)
        metrics = torch.stack([*losses, q.mean(dim=(-2, -1)), alpha, entropy], dim=-1)
        return torch.cat([metrics, critic_losses], dim=-1)

    # Each of the following returns values without a graph, and the gradients of a loss.

    def _critic_losses(
        self, batch: Transitions, next_noise: torch.Tensor, drawn: torch.Tensor | None, alpha: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Sequence[torch.Tensor]]:
        target_q = self._target_q(batch, next_noise, drawn, alpha)
        q = self.critic(batch.observations, batch.actions, self._network)
        losses = self.config.critic_loss_scale * (q - target_q.unsqueeze(-2)).square().mean(dim=-1)
        gradients = torch.autograd.grad(losses.sum(dim=-1).sum(), self.optimizers["critic"].parameters)
        return losses.detach(), q.detach(), gradients

    def _actor_loss(
        self, batch: Transitions, actions: torch.Tensor, log_prob: torch.Tensor, alpha: torch.Tensor
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        each_q = self.critic(batch.observations, actions, self._network)
        policy_q = each_q.mean(dim=-2) if self.config.actor_q == "mean" else each_q.min(dim=-2).values
        loss = (alpha.unsqueeze(-1) * log_prob - policy_q).mean(dim=-1)
        # Asking for the actor's gradients alone spares the critics' weight gradients.
        gradients = torch.autograd.grad(loss.sum(), self.optimizers["actor"].parameters)
        return loss.detach(), gradients

    def _alpha_loss(
        self, log_prob: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Sequence[torch.Tensor]]:
        entropy = -log_prob.detach().mean(dim=-1)
        loss = self.log_alpha * (entropy - self.target_entropy)
        gradients = torch.autograd.grad(loss.sum(), self.optimizers["alpha"].parameters)
        return loss.detach(), entropy, gradients

    def _move_target(self) -> None:
        move = get_ema_multi_avg_fn(1.0 - self.config.polyak)
        move(self._targets, self.optimizers["critic"].parameters, None)

    def _sample(self, observations: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.actor.sample(observations, noise, self._network, self.config.log_prob_epsilon)

    @torch.no_grad()
    def _target_q(
        self, batch: Transitions, noise: torch.Tensor, drawn: torch.Tensor | None, alpha: torch.Tensor
    ) -> torch.Tensor:
        actions, log_prob = self._sample(batch.next_observations, noise)
        q = self.target(batch.next_observations, actions, self._network, drawn).min(dim=-2).values
        if self.config.entropy_backup:
            q = q - alpha.unsqueeze(-1) * log_prob
        target = batch.rewards + self.config.discount * torch.where(batch.terminals, 0.0, q)
        return target if self.config.target_min is None else target.clamp(self.config.target_min)

    def update_many(
        self,
        data: Transitions,
        model_buffer: RingBuffer,
        updates: int,
        seed: int,
        on_progress: Callable[[float], None] = lambda _: None,
    ) -> dict[str, float]:
        """Make updates on batches of int(real_ratio * batch_size) rows of `data`, the others from the model.

        Rows are drawn uniformly with replacement. Row b of update i has the random counter (b, i) and the key
        `seed`, so every backend draws the same rows, and the same call gives the same parameters.

        Args:
            data: the data set. On a CPU `data.table.in_table` makes it faster to draw from.
            model_buffer: transitions made in the model.
            updates: number of updates.
            seed: 0 <= seed < 2^64.
            on_progress: called now and then with the share of the updates that is made.

        Returns:
            The mean over the updates of each of `METRICS`.

        Raises:
            InputError: the rows' sizes are not the networks', there are none to draw from, or a loss is not
                finite.
        """
        draws = self.begin(data, model_buffer, updates, seed)
        return self.means(self.make(draws, on_progress), updates)

    # --- the parts of `update_many`

    def make(self, draws: Draws, on_progress: Callable[[float], None] = lambda _: None) -> list[float]:
        """Make the updates; return the sums over them of `METRICS`, then of each critic's loss."""
        if kernels := backends.training_kernels(self.backend):
            sums = (sum_by_kernel(kernels, [call], self.threads)[0] for call in self.kernel_calls(draws))
        else:
            sums = (self.learn(batches) for batches in self.batches(draws))
        total: list[float] = sum_parts(sums, draws.updates, on_progress).tolist()
        return total

    def begin(self, data: Transitions, model_buffer: RingBuffer, updates: int, seed: int) -> Draws:
        """Check the sources of the batches and set the actor's learning rate.

        Raises:
            InputError: as `update_many`.
        """
        if updates < 1:
            raise InputError(f"updates must be at least 1, got {updates}")
        self._check_sources(data, model_buffer)
        if self.config.actor_schedule == "cosine" and self.total_updates:
            share = min(self.updates / self.total_updates, 1.0)
            rate = self.config.actor_learning_rate * 0.5 * (1.0 + math.cos(math.pi * share))
            self.optimizers["actor"].learning_rate = rate
        real, model = (_learnable(some, self.log_alpha.dtype) for some in (data, model_buffer.storage))
        return Draws(real, model, (len(data), len(model_buffer)), self.batch_rows, updates, seed)

    def kernel_calls(self, draws: Draws) -> Iterator[SacUpdates]:
        """Yield the kernel calls that make the updates; make each call before asking for the next."""
        for first in range(0, draws.updates, _UPDATES_AT_ONCE):
            yield SacUpdates(
                actor=self._parameters("actor"),
                critic=self._parameters("critic"),
                log_alpha=self._parameters("alpha")[0],
                config=self.config,
                learning_rates=(
                    self.optimizers["actor"].learning_rate,
                    self.optimizers["critic"].learning_rate,
                    self.optimizers["alpha"].learning_rate,
                ),
                target_entropy=self.target_entropy,
                real=draws.real,
                model=draws.model,
                sizes=draws.sizes,
                rows=draws.rows,
                in_order=draws.in_order,
                updates=min(_UPDATES_AT_ONCE, draws.updates - first),
                updates_before=self.updates,
                steps=[step for optimizer in self.optimizers.values() for step in optimizer.steps],
                count=self._updates,
                first_draw=first,
                seed=draws.seed,
            )

    def batches(self, draws: Draws) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield the batches in groups of up to 100, as `learn` takes them."""
        # On a GPU, drawing many batches takes as many launches as drawing few.
        at_once = _UPDATES_AT_ONCE * (10 if records(self.log_alpha.device) else 1)
        for first in range(0, draws.updates, at_once):
            drawn = self._draw(draws, first, min(at_once, draws.updates - first))
            yield from zip(*(array.split(_UPDATES_AT_ONCE) for array in drawn), strict=True)

    def batch(
        self, draws: Draws, number: int
    ) -> tuple[Transitions, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the arguments of `update` for batch `number` of `draws`."""
        return _arguments([array[0] for array in self._draw(draws, number, 1)])

    def learn(self, batches: Sequence[torch.Tensor]) -> torch.Tensor:
        """Update once on each batch in PyTorch; on a GPU replay one recorded graph.

        Args:
            batches: `DATA_ARRAYS`, noise and next_noise, each [count, batch, ...], then with
                `SACConfig.target_critics` the numbers of the drawn critics, [count, target_critics].

        Returns:
            The sums over the updates of what `update` returns.
        """
        if not records(self.log_alpha.device):
            return self._learn(*batches)
        updates = self.updates
        with deferred():
            total = self._recorder.play(self._learn, batches, list(self.live_state().values()))
            # Warming up and recording counted updates that were undone.
            self._updates.fill_(updates + len(batches[0]))
        return total

    def _learn(self, *batches: torch.Tensor) -> torch.Tensor:
        total = self.log_alpha.new_zeros(*self.log_alpha.shape, len(METRICS) + self.config.critics)
        with deferred() as interrupts:
            for arrays in zip(*batches, strict=True):
                total += self.update(*_arguments(arrays))
                interrupts.look()
        return total

    def means(self, total: Sequence[float], updates: int) -> dict[str, float]:
        """Divide sums whose first ones are those of `METRICS` by the number of updates.

        Raises:
            InputError: a mean is not finite.
        """
        means = {name: value / updates for name, value in zip(METRICS, total, strict=False)}
        return self._checked(means)

    @torch.no_grad()
    def measure(self, data: Transitions, model_buffer: RingBuffer, rows: int, seed: int) -> dict[str, float]:
        """Measure the networks as they are, on rows drawn from the data set and from the model.

        Nothing changes: neither the parameters nor the random numbers of an update. The cost is that of the
        forward passes on 2 * `rows` transitions.

        Args:
            data: the data set.
            model_buffer: transitions made in the model.
            rows: number of rows to draw from each of the two.
            seed: key of the random numbers, 0 <= seed < 2^64.

        Returns:
            The values of `MEASURES`. q_std is the standard deviation over all rows of Q, the mean over the
            critics. A TD error is the mean of |Q - target| over the rows of one source and the critics.
            log_std is the mean log standard deviation of the policy over rows and dimensions, saturation the
            share of its sampled actions' entries that are larger than 0.99 in size.

        Raises:
            InputError: a value is not finite, or there are no rows to draw from.
        """
        self._check_sources(data, model_buffer)
        if not len(data) or not len(model_buffer):
            raise InputError(
                f"rows of both sources are measured, but there are {len(data)} real and {len(model_buffer)}"
                " model rows"
            )
        real, model = (_learnable(some, self.log_alpha.dtype) for some in (data, model_buffer.storage))
        draws = Draws(real, model, (len(data), len(model_buffer)), (rows, rows), 1, seed)
        batch, noise, next_noise, drawn = self.batch(draws, 0)
        target = self._target_q(batch, next_noise, drawn, self.alpha)
        q = self.critic(batch.observations, batch.actions, self._network)
        mean, log_std = self.actor(batch.observations, self._network)
        actions = torch.tanh(mean + log_std.exp() * noise)
        # In float64 no sum overflows.
        errors = (q.double() - target.double()).abs().mean(dim=0)
        values = [
            q.double().mean(dim=0).std(correction=0),
            *(some.mean() for some in errors.split(rows)),
            log_std.double().mean(),
            (actions.abs() > _SATURATED).double().mean(),
        ]
        return self._checked(dict(zip(MEASURES, torch.stack(values).tolist(), strict=True)))

    def _checked(self, values: dict[str, float]) -> dict[str, float]:
        """Return `values`, or raise `InputError` where one is not finite."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise InputError(
                    f"SAC diverged before update {self.updates}: {name} is not finite;"
                    " lower the learning rates or raise the penalty coefficient"
                )
        return values

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

    def _draw(self, draws: Draws, first: int, count: int) -> list[torch.Tensor]:
        """Draw batches number first .. first + count - 1, as `learn` takes them.

        Row b of batch i has the random counter (b, i).
        """
        device, dtype = self.log_alpha.device, self.log_alpha.dtype
        batch, act_dim = sum(draws.rows), self.actor.act_dim
        rows = torch.arange(batch, device=device).repeat(count)
        steps = torch.arange(first, first + count, device=device).repeat_interleave(batch)
        if draws.in_order:
            real, model = (
                torch.arange(first * size, (first + count) * size, device=device).view(count, size)
                for size in draws.rows
            )
        else:
            choices = torch.tensor(draws.sizes, device=device).repeat_interleave(
                torch.tensor(draws.rows, device=device)
            )
            drawn = random_choice(rows, steps, BATCH_STREAM, choices.repeat(count), draws.seed)
            real, model = drawn.view(count, batch).split(draws.rows, dim=1)
        arrays = [
            torch.cat([getattr(draws.real, name)[real], getattr(draws.model, name)[model]], 1)
            for name in DATA_ARRAYS
        ]
        noise = (
            random_normals(rows, steps, stream, act_dim, draws.seed, dtype).view(count, batch, act_dim)
            for stream in (ACTION_STREAM, NEXT_ACTION_STREAM)
        )
        if self.config.target_critics is None:
            return [*arrays, *noise]
        numbers = torch.arange(first, first + count, device=device)
        some = self.config.target_critics, self.config.critics
        return [*arrays, *noise, random_subset(numbers, CRITIC_STREAM, *some, draws.seed)]

    def _parameters(self, name: str) -> list[Parameter]:
        optimizer = self.optimizers[name]
        targets = self._targets if name == "critic" else [None] * len(optimizer.parameters)
        # Detached tensors keep the memory that a kernel writes to, even if a parameter moves to another.
        parameters = [parameter.detach() for parameter in optimizer.parameters]
        followers = [None if target is None else target.detach() for target in targets]
        return list(zip(parameters, optimizer.exp_avgs, optimizer.exp_avg_sqs, followers, strict=True))

    def state(self) -> dict[str, torch.Tensor]:
        """Return everything that the next update depends on, by name; the tensors are not copies."""
        state = {name: tensor.detach() for name, tensor in self.live_state().items()}
        return state | {"updates": torch.tensor(self.updates)}

    def live_state(self) -> dict[str, torch.Tensor]:
        """Return the tensors of `state` without `updates`, attached, so that their data can be replaced."""
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
        """Continue from what `state` returned.

        Args:
            tensors: the state.
            source: name of the state in errors.

        Raises:
            InputError: a tensor is missing or has another shape or type, Adam's steps are not the number of
                updates, or a second moment is negative.
        """
        load_into(source, tensors, self.live_state() | {"updates": self._updates})
        steps = [float(step) for optimizer in self.optimizers.values() for step in optimizer.steps]
        # A float32 step count stops growing at 2^24.
        if self.updates < 0 or any(min(step, 2**24) != min(self.updates, 2**24) for step in steps):
            raise InputError(f"{source}: Adam's steps are not its {self.updates} updates")
        for optimizer in self.optimizers.values():
            optimizer.check_moments(source)


def sum_parts(
    sums: Iterable[torch.Tensor], updates: int, on_progress: Callable[[float], None]
) -> torch.Tensor:
    """Add up the sums of the parts of an epoch's updates; report after each part the share that is made."""
    total, parts = torch.zeros(()), math.ceil(updates / _UPDATES_AT_ONCE)
    for number, part in enumerate(sums, start=1):
        total = total + part
        on_progress(number / parts)
    return total


def sum_by_kernel(kernels: Backend, calls: Sequence[SacUpdates], threads: int) -> torch.Tensor:
    """Make the updates of several agents by a kernel.

    Returns:
        The sums of `METRICS` and of each critic's loss, float64 [agents, 6 + critics].
    """
    return torch.tensor(checked.sac_updates(kernels, calls, threads), dtype=torch.float64)


def _arguments(
    arrays: Sequence[torch.Tensor],
) -> tuple[Transitions, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the arguments of `SAC.update` from the arrays of one batch, in the order of `SAC.learn`."""
    learned_from, (noise, next_noise, *drawn) = arrays[: len(DATA_ARRAYS)], arrays[len(DATA_ARRAYS) :]
    batch: dict[str, Any] = dict(zip(DATA_ARRAYS, learned_from, strict=True))
    return Transitions(**batch), noise, next_noise, drawn[0] if drawn else None


def _learnable(data: Transitions, dtype: torch.dtype) -> Transitions:
    """Return the arrays that SAC learns from in `dtype`, with contiguous rows; copy only where needed."""

    def in_form(array: torch.Tensor) -> torch.Tensor:
        if array.dtype != torch.bool:
            array = array.to(dtype)
        # Columns of a wider table need no copy.
        return array if array.ndim == 1 or array.stride(1) == 1 else array.contiguous()

    arrays: dict[str, Any] = {name: in_form(getattr(data, name)) for name in DATA_ARRAYS}
    return Transitions(**arrays)
