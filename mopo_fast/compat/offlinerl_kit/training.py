"""OfflineRL-Kit's `MBPolicyTrainer` with many SAC updates in one kernel call."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from mopo_fast.compat.models import check_attributes, check_method
from mopo_fast.compat.offlinerl_kit.dynamics import draw_seed
from mopo_fast.compat.offlinerl_kit.files import VERSION
from mopo_fast.compat.offlinerl_kit.policy import (
    as_transitions,
    fuse_learn,
    fuse_rollout,
    is_mobile,
    update,
)
from mopo_fast.config import TrainingDtype
from mopo_fast.data.table import allocate_table
from mopo_fast.data.transitions import Transitions
from mopo_fast.errors import InputError
from mopo_fast.sac import Draws

# Updates of one kernel call. With more of them, Ctrl-C and the progress bar wait longer.
_UPDATES_AT_ONCE = 100
_COLUMNS = ("observations", "actions", "rewards", "next_observations")
# Attributes of a trainer that are read here.
_TRAINER = (
    "policy",
    "real_buffer",
    "fake_buffer",
    "_rollout_freq",
    "_step_per_epoch",
    "_dynamics_update_freq",
)
_WITHOUT_TRAINER = "leave fuse_trainer out and call fuse_rollout and fuse_learn on the policy"


def fuse_trainer(
    trainer: Any, *, dtype: TrainingDtype = "float32", backend: str = "auto", threads: int | None = None
) -> Any:
    """Let a trainer's `train` make up to 100 SAC updates in one kernel call, and its rollouts in another.

    The loop stays OfflineRL-Kit's: progress bar, logger, schedule, evaluation and checkpoints. Only its
    batches are no longer drawn in Python. The first of up to 100 calls of `policy.learn` draws the batches of
    all of them in the kernel and updates the policy; each of the calls returns the mean losses. The kernel
    draws rows uniformly with replacement, as `ReplayBuffer.sample` does, from the trainer's own buffers. At
    the start of `train` their arrays are moved into one table each, from which rows are read faster.

    A rollout, an update of the dynamics, an evaluation or a checkpoint sees the policy after exactly the
    updates that the loop has asked for.

    A copy of the trainer or of its policy that is made while `train` runs is not supported: it would keep the
    methods that stand in for their own until `train` ends.

    MOBILEPolicy's updates are made one by one, since its penalties depend on the policy before each.

    Args:
        trainer: MBPolicyTrainer whose policy is one that `fuse_rollout` and `fuse_learn` take; they need not
            have been called.
        dtype: precision of the matrix products of the updates, see `SACConfig.dtype`. That of the rollouts is
            an argument of `EnsembleDynamics`.
        backend: backend of `SAC`.
        threads: number of CPU threads, see `SAC`.

    Returns:
        `trainer` itself.

    Raises:
        InputError: the kernels do not support the trainer, its policy or its buffers. The message names the
            reason.
    """
    check_attributes(trainer, _TRAINER, VERSION)
    check_method(trainer, "train", "offlinerlkit", _WITHOUT_TRAINER, ("MBPolicyTrainer",))
    for buffer in (trainer.real_buffer, trainer.fake_buffer):
        for method in ("sample", "add_batch"):
            check_method(buffer, method, "offlinerlkit", _WITHOUT_TRAINER, ("ReplayBuffer",))
        _check_buffer(buffer)
    # In this order, a policy whose updates are refused stays as it is.
    fuse_rollout(fuse_learn(trainer.policy, dtype=dtype, backend=backend, threads=threads))
    if not is_mobile(trainer.policy):
        trainer.train = functools.partial(_train, trainer)
    return trainer


def _train(trainer: Any) -> Any:
    """Run the original's `train` with the policy and the buffers in the hands of `_Ahead`."""
    policy, buffers = trainer.policy, (trainer.real_buffer, trainer.fake_buffer)
    if not hasattr(policy, "_mopo_fast"):
        raise InputError("the trainer has another policy than when it was fused; call fuse_trainer again")
    for buffer in buffers:
        _check_buffer(buffer)
        _lay_in_table(buffer)
    ahead = _Ahead(trainer)
    looks = [name for name in ("rollout", "update_dynamics", "eval", "state_dict") if hasattr(policy, name)]
    guards = {name: ahead.guard(name, getattr(policy, name)) for name in looks}
    taken_over: list[tuple[Any, dict[str, Any]]] = [(policy, {"learn": ahead.learn, **guards})]
    taken_over += [(buffer, {"sample": functools.partial(_Batch, buffer)}) for buffer in buffers]
    before = [(thing, {name: vars(thing).get(name) for name in methods}) for thing, methods in taken_over]
    try:
        for thing, methods in taken_over:
            vars(thing).update(methods)
        return type(trainer).train(trainer)
    finally:
        for thing, methods in before:
            for name, method in methods.items():
                if method is None:
                    del vars(thing)[name]
                else:
                    vars(thing)[name] = method


