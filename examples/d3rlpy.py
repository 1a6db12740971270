"""d3rlpy 1.x's MOPO with our ensemble's predictions: python examples/d3rlpy.py

d3rlpy 1.1.1 is built with NumPy 1.26 and Cython 0.29: see tests/compat/test_compat_d3rlpy.py. The data are
steps of random actions, made on the spot; `--theirs` leaves the predictions to it. Run it with -P, since
this folder has a module of the same name.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import mopo_fast
from mopo_fast.collect.uniform import collect
from mopo_fast.compat import d3rlpy as fast


def make_dataset(data):
    """Its MDPDataset of one long episode after the other."""
    from d3rlpy.dataset import MDPDataset

    ends = data.terminals.numpy().astype(np.float32)
    ends[-1] = 1.0
    return MDPDataset(data.observations.numpy(), data.actions.numpy(), data.rewards.numpy(), ends)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200, help="updates")
    parser.add_argument("--batch", type=int, default=1000, help="start states of a rollout")
    parser.add_argument("--theirs", action="store_true", help="with its own predictions")
    arguments = parser.parse_args()
    # Beside this file, a module of the same name would be found first.
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
        # The line that changes.
        dynamics = fast.accelerate(dynamics)
    mopo = MOPO(dynamics=dynamics, rollout_interval=100, rollout_batch_size=arguments.batch)
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
