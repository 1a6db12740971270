"""A backend: the one Protocol of all that make rollouts and train, and the data that cross to it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, Protocol

import torch
from typing_extensions import TypeVar

from mopo_fast.config import DynamicsConfig, SACConfig
from mopo_fast.data.transitions import Transitions


@dataclass(frozen=True, eq=False)
class DynamicsArrays:
    """An ensemble and what is asked of it, as plain arrays of one dtype on one device.

    `weights[i]` [members, in, out], `biases[i]` [members, out]; `low`, `high` [obs_dim] termination box;
    `elites`, `penalty_members` int64 member numbers. `max_logvar`, `min_logvar` [1 or members, obs_dim + 1]
    bound what the second half of the outputs is a logarithm of: the variance, or with `log_std` the standard
    deviation. The next observation is `carry` [obs_dim] times the observation, plus the sample: 1 where the
    mean is a change, 0 where it is the next observation itself; None where all are changes.
    """

    weights: list[torch.Tensor]
    biases: list[torch.Tensor]
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

    def spelled_out(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Bounds [members, obs_dim + 1], max and min, and carry: all there, as the C++ kernels read them."""
        members = len(self.weights[0])
        carry = torch.ones_like(self.low) if self.carry is None else self.carry
        high, low = (bound.expand(members, -1).contiguous() for bound in (self.max_logvar, self.min_logvar))
        return high, low, carry


@dataclass(frozen=True, eq=False)
class PolicyArrays:
    """A tanh-Gaussian actor as plain arrays: `weights[i]` [in, out], `biases[i]` [out]."""

    weights: list[torch.Tensor]
    biases: list[torch.Tensor]
    activation: str
    log_std_min: float
    log_std_max: float


# An array of any library; a tensor by default.
A = TypeVar("A", default=torch.Tensor)


@dataclass(frozen=True, eq=False)
class StepResult(Generic[A]):
    """One step of the penalised model for a batch.

    Attributes:
        next_observations: [batch, obs_dim].
        rewards: [batch], raw_rewards - penalty_coef * penalties.
        terminals: bool [batch]: outside the termination box, or not finite.
        raw_rewards: [batch], as sampled from the drawn member.
        penalties: [batch], u(s, a).
        members: int32 [batch], the member drawn; -1 where the ensemble's mean was taken.
        mean, std: [members, batch, obs_dim + 1] of (delta obs, reward); None unless asked for.
    """

    next_observations: A
    rewards: A
    terminals: A
    raw_rewards: A
    penalties: A
    members: A
    mean: A | None = None
    std: A | None = None


@dataclass(frozen=True)
class Settings:
    """The settings that a step and a rollout share.

    Attributes:
        seed: unsigned 64 bits, key of the random numbers.
        deterministic: no noise, the mean over all members.
        operands: one of `config.ROLLOUT_DTYPES`. Both factors of every product in the networks are rounded to
            it; sums and all else are not.
        threads: number of threads of a CPU kernel.
    """

    seed: int
    deterministic: bool
    operands: str
    threads: int


@dataclass(frozen=True, eq=False)
class Destination:
    """The arrays of `capacity` rows that a rollout is written to, as a ring from row `head` on."""

    arrays: dict[str, torch.Tensor]
    head: int

    @property
    def capacity(self) -> int:
        return self.arrays["rewards"].shape[0]


@dataclass(frozen=True, eq=False)
class StepCall:
    """One model step from `observations` [batch, obs_dim] with `actions` [batch, act_dim].

    It is a rollout of one step that begins at `step` and has no policy. `rows` int64 [batch] number the rows
    for the random numbers; `distributions` asks for every member's mean and std.
    """

    dynamics: DynamicsArrays
    observations: torch.Tensor
    rows: torch.Tensor
    settings: Settings
    actions: torch.Tensor
    step: int
    distributions: bool
    policy: ClassVar[None] = None
    horizon: ClassVar[int] = 1


@dataclass(frozen=True, eq=False)
class RolloutCall:
    """Up to `horizon` steps of `policy` from the start states `observations` [batch, obs_dim], into `out`."""

    dynamics: DynamicsArrays
    observations: torch.Tensor
    rows: torch.Tensor
    settings: Settings
    policy: PolicyArrays
    horizon: int
    out: Destination
    step: ClassVar[int] = 0


