"""The loop of MOPO's authors as shipped, with our FakeEnv, with fused rollouts, and with fused updates.

Their code runs on TensorFlow 2 with the changes in examples/mopo_tf.py. Data and networks are random, of
halfcheetah's sizes. The loops are theirs: `_rollout_model`, then `_do_training_repeats` 1000 times.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from examples.mopo_tf import imitate_tensorflow_1, make_algorithm

OBS_DIM, ACT_DIM = 17, 6


def contenders(
    checkout: Path, *, batch_size: int, updates: int, **options: Any
) -> dict[str, Callable[[], object]]:
    """Return calls by name; each is a rollout of 5 steps, or an epoch: a rollout and `updates` of its own."""
    tf = imitate_tensorflow_1(checkout)
    import mopo.static

    from mopo_fast.compat.mopo_tf import FakeEnv, fuse_updates

    random = np.random.default_rng(0)
    shapes = {"observations": OBS_DIM, "actions": ACT_DIM, "next_observations": OBS_DIM, "rewards": 1}
    data = {name: random.normal(size=(10_000, dim)) for name, dim in shapes.items()}
    data["terminals"] = np.zeros(10_000)
    # Their output is not needed.
    with _quiet(), tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        algorithm = make_algorithm(
            tf, data, mopo.static["halfcheetah"], epoch_length=updates, rollout_batch_size=batch_size
        )
        algorithm._train_model(max_epochs=1, batch_size=256, holdout_ratio=0.2)
        algorithm._init_training()
        algorithm._epoch_before_hook()
        algorithm.sampler.initialize(algorithm._training_environment, algorithm._policy, algorithm._pool)
        algorithm._set_rollout_length()
        algorithm._reallocate_model_pool()
    algorithm._training_progress = SimpleNamespace(update=lambda: None, set_description=lambda: None)
    theirs = algorithm.fake_env
    ours = FakeEnv(
        algorithm._model,
        mopo.static["halfcheetah"],
        theirs.penalty_coeff,
        theirs.penalty_learned_var,
        **options,
    )

    def rollout(environment: Any) -> Callable[[], None]:
        def run() -> None:
            algorithm.fake_env = environment
            with _quiet():
                algorithm._rollout_model(rollout_batch_size=batch_size, deterministic=False)

        return run

    def fused() -> None:
        # Replaces their loop.
        obs = algorithm.sampler.random_batch(batch_size)["observations"]
        samples = ours.rollout(algorithm._policy, obs, algorithm._rollout_length)
        algorithm._model_pool.add_samples(samples)

    things = algorithm, algorithm._policy
    before = [set(vars(thing)) for thing in things]
    fuse_updates(algorithm, **options)
    # The other ways need the methods as they were.
    taken_over = [
        (thing, {name: vars(thing).pop(name) for name in vars(thing).keys() - names})
        for thing, names in zip(things, before, strict=True)
    ]

    def epoch(roll_out: Callable[[], None], *, fuse: bool = False) -> Callable[[], None]:
        def run() -> None:
            for thing, methods in taken_over if fuse else ():
                vars(thing).update(methods)
            roll_out()
            algorithm._epoch_before_hook()
            for step in range(updates):
                algorithm._timestep = step
                algorithm._do_training_repeats(timestep=step)
            for thing, methods in taken_over if fuse else ():
                for name in methods:
                    del vars(thing)[name]

        return run

    rollouts = {"as shipped": rollout(theirs), "FakeEnv": rollout(ours), "fused": fused}
    return {
        **{f"rollout, {name}": run for name, run in rollouts.items()},
        **{f"epoch, {name}": epoch(run) for name, run in rollouts.items()},
        "epoch, fused and fuse_updates": epoch(fused, fuse=True),
    }


@contextlib.contextmanager
def _quiet() -> Any:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
