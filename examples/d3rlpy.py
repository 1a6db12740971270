"""Train with d3rlpy 1.x's MOPO on this package's predictions and updates.

    python -P examples/d3rlpy.py

-P is needed because this folder has a module of d3rlpy's name. d3rlpy 1.1.1 must be built with NumPy 1.26 and
Cython 0.29; tests/compat/test_compat_d3rlpy.py lists the versions. The data set is made by random actions at
the start. `--theirs` uses d3rlpy's own predictions and updates, for comparison.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import mopo_fast
from mopo_fast.collect import collect
from mopo_fast.compat import d3rlpy as fast


def make_dataset(data):
    """Return d3rlpy's MDPDataset of `data`."""
    from d3rlpy.dataset import MDPDataset

    ends = data.terminals.numpy().astype(np.float32)
    ends[-1] = 1.0
    return MDPDataset(data.observations.numpy(), data.actions.numpy(), data.rewards.numpy(), ends)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200, help="SAC updates")
    parser.add_argument("--batch", type=int, default=1000, help="start states per rollout")
    parser.add_argument("--theirs", action="store_true", help="use d3rlpy's own predictions and updates")
    arguments = parser.parse_args()
    # Imported here: without -P, this file itself would be found under the name d3rlpy.
    from d3rlpy.algos import MOPO
    from d3rlpy.dynamics import ProbabilisticEnsembleDynamics

    np.random.seed(0)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = collect("hopper-random", 5_000, out=Path(folder, "data.hdf5"), quiet=True)
        dataset = make_dataset(mopo_fast.load_dataset(path))
    dynamics = ProbabilisticEnsembleDynamics()
    dynamics.fit(
        dataset.episodes, n_steps=500, n_steps_per_epoch=250, save_metrics=False, show_progress=False
    )
    if not arguments.theirs:
        dynamics = fast.accelerate(dynamics)
    mopo = MOPO(dynamics=dynamics, rollout_interval=100, rollout_batch_size=arguments.batch)
    mopo.build_with_dataset(dataset)
    if not arguments.theirs:
        fast.fuse_updates(mopo)
    started = time.perf_counter()
    mopo.fit(
        dataset.episodes,
        n_steps=arguments.steps,
        n_steps_per_epoch=100,
        save_metrics=False,
        show_progress=False,
    )
    print(f"{arguments.steps} updates and their rollouts: {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