# A parameter under training: its value, Adam's two moments and the target that follows it, if any.
Parameter = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True, eq=False)
class SacRun:
    """A run's SAC updates, made in place.

    Attributes:
        actor, critic: the weights of all layers, then the biases; the critics' with targets.
        real, model: the transitions to draw from, by their first `sizes` rows; `rows` of each make a batch.
            float32, terminals bool, the numbers of a row side by side.
        updates_before: Adam's steps so far.
        steps: Adam's counts of them, float32 scalars, moved on with the parameters.
        count: the SAC's count of updates, an int64 scalar on the CPU, moved on likewise.
        first_draw: number of the first update for the random counters, with `seed` as their key.
    """

    actor: list[Parameter]
    critic: list[Parameter]
    log_alpha: Parameter
    config: SACConfig
    actor_learning_rate: float
    target_entropy: float
    real: Transitions
    model: Transitions
    sizes: tuple[int, int]
    rows: tuple[int, int]
    updates: int
    updates_before: int
    steps: list[torch.Tensor]
    count: torch.Tensor
    first_draw: int
    seed: int


@dataclass(frozen=True, eq=False)
class FitRun:
    """A run's steps of the ensemble's fit, made in place.

    Attributes:
        layers: the weights of all layers, then the biases.
        bounds: max_logvar and min_logvar.
        table: [n, obs + act + obs + 1 or more], the inputs, standardised, and the `dims` = obs + 1 targets.
        rows: int64 [members, count], the rows that each member sees; may be columns of a wider matrix.
        steps_before: Adam's steps so far.
        steps: Adam's counts of them, float32 scalars, moved on with the parameters.
    """

    layers: list[Parameter]
    bounds: tuple[Parameter, Parameter]
    activation: str
    table: torch.Tensor
    dims: int
    rows: torch.Tensor
    config: DynamicsConfig
    steps_before: int
    steps: list[torch.Tensor]


# The sizes of a network: inputs, hidden layers, outputs.
Sizes = tuple[int, ...]


def network_sizes(weights: Iterable[torch.Tensor]) -> Sizes:
    """The sizes of a network, from weights [..., in, out]."""
    first, *others = (weight.shape[-2:] for weight in weights)
    return (*first, *(size for _, size in others))


@dataclass(frozen=True)
class Need:
    """The work that a backend is asked whether it can do: rollouts, or training.

    Attributes:
        dtype: one of `config.ROLLOUT_DTYPES`, or of `config.FIT_DTYPES` for training.
        device: where the arrays are.
        ensemble, policy: sizes of the networks of rollouts, as far as they are known.
        training: the most inputs or outputs of a layer to be trained; None: rollouts are needed.
    """

    dtype: str
    device: torch.device
    ensemble: Sizes | None = None
    policy: Sizes | None = None
    training: int | None = None


@dataclass(frozen=True)
class BackendStatus:
    """A backend's availability on this machine, and the reason in words.

    `by_name_only`: it is for debugging, or new, and "auto" passes it by.
    """

    name: str
    available: bool
    reason: str
    by_name_only: bool = False


class Backend(Protocol):
    """The interface of every backend. `checked` has looked at all arguments; nothing is checked again.

    Attributes:
        name: the name to choose it by.
        trains: "kernels": by its own `sac_updates` and `fit_steps`. "pytorch": by the updates that sac.py and
            fit.py make in PyTorch. None: not at all, and a run that asks for it trains with another.
    """

    name: str
    trains: Literal["kernels", "pytorch"] | None

    def status(self) -> BackendStatus:
        """Tell whether it can run on this machine."""

    def refusal(self, need: Need) -> str | None:
        """Tell why it cannot serve `need`, or None where it can. It is available."""

    def step(self, call: StepCall) -> StepResult:
        """Make one model step."""

    def rollout(self, call: RolloutCall) -> tuple[int, int]:
        """Make rollouts: (rows written, rollouts cut as not finite)."""

    def sac_updates(self, runs: Sequence[SacRun], threads: int) -> list[list[float]]:
        """Update each run in place: the sums over its updates of each of `sac.METRICS`.

        A run gets the same bits alone and beside others, as it does from `fit_steps`.
        """
        raise RuntimeError(f"backend {self.name} has no kernels that train")

    def fit_steps(self, runs: Sequence[FitRun], threads: int) -> list[float]:
        """Step each run's fit in place: the sums of the steps' losses, weight decay left out."""
        raise RuntimeError(f"backend {self.name} has no kernels that train")
