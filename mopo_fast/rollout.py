"""Penalised model rollouts: check the arguments, choose a backend, call it.

`RolloutEngine.step` makes one step with the caller's actions. `RolloutEngine.rollout` makes `horizon` steps
with a policy. Random numbers depend on (seed, row, step) alone, so a rollout equals the calls of `step` that
it is made of, and a batch may be split in any way.
"""

import copy
import dataclasses
import functools
import logging
import operator
import os
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar, cast

import numpy as np
import torch

from mopo_fast.backends import checked
from mopo_fast.backends.choose import choose, get_backend
from mopo_fast.backends.interface import (
    A,
    Backend,
    Destination,
    DynamicsArrays,
    Need,
    PolicyArrays,
    RolloutCall,
    RolloutCounts,
    Settings,
    StepCall,
    StepResult,
    Truncation,
    ValuesCall,
    network_sizes,
)
from mopo_fast.backends.philox import ACTION_STREAM, BATCH_STREAM, random_choice, random_uniforms
from mopo_fast.backends.reference import above_limit, act, halt, rollout_by_steps
from mopo_fast.buffer import RingBuffer
from mopo_fast.clone import clone_policy
from mopo_fast.config import (
    LARGEST_FLOAT32,
    MEMBER_DRAWS,
    PENALTIES,
    ROLLOUT_DTYPES,
    MemberDraw,
    Penalty,
    PenaltyMembers,
)
from mopo_fast.data import load_dataset
from mopo_fast.data.transitions import ROLLOUT_ARRAYS, Transitions, array_layout, transition_bytes
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor, Critic, Policy
from mopo_fast.tasks import BOXES, TASKS, Box, Task, TerminationFunction, make_box
from mopo_fast.utils.arrays import maker_like, map_tensors, to_tensor
from mopo_fast.utils.machine import check_memory, resolve_threads
from mopo_fast.utils.seeds import START, derive_seed

logger = logging.getLogger("mopo_fast")

# Rows of the data whose penalties are computed at a time.
_DATA_ROWS = 50_000
# Most row numbers that an engine keeps for the next call.
_KEPT_NUMBERS = 1024

