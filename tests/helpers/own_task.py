"""Task of docs/own-data.md: push a cart on a rail to the middle. The episode ends beyond |x| = 1."""

import gymnasium
import numpy as np

from mopo_fast import Task
from mopo_fast.tasks import make_box


class Cart(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-0.5, 0.5, 2).astype(np.float32)
        return self.state, {}

    def step(self, action):
        x, v = self.state
        v = v + 0.1 * float(action[0])
        self.state = np.array([x + 0.1 * v, v], np.float32)
        return self.state, 1.0 - float(self.state[0]) ** 2, bool(abs(self.state[0]) > 1), False, {}


gymnasium.register("Cart-v0", Cart, max_episode_steps=50)
task = Task("cart", "Cart-v0", obs_dim=2, act_dim=1, box=make_box(2, {0: (-1.0, 1.0)}))