class _Batch(Mapping[str, torch.Tensor]):
    """A batch that a buffer draws when someone looks into it."""

    def __init__(self, buffer: Any, batch_size: int) -> None:
        self.buffer, self.size = buffer, batch_size
        self._drawn: dict[str, torch.Tensor] | None = None

    @property
    def is_drawn(self) -> bool:
        """True if someone has looked into it."""
        return self._drawn is not None

    def _draw(self) -> dict[str, torch.Tensor]:
        if self._drawn is None:
            self._drawn = type(self.buffer).sample(self.buffer, self.size)
        return self._drawn

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._draw()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._draw())

    def __len__(self) -> int:
        return len(self._draw())


class _Ahead:
    """A policy that is some updates ahead of its trainer's loop.

    Args:
        trainer: the MBPolicyTrainer, at the start of its `train`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._policy = trainer, trainer.policy
        self._learn = trainer.policy.learn
        self._asked = 0
        self._left = 0
        self._losses: dict[str, float] = {}

    def learn(self, batch: dict[str, Any]) -> dict[str, float]:
        """Stand in for the policy's `learn`."""
        real, fake = batch["real"], batch["fake"]
        drawn = [not isinstance(one, _Batch) or one.is_drawn for one in (real, fake)]
        if self._left and any(drawn):
            raise InputError(
                "the trainer looks into some batches and not into others, so updates cannot be made ahead;"
                f" {_WITHOUT_TRAINER}"
            )
        if any(drawn):
            self._asked += 1
            result: dict[str, float] = self._learn(batch)
            return result
        if not self._left:
            self._left = self._until_next_look()
            self._losses = self._update(real, fake, self._left)
        self._asked += 1
        self._left -= 1
        return self._losses

    def guard(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method of the policy that refuses to be called while the policy is ahead."""

        def guarded(*arguments: Any, **options: Any) -> Any:
            if self._left:
                raise InputError(
                    f"the trainer calls the policy's {name} at update {self._asked}, where the policy is"
                    f" already {self._left} updates further; {_WITHOUT_TRAINER}"
                )
            return method(*arguments, **options)

        return guarded

    def _until_next_look(self) -> int:
        """Return the number of updates until the loop may look at the policy, at most 100."""
        trainer = self._trainer
        periods: list[int] = [trainer._step_per_epoch, trainer._rollout_freq, trainer._dynamics_update_freq]
        until = (period - self._asked % period for period in periods if period > 0)
        return min(_UPDATES_AT_ONCE, *until)

    def _update(self, real: _Batch, fake: _Batch, updates: int) -> dict[str, float]:
        policy = self._policy
        for batch in (real, fake):
            if batch.size and not batch.buffer._size:
                raise InputError(f"a batch takes {batch.size} rows of a buffer that is empty")
        data, model = _source(real.buffer), _source(fake.buffer)
        sizes, rows = (len(data), len(model)), (real.size, fake.size)
        return update(policy, Draws(data, model, sizes, rows, updates, draw_seed()))


def _check_buffer(buffer: Any) -> None:
    check_attributes(buffer, (*_COLUMNS, "terminals", "_size"), VERSION)
    for name in (*_COLUMNS, "terminals"):
        array = getattr(buffer, name)
        if array.dtype != np.float32 or array.ndim != 2:
            raise InputError(
                f"the buffers must hold rows of float32, got {name} {array.dtype} {list(array.shape)};"
                " make them with obs_dtype=np.float32 and action_dtype=np.float32"
            )


def _lay_in_table(buffer: Any) -> None:
    """Move a buffer's arrays into the columns of one table."""
    obs_dim, act_dim = buffer.observations.shape[1], buffer.actions.shape[1]
    columns = allocate_table(_COLUMNS, len(buffer.observations), obs_dim, act_dim)
    for name in _COLUMNS:
        array = columns[name].numpy()
        array = array[:, None] if array.ndim == 1 else array
        array[: buffer._size] = getattr(buffer, name)[: buffer._size]
        setattr(buffer, name, array)


def _source(buffer: Any) -> Transitions:
    """Return the rows of a buffer in place, but for the terminals."""
    names = (*_COLUMNS, "terminals")
    return as_transitions({name: torch.from_numpy(getattr(buffer, name)[: buffer._size]) for name in names})
