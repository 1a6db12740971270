"""The loop of d3rlpy 1.x as shipped, with our ensemble's predictions, and with our SAC updates as well.

Data and networks are random, of halfcheetah's sizes. The loop is `LearnableBase.fit`: a rollout at the
first step, then SAC updates. d3rlpy does not terminate rollouts.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compat import in_every_way
from mopo_fast.compat.d3rlpy import accelerate, fuse_updates

OBS_DIM, ACT_DIM = 17, 6


def contenders(
    _: Path | None, *, batch_size: int, updates: int, **options: Any
) -> dict[str, Callable[[], object]]:
    """Return calls by name; each is a rollout of 5 steps, or an epoch: a rollout and `updates` of its own."""
    from d3rlpy.algos import MOPO
    from d3rlpy.dataset import MDPDataset
    from d3rlpy.dynamics import ProbabilisticEnsembleDynamics

    random = np.random.default_rng(0)
    sizes = ((10_000, OBS_DIM), (10_000, ACT_DIM), (10_000,))
    arrays = [random.uniform(-1, 1, size=size).astype(np.float32) for size in sizes]
    dataset = MDPDataset(*arrays, terminals=np.arange(10_000) % 1000 == 999)

    def make(predictions: bool, learning: bool = False) -> Any:
        dynamics = ProbabilisticEnsembleDynamics()
        dynamics.build_with_dataset(dataset)
        if predictions:
            accelerate(dynamics, **options)
        mopo = MOPO(dynamics=dynamics, rollout_interval=updates, rollout_batch_size=batch_size)
        mopo.build_with_dataset(dataset)
        return fuse_updates(mopo, **options) if learning else mopo

    fit = functools.partial(_fit, dataset, updates)
    ways = {"as shipped": make(False), "accelerate": make(True)}
    return {
        **in_every_way({"rollout": functools.partial(_roll_out, dataset), "epoch": fit}, ways),
        "epoch, accelerate and fuse_updates": functools.partial(fit, make(True, True)),
    }


def _roll_out(dataset: Any, mopo: Any) -> None:
    transitions = [transition for episode in dataset.episodes for transition in episode]
    assert mopo.generate_new_data(transitions)


def _fit(dataset: Any, updates: int, mopo: Any) -> None:
    quiet = {"save_metrics": False, "show_progress": False, "verbose": False}
    mopo.fit(dataset.episodes, n_steps=updates, n_steps_per_epoch=updates, **quiet)
