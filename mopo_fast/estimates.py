"""Estimates of a policy's return that need no environment.

`penalised_returns` sums up the penalised rewards of long rollouts in an ensemble. `fitted_q` evaluates the
policy on the data set alone. Both begin at start states that `draw_starts` takes from the data.
"""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mopo_fast.backends.philox import (
    ACTION_STREAM,
    BATCH_STREAM,
    NEXT_ACTION_STREAM,
    random_choice,
    random_normals,
)
from mopo_fast.data import Transitions
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine
from mopo_fast.utils.adam import Adam
from mopo_fast.utils.seeds import INIT, derive_seed

# Updates of Q for which random numbers are drawn at once.
_UPDATES_AT_ONCE = 100
# Most rows that the mean and the deviation of the observations are taken from.
_SCALED_BY = 100_000
# Share of the updates after which the mean value is noted, to tell how much it still moves.
_EARLIER = 0.9
# A value may exceed the largest one that the rewards allow by this factor, for Q is an approximation.
_BEYOND = 1.1


@dataclass(frozen=True, eq=False)
class Starts:
    """Start states of episodes.

    Attributes:
        observations: [n, obs_dim], all from different rows of the data.
        of_episodes: True where they are the first observations of the data's episodes, False where they are
            any observations, because the data have no episodes.
        available: number of rows that they were drawn from.
    """

    observations: torch.Tensor
    of_episodes: bool
    available: int


def draw_starts(data: Transitions, count: int, *, seed: int) -> Starts:
    """Draw the first observations of `count` episodes of a data set, or of all if there are fewer.

    Where most rows do not follow the row before, as in shuffled data, there are no episodes to see. Then any
    observations are drawn.
    """
    if count < 1:
        raise InputError(f"starts must be at least 1, got {count}")
    ends = data.episode_ends()
    # The rule of `find_episodes`.
    of_episodes = len(data) == 1 or int(ends.sum()) <= len(data) / 2
    if of_episodes:
        first = ends.nonzero()[:-1, 0] + 1
        rows = torch.cat([first.new_zeros(1), first])
    available = len(rows) if of_episodes else len(data)
    drawn = np.random.default_rng(seed).choice(available, min(count, available), replace=False)
    index = torch.from_numpy(np.sort(drawn)).to(data.device)
    picked = rows[index] if of_episodes else index
    return Starts(data.observations[picked], of_episodes, available)


def check_rollouts(horizon: int, discount: float) -> None:
    """Raise `InputError` where `penalised_returns` refuses these settings."""
    if horizon < 1:
        raise InputError(f"horizon must be at least 1, got {horizon}")
    if not 0.0 < discount <= 1.0:
        raise InputError(f"discount must be above 0 and at most 1, got {discount}")


def check_q_discount(discount: float) -> None:
    """Raise `InputError` where `fitted_q` refuses this discount."""
    if not 0.0 <= discount < 1.0:
        raise InputError(f"the discount of fitted Q must be at least 0 and less than 1, got {discount}")


@dataclass(frozen=True, eq=False)
class ModelReturns:
    """Returns of rollouts in an ensemble, one for each start state.

    Attributes:
        penalised: [starts] float64, sums of the penalised rewards.
        unpenalised: [starts] float64, sums of the ensemble's rewards.
        steps: [starts] int64, numbers of steps.
        non_finite: bool [starts], rollouts that ended before a prediction that was not finite. Their sums
            are those of the steps before it.
    """

    penalised: torch.Tensor
    unpenalised: torch.Tensor
    steps: torch.Tensor
    non_finite: torch.Tensor


