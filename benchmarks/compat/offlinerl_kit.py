"""The rollout and the epoch of OfflineRL-Kit's MOPO, of halfcheetah's sizes, on random data.

An epoch is one of `MBPolicyTrainer.train`: a rollout of 5 steps, the updates, the progress bar, the logger
and the checkpoint. Its evaluation is one episode of one step.
"""

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.offlinerl_kit import make_buffers, make_importable, make_policy
from mopo_fast import Transitions
from mopo_fast.compat.offlinerl_kit import fuse_learn, fuse_rollout, fuse_trainer

OBS_DIM, ACT_DIM = 17, 6
TASK = "halfcheetah-medium-v2"
# Open to the end: the logger keeps it.
_NOWHERE = open(os.devnull, "w")  # noqa: SIM115


class _Episodes:
    """Episodes of one step, so that an evaluation takes no time."""

    def reset(self) -> Any:
        return np.zeros(OBS_DIM, np.float32)

    def step(self, action: Any) -> Any:
        return self.reset(), 0.0, True, {}

    def get_normalized_score(self, value: float) -> float:
        return value


def contenders(
    checkout: Path, *, batch_size: int, updates: int, **options: Any
) -> dict[str, Callable[[], object]]:
    """Return calls by name; each is a rollout of 5 steps, or an epoch of MBPolicyTrainer."""
    make_importable(checkout)
    random = np.random.default_rng(0)
    arrays = [
        torch.from_numpy(random.normal(size=(10_000, dim)).astype(np.float32))
        for dim in (OBS_DIM, ACT_DIM, OBS_DIM)
    ]
    observations, actions, successors = arrays
    data = Transitions(
        observations, actions.tanh(), torch.zeros(10_000), successors, torch.zeros(10_000, dtype=torch.bool)
    )
    updating = {name: value for name, value in options.items() if name != "backend"}

    def fuse_both(trainer: Any) -> None:
        fuse_learn(fuse_rollout(trainer.policy), **updating)

    ways: dict[str, Callable[[Any], object]] = {
        "as shipped": lambda trainer: trainer,
        "fuse_rollout": lambda trainer: fuse_rollout(trainer.policy),
        "fuse_rollout and fuse_learn": fuse_both,
        "fuse_trainer": functools.partial(fuse_trainer, **updating),
    }
    trainers = {}
    for name, take_over in ways.items():
        trainers[name] = _make_trainer(data, batch_size, updates, theirs=name == "as shipped", **options)
        take_over(trainers[name])
    rollouts = {"as shipped": "as shipped", "fused": "fuse_rollout"}
    return {
        **{f"rollout, {way}": functools.partial(_roll_out, trainers[name]) for way, name in rollouts.items()},
        **{f"epoch, {way}": functools.partial(_train, trainer) for way, trainer in trainers.items()},
    }


def _make_trainer(data: Transitions, batch_size: int, updates: int, *, theirs: bool, **options: Any) -> Any:
    from offlinerlkit.policy_trainer import MBPolicyTrainer
    from offlinerlkit.utils.logger import Logger

    torch.manual_seed(0)
    np.random.seed(0)
    policy = make_policy(OBS_DIM, ACT_DIM, TASK, 0.5, theirs, **({} if theirs else options))
    policy.dynamics.scaler.fit(np.concatenate([data.observations, data.actions], 1))
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    with _without_output():
        logger = Logger(folder, {"consoleout_backup": "stdout", "policy_training_progress": "csv"})
    # A training closes its logger at the end.
    logger.close = lambda: None
    return MBPolicyTrainer(
        policy,
        _Episodes(),
        *make_buffers(data, 5 * 5 * batch_size),
        logger,
        rollout_setting=(updates, batch_size, 5),
        epoch=1,
        step_per_epoch=updates,
        eval_episodes=1,
    )


def _roll_out(trainer: Any) -> None:
    start = trainer.real_buffer.sample(trainer._rollout_batch_size)["observations"].cpu().numpy()
    made, _ = trainer.policy.rollout(start, 5)
    trainer.fake_buffer.add_batch(**made)


def _train(trainer: Any) -> None:
    with _without_output():
        trainer.train()


def _without_output() -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    stack.enter_context(contextlib.redirect_stdout(_NOWHERE))
    stack.enter_context(contextlib.redirect_stderr(_NOWHERE))
    return stack
