"""The rollout and the epoch of OfflineRL-Kit's algorithms, of halfcheetah's sizes, on random data.

An epoch is one of `MBPolicyTrainer.train`, with the settings of the algorithm's run script: rollouts of 5
steps (MOBILE: of one), the updates, RAMBO's update of the dynamics, the progress bar, the logger and the
checkpoint. Its evaluation is one episode of one step.
"""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.compat.offlinerl_kit_scripts import Algorithm, make_trainer, without_output
from mopo_fast import Transitions
from mopo_fast.compat.offlinerl_kit import EnsembleDynamics, fuse_learn, fuse_rollout, fuse_trainer

OBS_DIM, ACT_DIM = 17, 6
# Arguments of the run scripts, besides the sizes.
_ARGUMENTS: dict[Algorithm, list[str]] = {
    "mopo": ["--rollout-length", "5", "--penalty-coef", "0.5"],
    "combo": ["--cql-weight", "0.5"],
    # Its pretraining of the policy is no part of an epoch.
    "rambo": ["--bc-epoch", "0"],
    "mobile": ["--penalty-coef", "0.5"],
}


def contenders(
    checkout: Path, *, batch_size: int, updates: int, algorithm: Algorithm = "mopo", **options: Any
) -> dict[str, Callable[[], object]]:
    """Return calls by name; each is a rollout, or an epoch of MBPolicyTrainer.

    Args:
        checkout: folder of OfflineRL-Kit.
        batch_size: start states of a rollout.
        updates: updates of an epoch. RAMBO makes four rollouts in an epoch, and one update of the dynamics
            with as many steps.
        algorithm: algorithm that is timed.
        options: those of `fuse_trainer` and of our EnsembleDynamics.
    """
    ways = {"as shipped": None, **_ways(algorithm, options)}
    trainers = {
        way: _make_trainer(checkout, algorithm, batch_size, updates, take_over, options)
        for way, take_over in ways.items()
    }
    suffix = "" if algorithm == "mopo" else f" of {algorithm.upper()}"
    rollouts = {"as shipped": "as shipped", "fused": "fuse_rollout"}
    return {
        **{
            f"rollout{suffix}, {way}": functools.partial(_roll_out, trainers[name])
            for way, name in rollouts.items()
        },
        **{f"epoch{suffix}, {way}": functools.partial(_train, trainer) for way, trainer in trainers.items()},
    }


def _ways(algorithm: Algorithm, options: dict[str, Any]) -> dict[str, Callable[[Any], object]]:
    """Return the functions that take a trainer over, by name."""

    def fuse_both(trainer: Any) -> None:
        fuse_learn(fuse_rollout(trainer.policy), **options)

    ways: dict[str, Callable[[Any], object]] = {
        "fuse_rollout": lambda trainer: fuse_rollout(trainer.policy),
        "fuse_rollout and fuse_learn": fuse_both,
        "fuse_trainer": functools.partial(fuse_trainer, **options),
    }
    if algorithm == "combo":
        # It keeps its own `learn`.
        return {"fuse_rollout": ways["fuse_rollout"]}
    if algorithm == "mobile":
        # Its updates are made one by one.
        del ways["fuse_rollout and fuse_learn"]
    return ways


def _make_trainer(
    checkout: Path,
    algorithm: Algorithm,
    batch_size: int,
    updates: int,
    take_over: Callable[[Any], object] | None,
    options: dict[str, Any],
) -> Any:
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    arguments = ["--task", "halfcheetah-medium-v2", *_ARGUMENTS[algorithm], "--rollout-batch-size"]
    arguments += [str(batch_size), "--epoch", "1", "--step-per-epoch", str(updates), "--eval_episodes", "1"]
    if algorithm == "rambo":
        # Its own numbers at 1000 updates: rollouts every 250, an update of the dynamics every 1000.
        arguments += ["--rollout-freq", str(updates // 4), "--dynamics-update-freq", str(updates)]
    dynamics = None if take_over is None else functools.partial(EnsembleDynamics, **options)
    trainer = make_trainer(
        checkout, algorithm, _data(), arguments, folder, dynamics=dynamics, take_over=take_over
    )
    trainer.policy._adv_train_steps = updates
    # A training closes its logger at the end.
    trainer.logger.close = lambda: None
    return trainer


def _data() -> Transitions:
    random = np.random.default_rng(0)
    observations, actions, successors = (
        torch.from_numpy(random.normal(size=(10_000, dim)).astype(np.float32))
        for dim in (OBS_DIM, ACT_DIM, OBS_DIM)
    )
    return Transitions(
        observations, actions.tanh(), torch.zeros(10_000), successors, torch.zeros(10_000, dtype=torch.bool)
    )


def _roll_out(trainer: Any) -> None:
    start = trainer.real_buffer.sample(trainer._rollout_batch_size)["observations"].cpu().numpy()
    made, _ = trainer.policy.rollout(start, trainer._rollout_length)
    trainer.fake_buffer.add_batch(**made)


def _train(trainer: Any) -> None:
    with without_output():
        trainer.train()
