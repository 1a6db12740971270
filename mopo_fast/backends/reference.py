"""The oracle that every kernel is tested against: plain PyTorch, any device, float32 or float64.

Source: the authors' models/fake_env.py for the step, mopo.py for the rollout.
"""

import dataclasses
from collections.abc import Callable

import torch
from typing_extensions import override

from mopo_fast.backends.interface import (
    Backend,
    BackendStatus,
    Destination,
    DynamicsArrays,
    Need,
    PolicyArrays,
    RolloutCall,
    RolloutCounts,
    Settings,
    StepCall,
    StepResult,
    Truncation,
    ValuesCall,
)
from mopo_fast.backends.philox import (
    ACTION_STREAM,
    MEMBER_STREAM,
    NOISE_STREAM,
    random_choice,
    random_normals,
)
from mopo_fast.ensemble import mlp, soft_clamp_variance

# Rows at a time. On a CPU the activations of all members then fit into the last-level cache. On a GPU they
# fit into memory, and the kernels are long enough to be worth their launches.
_CHUNKS = {"cpu": 2000, "cuda": 2**17}


def predict(
    dynamics: DynamicsArrays,
    observations: torch.Tensor,
    actions: torch.Tensor,
    operands: str = "float32",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return every member's means and variances of its outputs, each [members, batch, obs_dim + 1]."""
    inputs = torch.cat([observations, actions], dim=-1)
    x = (inputs - dynamics.input_mean) / dynamics.input_std
    heads = mlp(x, dynamics.weights, dynamics.biases, dynamics.activation, operands, norms=dynamics.norms)
    mean, logvar = heads.chunk(2, dim=-1)
    bounds = dynamics.max_logvar.unsqueeze(1), dynamics.min_logvar.unsqueeze(1)
    bounded = soft_clamp_variance(logvar, *bounds)
    return mean, bounded.square() if dynamics.log_std else bounded


def penalise(penalty: str, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Compute u(s, a) [batch] from the penalty members' means and variances [members, batch, obs_dim + 1].

    - max_aleatoric: max over members of ||sigma||, reward included (authors).
    - max_deviation: max over members of ||mu_i - mean mu||, observation only (authors' alternative).
    - max_pairwise: max over pairs of ||mu_i - mu_j||, observation only (MOReL).
    - ensemble_std: sqrt of the mean over observation dims of the members' variance (OfflineRL-Kit).
    - mixture_std: ||std of the Gaussian mixture||, reward included (Lu et al. 2022).
    """
    deltas = mean[..., :-1]
    if penalty == "max_aleatoric":
        return variance.sum(-1).amax(0).sqrt()
    if penalty == "max_deviation":
        return (deltas - deltas.mean(0)).square().sum(-1).amax(0).sqrt()
    if penalty == "max_pairwise":
        pairs = [(deltas - other).square().sum(-1).amax(0) for other in deltas]
        return torch.stack(pairs).amax(0).sqrt()
    if penalty == "ensemble_std":
        return (deltas - deltas.mean(0)).square().mean(0).mean(-1).sqrt()
    assert penalty == "mixture_std"
    # Unlike mean(mu^2) - mean(mu)^2, this form does not cancel.
    return (variance + (mean - mean.mean(0)).square()).mean(0).sum(-1).sqrt()


def act(
    policy: PolicyArrays, observations: torch.Tensor, rows: torch.Tensor, step: int, settings: Settings
) -> torch.Tensor:
    """Return the policy's actions [batch, act_dim], with the noise of this step's random numbers."""
    heads = mlp(observations, policy.weights, policy.biases, policy.activation, settings.operands)
    mean, log_std = heads.chunk(2, dim=-1)
    if settings.mean_actions:
        return torch.tanh(mean)
    noise = random_normals(rows, step, ACTION_STREAM, mean.shape[1], settings.seed, mean.dtype)
    std = log_std.clamp(policy.log_std_min, policy.log_std_max).exp()
    return torch.tanh(mean + std * noise)


def _step(
    dynamics: DynamicsArrays,
    observations: torch.Tensor,
    actions: torch.Tensor,
    rows: torch.Tensor,
    step: int,
    settings: Settings,
    penalised: bool,
) -> StepResult:
    mean, variance = predict(dynamics, observations, actions, settings.operands)
    if settings.deterministic:
        members = torch.full_like(rows, -1)
        sample = mean.mean(0)
    else:
        elites = dynamics.elites
        drawn_at = 0 if dynamics.keep_member else step
        draw = random_choice(rows, drawn_at, MEMBER_STREAM, len(elites), settings.seed)
        members = elites[draw]
        batch = torch.arange(len(rows), device=rows.device)
        noise = random_normals(rows, step, NOISE_STREAM, mean.shape[-1], settings.seed, mean.dtype)
        sample = mean[members, batch] + variance[members, batch].sqrt() * noise
    carried = observations if dynamics.carry is None else dynamics.carry * observations
    next_observations = carried + sample[:, :-1]
    raw_rewards = rewards = sample[:, -1]
    penalties = None
    if penalised:
        chosen = dynamics.penalty_members
        penalties = penalise(dynamics.penalty, mean[chosen], variance[chosen])
        rewards = raw_rewards - dynamics.penalty_coef * penalties
    inside = (next_observations >= dynamics.low) & (next_observations <= dynamics.high)
    finite = torch.isfinite(next_observations).all(-1) & torch.isfinite(rewards)
    result = StepResult(
        next_observations=next_observations,
        rewards=rewards,
        terminals=~(inside.all(-1) & finite),
        raw_rewards=raw_rewards,
        penalties=penalties,
        members=members.to(torch.int32),
        mean=mean,
        std=variance.sqrt(),
    )
    return halt(result, dynamics.truncation)


def above_limit(result: StepResult, truncation: Truncation) -> torch.Tensor:
    """Tell which rows, bool [batch], are finite and have a penalty that ends a rollout."""
    assert result.penalties is not None
    finite = torch.isfinite(result.next_observations).all(-1) & torch.isfinite(result.rewards)
    return finite & (result.penalties > truncation.at)


def halt(result: StepResult, truncation: Truncation) -> StepResult:
    """Give the rows that are above the limit the halt reward, if there is one, and make them terminal."""
    if truncation.halt_reward is None:
        return result
    halted = above_limit(result, truncation)
    return dataclasses.replace(
        result,
        rewards=result.rewards.masked_fill(halted, truncation.halt_reward),
        terminals=result.terminals | halted,
    )


def rollout_by_steps(
    observations: torch.Tensor,
    rows: torch.Tensor,
    horizon: int,
    out: Destination,
    step: Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, StepResult]],
    truncation: Truncation,
) -> RolloutCounts:
    """Make rollouts step by step, with the result of a fused kernel.

    Args:
        observations: [batch, obs_dim], the start states.
        rows: int64 [batch], the start states' numbers for the random numbers.
        horizon: most steps of a rollout.
        out: the ring that the transitions are written to.
        step: returns the actions and the model step of (observations, rows, t) of the rollouts that go on.
        truncation: penalties that end a rollout.
    """
    position = torch.arange(len(rows), device=rows.device)
    parts: list[dict[str, torch.Tensor]] = []
    cut = truncated = 0
    for t in range(horizon):
        if len(rows) == 0:
            break
        actions, result = step(observations, rows, t)
        finite = torch.isfinite(result.next_observations).all(-1) & torch.isfinite(result.rewards)
        cut += int((~finite).sum())
        part: dict[str, torch.Tensor | None] = {
            "observations": observations,
            "actions": actions,
            "rewards": result.rewards,
            "next_observations": result.next_observations,
            "terminals": result.terminals,
            "raw_rewards": result.raw_rewards,
            "penalties": result.penalties,
            "members": result.members,
            "rollout_index": rows,
            "step": torch.full_like(result.members, t),
            "position": position,
        }
        parts.append({name: array[finite] for name, array in part.items() if array is not None})
        alive = finite & ~result.terminals
        if truncation.needs_penalties:
            above = above_limit(result, truncation)
            truncated += int(above.sum())
            alive &= ~above
        observations, rows, position = result.next_observations[alive], rows[alive], position[alive]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    # The parts are in the order of steps; the result is in the order of rollouts.
    order = torch.argsort(whole.pop("position"), stable=True)
    target = (out.head + torch.arange(len(order), device=order.device)) % out.capacity
    for name, array in out.arrays.items():
        array[target] = whole[name][order].to(array.dtype)
    return RolloutCounts(len(order), cut, truncated)


def least_values(call: ValuesCall) -> torch.Tensor:
    """Compute `Backend.least_values`, for every backend without a kernel for it."""
    members, count, obs_dim = call.mean.shape
    mean, std = (array.view(-1, obs_dim) for array in (call.mean, call.std))
    numbers = torch.arange(call.samples * members * count, device=mean.device)
    parts = []
    for rows in numbers.split(_CHUNKS.get(mean.device.type, _CHUNKS["cuda"])):
        noise = random_normals(rows, 0, NOISE_STREAM, obs_dim, call.settings.seed, mean.dtype)
        gaussians = rows % (members * count)
        states = mean[gaussians] + std[gaussians] * noise
        actions = act(call.policy, states, rows, 0, call.settings)
        inputs = torch.cat([states, actions], dim=-1)
        q = mlp(inputs, call.weights, call.biases, "relu", call.settings.operands)
        parts.append(q.amin(dim=0).view(-1))
    return torch.cat(parts).view(call.samples, members, count)


class ReferenceBackend(Backend):
    """Plain PyTorch on any device, in chunks of rows."""

    name = "reference"
    trains = "pytorch"

    @override
    def status(self) -> BackendStatus:
        return BackendStatus(self.name, True, "plain PyTorch, always there")

    @override
    def refusal(self, need: Need) -> str | None:
        return None

    @override
    def step(self, call: StepCall) -> StepResult:
        size = _CHUNKS.get(call.observations.device.type, _CHUNKS["cuda"])
        batch = zip(
            call.observations.split(size), call.actions.split(size), call.rows.split(size), strict=True
        )
        chunks = [_step(call.dynamics, *chunk, call.step, call.settings, call.penalties) for chunk in batch]

        def join(name: str, dim: int = 0) -> torch.Tensor:
            return torch.cat([getattr(chunk, name) for chunk in chunks], dim=dim)

        return StepResult(
            **{name: join(name) for name in call.arrays},
            mean=join("mean", dim=1) if call.distributions else None,
            std=join("std", dim=1) if call.distributions else None,
        )

    @override
    def least_values(self, call: ValuesCall) -> torch.Tensor:
        return least_values(call)

    @override
    def rollout(self, call: RolloutCall) -> RolloutCounts:
        def step(observations: torch.Tensor, rows: torch.Tensor, t: int) -> tuple[torch.Tensor, StepResult]:
            actions = act(call.policy, observations, rows, t, call.settings)
            one = StepCall(
                call.dynamics,
                observations,
                rows,
                call.settings,
                actions,
                t,
                distributions=False,
                penalties=call.penalties,
            )
            return actions, self.step(one)

        truncation = call.dynamics.truncation
        return rollout_by_steps(call.observations, call.rows, call.horizon, call.out, step, truncation)
