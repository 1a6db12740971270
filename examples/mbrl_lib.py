"""Run mbrl-lib's MBPO loop on a fixed data set with this package's ModelEnv and SAC updates.

    pip install --no-deps mbrl==0.2.0 hydra-core==1.3.2 omegaconf==2.3.0 antlr4-python3-runtime==4.9.3
    pip install --no-deps termcolor==2.5.0
    python examples/mbrl_lib.py

The data set is made by random actions at the start. ModelEnv adds MOPO's penalty. `--theirs` runs mbrl-lib's
own ModelEnv, without a penalty, and its own updates. `--one-by-one` keeps its loop over the updates.
"""

import argparse
import sys
import tempfile
import time
import types
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch

import mopo_fast
from mopo_fast.collect import collect
from mopo_fast.compat import mbrl_lib
from mopo_fast.environments import make_environment
from mopo_fast.tasks import TASKS

# mbrl-lib imports a video library that is not used here.
sys.modules.setdefault("skvideo", MagicMock())
import mbrl.models  # noqa: E402
import mbrl.util  # noqa: E402
from mbrl.algorithms.mbpo import rollout_model_and_populate_sac_buffer  # noqa: E402
from mbrl.env.termination_fns import hopper  # noqa: E402
from mbrl.planning.sac_wrapper import SACAgent  # noqa: E402
from mbrl.third_party.pytorch_sac_pranz24.sac import SAC  # noqa: E402


def make_model(obs_dim, act_dim, elites=(0, 1, 2, 3, 4)):
    """Make a model as mbrl-lib's MBPO configurations do."""
    model = mbrl.models.GaussianMLP(
        obs_dim + act_dim,
        obs_dim + 1,
        "cpu",
        ensemble_size=7,
        propagation_method="random_model",
        activation_fn_cfg={"_target_": "torch.nn.SiLU"},
    )
    model.set_elite(elites)
    return mbrl.models.OneDTransitionRewardModel(model, normalize=True, normalize_double_precision=True)


def make_agent(env, hidden=512):
    """Make mbrl-lib's SAC with its MBPO hyperparameters for hopper."""
    arguments = types.SimpleNamespace(
        gamma=0.99,
        tau=0.005,
        alpha=0.2,
        policy="Gaussian",
        target_update_interval=1,
        automatic_entropy_tuning=True,
        target_entropy=-1,
        hidden_size=hidden,
        device=torch.device("cpu"),
        lr=3e-4,
    )
    return SAC(env.observation_space.shape[0], env.action_space, arguments)


def make_buffers(data, capacity):
    """Return two of mbrl-lib's buffers: one filled with `data`, and an empty one."""
    shapes = (data.obs_dim,), (data.act_dim,)
    real, fake = mbrl.util.ReplayBuffer(len(data), *shapes), mbrl.util.ReplayBuffer(capacity, *shapes)
    names = ("observations", "actions", "next_observations", "rewards", "terminals")
    real.add_batch(*(getattr(data, name).numpy() for name in names), np.zeros(len(data), bool))
    return real, fake


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100, help="SAC updates per epoch")
    parser.add_argument("--batch", type=int, default=5000, help="start states per rollout")
    parser.add_argument("--theirs", action="store_true", help="use mbrl-lib's own ModelEnv and updates")
    parser.add_argument("--one-by-one", action="store_true", help="call update_parameters in a loop")
    arguments = parser.parse_args()
    np.random.seed(0)
    torch.manual_seed(0)
    env = make_environment(TASKS["hopper"].env_id)
    with tempfile.TemporaryDirectory() as folder:
        path = collect("hopper-random", 10_000, out=Path(folder, "data.hdf5"), quiet=True)
        data = mopo_fast.load_dataset(path)
    real, fake = make_buffers(data, 5 * 5 * arguments.batch)
    model = make_model(data.obs_dim, data.act_dim)
    model.update_normalizer(real.get_all())
    training, validation = mbrl.util.common.get_basic_buffer_iterators(real, 256, 0.2, 7)
    trainer = mbrl.models.ModelTrainer(model, optim_lr=1e-3, weight_decay=1e-5)
    trainer.train(training, validation, num_epochs=10)
    generator = torch.Generator().manual_seed(0)
    if arguments.theirs:
        model_env = mbrl.models.ModelEnv(env, model, hopper, None, generator)
    else:
        model_env = mbrl_lib.ModelEnv(env, model, hopper, None, generator, penalty_coef=1.0)
    sac = make_agent(env)
    agent = SACAgent(sac)
    if not arguments.theirs:
        mbrl_lib.fuse_sac(sac)
    for epoch in range(arguments.epochs):
        started = time.perf_counter()
        rollout_model_and_populate_sac_buffer(model_env, real, agent, fake, True, 5, arguments.batch)
        rolled_out = time.perf_counter()
        first = epoch * arguments.steps
        if arguments.theirs or arguments.one_by_one:
            for update in range(first, first + arguments.steps):
                sac.update_parameters(fake, 256, update, reverse_mask=True)
        else:
            sac.update_many(fake, 256, first, arguments.steps, reverse_mask=True)
        seconds = rolled_out - started, time.perf_counter() - rolled_out
        print(f"epoch {epoch}: rollout {seconds[0]:.2f} s, SAC {seconds[1]:.2f} s, {len(fake)} transitions")


if __name__ == "__main__":
    main()
