"""Compare with the d4rl package itself, installed into a separate folder."""

import subprocess
import sys
from pathlib import Path

import pytest
from own_packages import run_with

# Packages that its loader imports. MuJoCo 2.1 and its other simulators are not needed.
PACKAGES = ["d4rl==1.1", "gym==0.24.1", "gym-notices==0.1.0", "tqdm==4.70.1"]

PARITY = """
import sys
from pathlib import Path
import h5py
import numpy as np
from mopo_fast import load_dataset
from mopo_fast.data.d4rl import LOCATIONS, import_d4rl
from mopo_fast.tasks import get_task, parse_dataset_name

d4rl = import_d4rl()
import gym
from d4rl.offline_env import OfflineEnv

class Environment(OfflineEnv):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1.0, 1.0, (3,))

    def __init__(self, path, limit):
        super().__init__()
        self.path, self._max_episode_steps = path, limit

    def get_dataset(self):
        return super().get_dataset(self.path)

def same(ours, theirs, what):
    for key, array in theirs.items():
        mine = getattr(ours, key).numpy()
        assert mine.dtype == array.dtype and mine.tobytes() == array.tobytes(), (what, key)

random, compared = np.random.default_rng(0), 0
for limit in (1000, 7):
    for timeouts in (True, False):
        for successors in (True, False):
            path, n = Path(f"a-{limit}-{timeouts}-{successors}.hdf5"), 3000
            with h5py.File(path, "w") as file:
                file["observations"] = random.normal(size=(n, 2))
                file["actions"] = random.normal(size=(n, 3)).astype(np.float32)
                file["rewards"] = random.normal(size=(n, 1))
                file["terminals"] = random.random(n) < (0.0005 if limit == 1000 else 0.1)
                file["metadata/algorithm"] = "SAC"
                if timeouts:
                    file["timeouts"] = random.random(n) < 0.01
                if successors:
                    file["next_observations"] = random.normal(size=(n, 2))
            environment = Environment(path, limit)
            theirs = d4rl.qlearning_dataset(environment)
            assert 0 < len(theirs["rewards"]) < n - 1
            same(load_dataset(environment, compat="d4rl"), theirs, path)
            if limit == 1000:
                same(load_dataset(path, compat="d4rl"), theirs, path)
                same(load_dataset(environment.get_dataset(), compat="d4rl"), theirs, path)
            compared += 1
scores = 0
for name in LOCATIONS:
    if name in d4rl.infos.REF_MIN_SCORE:
        task = get_task(parse_dataset_name(name)[0])
        for episode_return in (-300.0, 0.0, 1234.5, 12000.0):
            expected = 100 * d4rl.get_normalized_score(name, episode_return)
            assert np.isclose(task.normalized_score(episode_return), expected, rtol=1e-12), name
        assert d4rl.infos.DATASET_URLS[name].endswith(LOCATIONS[name].rpartition("/")[2]), name
        scores += 1
print(compared, scores)
"""


def test_without_the_package() -> None:
    # The test runs in a separate process, because the guard changes which packages can be imported.
    code = "from mopo_fast.data.d4rl import import_d4rl\nimport_d4rl()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "InputError: the d4rl package cannot be imported" in done.stderr
    assert "pip install d4rl==1.1" in done.stderr


@pytest.mark.slow
def test_same_rows_and_scores(tmp_path: Path) -> None:
    printed = run_with(PACKAGES, PARITY, tmp_path, D4RL_DATASET_DIR=str(tmp_path / "cache"))
    compared, scores = map(int, printed.split()[-2:])
    assert compared == 8
    assert scores > 60
