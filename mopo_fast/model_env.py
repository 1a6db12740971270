"""The penalised model as a vector environment of gymnasium, for agents of other libraries.

    envs = ModelVectorEnv(engine, data, num_envs=64, horizon=5, seed=0)
    observations, infos = envs.reset()
    observations, rewards, terminations, truncations, infos = envs.step(actions)

Where the policy is an `Actor`, `RolloutEngine.rollout` makes all steps in one call.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from mopo_fast.backends.checked import check_range
from mopo_fast.backends.philox import BATCH_STREAM, random_choice
from mopo_fast.data.transitions import Transitions
from mopo_fast.errors import InputError
from mopo_fast.rollout import RolloutEngine
from mopo_fast.utils.arrays import to_tensor
from mopo_fast.utils.seeds import ROLLOUT, START, derive_seed

Array = npt.NDArray[Any]

# The start states of so many episodes are drawn at once, since few draws cost as much as many: of one
# environment, and of all together.
_EPISODES_AT_ONCE, _DRAWN_AT_ONCE = 64, 2**16
# Steps are numbered in 32 bits of the random numbers' counter. After as many steps the key changes.
_STEPS_OF_A_KEY = 2**32


class ModelVectorEnv(VectorEnv[Array, Array, Array]):
    """Environments whose transitions are predicted by an ensemble, all of them by one call of the kernel.

    Rewards are the engine's, less the penalty. An episode begins at a state drawn from `start_states`. It is
    terminated where the engine's rule says so, and truncated after `horizon` steps and by its `truncate_at`.
    Observations, rewards and floats of `infos` are float32 in NumPy, whatever the engine's precision and
    device.

    **A prediction that is not finite** terminates its episode. Its transition does not exist: the observation
    is the one before the step, the reward and its parts are 0, and `infos["non_finite"]` is True. An agent
    that keeps transitions should leave it out, as `RolloutEngine.rollout` does.

    **Infos** follow gymnasium's convention: an array for each name, and under the name with an underscore
    before it the mask of the environments that have it. Each step has `raw_reward`, `member` (-1 where the
    mean over all members was taken), `non_finite`, and `penalty` where the engine computes penalties. A reset
    has none.

    **Random numbers** depend on the seed and the environment's number alone, and for a start state on the
    number of its episode, for a transition on the number of the call of `step`. So the same seed and actions
    give the same trajectories for any number of environments, and the first steps after `reset(seed=...)` are
    those of `RolloutEngine.rollout` with this seed. A reset without a seed goes on with new numbers.

    **Ends of episodes** are handled as in gymnasium's `SyncVectorEnv`. With `NEXT_STEP`, the step after an
    end ignores the environment's action and returns a start state with reward 0. With `SAME_STEP`, the step
    that ends an episode returns the next start state, and `infos` has `final_obs` and `final_info`. With
    `DISABLED`, the caller resets by `reset(options={"reset_mask": mask})`, with a mask bool [num_envs].

    Actions are handed on as they are, also outside of the action space, where
    `gymnasium.wrappers.vector.ClipAction` clips them.

    Args:
        engine: engine that predicts the steps, on any device.
        start_states: finite floats [n, obs_dim], an array or a tensor; or `Transitions`, whose observations
            are taken.
        num_envs: number of environments.
        horizon: most steps of an episode.
        seed: key of the random numbers until `reset` is given another one, 0 <= seed < 2^64. None draws one.
        action_space: space of an environment's actions; None for [-1, 1], the range of `Actor`.
        autoreset_mode: gymnasium's `AutoresetMode`, or its value.
        deterministic: predict the mean over all members, without noise.
        first_row: number of the first environment for the random numbers. Objects with the same seed draw
            different numbers if no number is in both, and together what one object with all numbers draws.

    Attributes:
        engine: the engine.
        horizon: most steps of an episode.
        autoreset_mode: the mode of resets.

    Raises:
        InputError: an argument has a wrong type, shape or value.
    """

    autoreset_mode: AutoresetMode

    def __init__(
        self,
        engine: RolloutEngine,
        start_states: Any,
        *,
        num_envs: int = 1,
        horizon: int = 5,
        seed: int | None = None,
        action_space: Box | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        deterministic: bool = False,
        first_row: int = 0,
    ) -> None:
        if not isinstance(engine, RolloutEngine):
            raise InputError(f"engine must be a mopo_fast.RolloutEngine, got {type(engine).__name__}")
        if engine.member != "per_step":
            raise InputError(
                f'each step draws a member; give an engine with member="per_step", not {engine.member!r}'
            )
        check_range("num_envs", num_envs, 1, 2**31)
        check_range("horizon", horizon, 1, 2**31)
        check_range("first_row", first_row, 0, 2**62)
        if seed is not None:
            check_range("seed", seed, 0, 2**64)
        obs_dim, act_dim = engine.ensemble.obs_dim, engine.ensemble.act_dim
        self.engine, self.num_envs, self.horizon = engine, num_envs, horizon
        self.deterministic = deterministic
        self.autoreset_mode = _checked_mode(autoreset_mode)
        self.metadata = {"autoreset_mode": self.autoreset_mode, "render_modes": []}
        self.single_observation_space = Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.single_action_space = _checked_space(action_space, act_dim)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._starts = _checked_starts(start_states, obs_dim)
        self._numbers = torch.arange(first_row, first_row + num_envs)
        self._rows = self._numbers.to(engine.device)
        # Row numbers of the start states of each environment's next episodes, and how many have begun.
        at_once = max(1, min(_EPISODES_AT_ONCE, _DRAWN_AT_ONCE // num_envs))
        self._drawn = np.zeros((num_envs, at_once), np.int64)
        self._episodes = np.zeros(num_envs, np.int64)
        self._states = np.zeros((num_envs, obs_dim), np.float32)
        self._lengths = np.zeros(num_envs, np.int64)
        self._ended = np.zeros(num_envs, bool)
        self._begun = False
        self._seed_with(
            int(np.random.SeedSequence().generate_state(1, np.uint64)[0]) if seed is None else seed
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Begin new episodes in all environments, or in those of a mask.

        Args:
            seed: key of the random numbers from now on, of all environments. None goes on with the last one.
            options: {"reset_mask": bool [num_envs]} resets the environments where the mask is True.

        Returns:
            Observations [num_envs, obs_dim] of all environments, and no infos.

        Raises:
            InputError: the seed is out of range, the mask is no such array or has no True, or a seed or the
                first reset comes with a mask that leaves environments out.
        """
        mask = self._checked_mask(options)
        if not mask.all():
            if seed is not None:
                raise InputError("seed is the key of all environments; give it without a reset_mask")
            if not self._begun:
                raise InputError("the first reset must be of all environments; leave the reset_mask out")
        if seed is not None:
            check_range("seed", seed, 0, 2**64)
            self._seed_with(seed)
        self._begun = True
        self._restart(mask)
        self._ended[mask] = False
        return self._states.copy(), {}

    def step(self, actions: Any) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Make a step in every environment.

        Args:
            actions: finite floats [num_envs, act_dim].

        Returns:
            Observations [num_envs, obs_dim], rewards, terminations and truncations [num_envs], and infos, see
            the class.

        Raises:
            InputError: there was no reset yet, the actions have a wrong shape or are not finite, or an
                environment has ended and the mode is `DISABLED`.
        """
        if not self._begun:
            raise InputError("there are no states yet; call reset before the first step")
        actions = self._checked_actions(actions)
        restarted = self._ended
        some = bool(restarted.any())
        if some and self.autoreset_mode is AutoresetMode.DISABLED:
            numbers = np.flatnonzero(restarted)
            raise InputError(
                f"{len(numbers)} environments have ended, the first is number {numbers[0]}; reset them by"
                ' reset(options={"reset_mask": mask})'
            )
        results = self._predict_live(actions, ~restarted) if some else self._predict(actions)
        self._states = results.pop("observations", self._states)
        rewards = results.pop("rewards", None)
        terminations = results.pop("terminals", None)
        if rewards is None or terminations is None:
            rewards, terminations = np.zeros(self.num_envs, np.float32), np.zeros(self.num_envs, bool)
        self._lengths += 1
        if some:
            self._restart(restarted)
        truncations = self._lengths >= self.horizon
        if (above := results.pop("truncated", None)) is not None:
            truncations |= above
        ended = terminations | truncations
        if self.autoreset_mode is AutoresetMode.SAME_STEP and ended.any():
            infos = self._final_infos(results, ended)
            self._restart(ended)
        else:
            infos = _with_masks(results, ~restarted)
            self._ended = ended
        self._steps += 1
        return self._states.copy(), rewards, terminations, truncations, infos

    def __repr__(self) -> str:
        return (
            f"ModelVectorEnv({self.engine!r}, num_envs={self.num_envs}, horizon={self.horizon},"
            f" autoreset_mode={self.autoreset_mode})"
        )

    def _seed_with(self, seed: int) -> None:
        super().reset(seed=seed)
        self._seed = seed
        # Both are counted from the seed on, through all resets.
        self._steps, self._episodes[:] = 0, 0

    def _predict(self, actions: Array, live: Array | None = None) -> dict[str, Array]:
        """Predict a step, of the environments with the numbers `live` or of all; return arrays by name."""
        states, rows = self._states, self._rows
        if live is not None:
            states, actions = states[live], actions[live]
            rows = self._numbers[torch.from_numpy(live)].to(self.engine.device)
        era, step = divmod(self._steps, _STEPS_OF_A_KEY)
        result = self.engine.step(
            torch.from_numpy(states).to(self.engine.device),
            torch.from_numpy(actions).to(self.engine.device),
            seed=derive_seed(self._seed, ROLLOUT, era) if era else self._seed,
            step=step,
            rows=rows,
            deterministic=self.deterministic,
        )
        arrays = {
            "observations": _floats(result.next_observations),
            "rewards": _floats(result.rewards),
            "terminals": result.terminals.cpu().numpy(),
            "raw_reward": _floats(result.raw_rewards),
            "member": result.members.cpu().numpy(),
        }
        if result.penalties is not None:
            arrays["penalty"] = _floats(result.penalties)
        if result.truncations is not None:
            arrays["truncated"] = result.truncations.cpu().numpy()
        floats = [arrays[name] for name in ("rewards", "raw_reward", "penalty") if name in arrays]
        finite = np.isfinite(arrays["observations"]).all(axis=1)
        for values in floats:
            finite &= np.isfinite(values)
        broken = np.logical_not(finite)
        arrays["non_finite"] = broken
        if broken.any():
            arrays["observations"][broken] = states[broken]
            for values in floats:
                values[broken] = 0.0
            arrays["terminals"][broken] = True
        return arrays

    def _predict_live(self, actions: Array, mask: Array) -> dict[str, Array]:
        """Predict a step of the environments of a mask, with values of 0 in the others.

        There are no arrays where the mask has no environment.
        """
        live = np.flatnonzero(mask)
        if len(live) == 0:
            return {}
        whole = {}
        for name, values in self._predict(actions, live).items():
            whole[name] = np.zeros((self.num_envs, *values.shape[1:]), values.dtype)
            whole[name][live] = values
        return whole

    def _final_infos(self, results: dict[str, Array], ended: Array) -> dict[str, Any]:
        """Return the infos of a step after which the `ended` environments begin again at once."""
        final = np.full(self.num_envs, None, dtype=object)
        for i in np.flatnonzero(ended):
            final[i] = self._states[i].copy()
        # Each environment's infos are those of the step that ended it, or at the top if it goes on.
        at_end = {name: np.where(ended, values, values.dtype.type(0)) for name, values in results.items()}
        infos: dict[str, Any] = {"final_obs": final, "_final_obs": ended.copy()}
        infos |= {"final_info": _with_masks(at_end, ended), "_final_info": ended.copy()}
        if not ended.all():
            goes_on = {
                name: np.where(ended, values.dtype.type(0), values) for name, values in results.items()
            }
            infos |= _with_masks(goes_on, ~ended)
        return infos

    def _restart(self, mask: Array) -> None:
        """Begin an episode in each of the environments of a mask, at a start state that is drawn."""
        rows = np.flatnonzero(mask)
        column = self._episodes[rows] % self._drawn.shape[1]
        if len(used_up := rows[column == 0]):
            at_once = self._drawn.shape[1]
            episodes = torch.from_numpy(self._episodes[used_up])[:, None] + torch.arange(at_once)
            drawn = random_choice(
                self._numbers[torch.from_numpy(used_up)].repeat_interleave(at_once),
                # A counter has 32 bits. After as many episodes the start states come again, with other noise.
                episodes.flatten() % 2**32,
                BATCH_STREAM,
                len(self._starts),
                derive_seed(self._seed, START),
            )
            self._drawn[used_up] = drawn.view(-1, at_once).numpy()
        self._states[rows] = self._starts[self._drawn[rows, column]]
        self._lengths[rows] = 0
        self._episodes[rows] += 1

    def _checked_actions(self, given: Any) -> Array:
        try:
            # Numbers beyond float32 become infinite, which is refused below.
            with np.errstate(over="ignore"):
                actions = np.require(given, np.float32, ["C", "W"])
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"actions cannot be read as an array of floats: {error}") from error
        if actions.shape != self.action_space.shape:
            expected, got = list(self.action_space.shape or ()), list(actions.shape)
            raise InputError(f"actions must be [num_envs, act_dim] = {expected}, got shape {got}")
        finite = np.isfinite(actions)
        if not finite.all():
            row = int(np.flatnonzero(~finite.all(axis=1))[0])
            raise InputError(f"the action of environment {row} is not finite: {actions[row].tolist()}")
        return actions

    def _checked_mask(self, options: dict[str, Any] | None) -> Array:
        if options is not None and not isinstance(options, dict):
            raise InputError(f"options must be a dictionary, got {type(options).__name__}")
        if unknown := sorted(map(str, (options or {}).keys() - {"reset_mask"})):
            raise InputError(f"unknown option {unknown[0]!r}; there is: reset_mask")
        if not options:
            return np.ones(self.num_envs, bool)
        mask = options["reset_mask"]
        if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape != (self.num_envs,):
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, np.ndarray) else type(mask).__name__
            raise InputError(f"reset_mask must be a NumPy array, bool [{self.num_envs}], got {got}")
        if not mask.any():
            raise InputError("reset_mask has no True; leave the call of reset out")
        return mask


def _floats(tensor: torch.Tensor) -> Array:
    """Return a tensor as an array in float32, where a number beyond its range is infinite."""
    return tensor.to("cpu", torch.float32).numpy()


def _with_masks(values: dict[str, Array], mask: Array) -> dict[str, Any]:
    infos: dict[str, Any] = {}
    for name, array in values.items():
        infos[name], infos[f"_{name}"] = array, mask.copy()
    return infos


def _checked_mode(mode: AutoresetMode | str) -> AutoresetMode:
    try:
        return AutoresetMode(mode)
    except ValueError:
        known = ", ".join(one.value for one in AutoresetMode)
        raise InputError(f"unknown autoreset_mode {mode!r}; there are: {known}") from None


def _checked_space(space: Box | None, act_dim: int) -> Box:
    if space is None:
        return Box(-1.0, 1.0, (act_dim,), np.float32)
    if not isinstance(space, Box) or space.shape != (act_dim,):
        raise InputError(f"action_space must be a gymnasium.spaces.Box of shape ({act_dim},), got {space!r}")
    return space


def _checked_starts(given: Any, obs_dim: int) -> Array:
    states = given.observations if isinstance(given, Transitions) else given
    tensor = to_tensor("start_states", states, torch.device("cpu")).detach()
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        raise InputError(f"start_states must be dense floats, got {tensor.dtype} of layout {tensor.layout}")
    if tensor.ndim != 2 or tensor.shape[1] != obs_dim:
        raise InputError(f"start_states must be [n, {obs_dim}], got shape {list(tensor.shape)}")
    if len(tensor) == 0:
        raise InputError("start_states has no rows")
    starts = _floats(tensor)
    finite = np.isfinite(starts).all(axis=1)
    if not finite.all():
        raise InputError(f"start_states is not finite in float32 at row {int(np.flatnonzero(~finite)[0])}")
    return starts
