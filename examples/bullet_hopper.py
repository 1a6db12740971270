"""The task file of PyBullet's hopper, for `mopo-fast train DATA --task examples/bullet_hopper.py`.

    pip install pybullet
    pip install --no-deps pybullet-envs-gymnasium==0.6.0

examples/bullet_data.py makes its data. PyBullet's ant is in examples/bullet_ant.py.
"""

import pybullet_envs_gymnasium  # noqa: F401 - registers the environment

from mopo_fast import Task
from mopo_fast.tasks import make_box

# The episode ends where the torso is below 0.8 m or its pitch is 1 or more. The observation has the torso's
# height above 1.25 m, where it starts, and the pitch.
task = Task(
    "bullethopper",
    "HopperBulletEnv-v0",
    obs_dim=15,
    act_dim=3,
    box=make_box(15, {0: (-0.45, float("inf")), 7: (-1.0, 1.0)}),
)
