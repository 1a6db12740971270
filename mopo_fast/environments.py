"""MuJoCo environments."""

import warnings
from typing import Any

import gymnasium
import mujoco


def make_environment(env_id: str) -> Any:
    """`gymnasium.make`, without two complaints that are not the user's to mend.

    -v4 is meant (its rules are those that D4RL's reference scores belong to), so gymnasium's advice to take
    -v5 is not passed on; nor is what MuJoCo finds fault with in gymnasium's own half_cheetah.xml, which would
    be written to a MUJOCO_LOG.TXT in the working folder.
    """
    handler = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return gymnasium.make(env_id)
    finally:
        mujoco.set_mju_user_warning(handler)
