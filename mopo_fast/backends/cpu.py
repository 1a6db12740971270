"""The kernels in C++ (csrc/), one thread a core, for the best instruction set of the processor."""

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch

from mopo_fast.backends.interface import (
    Backend,
    BackendStatus,
    Destination,
    FitRun,
    Need,
    RolloutCall,
    SacRun,
    StepCall,
    StepResult,
)
from mopo_fast.backends.training_calls import fit_call, sac_call
from mopo_fast.config import ACTIVATIONS, PENALTIES
from mopo_fast.data.transitions import ROLLOUT_ARRAYS, array_layout
from mopo_fast.errors import InputError

_Network = tuple[list[int], list[int], list[int], int, int]
_NO_POLICY: _Network = ([], [], [], 0, 0)


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The extension, or None and the reason why it is not there."""
    try:
        return importlib.import_module("mopo_fast._cpu"), ""
    except ImportError as error:
        return None, f"the extension mopo_fast._cpu did not load ({error}); install with: pip install ."


def extension() -> ModuleType:
    """The compiled extension.

    Raises:
        InputError: it was not built, or does not load; says why.
    """
    module, reason = _load()
    if module is None:
        raise InputError(reason)
    return module


def is_built() -> bool:
    """Tell whether the compiled extension is there."""
    return _load()[0] is not None


def isas() -> list[str]:
    """Instruction sets that this processor can run, best first."""
    return list(extension().isas())


def isa() -> str:
    """The instruction set in use: MOPO_FAST_ISA, else the best.

    Raises:
        InputError: MOPO_FAST_ISA names one that this processor lacks.
    """
    wanted = os.environ.get("MOPO_FAST_ISA", "")
    if wanted and wanted not in isas():
        raise InputError(f"MOPO_FAST_ISA={wanted} cannot run on this processor; it has: {', '.join(isas())}")
    return wanted or isas()[0]


@contextlib.contextmanager
def _within_resources() -> Iterator[None]:
    """Tell what to do where a kernel finds no memory or the system has no more threads."""
    try:
        yield
    except MemoryError as error:
        raise InputError(
            "there is no memory for the kernel's arrays; lower threads, the horizon or the networks' sizes"
        ) from error
    except extension().ThreadError as error:
        raise InputError(f"the kernel cannot start its threads ({error}); lower threads") from error


def _network(weights: list[torch.Tensor], biases: list[torch.Tensor], activation: str) -> _Network:
    networks = weights[0].shape[0] if weights[0].ndim == 3 else 1
    sizes = [weights[0].shape[-2], *(weight.shape[-1] for weight in weights)]
    return (
        [weight.data_ptr() for weight in weights],
        [bias.data_ptr() for bias in biases],
        sizes,
        networks,
        ACTIVATIONS.index(activation),
    )


def _launch(
    call: StepCall | RolloutCall,
    out: Destination,
    *,
    actions: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
) -> tuple[int, int]:
    """Hand the arrays' addresses to the kernel; without a policy every row is kept."""
    dynamics, policy, start, settings = call.dynamics, call.policy, call.observations, call.settings
    arrays = [out.arrays.get(name) for name in ROLLOUT_ARRAYS]
    max_logvar, min_logvar, carry = dynamics.spelled_out()
    kernel = _within_resources()(extension().rollout)
    written, cut = kernel(
        isa=isa(),
        obs_dim=start.shape[1],
        act_dim=len(dynamics.input_mean) - start.shape[1],
        dynamics=_network(dynamics.weights, dynamics.biases, dynamics.activation),
        input_mean=dynamics.input_mean.data_ptr(),
        input_std=dynamics.input_std.data_ptr(),
        max_logvar=max_logvar.data_ptr(),
        min_logvar=min_logvar.data_ptr(),
        carry=carry.data_ptr(),
        log_std=dynamics.log_std,
        elites=dynamics.elites.data_ptr(),
        num_elites=len(dynamics.elites),
        penalty_members=dynamics.penalty_members.data_ptr(),
        num_penalty_members=len(dynamics.penalty_members),
        penalty=PENALTIES.index(dynamics.penalty),
        penalty_coef=dynamics.penalty_coef,
        low=dynamics.low.data_ptr(),
        high=dynamics.high.data_ptr(),
        policy=_network(policy.weights, policy.biases, policy.activation) if policy else _NO_POLICY,
        log_std_min=policy.log_std_min if policy else 0.0,
        log_std_max=policy.log_std_max if policy else 0.0,
        actions=0 if actions is None else actions.data_ptr(),
        batch=len(start),
        start=start.data_ptr(),
        rows=call.rows.data_ptr(),
        horizon=call.horizon,
        first_step=call.step,
        seed=settings.seed,
        deterministic=settings.deterministic,
        bfloat16=settings.operands == "bfloat16",
        keep_every_row=policy is None,
        out=[(0, 0) if array is None else (array.data_ptr(), array.stride(0)) for array in arrays],
        capacity=out.capacity,
        head=out.head,
        mean=0 if mean is None else mean.data_ptr(),
        std=0 if std is None else std.data_ptr(),
        threads=settings.threads,
    )
    return written, cut


class CpuBackend(Backend):
    """float32 on CPU tensors of any shape."""

    name = "cpu"
    trains = "kernels"

    def status(self) -> BackendStatus:
        module, reason = _load()
        if module is None:
            return BackendStatus(self.name, False, reason)
        try:
            return BackendStatus(self.name, True, f"{isa()}, of {', '.join(isas())}")
        except InputError as error:
            return BackendStatus(self.name, False, str(error))

    def refusal(self, need: Need) -> str | None:
        if need.device.type != "cpu":
            return f"serves CPU tensors, not {need.device}"
        if need.dtype not in ("float32", "bfloat16"):
            return f"serves float32 and bfloat16, not {need.dtype}"
        return None

    def step(self, call: StepCall) -> StepResult:
        batch, obs_dim = call.observations.shape
        # Not torch's default type and device, which a user may have set.
        empty = call.observations.new_empty
        arrays = {}
        for name in ("next_observations", "rewards", "terminals", "raw_rewards", "penalties", "members"):
            row, dtype = array_layout(name, obs_dim, call.actions.shape[1], torch.float32)
            arrays[name] = empty(batch, *row, dtype=dtype)
        mean = std = None
        if call.distributions:
            shape = (len(call.dynamics.weights[0]), batch, obs_dim + 1)
            mean, std = empty(shape), empty(shape)
        _launch(call, Destination(arrays, 0), actions=call.actions, mean=mean, std=std)
        return StepResult(**arrays, mean=mean, std=std)

    def rollout(self, call: RolloutCall) -> tuple[int, int]:
        return _launch(call, call.out)

    def sac_updates(self, runs: Sequence[SacRun], threads: int) -> list[list[float]]:
        """All runs side by side, each with its share of the threads."""
        calls = [sac_call(extension(), run) for run in runs]
        with _within_resources():
            each = max(1, threads // len(runs))
            sums: list[list[float]] = extension().sac_updates(calls, isa=isa(), threads=each)
        return sums

    def fit_steps(self, runs: Sequence[FitRun], threads: int) -> list[float]:
        """One run after the other, since each keeps every core busy."""
        calls = [fit_call(extension(), run) for run in runs]
        with _within_resources():
            losses: list[float] = extension().fit_steps(calls, isa=isa(), threads=threads)
        return losses
