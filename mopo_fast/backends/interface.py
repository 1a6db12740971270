"""The interface of a backend: one Protocol for rollouts and training, and the data that cross to it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Protocol

import torch
from typing_extensions import TypeVar

from mopo_fast.config import DynamicsConfig, SACConfig
from mopo_fast.data.transitions import ROLLOUT_ARRAYS, Transitions


@dataclass(frozen=True, eq=False)
class DynamicsArrays:
    """An ensemble, its penalty and its termination box, as plain arrays of one dtype on one device.

    The caller may pass the same object again as long as no array has changed, and a new one after that. So a
    backend may keep in it what it has computed from the arrays.

    Attributes:
        weights: [members, in, out] of each layer. The last one's outputs are obs_dim + 1 means, then as many
            log-variances.
        biases: [members, out] of each layer.
        norms: scales and shifts of the hidden layers' norms, [members, out] of each; None for none.
        input_mean: [obs_dim + act_dim], subtracted from the inputs.
        input_std: [obs_dim + act_dim], by which the inputs are then divided.
        max_logvar: [1 or members, obs_dim + 1], upper bounds of the log-variances.
        min_logvar: [1 or members, obs_dim + 1], lower bounds of the log-variances.
        carry: [obs_dim], a factor of the observation. The next observation is carry * observation + sample:
            1 where the ensemble predicts the change, 0 where it predicts the next observation itself. None
            stands for ones.
        elites: int64, numbers of the members to draw from.
        penalty_members: int64, numbers of the members that the penalty is computed from.
        low: [obs_dim], lower bounds of the termination box.
        high: [obs_dim], upper bounds of the termination box.
        log_std: the log-variances and their bounds are log standard deviations instead.
        activation: one of `config.ACTIVATIONS`.
        penalty: one of `config.PENALTIES`.
        penalty_coef: factor of the penalty.
        truncation: penalties that end rollouts.
        keep_member: a rollout draws one member for all its steps.
        kept: results of earlier calls, by the key of the function that made them.
    """

    weights: list[torch.Tensor]
    biases: list[torch.Tensor]
    norms: tuple[list[torch.Tensor], list[torch.Tensor]] | None
    input_mean: torch.Tensor
    input_std: torch.Tensor
    max_logvar: torch.Tensor
    min_logvar: torch.Tensor
    carry: torch.Tensor | None
    elites: torch.Tensor
    penalty_members: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    log_std: bool
    activation: str
    penalty: str
    penalty_coef: float
    truncation: "Truncation"
    keep_member: bool
    kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def needs_penalties(self) -> bool:
        """True where rewards depend on penalties, or a penalty can end a rollout."""
        return self.penalty_coef != 0.0 or self.truncation.needs_penalties

    def spelled_out(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return max_logvar, min_logvar [members, obs_dim + 1] and carry, as the C++ kernels read them."""
        members = len(self.weights[0])
        carry = torch.ones_like(self.low) if self.carry is None else self.carry
        high, low = (bound.expand(members, -1).contiguous() for bound in (self.max_logvar, self.min_logvar))
        return high, low, carry


@dataclass(frozen=True)
class Truncation:
    """Penalties that end rollouts.

    Attributes:
        at: a rollout ends after a step with a larger penalty; infinite for no such end.
        halt_reward: reward of that step, which is then terminal; None leaves the step as it is.
    """

    at: float = math.inf
    halt_reward: float | None = None

    @property
    def needs_penalties(self) -> bool:
        """True where a penalty can end a rollout."""
        return self.at < math.inf


class RolloutCounts(NamedTuple):
    """Numbers of a call's rollouts.

    Attributes:
        written: number of rows written.
        non_finite: number of rollouts ended by a prediction that was not finite.
        truncated: number of rollouts ended by their penalty.
    """

    written: int
    non_finite: int
    truncated: int


@dataclass(frozen=True, eq=False)
class PolicyArrays:
    """A tanh-Gaussian actor as plain arrays.

    Attributes:
        weights: [in, out] of each layer. The last one's outputs are act_dim means, then as many log stds.
        biases: [out] of each layer.
        activation: one of `config.ACTIVATIONS`.
        log_std_min: lower bound that the log stds are clipped to.
        log_std_max: upper bound that the log stds are clipped to.
    """

    weights: list[torch.Tensor]
    biases: list[torch.Tensor]
    activation: str
    log_std_min: float
    log_std_max: float


