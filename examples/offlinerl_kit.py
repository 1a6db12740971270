"""Train with OfflineRL-Kit's MOPO on this package's dynamics, rollouts and SAC updates.

    python examples/offlinerl_kit.py CHECKOUT

CHECKOUT is an unchanged checkout of https://github.com/yihaosun1124/OfflineRL-Kit. A stand-in replaces gym,
whose environments are not used. The data set is made by random actions at the start. `--theirs` runs
OfflineRL-Kit's own code, for comparison.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch

import mopo_fast
from mopo_fast.collect import collect
from mopo_fast.compat import offlinerl_kit
from mopo_fast.environments import make_environment
from mopo_fast.tasks import TASKS


def make_importable(checkout):
    """Make OfflineRL-Kit importable without gym."""
    for name in ("gym", "gym.envs", "gym.envs.mujoco"):
        sys.modules[name] = MagicMock()
    sys.path.insert(0, str(checkout))


def make_policy(obs_dim, act_dim, task, penalty_coef, theirs, **options):
    """Make a MOPOPolicy as run_example/run_mopo.py does.

    `theirs` keeps OfflineRL-Kit's own dynamics; `options` are those of ours, such as dtype.
    """
    from offlinerlkit.dynamics import EnsembleDynamics
    from offlinerlkit.modules import ActorProb, Critic, EnsembleDynamicsModel, TanhDiagGaussian
    from offlinerlkit.nets import MLP
    from offlinerlkit.policy import MOPOPolicy
    from offlinerlkit.utils.scaler import StandardScaler
    from offlinerlkit.utils.termination_fns import get_termination_fn

    if not theirs:
        # The first change: take EnsembleDynamics from mopo_fast.
        EnsembleDynamics = offlinerl_kit.EnsembleDynamics

    decay = [2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4]
    model = EnsembleDynamicsModel(obs_dim, act_dim, [200] * 4, weight_decays=decay)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    dynamics = EnsembleDynamics(
        model, optimizer, StandardScaler(), get_termination_fn(task), penalty_coef=penalty_coef, **options
    )
    head = TanhDiagGaussian(256, act_dim, unbounded=True, conditioned_sigma=True)
    actor = ActorProb(MLP(obs_dim, [256, 256]), head)
    critics = [Critic(MLP(obs_dim + act_dim, [256, 256])) for _ in range(2)]
    log_alpha = torch.zeros(1, requires_grad=True)
    return MOPOPolicy(
        dynamics,
        actor,
        *critics,
        torch.optim.Adam(actor.parameters(), lr=1e-4),
        *(torch.optim.Adam(critic.parameters(), lr=3e-4) for critic in critics),
        alpha=(-act_dim, log_alpha, torch.optim.Adam([log_alpha], lr=1e-4)),
    )


def make_buffers(data, capacity):
    """Return OfflineRL-Kit's two buffers: one filled with `data`, and an empty one."""
    from offlinerlkit.buffer import ReplayBuffer

    shapes = (data.obs_dim,), np.float32, data.act_dim, np.float32
    real, fake = ReplayBuffer(len(data), *shapes), ReplayBuffer(capacity, *shapes)
    names = ("observations", "actions", "next_observations", "rewards", "terminals")
    real.load_dataset({name: getattr(data, name).numpy() for name in names})
    return real, fake


class OldGym:
    """Gymnasium environment with gym's old interface, which OfflineRL-Kit's trainer expects."""

    def __init__(self, task):
        self.env, self.task, self.next_seed = make_environment(task.env_id), task, 0

    def seed(self, seed):
        """Seed the next reset, and with it all later ones."""
        self.next_seed = seed

    def reset(self):
        """Start an episode; the first reset seeds all later ones."""
        seed, self.next_seed = self.next_seed, None
        return self.env.reset(seed=seed)[0]

    def step(self, action):
        observation, reward, terminal, truncated, info = self.env.step(action)
        return observation, reward, terminal or truncated, info

    def get_normalized_score(self, value):
        return self.task.normalized_score(value) / 100


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100, help="SAC updates per epoch")
    parser.add_argument("--batch", type=int, default=5000, help="start states per rollout")
    parser.add_argument("--theirs", action="store_true", help="run OfflineRL-Kit's own code")
    arguments = parser.parse_args()
    make_importable(arguments.checkout.resolve())
    from offlinerlkit.policy_trainer import MBPolicyTrainer
    from offlinerlkit.utils.logger import Logger

    np.random.seed(0)
    torch.manual_seed(0)
    task = TASKS["hopper"]
    with tempfile.TemporaryDirectory() as folder:
        path = collect("hopper-random", 10_000, out=Path(folder, "data.hdf5"), quiet=True)
        data = mopo_fast.load_dataset(path)
        policy = make_policy(data.obs_dim, data.act_dim, "hopper-random-v2", 1.0, arguments.theirs)
        real, fake = make_buffers(data, 5 * 5 * arguments.batch)
        logger = Logger(folder, {"consoleout_backup": "stdout", "progress": "csv"})
        started = time.perf_counter()
        policy.dynamics.train(real.sample_all(), logger, max_epochs=10)
        print(f"fit: {time.perf_counter() - started:.1f} s")
        trainer = MBPolicyTrainer(
            policy,
            OldGym(task),
            real,
            fake,
            logger,
            rollout_setting=(arguments.steps, arguments.batch, 5),
            epoch=arguments.epochs,
            step_per_epoch=arguments.steps,
            real_ratio=0.05,
            eval_episodes=2,
        )
        if not arguments.theirs:
            # The second change: make rollouts, and up to 100 updates at a time, in one kernel call each.
            trainer = offlinerl_kit.fuse_trainer(trainer)
        trainer.train()


if __name__ == "__main__":
    main()
