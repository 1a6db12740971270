"""Rollouts on a GPU: first padded to the horizon, then the transitions that exist are copied to the ring."""

import dataclasses
from typing import NamedTuple, Protocol

import torch

from mopo_fast.backends.interface import RolloutCall, RolloutCounts, StepCall, StepResult

# Bytes of padded rollouts that are made at a time; a larger batch is split.
PADDED_BYTES = 1 << 28


class PaddedRollouts(NamedTuple):
    """Rollouts padded to the horizon.

    Attributes:
        actions: [batch, horizon, act_dim].
        rewards: [batch, horizon].
        next_observations: [batch, horizon, obs_dim].
        terminals: bool [batch, horizon].
        raw_rewards: [batch, horizon].
        penalties: [batch, horizon].
        members: int32 [batch, horizon].
        lengths: int32 [batch], number of steps that exist.
        cut: int32 [batch], 1 where a prediction that was not finite ended the rollout, 2 where its penalty
            did, else 0.
    """

    actions: torch.Tensor
    rewards: torch.Tensor
    next_observations: torch.Tensor
    terminals: torch.Tensor
    raw_rewards: torch.Tensor
    penalties: torch.Tensor
    members: torch.Tensor
    lengths: torch.Tensor
    cut: torch.Tensor

    def offsets(self) -> torch.Tensor:
        """Count the transitions of the rollouts before each one, int64 [batch]."""
        return self.lengths.cumsum(0) - self.lengths


class Launch(Protocol):
    """A backend's kernel that makes rollouts."""

    def __call__(
        self,
        call: StepCall | RolloutCall,
        padded: PaddedRollouts,
        *,
        mean: torch.Tensor | None = None,
        std: torch.Tensor | None = None,
    ) -> None:
        """Make all steps of all rollouts into `padded`.

        Args:
            call: the rollouts. Without a policy, the kernel reads the actions from `padded`.
            padded: receives the rollouts.
            mean: receives every member's mean, [members, batch, obs_dim + 1].
            std: receives every member's standard deviation, likewise.
        """


class Compact(Protocol):
    """A backend's kernel that writes padded rollouts to the ring."""

    def __call__(self, call: RolloutCall, padded: PaddedRollouts, head: int) -> None:
        """Copy the transitions that exist into the ring `call.out`, from row `head` on."""


def _empty(start: torch.Tensor, act_dim: int, horizon: int) -> PaddedRollouts:
    batch, obs_dim = start.shape

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=start.device)

    return PaddedRollouts(
        actions=empty(batch, horizon, act_dim),
        rewards=empty(batch, horizon),
        next_observations=empty(batch, horizon, obs_dim),
        terminals=empty(batch, horizon, dtype=torch.bool),
        raw_rewards=empty(batch, horizon),
        penalties=empty(batch, horizon),
        members=empty(batch, horizon, dtype=torch.int32),
        lengths=empty(batch, dtype=torch.int32),
        cut=empty(batch, dtype=torch.int32),
    )


def padded_step(launch: Launch, call: StepCall) -> StepResult:
    """Make a model step as a rollout of one step."""
    padded = _empty(call.observations, 0, 1)._replace(actions=call.actions)
    mean, std = call.empty_distributions()
    with torch.cuda.device_of(call.observations):
        launch(call, padded, mean=mean, std=std)
    # The kernels compute penalties in any case.
    arrays = {name: getattr(padded, name).squeeze(1) for name in call.arrays}
    return StepResult(**arrays, mean=mean, std=std)


def padded_rollout(launch: Launch, compact: Compact, call: RolloutCall) -> RolloutCounts:
    """Make rollouts, a part of the batch at a time; see `Backend.rollout`."""
    obs_dim, act_dim = call.observations.shape[1], call.policy.weights[-1].shape[-1] // 2
    turn = max(1, PADDED_BYTES // (4 * call.horizon * (obs_dim + act_dim + 5)))
    written = non_finite = truncated = 0
    for start, rows in zip(call.observations.split(turn), call.rows.split(turn), strict=True):
        part = dataclasses.replace(call, observations=start, rows=rows)
        padded = _empty(start, act_dim, call.horizon)
        with torch.cuda.device_of(start):
            launch(part, padded)
            compact(part, padded, (call.out.head + written) % call.out.capacity)
        sums = [padded.lengths.sum(), (padded.cut == 1).sum(), (padded.cut == 2).sum()]
        counts: list[int] = torch.stack(sums).tolist()
        written, non_finite, truncated = written + counts[0], non_finite + counts[1], truncated + counts[2]
    return RolloutCounts(written, non_finite, truncated)
