"""Adapter for Stable-Baselines3: its `VecEnv` around a vector environment of gymnasium.

    from mopo_fast.compat.stable_baselines3 import GymnasiumVecEnv
    envs = ModelVectorEnv(engine, data, num_envs=64, autoreset_mode="SameStep")
    SAC("MlpPolicy", GymnasiumVecEnv(envs)).learn(100_000)

Stable-Baselines3 takes subclasses of its own `VecEnv` alone, and has none around gymnasium's environments.

Source: stable_baselines3 2.9.2, common/vec_env/base_vec_env.py and dummy_vec_env.py.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers.vector import DictInfoToList

from mopo_fast.errors import InputError

try:
    from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices
except ImportError as error:
    raise ImportError(
        f"stable_baselines3 cannot be imported ({error}); install it with `pip install '.[agents]'` in the"
        " checkout"
    ) from error

Array = npt.NDArray[Any]


class GymnasiumVecEnv(VecEnv):
    """Stable-Baselines3's `VecEnv` around a vector environment of gymnasium, such as `ModelVectorEnv`.

    Each environment's info has what gymnasium's has, `TimeLimit.truncated`, and at the end of an episode
    `terminal_observation`, as in Stable-Baselines3's `DummyVecEnv`. Wrapped in its `VecMonitor`, agents log
    returns.

    Args:
        envs: a vector environment with the autoreset mode SAME_STEP, since Stable-Baselines3 expects the next
            episode's first observation from the step that ends an episode.

    Attributes:
        envs: the vector environment.

    Raises:
        InputError: `envs` is no vector environment, or has another autoreset mode.
    """

    def __init__(self, envs: VectorEnv[Any, Any, Any]) -> None:
        if not isinstance(envs, VectorEnv):
            raise InputError(f"envs must be a gymnasium.vector.VectorEnv, got {type(envs).__name__}")
        mode = envs.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.SAME_STEP:
            raise InputError(
                f"Stable-Baselines3 needs environments with autoreset_mode SAME_STEP, got {mode}"
            )
        self.envs = envs
        self._listed = DictInfoToList(envs)
        self._actions: Array | None = None
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> Array:
        """Begin new episodes, with the seed of `seed` where it was called since the last reset.

        Returns:
            Observations [num_envs, ...].
        """
        observations, self.reset_infos = self._listed.reset(
            seed=self._seeds[0], options=self._options[0] or None
        )
        self._reset_seeds()
        self._reset_options()
        return np.asarray(observations)

    def step_async(self, actions: Array) -> None:
        """Keep the actions [num_envs, ...] for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[Array, Array, Array, list[dict[str, Any]]]:
        """Make the step whose actions were given to `step_async`.

        Returns:
            Observations, rewards, dones and a list of infos. Where an episode has ended, the observation is
            the next one's first.
        """
        observations, rewards, terminations, truncations, infos = self._listed.step(self._actions)
        listed: list[dict[str, Any]] = infos
        dones = terminations | truncations
        for info, cut in zip(listed, (truncations & ~terminations).tolist(), strict=True):
            info["TimeLimit.truncated"] = cut
        for i in np.flatnonzero(dones):
            last = listed[i]
            last |= {**last.pop("final_info"), "terminal_observation": last.pop("final_obs")}
        return np.asarray(observations), np.asarray(rewards, np.float32), dones, listed

    def close(self) -> None:
        """Close the vector environment."""
        self.envs.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute of the vector environment, once for each of the environments `indices`."""
        value = getattr(self.envs, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Raise `InputError`: the environments are one object."""
        raise InputError(f"there are no single environments; set {attr_name} of the attribute envs")

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Raise `InputError`: the environments are one object."""
        raise InputError(f"there are no single environments; call {method_name} of the attribute envs")

    def env_is_wrapped(self, wrapper_class: type[Any], indices: VecEnvIndices = None) -> list[bool]:
        """Return False for each of the environments `indices`, since none can have a wrapper of its own."""
        return [False for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[Array | None]:
        """Return None for each environment: there are no pictures."""
        return [None for _ in range(self.num_envs)]
