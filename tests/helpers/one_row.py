"""One environment of a ModelVectorEnv, for what takes single environments."""

from typing import Any

import gymnasium

from mopo_fast.model_env import ModelVectorEnv


class OneRow(gymnasium.Env):
    """A single environment of gymnasium around a ModelVectorEnv of one, with the mode DISABLED."""

    def __init__(self, envs: ModelVectorEnv) -> None:
        self.envs = envs
        self.observation_space = envs.single_observation_space
        self.action_space = envs.single_action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        observations, _ = self.envs.reset(seed=seed)
        return observations[0], {}

    def step(self, action: Any) -> Any:
        *arrays, infos = self.envs.step(action[None])
        observation, reward, terminated, truncated = (array[0] for array in arrays)
        info = {name: values[0] for name, values in infos.items() if not name.startswith("_")}
        # Gymnasium puts a bool of NumPy into an array of objects.
        info["non_finite"] = bool(info["non_finite"])
        return observation, float(reward), bool(terminated), bool(truncated), info
