"""MuJoCo environments: gymnasium's, and those of the paper's two out-of-distribution tasks."""

import math
import warnings
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.mujoco.ant_v4 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v4 import HalfCheetahEnv

from mopo_fast.config import ZInit


class HalfCheetahJump(HalfCheetahEnv):
    """HalfCheetah that is rewarded for jumping.

    The reward is min(v_x, 3) - 0.1 |a|^2 + jump_weight (z - z_init), where z is the torso's height. The
    observation has 18 dimensions: qpos without x, the torso's height, and qvel.

    Args:
        jump_weight: weight of the height in the reward.
        z_init: "constant" for the height of the model's initial state; "episode" for the height at the
            episode's reset, which is up to 0.1 m higher or lower, as in the authors' later code
            (gwthomas/force, env/mujoco/half_cheetah_vel_jump.py). Returns of the two are not comparable.
        **options: arguments of gymnasium's HalfCheetah.
    """

    def __init__(self, jump_weight: float = 15.0, z_init: ZInit = "constant", **options: Any) -> None:
        self._measured, self._init_height = z_init == "episode", 0.0
        super().__init__(**options)
        self.jump_weight = jump_weight
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (18,), np.float64)

    def step(self, action: Any) -> Any:
        """Step as gymnasium's HalfCheetah does, with this class's reward."""
        observation, _, terminated, truncated, info = super().step(action)
        # qpos[1] is the height above that of the model's initial state.
        jump = self.jump_weight * (self.data.qpos[1] - self._init_height)
        reward = min(info["x_velocity"], 3.0) + info["reward_ctrl"] + jump
        return observation, float(reward), terminated, truncated, info

    def reset_model(self) -> Any:
        """Draw the initial state as gymnasium's HalfCheetah does, and measure its height."""
        observation = super().reset_model()
        self._init_height = float(self.data.qpos[1]) if self._measured else 0.0
        return observation

    def _get_obs(self) -> Any:
        height = self.model.body("torso").pos[2] + self.data.qpos[1]
        return np.concatenate([self.data.qpos[1:], [height], self.data.qvel])


class AntAngle(AntEnv):
    """Ant that is rewarded for running in one direction.

    The reward is v - 0.5 |a|^2 - 0.5e-3 |f|^2 + 1, where v is the velocity in that direction and f are the
    contact forces, clipped to [-1, 1]. MuJoCo 2.0, which the paper's authors used, left the forces at 0, so
    their returns have no contact cost.

    Args:
        degrees: angle between that direction and the x axis.
        **options: arguments of gymnasium's Ant.
    """

    def __init__(self, degrees: float = 30.0, **options: Any) -> None:
        super().__init__(**options)
        self.direction = math.radians(degrees)

    def step(self, action: Any) -> Any:
        """Step as gymnasium's Ant does, with this class's reward."""
        observation, _, terminated, truncated, info = super().step(action)
        speed = info["x_velocity"] * math.cos(self.direction) + info["y_velocity"] * math.sin(self.direction)
        reward = speed + info["reward_ctrl"] + info["reward_survive"] - self.contact_cost
        return observation, float(reward), terminated, truncated, info


# Each task is followed by the environment that trains the agent whose replay is the task's data set.
for _name, _class, _options in (
    ("HalfCheetahJump", HalfCheetahJump, {}),
    ("HalfCheetahJumpMeasured", HalfCheetahJump, {"z_init": "episode"}),
    ("HalfCheetahSpeed3", HalfCheetahJump, {"jump_weight": 0.0}),
    ("AntAngle", AntAngle, {}),
    ("AntForward", AntAngle, {"degrees": 0.0}),
):
    gymnasium.register(f"mopo_fast/{_name}-v0", _class, max_episode_steps=1000, kwargs=_options)


def make_environment(env_id: str, **options: Any) -> Any:
    """Call `gymnasium.make` without two warnings that the user can do nothing about.

    One is gymnasium's advice to take -v5: D4RL's reference scores belong to the rules of -v4. The other is
    MuJoCo's, about gymnasium's own half_cheetah.xml, which MuJoCo would write to MUJOCO_LOG.TXT in the
    working folder.

    Args:
        env_id: id of the environment.
        **options: further arguments of `gymnasium.make`, such as `render_mode`.
    """
    handler = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return gymnasium.make(env_id, **options)
    finally:
        mujoco.set_mju_user_warning(handler)