def penalised_returns(
    engine: RolloutEngine,
    policy: Actor,
    starts: torch.Tensor,
    horizon: int,
    *,
    seed: int,
    discount: float = 1.0,
    deterministic: bool = True,
    on_progress: Callable[[float], None] = lambda _: None,
) -> ModelReturns:
    """Sum up the penalised rewards of a policy's rollouts in an ensemble, without storing transitions.

    A rollout ends at a terminal state, before a prediction that is not finite, or after `horizon` steps. It
    is that of `RolloutEngine.rollout` with the same seed: at each step a member and noise are drawn.

    Args:
        engine: engine with the ensemble, the penalty, its coefficient and the termination rule.
        policy: the policy.
        starts: finite floats [starts, obs_dim].
        horizon: most steps of a rollout.
        seed: key of the random numbers, 0 <= seed < 2^64.
        discount: factor in (0, 1] by which each step's reward counts less than that of the step before.
        deterministic: act by tanh(mean), as `evaluate` does, instead of sampling. The ensemble is sampled in
            both cases.
        on_progress: called now and then with the share of the steps that is made.

    Raises:
        InputError: an argument is out of range or does not fit the ensemble.
    """
    check_rollouts(horizon, discount)
    count = len(starts)
    sums = torch.zeros(2, count, dtype=torch.float64, device=engine.device)
    steps = torch.zeros(count, dtype=torch.int64, device=engine.device)
    non_finite = torch.zeros(count, dtype=torch.bool, device=engine.device)
    rows, observations = torch.arange(count, device=engine.device), starts.to(engine.device, engine.dtype)
    act, weight = policy.acting(), 1.0
    for step in range(horizon):
        noise = None
        if not deterministic:
            noise = random_normals(rows, step, ACTION_STREAM, policy.act_dim, seed, engine.dtype)
        result = engine.step(observations, act(observations, noise), seed=seed, step=step, rows=rows)
        finite = torch.isfinite(result.next_observations).all(-1) & torch.isfinite(result.rewards)
        made = rows[finite]
        sums[0, made] += weight * result.rewards[finite].double()
        sums[1, made] += weight * result.raw_rewards[finite].double()
        steps[made] += 1
        non_finite[rows[~finite]] = True
        alive = finite & ~result.terminals
        observations, rows = result.next_observations[alive], rows[alive]
        weight *= discount
        if len(rows) == 0:
            break
        on_progress((step + 1) / horizon)
    on_progress(1.0)
    return ModelReturns(sums[0], sums[1], steps, non_finite)


@dataclass(frozen=True, eq=False)
class FittedQ:
    """The result of fitted Q evaluation.

    Attributes:
        values: [starts] float64, Q' of each start state and of the policy's action there.
        earlier: mean of these values after nine tenths of the updates; far from theirs, Q' still moves.
        loss: mean squared error of the last updates, in squared units of the reward.
        diverged: the values are not finite, or beyond all that the data's rewards allow.
    """

    values: torch.Tensor
    earlier: float
    loss: float
    diverged: bool


def fitted_q(
    policy: Actor,
    data: Transitions,
    starts: torch.Tensor,
    *,
    discount: float = 0.99,
    updates: int = 25_000,
    seed: int,
    deterministic: bool = True,
    hidden: tuple[int, ...] = (256, 256),
    learning_rate: float = 3e-4,
    batch_size: int = 256,
    polyak: float = 0.02,
    on_progress: Callable[[float], None] = lambda _: None,
) -> FittedQ:
    """Evaluate a policy by a Q-function that is fitted to a data set, and return its values at start states.

    Each update moves Q(s, a) towards r + discount * Q'(s', a'), where a' is the policy's action and Q' a
    moving average of Q, whose values are returned. A terminal state has the value 0, and a time-out does not
    end an episode. The same arguments give the same result on one machine and number of threads.

    Source: Le et al. (ICML 2019); Paine et al. (2020, arXiv 2007.09055) for the choice between policies; Yue
    et al. (NeurIPS 2023) for the layer normalisation in Q, without which it often diverges.

    Args:
        policy: the policy.
        data: transitions, on the policy's device.
        starts: [starts, obs_dim].
        discount: discount factor in [0, 1).
        updates: number of updates. Q' has a time constant of 1 / (polyak * (1 - discount)) updates, which
            are 5,000 by default.
        seed: seed of the initial weights, of the batches and of sampled actions.
        deterministic: evaluate tanh(mean) instead of sampled actions.
        hidden: widths of the hidden layers of Q.
        learning_rate: learning rate of Adam.
        batch_size: transitions of one update.
        polyak: share of the distance to Q that Q' moves after each update.
        on_progress: called now and then with the share of the updates that is made.

    Raises:
        InputError: an argument is out of range, or the policy does not fit the data.
    """
    if updates < 1 or batch_size < 1:
        raise InputError(f"updates and batch_size must be at least 1, got {updates} and {batch_size}")
    check_q_discount(discount)
    if (policy.obs_dim, policy.act_dim) != (data.obs_dim, data.act_dim):
        raise InputError(
            f"the policy is for {policy.obs_dim} observation and {policy.act_dim} action dimensions, the data"
            f" have {data.obs_dim} and {data.act_dim}"
        )
    critic = _make_q(data.obs_dim + data.act_dim, hidden, derive_seed(seed, INIT)).to(data.device)
    target = copy.deepcopy(critic).requires_grad_(False)
    parameters, followers = list(critic.parameters()), list(target.parameters())
    optimizer, follow = Adam(parameters, learning_rate), get_ema_multi_avg_fn(1.0 - polyak)
    scales, act = _measure(data), policy.acting()
    starts = starts.to(data.device)
    earlier = loss = math.nan

    @torch.no_grad()
    def value() -> torch.Tensor:
        noise = None
        if not deterministic:
            rows = torch.arange(len(starts), device=data.device)
            noise = random_normals(rows, 0, ACTION_STREAM, policy.act_dim, seed, starts.dtype)
        q: torch.Tensor = target(scales.inputs(starts, act(starts, noise)))[:, 0]
        return scales.unit * q.double()

    for first in range(0, updates, _UPDATES_AT_ONCE):
        count = min(_UPDATES_AT_ONCE, updates - first)
        if first <= _EARLIER * updates < first + count:
            earlier = value().mean().item()
        total = torch.zeros((), dtype=torch.float64, device=data.device)
        rows, noises = _draw(policy, data, first, count, batch_size, seed, deterministic)
        for some, noise in zip(rows, noises, strict=True):
            following = data.next_observations[some]
            with torch.no_grad():
                later = target(scales.inputs(following, act(following, noise)))[:, 0]
                later = later.masked_fill(data.terminals[some], 0.0)
                goal = data.rewards[some] / scales.unit + discount * later
            q = critic(scales.inputs(data.observations[some], data.actions[some]))[:, 0]
            error = (q - goal).square().mean()
            optimizer.step(torch.autograd.grad(error, parameters))
            follow(followers, parameters, None)
            total += error.detach().double()
        loss = total.item() / count * scales.unit**2
        if not math.isfinite(loss):
            break
        on_progress((first + count) / updates)
    values = value()
    # No sum of discounted rewards is larger.
    limit = _BEYOND * scales.largest / (1.0 - discount)
    diverged = not math.isfinite(loss) or not abs(values.mean().item()) <= limit
    return FittedQ(values, earlier, loss, diverged)


