"""The task file of PyBullet's ant; see examples/bullet_hopper.py."""

import pybullet_envs_gymnasium  # noqa: F401 - registers the environment

from mopo_fast import Task
from mopo_fast.tasks import make_box

# The episode ends where the torso is not above 0.26 m. The observation has the height over 0.75 m.
task = Task(
    "bulletant", "AntBulletEnv-v0", obs_dim=28, act_dim=8, box=make_box(28, {0: (-0.49, float("inf"))})
)