PenaltyFunction = Callable[[Any, Any], Any]
"""Returns penalties [batch] from means and standard deviations [members, batch, obs_dim + 1]."""
RewardFunction = Callable[[Any, Any, Any], Any]
"""Returns rewards [batch] from observations, actions and next observations."""

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _untraced(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Keep torch.compile out of a function, since its graphs cannot hold the addresses that kernels take."""

    @functools.wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        # `torch.compiler.disable` imports the compiler, which takes seconds, so it is called only if needed.
        called = torch.compiler.disable(function) if torch.compiler.is_compiling() else function
        return called(*args, **kwargs)

    return call


@dataclasses.dataclass(frozen=True, eq=False)
class _Kept:
    """An ensemble's arrays, and what tells whether it has changed since they were read.

    Attributes:
        options: settings that the arrays depend on.
        stamps: (address, version, shape, strides) of each source.
        sources: the ensemble's tensors.
        held: aliases of them, so that no other memory can have their addresses.
        arrays: the arrays.
    """

    options: tuple[Any, ...]
    stamps: list[tuple[Any, ...]]
    sources: tuple[torch.Tensor, ...]
    held: list[torch.Tensor]
    arrays: DynamicsArrays


class RolloutEngine:
    """Rolls out a policy in an ensemble and penalises every reward by the model's uncertainty.

    A penalty takes the predictions of all members, a reward only those of the member that was drawn. So
    without penalties a member computes only the rows that have drawn it, and a step takes a fraction of the
    time. All other numbers are the same to the bit. `deterministic` and `distributions` take all members in
    any case.

    Args:
        ensemble: the dynamics. It may change between calls: PyTorch's in-place operations, this package's
            training, `load_state_dict`, `to`, and another tensor in place of a parameter are all noticed.
            Writes that PyTorch does not count, through `.data`, a NumPy view, another process or a fused
            optimiser of `torch.optim`, may go unnoticed: call `refresh` after them.
        penalty: the uncertainty u(s, a), one of `mopo_fast.config.PENALTIES`, or a function (means, stds) ->
            floats [batch] of the `penalty_members`' predictions of (delta obs, reward), each [members, batch,
            obs_dim + 1].
        penalty_coef: lambda >= 0. Rewards are raw_rewards - penalty_coef * penalties.
        termination: the name of a rule in `mopo_fast.tasks.BOXES` or of a task in `mopo_fast.tasks.TASKS`, a
            `Task`, a `Box`, None (no state is terminal), or a function (observations, actions,
            next_observations) -> bool [batch].
        reward: a function (observations, actions, next_observations) -> floats [batch], whose rewards take
            the place of the model's. Functions are called after every step: by `step` with arrays of the
            caller's kind, by `rollout` with tensors. The kernels then compute the ensemble one step at a
            time.
        backend: "auto", or a name that `mopo-fast doctor` lists.
        dtype: "float32" or "float64" for all arrays and arithmetic. "bfloat16", "bfloat16x3", "float16" and
            "tfloat32" round the factors of the networks' products, and keep all else in float32; they are
            fast on processors that multiply such numbers. In "bfloat16x3" a factor is the sum of two numbers
            in bfloat16.
        threads: threads of the CPU kernel; None takes all cores that this process may use.
        penalty_members: members that the penalty is computed from, "all" (authors) or "elites" (Unifloral).
        penalties: return the penalties. None returns them where `penalty_coef` is not 0 or `truncate_at` is
            given, and where the buffer of a rollout stores them.
        truncate_at: end a rollout after a step with a penalty above this value. None ends none. The step is
            kept; unlike a terminal one, its next state has a value. `penalty_quantile` finds a value.
        halt_reward: reward of such a step, which is then terminal, as in MOReL (Kidambi et al. 2020). None
            leaves its reward, and it is no terminal.
        member: "per_step" draws an elite for each step (authors), "per_rollout" one for all steps of a
            rollout.

    Raises:
        InputError: an argument is unknown or out of range, or the backend cannot serve.
    """

    def __init__(
        self,
        ensemble: EnsembleDynamics,
        *,
        penalty: Penalty | PenaltyFunction = "max_aleatoric",
        penalty_coef: float = 1.0,
        termination: str | Task | Box | TerminationFunction | None = None,
        reward: RewardFunction | None = None,
        backend: str = "auto",
        dtype: str = "float32",
        threads: int | None = None,
        penalty_members: PenaltyMembers = "all",
        penalties: bool | None = None,
        truncate_at: float | None = None,
        halt_reward: float | None = None,
        member: MemberDraw = "per_step",
    ) -> None:
        self.penalty_function: PenaltyFunction | None = None
        if callable(penalty):
            self.penalty_function, penalty = penalty, PENALTIES[0]
        checked.check_known("penalty", penalty, PENALTIES)
        if reward is not None and not callable(reward):
            raise InputError(f"reward must be a function or None, got {reward!r}")
        self.reward_function = reward
        if not isinstance(penalty_coef, (int, float)) or not 0.0 <= penalty_coef < float("inf"):
            raise InputError(f"penalty_coef must be finite and not negative, got {penalty_coef!r}")
        checked.check_known("dtype", dtype, ROLLOUT_DTYPES)
        if penalty_members not in ("all", "elites"):
            raise InputError(f'penalty_members must be "all" or "elites", got {penalty_members!r}')
        self.ensemble = ensemble
        self.penalty, self.penalty_coef = penalty, float(penalty_coef)
        self.penalty_members = penalty_members
        if penalties is not None and not isinstance(penalties, bool):
            raise InputError(f"penalties must be True, False or None, got {penalties!r}")
        if penalties is False and self.penalty_coef:
            raise InputError(f"penalty_coef={penalty_coef:g} needs penalties; leave penalties=False out")
        self.penalties = penalties
        checked.check_known("member", member, MEMBER_DRAWS)
        self.member = member
        self.truncation = make_truncation(truncate_at, halt_reward, exact=dtype == "float64")
        if penalties is False and self.truncation.needs_penalties:
            raise InputError(f"truncate_at={truncate_at:g} needs penalties; leave penalties=False out")
        self.operands = dtype
        self.dtype = torch.float64 if dtype == "float64" else torch.float32
        self.device = ensemble.input_mean.device
        # Read once, since reading a value from a GPU waits for it.
        self._absolute = bool(ensemble.absolute.any())
        self._wanted_backend = backend
        self._need = Need(
            dtype,
            self.device,
            network_sizes(ensemble.weights),
            penalty=penalty,
            layer_norm=ensemble.layer_norm,
        )
        self.backend = choose(backend, self._need)
        self.threads = resolve_threads(threads)
        self.termination_function: TerminationFunction | None = None
        self._termination = termination
        if isinstance(termination, str):
            rules = {**{name: task.box for name, task in TASKS.items()}, **BOXES}
            checked.check_known("termination", termination, tuple(rules))
            termination = rules[termination]
        if isinstance(termination, Task):
            termination = termination.box
        if callable(termination):
            self.termination_function = termination
            termination = None
        box = make_box(ensemble.obs_dim) if termination is None else termination
        if not isinstance(box, Box):
            raise InputError(
                f"termination must be a name, a Task, a Box, a function or None, got {termination!r}"
            )
        if box.obs_dim != ensemble.obs_dim:
            raise InputError(
                f"the termination box has {box.obs_dim} dimensions, the ensemble's observations have"
                f" {ensemble.obs_dim}"
            )
        ensemble.check_elites()
        self._kept: _Kept | None = None
        # The latest row numbers: to make them takes a tenth of a step of one row. Nobody writes to them.
        self._numbers = torch.arange(1, device=self.device)
        self._low = torch.tensor(box.low, dtype=self.dtype, device=self.device)
        self._high = torch.tensor(box.high, dtype=self.dtype, device=self.device)

    def __repr__(self) -> str:
        rule = self._termination
        if not isinstance(rule, str | None):
            rule = rule.name if isinstance(rule, Task) else _name_of(rule)
        penalty = self.penalty if self.penalty_function is None else _name_of(self.penalty_function)
        others: dict[str, Any] = {"reward": _name_of(self.reward_function)}
        if self.truncation.needs_penalties:
            others["truncate_at"] = self.truncation.at
        others["halt_reward"] = self.truncation.halt_reward
        others["member"] = self.member if self.member != MEMBER_DRAWS[0] else None
        given = "".join(f", {name}={value!r}" for name, value in others.items() if value is not None)
        return (
            f"RolloutEngine({self.ensemble!r}, penalty={penalty!r}, penalty_coef={self.penalty_coef},"
            f" termination={rule!r}, backend={self.backend!r}, dtype={self.operands!r},"
            f" threads={self.threads}, penalty_members={self.penalty_members!r}, penalties={self.penalties}"
            f"{given})"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy, in this process or another, reads the ensemble itself.
        return self.__dict__ | {"_kept": None}

    @property
    def _needs_penalties(self) -> bool:
        """True where rewards depend on penalties, or a penalty can end a rollout."""
        return self.penalty_coef != 0.0 or self.truncation.needs_penalties

    def _returns_penalties(self) -> bool:
        """Tell if new arrays hold penalties."""
        return self._needs_penalties if self.penalties is None else self.penalties

    @property
    def _calls_functions(self) -> bool:
        """True where the caller's functions are called after every step."""
        functions = self.termination_function, self.penalty_function, self.reward_function
        return any(function is not None for function in functions)

    def refresh(self) -> None:
        """Read the ensemble again at the next call, also where no change of it was noticed."""
        self._kept = None

    @_untraced
    def step(
        self,
        observations: A,
        actions: A,
        *,
        seed: int,
        step: int = 0,
        rows: A | None = None,
        deterministic: bool = False,
        distributions: bool = False,
    ) -> StepResult[A]:
        """Make one step of the model with the caller's actions.

        Args:
            observations: finite floats [batch, obs_dim]: a tensor, a NumPy array, or an array of another
                library that supports DLPack, such as JAX. Memory is shared, not copied, where types agree.
            actions: finite floats [batch, act_dim], likewise.
            seed: key of the random numbers, 0 <= seed < 2^64.
            step: number of this step in its rollout, 0 <= step < 2^32.
            rows: int64 [batch], the rows' numbers for the random numbers; None stands for 0, 1, 2, ...
            deterministic: take the mean over all members, without noise.
            distributions: return every member's mean and std too.

        Returns:
            A `StepResult` with arrays of the kind of `observations`. A row is terminal where its prediction
            is not finite; so is one whose penalty is not finite, where penalties are computed. `truncations`
            are those of `truncate_at`.

        Raises:
            InputError: an argument has a wrong shape, type, device or value.
        """
        penalties = self._returns_penalties()
        return self._step(observations, actions, seed, step, rows, deterministic, distributions, penalties)

    def _step(
        self,
        observations: A,
        actions: A,
        seed: int,
        step: int,
        rows: A | None,
        deterministic: bool,
        distributions: bool,
        penalties: bool,
    ) -> StepResult[A]:
        make = maker_like("observations", observations)
        start = self._checked("observations", observations, self.ensemble.obs_dim)
        action = self._checked("actions", actions, self.ensemble.act_dim)
        if len(action) != len(start):
            raise InputError(f"there are {len(start)} observations but {len(action)} actions")
        numbers = self._checked_rows(rows, len(start))
        checked.check_range("seed", seed, 0, 2**64)
        checked.check_range("step", step, 0, 2**32)
        settings = Settings(seed, deterministic, self.operands, self.threads)
        own = penalties and self.penalty_function is not None
        call = StepCall(
            *(self._dynamics(), start, numbers, settings, action, step),
            distributions=distributions or own,
            penalties=penalties and not own,
        )
        result = checked.step(get_backend(self.backend), call)
        if own:
            result = dataclasses.replace(result, penalties=self._penalise(result, make))
        # Copies, so that a function which writes into its arguments changes nothing else.
        arrays = start, action, result.next_observations
        if self.reward_function is not None:
            given = self.reward_function(*(make(array.clone()) for array in arrays))
            finite = result.next_observations.isfinite().all(-1)
            raw = self._checked_numbers("the reward function", given, finite)
            inside = (arrays[2] >= self._low) & (arrays[2] <= self._high)
            ended = ~(inside.all(-1) & finite)
            result = dataclasses.replace(result, raw_rewards=raw, terminals=ended)
        if own or self.reward_function is not None:
            result = self._rewarded(result)
        if not distributions:
            result = dataclasses.replace(result, mean=None, std=None)
        if self.truncation.needs_penalties:
            result = dataclasses.replace(result, truncations=above_limit(result, self.truncation))
        if self.termination_function is not None:
            ended = self.termination_function(*(make(array.clone()) for array in arrays))
            result.terminals.logical_or_(self._checked_flags(ended, len(start)))
        if isinstance(observations, torch.Tensor):
            return cast(StepResult[A], result)
        made: StepResult[A] = map_tensors(make, result)
        return made

    def penalty_quantile(self, data: Transitions | str | os.PathLike[str], quantile: float) -> float:
        """Return a quantile of the penalties of the data's observations and actions.

        Args:
            data: transitions with observations [n, obs_dim] and actions [n, act_dim], or the name or path of
                a data set.
            quantile: 0 to 1; 1 is the highest penalty.

        Raises:
            InputError: the quantile is out of range, the data do not fit the ensemble, or a penalty is not
                finite.
        """
        if not isinstance(quantile, int | float) or isinstance(quantile, bool) or not 0.0 <= quantile <= 1.0:
            raise InputError(f"quantile must be in [0, 1], got {quantile!r}")
        if isinstance(data, str | os.PathLike):
            data = load_dataset(os.fspath(data))
        if not isinstance(data, Transitions):
            raise InputError(f"data must be Transitions or the name of a data set, got {type(data).__name__}")
        if len(data) == 0:
            raise InputError("data have no transitions")
        # The caller's rewards and terminations do not matter here.
        bare = copy.copy(self)
        bare.reward_function = bare.termination_function = None
        penalties = []
        for first in range(0, len(data), _DATA_ROWS):
            some = slice(first, first + _DATA_ROWS)
            observations, actions = (
                array[some].to(self.device) for array in (data.observations, data.actions)
            )
            made = bare._step(observations, actions, 0, 0, None, True, distributions=False, penalties=True)
            assert made.penalties is not None
            penalties.append(made.penalties.cpu())
        found = torch.cat(penalties).numpy()
        if not np.isfinite(found).all():
            row = int((~np.isfinite(found)).argmax())
            raise InputError(
                f"the penalty of transition {row} of the data is not finite; fit the ensemble again"
            )
        return float(np.quantile(found, quantile))

    def _penalise(self, result: StepResult, make: Callable[[torch.Tensor], Any]) -> torch.Tensor:
        """Return the penalties of the caller's function."""
        assert self.penalty_function is not None and result.mean is not None and result.std is not None
        mean, std = result.mean, result.std
        if self.penalty_members == "elites":
            mean, std = mean[self.ensemble.elites], std[self.ensemble.elites]
        given = self.penalty_function(make(mean.clone()), make(std.clone()))
        finite = (mean.isfinite() & std.isfinite()).all(-1).all(0)
        return self._checked_numbers("the penalty function", given, finite)

    def _rewarded(self, result: StepResult) -> StepResult:
        """Make the rewards of raw rewards and penalties of which the caller's functions made some."""
        rewards = result.raw_rewards.clone()
        if result.penalties is not None:
            # With a coefficient of 0 too: a penalty that is not finite makes such a reward.
            rewards -= self.penalty_coef * result.penalties
        terminals = result.terminals | ~rewards.isfinite()
        return halt(dataclasses.replace(result, rewards=rewards, terminals=terminals), self.truncation)

    def _checked_numbers(self, function: str, given: Any, finite: torch.Tensor) -> torch.Tensor:
        """Return what a caller's function gave for each row, of the engine's dtype.

        It must be finite where `finite` is True, bool [batch].
        """
        batch = len(finite)
        array = to_tensor(f"what {function} returns", given, self.device).to(self.device)
        if not array.is_floating_point() or array.numel() != batch:
            raise InputError(
                f"{function} must return floats [{batch}], got {array.dtype} {list(array.shape)}"
            )
        # A copy, which shares no memory with what the function was given.
        array = array.detach().reshape(-1).to(self.dtype, copy=True)
        wrong = ~array.isfinite() & finite
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            raise InputError(f"{function} must return finite numbers, got {array[row].item()} at row {row}")
        return array

    @_untraced
    def bellman_inconsistency(
        self, observations: Any, actions: Any, policy: Actor, critic: Critic, *, seed: int, samples: int = 10
    ) -> torch.Tensor:
        """Return the standard deviation over the elites of the value of the next state.

        Each elite's value is the mean over samples of its next observation and of the policy's action there,
        of the least Q over the critics. Rewards and terminations do not enter it.

        Source: MOBILE (Sun et al., ICML 2023); `MOBILEPolicy.compute_lcb` of OfflineRL-Kit.

        Args:
            observations: finite floats [batch, obs_dim], an array as for `step`.
            actions: finite floats [batch, act_dim], likewise.
            policy: the policy whose actions are drawn at the next observations.
            critic: the Q-functions, usually the target's.
            seed: key of the random numbers, 0 <= seed < 2^64.
            samples: number of next observations of each row and elite.

        Returns:
            [batch], a tensor of the engine's dtype.

        Raises:
            InputError: an argument has a wrong shape, type, device or value, or there is one elite alone.
        """
        elites = self.ensemble.elites
        if len(elites) < 2:
            raise InputError("a standard deviation over the elites needs at least two of them, there is one")
        if not isinstance(policy, Actor):
            raise InputError(f"policy must be a mopo_fast.Actor, got {type(policy).__name__}")
        self._check_actor(policy)
        checked.check_range("seed", seed, 0, 2**64)
        start = self._checked("observations", observations, self.ensemble.obs_dim)
        action = self._checked("actions", actions, self.ensemble.act_dim)
        if len(action) != len(start):
            raise InputError(f"there are {len(start)} observations but {len(action)} actions")
        settings = Settings(seed, False, self.operands, self.threads)
        rows = self._checked_rows(None, len(start))
        dynamics = self._dynamics()
        whole = StepCall(dynamics, start, rows, settings, action, 0, True, penalties=dynamics.needs_penalties)
        step = checked.step(get_backend(self.backend), whole)
        assert step.mean is not None and step.std is not None
        mean, std = step.mean[elites, :, :-1], step.std[elites, :, :-1].contiguous()
        carry = dynamics.carry
        call = ValuesCall(
            mean + (start if carry is None else carry * start),
            std,
            samples,
            self._policy(policy),
            [self._cast(weight) for weight in critic.weights],
            [self._cast(bias) for bias in critic.biases],
            settings,
        )
        values = checked.least_values(self._backend_for(policy), call)
        return values.mean(dim=0).std(dim=0)

    @_untraced
    def rollout(
        self,
        policy: Policy,
        start_observations: Any,
        horizon: int,
        *,
        seed: int,
        count: int | None = None,
        rows: torch.Tensor | None = None,
        deterministic: bool | Literal["policy", "model"] = False,
        out: RingBuffer | None = None,
    ) -> Transitions:
        """Roll out `policy` for up to `horizon` steps from every start state.

        A terminal transition is kept and ends its rollout. A prediction that is not finite ends its rollout
        too; it is not kept, but counted in `info["non_finite"]`.

        Args:
            policy: an `Actor`, whose steps are fused with the ensemble's. Or any function of observations,
                a tensor [n, obs_dim] of the rollouts that go on, that returns finite actions [n, act_dim]:
                it is called at each step, and the kernels compute the ensemble alone. "uniform" draws
                actions from [-1, 1] in the same way. "behavior" clones the policy that made the data set of
                the start states, by `clone_policy` with this seed, which takes some seconds at each call.
            start_observations: finite floats [batch, obs_dim], an array as for `step`. Or `Transitions`, or
                the name or path of a data set, from whose observations `count` are drawn.
            horizon: most steps of a rollout, at least 1.
            seed: key of the random numbers, 0 <= seed < 2^64.
            count: number of start states to draw where `start_observations` are a data set.
            rows: int64 [batch], the start states' numbers for the random numbers; None stands for 0, 1, 2,
                ... A shard that passes its numbers in a larger batch gets the larger batch's transitions.
            deterministic: True acts by tanh(mean) and takes the mean over all members, without noise.
                "policy" does only the first of this, "model" only the second. A function that is a policy
                is called in the same way in all cases.
            out: ring that the transitions are appended to; None allocates new arrays. A ring that stores
                penalties gets them also where `penalty_coef` is 0.

        Returns:
            The transitions that exist, ordered by start state, then by step. With `out`, they have the ring's
            arrays, as views of the ring, or as copies where they wrap around its end. `penalties` is None
            where they were not computed. `info` has the numbers of rollouts that ended in a prediction that
            was not finite ("non_finite") and by `truncate_at` ("truncated").

        Raises:
            InputError: an argument has a wrong shape, type, device or value, the backend cannot serve such
                a policy, or a function returns something else than actions.
        """
        ensemble = self.ensemble
        if isinstance(start_observations, str | os.PathLike):
            start_observations = load_dataset(os.fspath(start_observations))
        source = start_observations
        clones = isinstance(policy, str) and policy == "behavior"
        if clones and not isinstance(source, Transitions):
            raise InputError(
                '"behavior" clones the policy of a data set, but the start states are an array; give'
                " Transitions or the name of a data set with count, or clone the policy once by"
                " mopo_fast.clone_policy(data) and pass that"
            )
        if count is not None or isinstance(source, Transitions):
            start_observations = self._draw_starts(source, count, seed)
        start = self._checked("start_observations", start_observations, ensemble.obs_dim)
        rows = self._checked_rows(rows, len(start))
        checked.check_range("seed", seed, 0, 2**64)
        checked.check_range("horizon", horizon, 1, 2**31)
        if clones:
            policy = clone_policy(source, seed=seed).to(self.device)
        if isinstance(policy, Actor):
            self._check_actor(policy)
        elif not callable(policy) and policy != "uniform":
            raise InputError(
                'policy must be a mopo_fast.Actor, "uniform", "behavior", or a function of observations that'
                f" returns actions, got {policy!r:.100}; for any other policy loop over `engine.step`"
            )
        if out is None:
            penalties = self._returns_penalties()
            room = allocate(
                *(len(start) * horizon, ensemble.obs_dim, ensemble.act_dim, self.device, self.dtype),
                penalties=penalties,
            )
            storage, head = room.arrays(), 0
        else:
            storage, head = out.storage.arrays(), out.head
            if self.penalties is False and "penalties" in storage:
                raise InputError(
                    "the buffer stores penalties, which this engine does not compute; make the buffer with"
                    " penalties=False"
                )
            if len(start) * horizon > out.capacity:
                raise InputError(
                    f"{len(start)} rollouts of {horizon} steps can make {len(start) * horizon} transitions,"
                    f" the buffer holds {out.capacity}"
                )
            # Kernels read the start states while they write the buffer, so the two must not share memory.
            memory = {array.untyped_storage().data_ptr() for array in storage.values()}
            start, rows = (
                array.clone() if array.untyped_storage().data_ptr() in memory else array
                for array in (start, rows)
            )
        if not isinstance(deterministic, bool) and deterministic not in ("policy", "model"):
            raise InputError(f'deterministic must be True, False, "policy" or "model", got {deterministic!r}')
        settings = Settings(
            seed,
            deterministic in (True, "model"),
            self.operands,
            self.threads,
            mean_actions=deterministic in (True, "policy"),
        )
        destination = Destination(storage, head)
        if isinstance(policy, Actor):
            call = RolloutCall(
                self._dynamics(), start, rows, settings, self._policy(policy), horizon, destination
            )
            if not self._calls_functions:
                counts = checked.rollout(self._backend_for(policy), call)
            else:
                checked.check_rollout(get_backend(self.backend), call)
                counts = self._by_steps(
                    lambda observations, rows, t: act(call.policy, observations, rows, t, settings),
                    *(start, rows, horizon, settings, destination),
                )
        else:
            layout = checked.Layout(self.dtype, self.device)
            most = len(start) * horizon
            checked.check_destination(destination, layout, ensemble.obs_dim, ensemble.act_dim, most)
            choose = self._uniform(seed) if policy == "uniform" else self._caller(policy)
            counts = self._by_steps(choose, start, rows, horizon, settings, destination)
        for array in storage.values():
            # Kernels write behind autograd's back; this lets it detect that a saved tensor has changed.
            torch.autograd.graph.increment_version(array)
        if counts.non_finite:
            logger.warning(
                "%d of %d rollouts ended in a prediction that was not finite", counts.non_finite, len(start)
            )
        written = counts.written
        if out is None:
            arrays: dict[str, Any] = {name: array[:written] for name, array in storage.items()}
        else:
            out.advance(written)
            end = head + written
            arrays = {
                name: array[head:end]
                if end <= out.capacity
                else torch.cat([array[head:], array[: end - out.capacity]])
                for name, array in storage.items()
            }
        info = {"non_finite": counts.non_finite, "truncated": counts.truncated}
        return Transitions(**arrays, info=info)

    def _draw_starts(self, given: Any, count: int | None, seed: int) -> torch.Tensor:
        """Draw start states from the observations of a data set."""
        if not isinstance(given, Transitions):
            raise InputError(
                "count is for start states that are drawn from a data set; leave it out, or give Transitions"
                " or the name of a data set"
            )
        if count is None:
            raise InputError("start states from a data set need count, the number of them to draw")
        if given.obs_dim != self.ensemble.obs_dim:
            raise InputError(
                f"the data set has {given.obs_dim} observation and {given.act_dim} action dimensions, the"
                f" ensemble {self.ensemble.obs_dim} and {self.ensemble.act_dim}"
            )
        checked.check_range("count", count, 1, 2**31)
        checked.check_range("seed", seed, 0, 2**64)
        numbers = torch.arange(count, device=given.device)
        drawn = random_choice(numbers, 0, BATCH_STREAM, len(given), derive_seed(seed, START))
        return given.observations[drawn].to(self.device)

    def _backend_for(self, policy: Actor) -> Backend:
        """Return the engine's backend, or another one if it cannot serve such a policy."""
        need = dataclasses.replace(self._need, policy=network_sizes(policy.weights))
        backend = get_backend(self.backend)
        if backend.refusal(need) is None:
            return backend
        return get_backend(choose(self._wanted_backend, need))

    def _by_steps(
        self,
        choose: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
        start: torch.Tensor,
        rows: torch.Tensor,
        horizon: int,
        settings: Settings,
        out: Destination,
    ) -> RolloutCounts:
        """Make rollouts step by step, with actions by `choose` from (observations, rows, t)."""

        def step(observations: torch.Tensor, rows: torch.Tensor, t: int) -> tuple[torch.Tensor, StepResult]:
            actions = choose(observations, rows, t)
            result = self._step(
                observations,
                actions,
                settings.seed,
                t,
                rows,
                settings.deterministic,
                distributions=False,
                penalties=self._needs_penalties or "penalties" in out.arrays,
            )
            return actions, result

        return rollout_by_steps(start, rows, horizon, out, step, self.truncation)

    def _check_actor(self, policy: Actor) -> None:
        ensemble, kind = self.ensemble, type(policy)
        if (policy.obs_dim, policy.act_dim) != (ensemble.obs_dim, ensemble.act_dim):
            raise InputError(
                f"the policy is for {policy.obs_dim} observation and {policy.act_dim} action dimensions,"
                f" the ensemble for {ensemble.obs_dim} and {ensemble.act_dim}"
            )
        if (kind.forward, kind.act) != (Actor.forward, Actor.act):
            raise InputError(
                f"{kind.__name__} has a forward or act of its own, while the kernels compute an Actor from"
                " its weights; pass `policy.act`, or loop over `engine.step`"
            )

    def _uniform(self, seed: int) -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]:
        """Return a policy whose actions are uniform in [-1, 1]."""

        def draw(_: torch.Tensor, rows: torch.Tensor, t: int) -> torch.Tensor:
            uniform = random_uniforms(rows, t, ACTION_STREAM, self.ensemble.act_dim, seed, self.dtype)
            return 2.0 * uniform - 1.0

        return draw

    def _caller(
        self, policy: Callable[[Any], Any]
    ) -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]:
        return lambda observations, rows, t: self._call(policy, observations)

    def _call(self, policy: Callable[[Any], Any], observations: torch.Tensor) -> torch.Tensor:
        """Return a function's actions for observations [n, obs_dim]."""
        # A copy, so that a function which writes into its argument changes no observation.
        with torch.no_grad():
            given = policy(observations.clone())
        actions = self._checked("actions of the policy", given, self.ensemble.act_dim)
        if len(actions) != len(observations):
            raise InputError(
                f"the policy returned {len(actions)} actions for {len(observations)} observations; return one"
                " for each, or loop over `engine.step`"
            )
        return actions

    def _checked_flags(self, ended: Any, batch: int) -> torch.Tensor:
        flags = to_tensor("what the termination function returns", ended, self.device).to(self.device)
        if flags.dtype != torch.bool or flags.numel() != batch:
            raise InputError(
                f"the termination function must return bool [{batch}], got {flags.dtype} {list(flags.shape)}"
            )
        return flags.reshape(-1)

    def _dynamics(self) -> DynamicsArrays:
        """Return the ensemble's arrays: the same object as long as nothing has changed."""
        ensemble, kept = self.ensemble, self._kept
        sources: tuple[Any, ...] = (
            # Their dictionaries, since reading attributes of modules takes a tenth of a step of one row.
            *(*ensemble.weights._parameters.values(), *ensemble.biases._parameters.values()),
            *(*ensemble.norm_scales._parameters.values(), *ensemble.norm_shifts._parameters.values()),
            *(*ensemble._parameters.values(), *ensemble._buffers.values(), self._low, self._high),
        )
        options: tuple[Any, ...] = (self.penalty, self.penalty_coef, self.penalty_members)
        options += (self.penalty_function is None,)
        options += (self.truncation, self.member)
        options += (ensemble.activation, ensemble.log_scale)
        try:
            stamps = [(one.data_ptr(), one._version, one.shape, one.stride()) for one in sources]
        except RuntimeError:
            # Inference tensors have no version.
            return self._read_dynamics()
        if (
            kept is not None
            and (kept.options, kept.stamps) == (options, stamps)
            and all(map(operator.is_, kept.sources, sources))
        ):
            return kept.arrays
        arrays = self._read_dynamics()
        norms = arrays.norms or ((), ())
        layers = zip((*arrays.weights, *arrays.biases, *norms[0], *norms[1]), sources, strict=False)
        # CUDA graphs do not count their writes, and a converted copy would not follow them.
        if self.device.type == "cpu" and all(array.data_ptr() == one.data_ptr() for array, one in layers):
            self._kept = _Kept(options, stamps, sources, [one.detach() for one in sources], arrays)
        return arrays

    def _read_dynamics(self) -> DynamicsArrays:
        ensemble = self.ensemble
        everyone = torch.arange(ensemble.members, device=self.device)
        # A copy, since member numbers that were checked must not change before the kernel reads them.
        elites = ensemble.elites.to(self.device, copy=True).contiguous()
        return DynamicsArrays(
            weights=[self._cast(weight) for weight in ensemble.weights],
            biases=[self._cast(bias) for bias in ensemble.biases],
            norms=self._norms(),
            input_mean=self._cast(ensemble.input_mean),
            input_std=self._cast(ensemble.input_std),
            max_logvar=self._cast(torch.atleast_2d(ensemble.max_logvar)),
            min_logvar=self._cast(torch.atleast_2d(ensemble.min_logvar)),
            carry=self._cast(~ensemble.absolute) if self._absolute else None,
            elites=elites,
            penalty_members=everyone if self.penalty_members == "all" else elites,
            low=self._low,
            high=self._high,
            log_std=ensemble.log_scale == "std",
            activation=ensemble.activation,
            penalty=self.penalty,
            # The kernels know nothing of the caller's penalties.
            penalty_coef=self.penalty_coef if self.penalty_function is None else 0.0,
            truncation=self.truncation if self.penalty_function is None else Truncation(),
            keep_member=self.member == "per_rollout",
        )

    def _norms(self) -> tuple[list[torch.Tensor], list[torch.Tensor]] | None:
        if not self.ensemble.layer_norm:
            return None
        scales, shifts = self.ensemble.norm_scales, self.ensemble.norm_shifts
        return [self._cast(scale) for scale in scales], [self._cast(shift) for shift in shifts]

    def _policy(self, policy: Actor) -> PolicyArrays:
        return PolicyArrays(
            [self._cast(weight) for weight in policy.weights],
            [self._cast(bias) for bias in policy.biases],
            policy.activation,
            policy.log_std_min,
            policy.log_std_max,
        )

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(self.device, self.dtype).contiguous()

    def _checked(self, name: str, given: Any, dim: int) -> torch.Tensor:
        array = to_tensor(name, given, self.device)
        if not array.is_floating_point():
            raise InputError(f"{name} must be floating-point, got {array.dtype}")
        if array.layout != torch.strided:
            raise InputError(f"{name} must be dense, got {array.layout}")
        if array.ndim != 2 or array.shape[1] != dim:
            raise InputError(f"{name} must be [batch, {dim}], got shape {list(array.shape)}")
        if len(array) == 0:
            raise InputError(f"{name} has no rows")
        if array.device != self.device:
            raise InputError(f"{name} must be on the ensemble's {self.device}, got {array.device}")
        if array.requires_grad or array.dtype != self.dtype:
            array = array.detach().to(self.dtype)
        array = array.contiguous()
        # With few rows each operation of PyTorch takes longer than NumPy's.
        if self.device.type == "cpu":
            finite = np.count_nonzero(np.isfinite(array.numpy())) == array.numel()
        else:
            finite = bool(torch.isfinite(array).all())
        if not finite:
            row = int((~torch.isfinite(array)).nonzero()[0, 0])
            raise InputError(f"{name} is not finite at row {row}")
        return array

    def _checked_rows(self, given: Any, batch: int) -> torch.Tensor:
        if given is None:
            numbers = self._numbers
            if len(numbers) != batch:
                numbers = torch.arange(batch, device=self.device)
                if batch <= _KEPT_NUMBERS:
                    self._numbers = numbers
            return numbers
        rows = to_tensor("rows", given, self.device)
        if rows.dtype != torch.int64 or rows.shape != (batch,):
            raise InputError(f"rows must be int64 [{batch}], got {rows.dtype} {list(rows.shape)}")
        if rows.device != self.device:
            raise InputError(f"rows must be on the ensemble's {self.device}, got {rows.device}")
        return rows.contiguous()


