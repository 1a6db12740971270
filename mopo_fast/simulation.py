"""Episodes of one environment, stepped together.

The MuJoCo environments of the built-in tasks are simulated in bulk: `mujoco.batch` steps all of them in one
call, and NumPy computes observations, rewards and ends of all episodes at once. Any other environment is
stepped by gymnasium, one episode after the other, and so is every environment before MuJoCo 4, which brought
`mujoco.batch`. Both give the same bits.

`mujoco.rollout` would not: it returns no `qacc_warmstart`, the solver's start of the next step. Called step
by step it drifts away from gymnasium's results.
"""

import functools
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mujoco
import numpy as np
import numpy.typing as npt
from gymnasium.envs.mujoco.humanoid_v4 import mass_center

from mopo_fast.environments import AntAngle, HalfCheetahJump, make_environment

try:
    from mujoco.batch import Batch
except ImportError:
    Batch = None

logger = logging.getLogger("mopo_fast")

Array = npt.NDArray[Any]
State = dict[str, Array]
"""Arrays of `mujoco.MjData` by name, [..., size] each, of any number of states."""


class Rules(ABC):
    """Turns simulated states into observations, rewards and ends, for many states at once.

    Attributes:
        reads: names of the arrays of `mujoco.MjData` that the rules need beside qpos and qvel.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def observe(self, state: State) -> Array:
        """Return the observations [..., obs_dim] of states."""

    @abstractmethod
    def healthy(self, state: State) -> Array:
        """Tell in which states the episode goes on, as bool [...]."""

    @abstractmethod
    def velocity(self, before: State, after: State, seconds: float) -> Array:
        """Return the mean velocity [..., 1 or 2] along x, and y where there is one, over `seconds`."""

    @abstractmethod
    def reward(self, velocity: Array, after: State, actions: Array) -> Array:
        """Return the rewards [...] of steps with these actions [..., act_dim] that ended in `after`."""


_UNBOUNDED = (-np.inf, np.inf)


def _between(values: Array, bounds: tuple[float, float]) -> Array:
    return np.asarray((bounds[0] < values) & (values < bounds[1]))


def _control_cost(weight: float, actions: Array) -> Any:
    # gymnasium computes the cost of a float32 action in float32.
    return weight * np.square(actions).sum(axis=-1)


@dataclass(frozen=True)
class Runner(Rules):
    """The rules of halfcheetah, hopper and walker2d.

    Source: gymnasium, envs/mujoco/*_v4.py.

    Attributes:
        ctrl_cost: weight of the squared action in the reward.
        healthy_reward: reward for each step.
        max_velocity: limit to which observed velocities are clipped, in both directions.
        height: open interval of qpos[1], outside which the episode ends.
        angle: open interval of qpos[2], outside which the episode ends.
        others: open interval of every element of qpos[2:] and qvel, outside which the episode ends.
    """

    ctrl_cost: float
    healthy_reward: float = 0.0
    max_velocity: float = np.inf
    height: tuple[float, float] = _UNBOUNDED
    angle: tuple[float, float] = _UNBOUNDED
    others: tuple[float, float] = _UNBOUNDED

    def observe(self, state: State) -> Array:
        """Return all but the position along the track; velocities are clipped."""
        velocities = state["qvel"]
        if self.max_velocity < np.inf:
            velocities = np.clip(velocities, -self.max_velocity, self.max_velocity)
        return np.concatenate([state["qpos"][..., 1:], velocities], axis=-1)

    def healthy(self, state: State) -> Array:
        """Compare height, angle and the other numbers of the state with their intervals."""
        positions = state["qpos"]
        inside = np.ones(positions.shape[:-1], dtype=bool)
        for values, bounds in (
            (positions[..., 1:2], self.height),
            (positions[..., 2:3], self.angle),
            (positions[..., 2:], self.others),
            (state["qvel"], self.others),
        ):
            # Without a rule everything passes, even NaN, as in gymnasium.
            if bounds != _UNBOUNDED:
                inside &= _between(values, bounds).all(axis=-1)
        return inside

    def velocity(self, before: State, after: State, seconds: float) -> Array:
        """Return the velocity of the root along the track."""
        return np.asarray((after["qpos"][..., :1] - before["qpos"][..., :1]) / seconds)

    def reward(self, velocity: Array, after: State, actions: Array) -> Array:
        """Return the velocity and the reward of a healthy state, less the cost of the controls."""
        reward = velocity[..., 0] + self.healthy_reward - _control_cost(self.ctrl_cost, actions)
        return np.asarray(reward)


HALFCHEETAH = Runner(ctrl_cost=0.1)
HOPPER = Runner(1e-3, 1.0, 10.0, (0.7, np.inf), (-0.2, 0.2), (-100.0, 100.0))
WALKER2D = Runner(1e-3, 1.0, 10.0, (0.8, 2.0), (-1.0, 1.0))


@dataclass(frozen=True)
class Jumper(Runner):
    """The rules of `environments.HalfCheetahJump`.

    Attributes:
        jump_weight: weight of the height in the reward.
        torso: height of the torso where qpos[1] is 0, in metres.
    """

    jump_weight: float = 0.0
    torso: float = 0.0

    def observe(self, state: State) -> Array:
        """Return halfcheetah's observation with the torso's height between positions and velocities."""
        positions = state["qpos"]
        height = self.torso + positions[..., 1:2]
        return np.concatenate([positions[..., 1:], height, state["qvel"]], axis=-1)

    def reward(self, velocity: Array, after: State, actions: Array) -> Array:
        """Return min(v_x, 3), less the cost of the controls, plus the weighted height."""
        speed, cost = velocity[..., 0], _control_cost(self.ctrl_cost, actions)
        # The environment subtracts a float32 cost from the Python number 3 in float32.
        run = np.where(speed > 3.0, 3.0 - cost, speed - cost)
        return np.asarray(run + self.jump_weight * after["qpos"][..., 1])


class AntRules(Rules):
    """The rules of gymnasium's Ant-v4."""

    reads: ClassVar[tuple[str, ...]] = ("xpos",)

    def observe(self, state: State) -> Array:
        """Return all but the position in the plane."""
        return np.concatenate([state["qpos"][..., 2:], state["qvel"]], axis=-1)

    def healthy(self, state: State) -> Array:
        """Require a finite state and a height in [0.2, 1]."""
        positions = state["qpos"]
        finite = np.isfinite(positions).all(axis=-1) & np.isfinite(state["qvel"]).all(axis=-1)
        return np.asarray(finite & (positions[..., 2] >= 0.2) & (positions[..., 2] <= 1.0))

    def velocity(self, before: State, after: State, seconds: float) -> Array:
        """Return the velocity of the torso, body 1, in the plane."""
        # xpos lags behind qpos by a physics step.
        return np.asarray((after["xpos"][..., 1, :2] - before["xpos"][..., 1, :2]) / seconds)

    def reward(self, velocity: Array, after: State, actions: Array) -> Array:
        """Return v_x + 1, less the cost of the controls."""
        return np.asarray(velocity[..., 0] + 1.0 - _control_cost(0.5, actions))


@dataclass(frozen=True)
class AntAngleRules(AntRules):
    """The rules of `environments.AntAngle`.

    Attributes:
        direction: angle between the rewarded direction and the x axis, in radians.
    """

    reads: ClassVar[tuple[str, ...]] = ("xpos", "cfrc_ext")
    direction: float

    def reward(self, velocity: Array, after: State, actions: Array) -> Array:
        """Return the speed in the direction + 1, less the costs of controls and contacts."""
        x, y = velocity[..., 0], velocity[..., 1]
        speed = x * math.cos(self.direction) + y * math.sin(self.direction)
        forces = np.clip(after["cfrc_ext"], -1.0, 1.0)
        contact_cost = 5e-4 * np.square(forces).reshape(*forces.shape[:-2], -1).sum(axis=-1)
        return np.asarray(speed - _control_cost(0.5, actions) + 1.0 - contact_cost)


@dataclass(frozen=True)
class HumanoidRules(Rules):
    """The rules of gymnasium's Humanoid-v4.

    Attributes:
        model: model whose bodies' masses weigh the centre of mass.
    """

    reads: ClassVar[tuple[str, ...]] = ("cinert", "cvel", "qfrc_actuator", "cfrc_ext", "xipos", "ctrl")
    model: Any

    def observe(self, state: State) -> Array:
        """Return all but the position in the plane, with inertia, velocities and forces of the bodies."""
        positions = state["qpos"]
        parts = [state[name] for name in ("qvel", "cinert", "cvel", "qfrc_actuator", "cfrc_ext")]
        shape = (*positions.shape[:-1], -1)
        return np.concatenate([positions[..., 2:], *(part.reshape(shape) for part in parts)], axis=-1)

    def healthy(self, state: State) -> Array:
        """Require a height between 1 and 2."""
        return _between(state["qpos"][..., 2], (1.0, 2.0))

    def velocity(self, before: State, after: State, seconds: float) -> Array:
        """Return the velocity of the centre of mass in the plane."""
        return (self._centres(after) - self._centres(before)) / seconds

    def _centres(self, state: State) -> Array:
        bodies = state["xipos"]
        flat = bodies.reshape(-1, *bodies.shape[-2:])
        centres = [mass_center(self.model, _Bodies(one)) for one in flat]
        return np.stack(centres).reshape(*bodies.shape[:-2], 2)

    def reward(self, velocity: Array, after: State, actions: Array) -> Array:
        """Return 1.25 v_x + 5, less the cost of the controls."""
        return np.asarray(1.25 * velocity[..., 0] + 5.0 - _control_cost(0.1, after["ctrl"]))


@dataclass
class _Bodies:
    xipos: Array


# Rules by the environment's entry point in gymnasium's registry.
_RULES: dict[Any, Callable[[Any], Rules]] = {
    "gymnasium.envs.mujoco.half_cheetah_v4:HalfCheetahEnv": lambda env: HALFCHEETAH,
    "gymnasium.envs.mujoco.hopper_v4:HopperEnv": lambda env: HOPPER,
    "gymnasium.envs.mujoco.walker2d_v4:Walker2dEnv": lambda env: WALKER2D,
    "gymnasium.envs.mujoco.ant_v4:AntEnv": lambda env: AntRules(),
    "gymnasium.envs.mujoco.humanoid_v4:HumanoidEnv": lambda env: HumanoidRules(env.model),
    HalfCheetahJump: lambda env: Jumper(
        ctrl_cost=0.1, jump_weight=env.jump_weight, torso=env.model.body("torso").pos[2]
    ),
    AntAngle: lambda env: AntAngleRules(env.direction),
}
# Arguments of the environments' constructors that the rules take from the environment.
_OPTIONS = {"jump_weight", "degrees"}


def rules_of(environment: Any) -> Rules | None:
    """Return the rules of an environment from `gymnasium.make`, or None where only gymnasium knows them."""
    spec = environment.spec
    make = _RULES.get(spec.entry_point)
    if make is None or spec.additional_wrappers or not spec.kwargs.keys() <= _OPTIONS:
        return None
    return make(environment.unwrapped)


@dataclass(frozen=True)
class Step:
    """One step of some episodes. Rows of the others have no meaning, but keep their observations.

    Attributes:
        observations: [count, obs_dim] after the step.
        rewards: [count] float64.
        terminated: bool [count], True where the environment ended the episode.
        truncated: bool [count], True where the time limit did.
        info: numbers of gymnasium's `info`, [count] each, by the names that were asked for.
    """

    observations: Array
    rewards: Array
    terminated: Array
    truncated: Array
    info: dict[str, Array]


class Episodes(ABC):
    """A number of episodes of one environment; a context manager.

    Attributes:
        environment: an environment from `gymnasium.make`, for its spaces, `dt` and other properties.
    """

    environment: Any

    @abstractmethod
    def physics(self, name: str) -> Array:
        """Return an array of `mujoco.MjData`'s state, such as qpos or time, of every episode [count, ...].

        It is a copy. Only MuJoCo environments have it.
        """

    @abstractmethod
    def reset(self, i: int, seed: int) -> Array:
        """Begin episode `i` anew, and return its observation [obs_dim]."""

    @abstractmethod
    def step(self, actions: Array, rows: Sequence[int] | Array) -> Step:
        """Step the episodes `rows` by `actions` [count, act_dim], in the environment's range."""

    def close(self) -> None:
        """Release the environment."""
        self.environment.close()

    def __enter__(self) -> "Episodes":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class GymnasiumEpisodes(Episodes):
    """Episodes of any environment, a gymnasium environment for each.

    Args:
        environment: environment of the first episode.
        env_id: id of the environment.
        count: number of episodes.
        info: names of numbers of gymnasium's `info` that steps report.

    Attributes:
        environments: the environment of each episode.
    """

    def __init__(self, environment: Any, env_id: str, count: int, info: Sequence[str] = ()) -> None:
        self.environment = environment
        self.environments = [environment]
        self._names = info
        self._observations: Array | None = None
        try:
            while len(self.environments) < count:
                self.environments.append(make_environment(env_id))
        except BaseException:
            self.close()
            raise

    def physics(self, name: str) -> Array:
        """Return an array of `mujoco.MjData` of every episode [count, ...]."""
        return np.stack([getattr(environment.unwrapped.data, name) for environment in self.environments])

    def reset(self, i: int, seed: int) -> Array:
        """Begin episode `i` anew, and return its observation [obs_dim]."""
        observation = np.asarray(self.environments[i].reset(seed=seed)[0])
        if self._observations is None:
            self._observations = np.zeros((len(self.environments), *observation.shape), observation.dtype)
        self._observations[i] = observation
        return observation

    def step(self, actions: Array, rows: Sequence[int] | Array) -> Step:
        """Step the episodes `rows` by `actions` [count, act_dim], in the environment's range."""
        assert self._observations is not None
        observations, count = self._observations, len(self.environments)
        rewards, terminated, truncated = np.zeros(count), np.zeros(count, bool), np.zeros(count, bool)
        info = {name: np.zeros(count) for name in self._names}
        for i in rows:
            observations[i], reward, fell, late, numbers = self.environments[i].step(actions[i])
            rewards[i], terminated[i], truncated[i] = float(reward), bool(fell), bool(late)
            for name, values in info.items():
                values[i] = numbers[name]
        return Step(observations.copy(), rewards, terminated, truncated, info)

    def close(self) -> None:
        """Release the environments."""
        for environment in self.environments:
            environment.close()


class MujocoEpisodes(Episodes):
    """Episodes of a MuJoCo environment, simulated in bulk.

    Args:
        environment: the environment, which only draws the initial states.
        rules: rules of the environment.
        count: number of episodes.
        threads: number of threads that simulate, the caller's included.
        info: some of "x_velocity" and "y_velocity", which steps report.
    """

    def __init__(
        self, environment: Any, rules: Rules, count: int, threads: int, info: Sequence[str] = ()
    ) -> None:
        inner = environment.unwrapped
        self.environment, self._rules, self._info = environment, rules, info
        self._model, self._skip, self._seconds = inner.model, inner.frame_skip, inner.dt
        self._limit = environment.spec.max_episode_steps or np.inf
        self._steps = np.zeros(count, dtype=np.int64)
        # Persistent, since other data lack what `mj_rnePostConstraint` reads.
        self._batch = Batch(self._model, count, threads, persistent=True)
        self._controls = self._batch.bind("ctrl")
        # MuJoCo computes contact forces on request.
        self._forces = mujoco.MjData(self._model) if "cfrc_ext" in rules.reads else None
        self._state: State = {
            name: np.stack([getattr(inner.data, name)] * count) for name in ("qpos", "qvel", *rules.reads)
        }
        self._bound = {name: self._batch.bind(name) for name in self._state if name != "cfrc_ext"}

    def physics(self, name: str) -> Array:
        """Return an array of `mujoco.MjData`'s state of every episode [count, ...]."""
        return np.array(self._batch.bind(name))

    def reset(self, i: int, seed: int) -> Array:
        """Begin episode `i` anew, and return its observation [obs_dim]."""
        observation: Array = self.environment.reset(seed=seed)[0]
        data = self.environment.unwrapped.data
        mujoco.mj_getState(self._model, data, self._batch.state[i], mujoco.mjtState.mjSTATE_INTEGRATION)
        for name, array in self._state.items():
            array[i] = getattr(data, name)
        self._steps[i] = 0
        return observation

    def step(self, actions: Array, rows: Sequence[int] | Array) -> Step:
        """Step the episodes `rows` by `actions` [count, act_dim], in the environment's range."""
        # MuJoCo takes numbers in ascending order only.
        rows = np.sort(np.asarray(rows, dtype=np.int64))
        before = {name: array.copy() for name, array in self._state.items()}
        self._controls[rows] = actions[rows]
        self._batch.step(rows, self._skip)
        for name, array in self._bound.items():
            self._state[name][rows] = array[rows]
        if self._forces is not None:
            for i in rows:
                self._batch.get_data(i, self._forces)
                mujoco.mj_rnePostConstraint(self._model, self._forces)
                self._state["cfrc_ext"][i] = self._forces.cfrc_ext
        self._steps[rows] += 1
        rules, after = self._rules, self._state
        velocity = rules.velocity(before, after, self._seconds)
        return Step(
            rules.observe(after),
            rules.reward(velocity, after, actions),
            ~rules.healthy(after),
            self._steps >= self._limit,
            {name: velocity[:, ("x_velocity", "y_velocity").index(name)] for name in self._info},
        )

    def close(self) -> None:
        """End the threads, and release the environment."""
        # MuJoCo ends them with the last array that shares its memory.
        self._bound, self._controls, self._batch = {}, None, None
        super().close()


def make_episodes(env_id: str, count: int, threads: int, info: Sequence[str] = ()) -> Episodes:
    """Make episodes of an environment, simulated in bulk where its rules are known.

    Args:
        env_id: id of the environment.
        count: number of episodes.
        threads: number of threads that simulate in bulk. The results do not depend on it.
        info: names of numbers of gymnasium's `info` that steps report.

    Raises:
        gymnasium.error.Error: gymnasium cannot make the environment.
        ImportError: one of its packages is missing.
    """
    environment = make_environment(env_id)
    rules = rules_of(environment)
    if rules is not None and Batch is None:
        _say_one_by_one(mujoco.__version__)
        rules = None
    if rules is None:
        return GymnasiumEpisodes(environment, env_id, count, info)
    return MujocoEpisodes(environment, rules, count, threads, info)


@functools.cache
def _say_one_by_one(version: str) -> None:
    logger.info("MuJoCo %s steps one episode after the other; MuJoCo 4 steps them side by side", version)