@dataclass(frozen=True, eq=False)
class _Scales:
    """Scales of a data set, which bring the inputs and the outputs of Q near 1.

    Attributes:
        mean: [obs_dim], mean of the observations.
        std: [obs_dim], their standard deviation, or 1 where it is 0.
        unit: root mean square of the rewards.
        largest: largest size of a reward.
    """

    mean: torch.Tensor
    std: torch.Tensor
    unit: float
    largest: float

    def inputs(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Return the inputs of Q [n, obs_dim + act_dim]: standardised observations, and actions."""
        return torch.cat([(observations - self.mean) / self.std, actions], dim=-1)


def _make_q(inputs: int, hidden: tuple[int, ...], seed: int) -> nn.Sequential:
    """Make a multi-layer perceptron with layer normalisation.

    Without it Q grows without bounds at actions that the data lack (Yue et al., NeurIPS 2023).
    """
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for before, after in itertools.pairwise((inputs, *hidden)):
            layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(hidden[-1], 1))


def _measure(data: Transitions) -> _Scales:
    # The arrays may be mapped from a file that is larger than the memory, so some rows stand for all.
    some = slice(None, None, max(1, len(data) // _SCALED_BY))
    std, mean = torch.std_mean(data.observations[some].double(), 0, correction=0)
    least, most = (bound.item() for bound in data.rewards.aminmax())
    # Rewards that are all zero have no size.
    largest = max(abs(least), abs(most)) or 1.0
    unit = data.rewards[some].double().square().mean().sqrt().item() or largest
    return _Scales(mean.float(), torch.where(std < 1e-6, 1.0, std).float(), unit, largest)


def _draw(
    policy: Actor, data: Transitions, first: int, count: int, batch: int, seed: int, deterministic: bool
) -> tuple[torch.Tensor, torch.Tensor | list[None]]:
    """Draw the rows [count, batch] of some updates, and the noise [count, batch, act_dim] of their actions.

    Row b of update i has the random counter (b, i).
    """
    rows = torch.arange(batch, device=data.device).repeat(count)
    steps = torch.arange(first, first + count, device=data.device).repeat_interleave(batch)
    drawn = random_choice(rows, steps, BATCH_STREAM, len(data), seed).view(count, batch)
    if deterministic:
        return drawn, [None] * count
    noise = random_normals(rows, steps, NEXT_ACTION_STREAM, policy.act_dim, seed, data.observations.dtype)
    return drawn, noise.view(count, batch, policy.act_dim)