# The arrays of a `StepResult` that every step returns, but for penalties that nobody asks for.
STEP_ARRAYS = ("next_observations", "rewards", "terminals", "raw_rewards", "penalties", "members")

# The array type of a library, torch by default.
A = TypeVar("A", default=torch.Tensor)


@dataclass(frozen=True, eq=False)
class StepResult(Generic[A]):
    """One step of the penalised model for a batch.

    Attributes:
        next_observations: [batch, obs_dim].
        rewards: [batch], raw_rewards - penalty_coef * penalties.
        terminals: bool [batch], True outside the termination box and where the prediction is not finite.
        raw_rewards: [batch], as sampled from the drawn member.
        members: int32 [batch], the member drawn; -1 where the ensemble's mean was taken.
        penalties: [batch], u(s, a); None where they were not computed, see `RolloutEngine`.
        truncations: bool [batch], True where the penalty ends a rollout; None where it cannot. Backends leave
            it to `RolloutEngine`.
        mean: [members, batch, obs_dim + 1], each member's mean of (delta obs, reward); None unless the call
            asked for `distributions`.
        std: [members, batch, obs_dim + 1], each member's standard deviation of it; None likewise.
    """

    next_observations: A
    rewards: A
    terminals: A
    raw_rewards: A
    members: A
    penalties: A | None = None
    truncations: A | None = None
    mean: A | None = None
    std: A | None = None


@dataclass(frozen=True)
class Settings:
    """The settings that a step and a rollout share.

    Attributes:
        seed: unsigned 64 bits, key of the random numbers.
        deterministic: take the mean over all members, without noise.
        operands: one of `config.ROLLOUT_DTYPES`. Both factors of every product in the networks have this
            precision; sums and all else are not rounded.
        threads: number of threads of a CPU kernel.
        mean_actions: let the policy act without noise.
    """

    seed: int
    deterministic: bool
    operands: str
    threads: int
    mean_actions: bool = False


@dataclass(frozen=True, eq=False)
class Destination:
    """The ring that a rollout is written to.

    Attributes:
        arrays: [capacity, ...] by name, some or all of `ROLLOUT_ARRAYS`.
        head: row that is written first.
    """

    arrays: dict[str, torch.Tensor]
    head: int

    @property
    def capacity(self) -> int:
        """Number of rows."""
        return self.arrays["rewards"].shape[0]

    def addresses(self) -> list[tuple[int, int]]:
        """Return (address, elements between two rows) of each of `ROLLOUT_ARRAYS`; (0, 0) where missing."""
        arrays = (self.arrays.get(name) for name in ROLLOUT_ARRAYS)
        return [(0, 0) if array is None else (array.data_ptr(), array.stride(0)) for array in arrays]


@dataclass(frozen=True, eq=False)
class StepCall:
    """One model step with the caller's actions: a rollout of one step, without a policy.

    Attributes:
        dynamics: the ensemble.
        observations: [batch, obs_dim].
        rows: int64 [batch], the rows' numbers for the random numbers.
        settings: the settings.
        actions: [batch, act_dim].
        step: number of the step for the random numbers.
        distributions: return every member's mean and std too.
        penalties: return the penalties too; must be True where `dynamics.penalty_coef` is not 0, or where
            penalties truncate.
    """

    dynamics: DynamicsArrays
    observations: torch.Tensor
    rows: torch.Tensor
    settings: Settings
    actions: torch.Tensor
    step: int
    distributions: bool
    penalties: bool = True
    policy: ClassVar[None] = None
    horizon: ClassVar[int] = 1

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays to return, those of `STEP_ARRAYS` without penalties that nobody asks for."""
        return tuple(name for name in STEP_ARRAYS if self.penalties or name != "penalties")

    def empty_distributions(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Allocate the mean and std of a `StepResult`; (None, None) where they are not asked for."""
        if not self.distributions:
            return None, None
        batch, obs_dim = self.observations.shape
        shape = len(self.dynamics.weights[0]), batch, obs_dim + 1
        return self.observations.new_empty(shape), self.observations.new_empty(shape)


@dataclass(frozen=True, eq=False)
class RolloutCall:
    """Rollouts of up to `horizon` steps.

    Attributes:
        dynamics: the ensemble.
        observations: [batch, obs_dim], the start states.
        rows: int64 [batch], the start states' numbers for the random numbers.
        settings: the settings.
        policy: the actor.
        horizon: most steps of a rollout.
        out: the ring that the transitions are written to.
    """

    dynamics: DynamicsArrays
    observations: torch.Tensor
    rows: torch.Tensor
    settings: Settings
    policy: PolicyArrays
    horizon: int
    out: Destination
    step: ClassVar[int] = 0

    @property
    def penalties(self) -> bool:
        """Tell if the penalties are read: for the rewards, to end rollouts, or by the ring."""
        return self.dynamics.needs_penalties or self.out.arrays.get("penalties") is not None


