"""Train an agent of Stable-Baselines3 or torchrl inside the learned, penalised model.

    pip install '.[agents]'
    python examples/model_env.py --agent sac
    python examples/model_env.py --agent torchrl --data DATA --dynamics RUN

Without `--data`, a data set of the task is made by random actions at the start. `--dynamics` is the folder of
a run or a fit; without it an ensemble is fitted to the data. At the end the agent is evaluated in the
environment, where it has never acted before.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import mopo_fast
from mopo_fast.collect import collect
from mopo_fast.config import DynamicsConfig
from mopo_fast.evaluate import evaluate
from mopo_fast.tasks import get_task


def train_by_stable_baselines3(kind, make_envs, steps, seed):
    """Return the policy of SAC or PPO, a function of observations."""
    from stable_baselines3 import PPO, SAC
    from stable_baselines3.common.vec_env import VecMonitor

    from mopo_fast.compat.stable_baselines3 import GymnasiumVecEnv

    envs = VecMonitor(GymnasiumVecEnv(make_envs("SameStep")))
    if kind == "sac":
        # As many updates as steps of single environments.
        agent = SAC("MlpPolicy", envs, gradient_steps=-1, learning_starts=10 * envs.num_envs, seed=seed)
    else:
        agent = PPO("MlpPolicy", envs, n_steps=max(10, 2048 // envs.num_envs), seed=seed, device="cpu")
    agent.learn(steps)
    returns = [episode["r"] for episode in agent.ep_info_buffer]
    print(f"mean return of the last {len(returns)} episodes in the model: {np.mean(returns):.3f}")
    return lambda observations: agent.predict(observations, deterministic=True)[0]


def train_by_torchrl(make_envs, steps, seed):
    """Return the policy of PPO, a function of observations."""
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torchrl.collectors import Collector
    from torchrl.envs import ExplorationType, GymWrapper, set_exploration_type
    from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value import GAE

    torch.manual_seed(seed)
    # torchrl resets by itself, so that nothing has to be put back into its place.
    envs = GymWrapper(make_envs("Disabled"))
    envs.set_seed(seed)
    obs_dim, act_dim = envs.observation_spec["observation"].shape[-1], envs.action_spec.shape[-1]
    sizes = {"num_cells": [64, 64], "activation_class": torch.nn.Tanh}
    network = torch.nn.Sequential(MLP(obs_dim, 2 * act_dim, **sizes), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(network, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    critic = ValueOperator(MLP(obs_dim, 1, **sizes))
    advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic)
    loss = ClipPPOLoss(actor, critic, entropy_coeff=0.0)
    optimiser = torch.optim.Adam(loss.parameters(), lr=3e-4)
    frames = envs.num_envs * max(10, 2048 // envs.num_envs)
    total = -(-steps // frames) * frames
    collector = Collector(envs, actor, frames_per_batch=frames, total_frames=total)
    for batch in collector:
        for _ in range(10):
            advantage(batch)
            rows = batch.reshape(-1)
            for part in rows[torch.randperm(len(rows))].split(256):
                losses = loss(part)
                optimiser.zero_grad()
                sum(losses[name] for name in ("loss_objective", "loss_critic")).backward()
                torch.nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimiser.step()
    collector.shutdown()
    print(
        f"mean reward of the last {len(rows)} steps in the model: {rows['next', 'reward'].mean().item():.3f}"
    )

    def policy(observations):
        rows = TensorDict(
            {"observation": torch.as_tensor(observations, dtype=torch.float32)}, len(observations)
        )
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            return actor(rows)["action"].numpy()

    return policy


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--agent", choices=["sac", "ppo", "torchrl"], default="sac")
    parser.add_argument("--task", default="hopper", help="task of the data set")
    parser.add_argument("--data", help="name or file of the data set")
    parser.add_argument("--dynamics", help="folder of a run or a fit with the ensemble")
    parser.add_argument("--steps", type=int, default=10_000, help="steps in the model, of all environments")
    parser.add_argument("--envs", type=int, default=64, help="environments side by side")
    parser.add_argument("--horizon", type=int, default=5, help="most steps of an episode in the model")
    parser.add_argument("--penalty-coef", type=float, default=1.0, help="weight of the penalty")
    parser.add_argument("--rows", type=int, default=10_000, help="rows of the data set that is made")
    parser.add_argument("--epochs", type=int, default=20, help="most epochs of the fit")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    task = get_task(options.task)
    if options.data:
        data = mopo_fast.load_dataset(options.data)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "data.hdf5")
            data = mopo_fast.load_dataset(collect(f"{task.name}-random", options.rows, out=path, quiet=True))
    if options.dynamics:
        ensemble = mopo_fast.EnsembleDynamics.load(options.dynamics)
    else:
        config = DynamicsConfig(max_epochs=options.epochs)
        ensemble = mopo_fast.fit_dynamics(data, config=config, seed=options.seed)
    engine = mopo_fast.RolloutEngine(ensemble, penalty_coef=options.penalty_coef, termination=task)

    def make_envs(mode):
        return mopo_fast.ModelVectorEnv(
            engine,
            data,
            num_envs=options.envs,
            horizon=options.horizon,
            seed=options.seed,
            autoreset_mode=mode,
        )

    started = time.perf_counter()
    if options.agent == "torchrl":
        policy = train_by_torchrl(make_envs, options.steps, options.seed)
    else:
        policy = train_by_stable_baselines3(options.agent, make_envs, options.steps, options.seed)
    print(f"{options.steps:,} steps in the model: {time.perf_counter() - started:.1f} s")
    result = evaluate(policy, task, seed=options.seed)
    print(f"return in the environment: {result.return_mean:.1f} +- {result.return_std:.1f}")


if __name__ == "__main__":
    main()
