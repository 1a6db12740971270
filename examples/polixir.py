"""Train with Polixir's MOPO on this package's ensemble predictions.

    python examples/polixir.py CHECKOUT

CHECKOUT is an unchanged checkout of https://github.com/polixir/OfflineRL. Only its MOPO is imported, and
stand-ins replace its loggers. The data set is made by random actions at the start. `--theirs` uses Polixir's
own ensemble, for comparison.
"""

import argparse
import contextlib
import importlib.machinery
import os
import sys
import tempfile
import time
import types
from pathlib import Path

import torch

import mopo_fast
from mopo_fast.collect import collect
from mopo_fast.compat import polixir
from mopo_fast.evaluate import evaluate
from mopo_fast.tasks import TASKS


def stand_in(name, **attributes):
    """Register an otherwise empty module with these attributes."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(attributes)
    sys.modules[name] = module


def import_mopo(checkout):
    """Import offlinerl.algo.modelbase.mopo without the other algorithms and their dependencies."""
    for package in ("offlinerl", "offlinerl.algo", "offlinerl.algo.modelbase"):
        stand_in(package, __path__=[str(checkout / package.replace(".", "/"))])
    stand_in("sklearn")
    stand_in("sklearn.preprocessing", MinMaxScaler=None)
    stand_in("loguru", logger=types.SimpleNamespace(info=lambda *_: None))

    class Session:
        def __init__(self, **_):
            self.repo = types.SimpleNamespace(index_path=os.getcwd())

        def set_params(self, *_, **__):
            pass

        track = set_params

    stand_in("aim", Session=Session)
    from offlinerl.algo.modelbase import mopo

    return mopo


def make_arguments(obs_dim, act_dim, task, **options):
    """Return the settings of offlinerl/config/algo/mopo_config.py, with `options` replaced."""
    return {
        "seed": 42,
        "task": task,
        "obs_shape": obs_dim,
        "action_shape": act_dim,
        "device": "cpu",
        "dynamics_path": None,
        "dynamics_save_path": None,
        "aim_path": os.getcwd(),
        "hidden_layer_size": 256,
        "hidden_layers": 2,
        "transition_layers": 4,
        "transition_init_num": 7,
        "transition_select_num": 5,
        "real_data_ratio": 0.05,
        "transition_batch_size": 256,
        "policy_batch_size": 256,
        "data_collection_per_epoch": 50e3,
        "steps_per_epoch": 1000,
        "max_epoch": 200,
        "learnable_alpha": True,
        "uncertainty_mode": "aleatoric",
        "transition_lr": 1e-3,
        "actor_lr": 3e-4,
        "discount": 0.99,
        "soft_target_tau": 5e-3,
        "horizon": 5,
        "lam": 2,
        **options,
    }


def make_buffer(data):
    """Return the arrays of `data` as one of Polixir's data sets."""
    from offlinerl.utils.data import SampleBatch

    names = {
        "obs": "observations",
        "obs_next": "next_observations",
        "act": "actions",
        "rew": "rewards",
        "done": "terminals",
    }
    return SampleBatch({key: data[name].reshape(len(data["rewards"]), -1) for key, name in names.items()})


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--fit-epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100, help="SAC updates per epoch")
    parser.add_argument("--batch", type=int, default=5000, help="start states per rollout")
    parser.add_argument("--theirs", action="store_true", help="use Polixir's own ensemble")
    options = parser.parse_args()
    mopo = import_mopo(options.checkout.resolve())

    class Trainer(mopo.AlgoTrainer):
        evaluations = 0

        def _eval_transition(self, transition, valdata):
            # Polixir's fit goes on while any member improves; stop it after a few epochs.
            self.evaluations += 1
            losses = super()._eval_transition(transition, valdata)
            return losses if self.evaluations <= options.fit_epochs else [float("inf")] * len(losses)

        def train_policy(self, train_buffer, val_buffer, transition, callback_fn):
            self.started = time.perf_counter()
            if not options.theirs:
                # The one line to add at the beginning of train_policy in offlinerl/algo/modelbase/mopo.py.
                transition = polixir.FastTransition(transition)
            return super().train_policy(train_buffer, val_buffer, transition, callback_fn)

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        rows = mopo_fast.load_dataset(collect("hopper-random", 5_000, out="data.hdf5", quiet=True))
        arguments = make_arguments(
            rows.obs_dim,
            rows.act_dim,
            "d4rl-hopper-random-v2",
            max_epoch=options.epochs,
            steps_per_epoch=options.steps,
            data_collection_per_epoch=options.batch,
        )
        trainer = Trainer(mopo.algo_init(arguments), arguments)

        def callback(policy):
            # A file as Polixir saves it. On the command line, it is read by
            # `mopo-fast convert policy.pt RUN --from polixir`.
            torch.save(policy, "policy.pt")
            actor = polixir.read(Path("policy.pt")).policy
            return {"return": evaluate(actor, TASKS["hopper"], episodes=5, seed=0).return_mean}

        buffer = make_buffer({name: array.numpy() for name, array in rows.arrays().items()})
        trainer.train(buffer, buffer, callback)
        print(f"{options.epochs} epochs in {time.perf_counter() - trainer.started:.1f} s")
        print(*trainer.metric_logs.values(), sep="\n")


if __name__ == "__main__":
    main()