@dataclass(frozen=True, eq=False)
class ValuesCall:
    """Values of a policy at states that are drawn from Gaussians.

    State number r of all, in the order of the result, has the random counters (r, 0).

    Attributes:
        mean: [members, rows, obs_dim] of the Gaussians.
        std: likewise.
        samples: number of states drawn from each Gaussian.
        policy: the policy, whose actions are drawn too.
        weights: [critics, in, out] of each layer of the critics, ReLU between them.
        biases: [critics, out] of each layer of the critics.
        settings: the settings.
    """

    mean: torch.Tensor
    std: torch.Tensor
    samples: int
    policy: PolicyArrays
    weights: list[torch.Tensor]
    biases: list[torch.Tensor]
    settings: Settings


def address(tensor: torch.Tensor | None) -> int:
    """Return the address of a tensor's memory, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def kernel_arguments(call: StepCall | RolloutCall) -> dict[str, Any]:
    """Return the keyword arguments that the rollout kernels in C++ have in common.

    They are addresses of the call's own arrays, so the call must outlive the kernel.
    """
    dynamics, policy, settings = call.dynamics, call.policy, call.settings
    batch, obs_dim = call.observations.shape
    if kernel_arguments not in dynamics.kept:
        dynamics.kept[kernel_arguments] = {
            "act_dim": len(dynamics.input_mean) - obs_dim,
            "input_mean": dynamics.input_mean.data_ptr(),
            "input_std": dynamics.input_std.data_ptr(),
            "log_std": dynamics.log_std,
            "elites": dynamics.elites.data_ptr(),
            "num_elites": len(dynamics.elites),
            "penalty_members": dynamics.penalty_members.data_ptr(),
            "num_penalty_members": len(dynamics.penalty_members),
            "penalty": dynamics.penalty,
            "penalty_coef": dynamics.penalty_coef,
            "truncate_at": dynamics.truncation.at,
            "halts": dynamics.truncation.halt_reward is not None,
            "halt_reward": dynamics.truncation.halt_reward or 0.0,
            "keep_member": dynamics.keep_member,
            "low": dynamics.low.data_ptr(),
            "high": dynamics.high.data_ptr(),
        }
    return {
        **dynamics.kept[kernel_arguments],
        "obs_dim": obs_dim,
        "log_std_min": policy.log_std_min if policy else 0.0,
        "log_std_max": policy.log_std_max if policy else 0.0,
        "batch": batch,
        "start": call.observations.data_ptr(),
        "rows": call.rows.data_ptr(),
        "horizon": call.horizon,
        "first_step": call.step,
        "seed": settings.seed,
        "mean_actions": settings.mean_actions,
        "deterministic": settings.deterministic,
    }


# A parameter under training: its value, Adam's two moments, and its target network's copy or None.
Parameter = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True, eq=False)
class SacUpdates:
    """A kernel's call that makes SAC updates of one agent in place.

    Attributes:
        actor: the weights of all layers, then the biases.
        critic: likewise, all with targets.
        log_alpha: logarithm of the temperature, a scalar.
        config: hyperparameters.
        learning_rates: those of the actor, the critics and alpha.
        target_entropy: in nats.
        real: transitions to draw from. float32, terminals bool, the elements of a row contiguous.
        model: likewise.
        sizes: numbers of rows to draw from, the first ones of `real` and of `model`.
        rows: numbers of rows in a batch that come from `real` and from `model`.
        in_order: True takes the next rows of each source for each update, False draws them.
        updates: number of updates to make.
        updates_before: number of updates made before.
        steps: Adam's step counts, float32 scalars, advanced by the kernel.
        count: the agent's count of updates, an int64 scalar on the CPU, advanced by the kernel.
        first_draw: number of the first update for the random counters.
        seed: unsigned 64 bits, key of the random numbers.
    """

    actor: list[Parameter]
    critic: list[Parameter]
    log_alpha: Parameter
    config: SACConfig
    learning_rates: tuple[float, float, float]
    target_entropy: float
    real: Transitions
    model: Transitions
    sizes: tuple[int, int]
    rows: tuple[int, int]
    in_order: bool
    updates: int
    updates_before: int
    steps: list[torch.Tensor]
    count: torch.Tensor
    first_draw: int
    seed: int


@dataclass(frozen=True, eq=False)
class FitSteps:
    """A kernel's call that makes steps of one ensemble's fit in place.

    Attributes:
        layers: the weights of all layers, then the biases.
        norms: the scales of the hidden layers' norms, then their shifts; empty without layer norms.
        bounds: max_logvar and min_logvar.
        activation: one of `config.ACTIVATIONS`.
        table: [n, obs + act + dims or more], the standardised inputs, then the targets.
        dims: number of targets, obs + 1.
        rows: int32 [members, count], the rows of `table` that each member sees, in batches of
            `config.batch_size`; may be columns of a wider matrix.
        config: hyperparameters.
        steps_before: number of steps made before.
        steps: Adam's step counts, float32 scalars, advanced by the kernel.
    """

    layers: list[Parameter]
    norms: list[Parameter]
    bounds: tuple[Parameter, Parameter]
    activation: str
    table: torch.Tensor
    dims: int
    rows: torch.Tensor
    config: DynamicsConfig
    steps_before: int
    steps: list[torch.Tensor]


# Sizes of a network's inputs, hidden layers and outputs.
Sizes = tuple[int, ...]


def network_sizes(weights: Iterable[torch.Tensor]) -> Sizes:
    """Return the sizes of a network, from its weights [..., in, out]."""
    first, *others = (weight.shape[-2:] for weight in weights)
    return (*first, *(size for _, size in others))


@dataclass(frozen=True)
class Need:
    """Work that a backend is asked to do: rollouts or training.

    Attributes:
        dtype: one of `config.ROLLOUT_DTYPES`, or of `config.TRAINING_DTYPES` for training.
        device: device of the arrays.
        ensemble: sizes of the ensemble that makes rollouts; None where not known yet.
        policy: sizes of the policy that makes rollouts; None where not known yet.
        penalty: one of `config.PENALTIES`; None where not known yet.
        training: inputs or outputs of the widest layer to train; None asks for rollouts.
        layer_norm: the ensemble has layer norms.
    """

    dtype: str
    device: torch.device
    ensemble: Sizes | None = None
    policy: Sizes | None = None
    penalty: str | None = None
    training: int | None = None
    layer_norm: bool = False


def refuse_penalty(need: Need, served: Sequence[str]) -> str | None:
    """Tell why a backend whose kernels have the penalties `served` cannot serve `need`, or None."""
    if need.penalty is None or need.penalty in served:
        return None
    return f"has the penalties {', '.join(served)}, not {need.penalty}"


@dataclass(frozen=True)
class BackendStatus:
    """A backend's availability on this machine.

    Attributes:
        name: the backend's name.
        available: it can run here.
        reason: why it can or cannot, in words.
        by_name_only: "auto" does not choose it, because it is new or for debugging.
    """

    name: str
    available: bool
    reason: str
    by_name_only: bool = False


class Backend(Protocol):
    """The interface of every backend.

    `checked` calls it and has checked all arguments; a backend checks nothing again.

    Attributes:
        name: the name that it is chosen by.
        trains: "kernels" where `sac_updates` and `fit_steps` train. "pytorch" where sac.py and fit.py train
            in PyTorch. None where it only makes rollouts; a run that asks for it trains with another backend.
    """

    name: str
    trains: Literal["kernels", "pytorch"] | None

    def status(self) -> BackendStatus:
        """Return whether the backend can run on this machine, and why."""

    def refusal(self, need: Need) -> str | None:
        """Return why an available backend cannot serve `need`, or None where it can."""

    def step(self, call: StepCall) -> StepResult:
        """Make one model step."""

    def rollout(self, call: RolloutCall) -> RolloutCounts:
        """Make rollouts."""

    def least_values(self, call: ValuesCall) -> torch.Tensor:
        """Return the least Q over the critics at each state, [samples, members, rows]."""

    def sac_updates(self, calls: Sequence[SacUpdates], threads: int) -> list[list[float]]:
        """Make each call's updates; return the sums over its updates of `sac.METRICS` and each critic's loss.

        A call computes the same bits alone and beside others. So does one of `fit_steps`.
        """
        raise RuntimeError(f"backend {self.name} has no kernels that train")

    def fit_steps(self, calls: Sequence[FitSteps], threads: int) -> list[float]:
        """Make each call's steps; return the sum of its steps' losses, weight decay left out."""
        raise RuntimeError(f"backend {self.name} has no kernels that train")
