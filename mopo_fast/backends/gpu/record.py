"""What rollouts on a GPU leave behind before the rows that exist are closed up into the ring."""

from typing import NamedTuple, Protocol

import torch

from mopo_fast.backends import Destination, StepResult

# Of a call's record; a larger batch takes its turns.
RECORD_BYTES = 1 << 28


class Record(NamedTuple):
    """[batch, horizon, ...] each, of which the first `lengths` [batch] exist; `cut` [batch]: not finite."""

    actions: torch.Tensor
    rewards: torch.Tensor
    next_observations: torch.Tensor
    terminals: torch.Tensor
    raw_rewards: torch.Tensor
    penalties: torch.Tensor
    members: torch.Tensor
    lengths: torch.Tensor
    cut: torch.Tensor


class Run(Protocol):
    """All steps of all rollouts, into the record; without a policy its actions are read."""

    def __call__(
        self,
        start: torch.Tensor,
        rows: torch.Tensor,
        record: Record,
        *,
        horizon: int = 1,
        first_step: int = 0,
        mean: torch.Tensor | None = None,
        std: torch.Tensor | None = None,
    ) -> None: ...


class Compact(Protocol):
    """Copy the record's rows that exist into the ring, from row `head` on."""

    def __call__(
        self, start: torch.Tensor, rows: torch.Tensor, record: Record, out: Destination, head: int
    ) -> None: ...


def _empty_record(start: torch.Tensor, act_dim: int, horizon: int) -> Record:
    batch, obs_dim = start.shape

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=start.device)

    return Record(
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


def recorded_step(
    run: Run, observations: torch.Tensor, actions: torch.Tensor, rows: torch.Tensor, step: int, members: int
) -> StepResult:
    """A step as a rollout of one; with the distributions of `members` where there are any."""
    batch, obs_dim = observations.shape
    record = _empty_record(observations, 0, 1)._replace(actions=actions)
    mean = std = None
    if members:
        shape = (members, batch, obs_dim + 1)
        mean, std = observations.new_empty(shape), observations.new_empty(shape)
    with torch.cuda.device_of(observations):
        run(observations, rows, record, first_step=step, mean=mean, std=std)
    return StepResult(
        next_observations=record.next_observations.squeeze(1),
        rewards=record.rewards.squeeze(1),
        terminals=record.terminals.squeeze(1),
        raw_rewards=record.raw_rewards.squeeze(1),
        penalties=record.penalties.squeeze(1),
        members=record.members.squeeze(1),
        mean=mean,
        std=std,
    )


def recorded_rollout(
    run: Run,
    compact: Compact,
    start: torch.Tensor,
    rows: torch.Tensor,
    act_dim: int,
    horizon: int,
    out: Destination,
) -> tuple[int, int]:
    """Rollouts into the ring: (rows written, rollouts cut as not finite)."""
    row_bytes = 4 * horizon * (start.shape[1] + act_dim + 5)
    turn = max(1, RECORD_BYTES // row_bytes)
    written = cut = 0
    for begin in range(0, len(start), turn):
        some, numbers = start[begin : begin + turn], rows[begin : begin + turn]
        record = _empty_record(some, act_dim, horizon)
        with torch.cuda.device_of(start):
            run(some, numbers, record, horizon=horizon)
            compact(some, numbers, record, out, (out.head + written) % out.capacity)
        counts: list[int] = torch.stack([record.lengths.sum(), record.cut.sum()]).tolist()
        written, cut = written + counts[0], cut + counts[1]
    return written, cut
