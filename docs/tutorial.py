# %% [markdown]
# # Tutorial
#
# This page is a notebook. Every build of this site runs it, so the output is what the code prints today.
#
# It walks through one MOPO run in five steps: **collect** data, **fit** a dynamics ensemble, look at the
# **penalty**, **roll out** a policy in the model, and **train** with SAC. All sizes are tiny, so that it
# takes less than a minute on two cores. A real run uses a hundred times as much data and updates; see
# [results](results.md).

# %%
import csv
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import mopo_fast
from mopo_fast.config import DynamicsConfig, EvaluationConfig, RolloutConfig

temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)

# %% [markdown]
# ## Collect and load a data set
#
# `collect` simulates Hopper with uniform random actions and writes HDF5 in D4RL's layout. `load_dataset`
# reads it, and any other file in that layout. The command line does the same with `mopo-fast collect
# hopper-random`.

# %%
path = folder / "train.hdf5"
mopo_fast.collect.collect("hopper-random", 10_000, seed=0, out=path, quiet=True)
data = mopo_fast.load_dataset(path)
print(data)

# %% [markdown]
# `data` is a `Transitions`: float32 tensors on the CPU, a row for each step. Hopper has 11 observation and 3
# action dimensions. An episode ends when the hopper falls, which is a *terminal* transition. With random
# actions it falls after some 20 steps.

# %%
print(data.describe())

# %%
speed = data.observations[:, 5]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
left.hist(data.rewards, bins=60)
left.set(xlabel="reward", ylabel="transitions")
right.scatter(speed[::10], data.rewards[::10], s=3, alpha=0.4)
right.set(xlabel="forward speed before the step", ylabel="reward")
plt.show()

# %% [markdown]
# ## Fit the dynamics
#
# The ensemble has seven networks. Each maps (observation, action) to a Gaussian over the change of the
# observation and the reward. The five with the least error on held-out rows are the *elites*, from which
# rollouts sample. `max_epochs` cuts the fit short here; by default it runs until no member improves. The
# networks are smaller than the default of four layers of 200.

# %%
losses = []
ensemble = mopo_fast.fit_dynamics(
    data,
    seed=0,
    config=DynamicsConfig(
        hidden=(100, 100, 100),
        weight_decay=(2.5e-5, 5e-5, 5e-5, 1e-4),
        max_epochs=30,
    ),
    on_epoch=lambda epoch: losses.append(min(epoch.holdout_mse)),
)
print(f"{len(losses)} epochs")
print(f"holdout MSE of the best member: {losses[0]:.3f} -> {losses[-1]:.4f}")
print(f"elites: {ensemble.elites.tolist()}")

# %% [markdown]
# ## Look at the penalty
#
# MOPO subtracts a penalty from every predicted reward: `r - lambda * u(s, a)`. It helps only if `u` is large
# where the model is wrong. Fresh data show whether it is: predict each transition, and compare the penalty
# with the true error of the prediction.
#
# `RolloutEngine.step` makes one step with given actions. `deterministic=True` predicts the mean over all
# seven members, without noise.

# %%
other_path = folder / "fresh.hdf5"
mopo_fast.collect.collect("hopper-random", 3_000, seed=1, out=other_path, quiet=True)
fresh = mopo_fast.load_dataset(other_path)
engine = mopo_fast.RolloutEngine(
    ensemble,
    penalty="max_aleatoric",
    penalty_coef=1.0,
    termination="hopper",
)

result = engine.step(fresh.observations, fresh.actions, seed=0, deterministic=True)
misses = result.next_observations - fresh.next_observations
errors = misses.norm(dim=1).numpy()
penalties = result.penalties.numpy()

ranks = np.argsort(np.argsort(penalties)), np.argsort(np.argsort(errors))
print(f"rank correlation of penalty and error: {np.corrcoef(*ranks)[0, 1]:.2f}")

order = np.array_split(np.argsort(penalties), 10)
figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
axes.scatter(penalties[::3], errors[::3], s=4, alpha=0.5, label="one transition")
axes.plot(
    [penalties[i].mean() for i in order],
    [errors[i].mean() for i in order],
    "o-",
    color="C1",
    label="mean of a tenth",
)
axes.set(xlabel="penalty u(s, a)", ylabel="true error of one step")
axes.set(xscale="log", yscale="log")
axes.legend()
plt.show()

# %% [markdown]
# ## Roll out a policy
#
# `rollout` runs a policy inside the model: all steps are fused into one call of a compiled kernel. The result
# holds the transitions in the same layout as the data, with penalised rewards, raw rewards and penalties.
#
# The numbers depend on the seed alone. Another thread count, or the same start states in two halves, give the
# same bits.

# %%
first_weights = torch.Generator().manual_seed(0)
policy = mopo_fast.Actor(data.obs_dim, data.act_dim, generator=first_weights)
starts = data.observations[:2_000]
rollouts = engine.rollout(policy, starts, horizon=5, seed=0)
assert rollouts.raw_rewards is not None and rollouts.penalties is not None
print(f"{len(rollouts)} transitions")
print(f"raw reward {rollouts.raw_rewards.mean():.3f}, penalty {rollouts.penalties.mean():.3f}")
print(f"penalised reward {rollouts.rewards.mean():.3f}")

one_thread = mopo_fast.RolloutEngine(
    ensemble,
    penalty_coef=1.0,
    termination="hopper",
    threads=1,
)
again = one_thread.rollout(policy, starts, horizon=5, seed=0)
print(f"same bits on one thread: {again.rewards.equal(rollouts.rewards)}")

# %% [markdown]
# ## Train
#
# `train` does all of this in a loop. Each epoch rolls the current policy out from states of the data, updates
# SAC on the result and evaluates the policy in MuJoCo. The run's folder keeps the configuration, a
# checkpoint, the learning curve, and `report.html`.
#
# `dataset` is a name, a path or data in memory, as here. `dynamics_from` takes the ensemble of above; without
# it, `train` fits one.

# %%
ensemble.save(folder / "fit")
config = mopo_fast.TrainConfig(
    dataset=data,
    task="hopper",
    steps=2_400,
    dynamics_from=str(folder / "fit"),
    rollout=RolloutConfig(
        horizon=5,
        penalty_coef=1.0,
        batch_size=5_000,
        interval=300,
    ),
    evaluation=EvaluationConfig(episodes=2),
)
summary = mopo_fast.train.train(config, folder / "run", quiet=True)
print(f"return {summary['return_mean']:.0f} +- {summary['return_std']:.0f}")
print(f"normalised score {summary['score_mean']:.1f}")

# %%
with open(folder / "run" / "progress.csv") as file:
    rows = list(csv.DictReader(file))
updates = [int(row["updates"]) for row in rows]
scores = [float(row["score_mean"]) for row in rows]

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.plot(updates, scores, "o-")
axes.set(xlabel="SAC updates", ylabel="normalised score (0: random, 100: expert)")
plt.show()
temporary.cleanup()

# %% [markdown]
# One seed and 2,400 updates say little about the method. [Results](results.md) has runs of 100,000 updates
# with several seeds, with and without the penalty.
#
# Next: [your own data and task](own-data.md), [rollouts in bulk](rollouts.md), [sweeps](many-runs.md).
