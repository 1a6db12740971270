"""The loop of Polixir's OfflineRL as shipped, and with our forward pass of the ensemble.

Data and networks are random, of halfcheetah's sizes. The loop is `AlgoTrainer.train_policy`, with no
updates for a rollout alone, and 1000 for an epoch.
"""

import atexit
import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from examples.polixir import import_mopo, make_arguments, make_buffer
from mopo_fast.compat.polixir import FastTransition

OBS_DIM, ACT_DIM = 17, 6


def contenders(
    checkout: Path, *, batch_size: int, updates: int, **options: Any
) -> dict[str, Callable[[], object]]:
    """Return calls by name; each is a rollout of 5 steps, or an epoch: a rollout and `updates` of its own."""
    # Their output is not needed.
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    mopo = import_mopo(checkout)
    random = np.random.default_rng(0)
    dims = {"observations": OBS_DIM, "next_observations": OBS_DIM, "actions": ACT_DIM, "rewards": 1}
    data = {name: random.normal(size=(10_000, dim)).astype(np.float32) for name, dim in dims.items()}
    data["terminals"] = np.zeros(10_000, np.float32)
    buffer = make_buffer(data)
    sizes = {"data_collection_per_epoch": batch_size, "max_epoch": 1}

    def run(updates: int, ours: bool) -> Callable[[], None]:
        with contextlib.chdir(folder):
            arguments = make_arguments(OBS_DIM, ACT_DIM, "halfcheetah", steps_per_epoch=updates, **sizes)
            trainer = mopo.AlgoTrainer(mopo.algo_init(arguments), arguments)
        trainer.save_model = lambda path: None
        theirs = trainer.transition
        theirs.requires_grad_(False)
        theirs.set_select([0, 1, 2, 3, 4])
        transition = FastTransition(theirs, **options) if ours else theirs

        def train() -> None:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                trainer.train_policy(buffer, buffer, transition, lambda policy: {})

        return train

    return {
        "rollout, as shipped": run(0, ours=False),
        "rollout, FastTransition": run(0, ours=True),
        "epoch, as shipped": run(updates, ours=False),
        "epoch, FastTransition": run(updates, ours=True),
    }
