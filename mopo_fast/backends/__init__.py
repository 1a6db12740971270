"""Backends: the implementations of rollouts and training, and how one is chosen.

A backend gets arrays that `checked` has looked at and returns arrays; it decides nothing.
"""

import functools
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol

import torch
from typing_extensions import TypeVar

from mopo_fast.backends.training import FitRun, SacRun
from mopo_fast.data.transitions import ROLLOUT_ARRAYS as ROLLOUT_ARRAYS
from mopo_fast.data.transitions import array_layout as array_layout
from mopo_fast.errors import InputError

logger = logging.getLogger("mopo_fast")


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


# An array of any library; a tensor where nothing else is said.
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
    """How to compute, for a step as for a rollout.

    Attributes:
        seed: unsigned 64 bits, key of the random numbers.
        deterministic: no noise, the mean over all members.
        operands: one of `config.ROLLOUT_DTYPES`, which both factors of every product in the networks are
            rounded to; sums and all else are not.
        threads: of a CPU kernel.
    """

    seed: int
    deterministic: bool
    operands: str
    threads: int


@dataclass(frozen=True, eq=False)
class Destination:
    """Where a rollout is written: arrays of `capacity` rows, used as a ring from row `head` on."""

    arrays: dict[str, torch.Tensor]
    head: int

    @property
    def capacity(self) -> int:
        return self.arrays["rewards"].shape[0]


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run on this machine, and the reason in words.

    `by_name_only`: it is for debugging, or new, and "auto" passes it by.
    """

    name: str
    available: bool
    reason: str
    by_name_only: bool = False


# Of a network: inputs, hidden layers, outputs.
Sizes = tuple[int, ...]


def network_sizes(weights: Iterable[torch.Tensor]) -> Sizes:
    """From weights [..., in, out]."""
    first, *others = (weight.shape[-2:] for weight in weights)
    return (*first, *(size for _, size in others))


class Kernels(Protocol):
    """The kernels of a backend's module that trains by its own. Each run gets the same bits alone.

    Attributes:
        DEVICE: the type of the devices whose tensors they train.
    """

    DEVICE: str

    def sac_updates(self, runs: Sequence[SacRun], threads: int) -> list[list[float]]:
        """SAC updates of each run in place: the sums over them of each of `sac.METRICS`."""

    def fit_steps(self, runs: Sequence[FitRun], threads: int) -> list[float]:
        """Steps of the fit of each run in place: the sums of their losses, weight decay left out."""


class Backend(Protocol):
    """What every backend offers. Arguments are valid; nothing is checked again.

    `trains`: a run that asks for it fits and updates with it too, and does not make rollouts alone.
    """

    name: str
    trains: bool

    def status(self) -> BackendStatus:
        """Available on this machine?"""

    def refusal(
        self, dtype: str, device: torch.device, ensemble: Sizes | None = None, policy: Sizes | None = None
    ) -> str | None:
        """Why this backend cannot serve one of `config.ROLLOUT_DTYPES` on a device, or None where it can.

        For rollouts the sizes are given, the policy's once it is known.
        """

    def training_refusal(self, dtype: str, device: torch.device, widest: int) -> str | None:
        """Why it cannot train layers of up to `widest` inputs and outputs, likewise."""

    def step(
        self,
        dynamics: DynamicsArrays,
        observations: torch.Tensor,
        actions: torch.Tensor,
        rows: torch.Tensor,
        step: int,
        distributions: bool,
        settings: Settings,
    ) -> StepResult:
        """One model step for observations [batch, obs_dim], actions [batch, act_dim]."""

    def rollout(
        self,
        dynamics: DynamicsArrays,
        policy: PolicyArrays,
        start: torch.Tensor,
        rows: torch.Tensor,
        horizon: int,
        out: Destination,
        settings: Settings,
    ) -> tuple[int, int]:
        """`horizon` steps from start [batch, obs_dim]: (rows written, rollouts cut as not finite)."""


@functools.cache
def _backends() -> dict[str, Backend]:
    from mopo_fast.backends.cpu import CpuBackend
    from mopo_fast.backends.gpu.cuda import CudaBackend
    from mopo_fast.backends.gpu.triton import TritonBackend
    from mopo_fast.backends.reference import ReferenceBackend

    # Best first.
    backends: list[Backend] = [CpuBackend(), CudaBackend(), TritonBackend(), ReferenceBackend()]
    return {backend.name: backend for backend in backends}


def _reason_against(
    candidate: Backend,
    wanted: str,
    dtype: str,
    device: torch.device,
    training: int | None,
    ensemble: Sizes | None,
    policy: Sizes | None,
) -> str | None:
    status = candidate.status()
    if not status.available:
        return status.reason
    if status.by_name_only and wanted != candidate.name:
        return f"{status.reason}, serves where it is asked for by name"
    if training is not None:
        return candidate.training_refusal(dtype, device, training)
    return candidate.refusal(dtype, device, ensemble, policy)


def available() -> list[BackendStatus]:
    """Every backend, best first, with the reason why it can or cannot run here."""
    return [backend.status() for backend in _backends().values()]


def get_backend(name: str) -> Backend:
    """The backend called `name`, which `choose` has found able."""
    return _backends()[name]


def training_kernels(name: str) -> Kernels | None:
    """What trains for the backend called `name`; None where PyTorch does."""
    from mopo_fast.backends import cpu
    from mopo_fast.backends.gpu import cuda

    kernels: dict[str, Kernels] = {"cpu": cpu, "cuda": cuda}
    return kernels.get(name)


def choose(
    name: str,
    dtype: str,
    device: torch.device,
    *,
    training: int | None = None,
    ensemble: Sizes | None = None,
    policy: Sizes | None = None,
) -> str:
    """The backend to use: `name`, or for "auto" MOPO_FAST_BACKEND, else the best that can serve.

    For rollouts of networks of these sizes; or for SAC and the fit, `training` layers of so many inputs and
    outputs at most.

    The choice and the reasons against better ones are logged once.

    Raises:
        InputError: an unknown name, or one that cannot serve; says why. Or MOPO_FAST_ISA names no instruction
            set of this processor.
    """
    _check_isa()
    return _choose(_wanted(name), dtype, device, training, ensemble, policy)


def choose_for_run(name: str, device: torch.device) -> str:
    """The backend of a run's fit and SAC: one that makes rollouts alone leaves these to the best that can.

    Raises:
        InputError: as `choose`.
    """
    _check_isa()
    wanted = _wanted(name)
    makes_rollouts_alone = wanted in _backends() and not _backends()[wanted].trains
    return _choose("auto" if makes_rollouts_alone else wanted, "float32", device, 0, None, None)


def _check_isa() -> None:
    """Refuse a MOPO_FAST_ISA that is not there: no other backend may take the kernels' place unasked."""
    from mopo_fast.backends import cpu

    if cpu.is_built():
        cpu.isa()


def _wanted(name: str) -> str:
    return (os.environ.get("MOPO_FAST_BACKEND") or "auto") if name == "auto" else name


@functools.cache
def _tell(choice: str) -> None:
    logger.info("%s", choice)


@functools.cache
def _choose(
    wanted: str,
    dtype: str,
    device: torch.device,
    training: int | None,
    ensemble: Sizes | None,
    policy: Sizes | None,
) -> str:
    names = ", ".join(_backends())
    if wanted != "auto" and wanted not in _backends():
        raise InputError(f"unknown backend {wanted!r}; there are: auto, {names}")
    reasons: list[str] = []
    for candidate in _backends().values():
        if wanted not in ("auto", candidate.name):
            continue
        reason = _reason_against(candidate, wanted, dtype, device, training, ensemble, policy)
        if reason is None:
            against = f" ({'; '.join(reasons)})" if reasons else ""
            _tell(f"backend: {candidate.name}{against}")
            return candidate.name
        reasons.append(f"{candidate.name}: {reason}")
    raise InputError(f"no backend can serve {dtype} on {device}: {'; '.join(reasons)}")
