"""Collect a data set in PyBullet with the policies that come with it.

    pip install pybullet
    pip install --no-deps pybullet-envs-gymnasium==0.6.0
    python examples/bullet_data.py hopper hopper-medium.npz --noise 0.5
    mopo-fast train hopper-medium.npz --task examples/bullet_hopper.py --steps 100000

PyBullet's policies were trained by others and lie in its examples, as weights in Python files. They are read
from there; nothing in these files is run.
"""

import argparse
import ast
import importlib.util
from pathlib import Path

import numpy as np

import mopo_fast
from mopo_fast.environments import make_environment
from mopo_fast.tasks import get_task

HERE = Path(__file__).parent
# The name of each robot in PyBullet's file of its policy.
ROBOTS = {"hopper": "Hopper", "ant": "Ant"}


def read_policy(robot):
    """Return the policy of a robot as a function of an observation [obs_dim]."""
    spec = importlib.util.find_spec("pybullet_envs")
    if spec is None:
        raise SystemExit("pybullet is not installed: pip install pybullet")
    folder = Path(spec.submodule_search_locations[0], "examples")
    source = folder / f"enjoy_TF_{ROBOTS[robot]}BulletEnv_v0_2017may.py"
    weights = {
        assigned.targets[0].id: np.array(ast.literal_eval(assigned.value.args[0]))
        for assigned in ast.parse(source.read_text()).body
        if isinstance(assigned, ast.Assign) and assigned.targets[0].id.startswith("weights_")
    }
    first, second, last = (
        (weights[f"weights_{layer}_w"], weights[f"weights_{layer}_b"])
        for layer in ("dense1", "dense2", "final")
    )

    def policy(observation):
        x = observation
        for weight, bias in (first, second):
            x = np.maximum(x @ weight + bias, 0.0)
        return x @ last[0] + last[1]

    return policy


def collect(environment, policy, steps, noise, seed):
    """Take `steps` steps by the policy's actions with Gaussian noise; return arrays by D4RL's names."""
    random = np.random.default_rng(seed)
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    rows = {name: [] for name in names}
    observation, _ = environment.reset(seed=seed)
    for _ in range(steps):
        action = policy(observation)
        action = np.clip(action + noise * random.standard_normal(action.shape), -1.0, 1.0)
        action = action.astype(np.float32)
        successor, reward, terminal, timeout, _ = environment.step(action)
        for name, value in zip(
            names, (observation, action, reward, successor, terminal, timeout), strict=True
        ):
            rows[name].append(value)
        observation = environment.reset()[0] if terminal or timeout else successor
    return {name: np.array(values) for name, values in rows.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("robot", choices=ROBOTS)
    parser.add_argument("out", type=Path, help="file to write, .npz or .hdf5")
    parser.add_argument("--steps", type=int, default=100_000, help="transitions (default: 100000)")
    parser.add_argument(
        "--noise", type=float, default=0.5, help="standard deviation of the noise on actions (default: 0.5)"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    task = get_task(str(HERE / f"bullet_{given.robot}.py"))
    environment = make_environment(task.env_id)
    arrays = collect(environment, read_policy(given.robot), given.steps, given.noise, given.seed)
    environment.close()
    data = mopo_fast.load_dataset(arrays)
    data.save(given.out)
    print(data.describe())


if __name__ == "__main__":
    main()