def _name_of(function: Any) -> str | None:
    return None if function is None else getattr(function, "__name__", type(function).__name__)


def make_truncation(at: float | None, halt_reward: float | None, *, exact: bool = False) -> Truncation:
    """Return the `Truncation` of `RolloutEngine`'s arguments; raise `InputError` where they are unusable.

    Unless it is to be `exact`, the limit becomes the next float32, which the kernels compare with: a penalty
    that is equal to the limit ends nothing.
    """
    if at is None:
        if halt_reward is not None:
            raise InputError(f"halt_reward={halt_reward!r} needs truncate_at")
        return Truncation()
    if not _is_float32(at) or at < 0.0:
        raise InputError(f"truncate_at must be finite and not negative, got {at!r}")
    if halt_reward is not None and not _is_float32(halt_reward):
        raise InputError(f"halt_reward must be a finite number, got {halt_reward!r}")
    halt = None if halt_reward is None else float(np.float32(halt_reward))
    if exact:
        return Truncation(float(at), halt)
    limit = np.float32(at)
    return Truncation(float(limit if limit >= at else np.nextafter(limit, np.float32(np.inf))), halt)


def _is_float32(value: Any) -> bool:
    """Tell whether a value is a number within the range of float32."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= LARGEST_FLOAT32


def allocate(
    capacity: int,
    obs_dim: int,
    act_dim: int,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    *,
    penalties: bool = True,
) -> Transitions:
    """Allocate every array that a rollout fills, not initialised.

    Args:
        capacity: number of transitions.
        obs_dim: size of an observation.
        act_dim: size of an action.
        device: device of the arrays.
        dtype: type of the floats.
        penalties: allocate an array of penalties too.

    Raises:
        InputError: the arrays would take more memory than is available.
    """
    names = [name for name in ROLLOUT_ARRAYS if penalties or name != "penalties"]
    size = capacity * transition_bytes(names, obs_dim, act_dim, dtype)
    check_memory(f"{capacity:,} transitions", size, device, "the horizon or the start states")
    arrays: dict[str, Any] = {}
    for name in names:
        shape, kind = array_layout(name, obs_dim, act_dim, dtype)
        arrays[name] = torch.empty((capacity, *shape), dtype=kind, device=device)
    return Transitions(**arrays)
