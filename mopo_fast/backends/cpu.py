"""The CPU backend: kernels in C++ (csrc/cpu/) for the processor's best instruction set."""

import contextlib
import functools
import importlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from typing_extensions import override

from mopo_fast.backends.interface import (
    Backend,
    BackendStatus,
    Destination,
    DynamicsArrays,
    FitSteps,
    Need,
    RolloutCall,
    RolloutCounts,
    SacUpdates,
    StepCall,
    StepResult,
    ValuesCall,
    address,
    kernel_arguments,
    refuse_penalty,
)
from mopo_fast.backends.training_calls import fit_call, sac_call
from mopo_fast.config import ACTIVATIONS, TRAINING_DTYPES
from mopo_fast.data.transitions import array_layout
from mopo_fast.ensemble import Norms
from mopo_fast.errors import InputError

logger = logging.getLogger("mopo_fast")

# Instruction sets that multiply bfloat16 in the fit, SAC and rollouts, and in rollouts.
WITH_BFLOAT16 = ("avx512_amx", "avx512_bf16")
WITH_BFLOAT16_ROLLOUTS = (*WITH_BFLOAT16, "neon_bf16")
# Rounds of multiply-adds that take some milliseconds in float32.
_GAIN_ROUNDS = 20_000

_Network = tuple[list[int], list[int], list[int], int, int, list[int], list[int]]
_NO_POLICY: _Network = ([], [], [], 0, 0, [], [])


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """Return the extension, or None and the reason why it cannot be loaded."""
    try:
        return importlib.import_module("mopo_fast._cpu"), ""
    except ModuleNotFoundError:
        return None, (
            "the C++ kernels were not built; install g++ 11 or newer, then mopo_fast again from its sources:"
            " `pip install --force-reinstall --no-deps --no-cache-dir .`"
        )
    except ImportError as error:
        return None, f"the C++ kernels did not load ({error}); install mopo_fast again"


def extension() -> ModuleType:
    """Return the compiled extension.

    Raises:
        InputError: it was not built or cannot be loaded.
    """
    module, reason = _load()
    if module is None:
        raise InputError(reason)
    return module


def is_built() -> bool:
    """Tell whether the compiled extension can be loaded."""
    return _load()[0] is not None


def isas() -> list[str]:
    """Return the instruction sets that this processor can run, best first."""
    return list(extension().isas())


@functools.cache
def _best() -> str:
    return isas()[0]


def isa() -> str:
    """Return the instruction set in use: the one that MOPO_FAST_ISA names, or the best.

    Raises:
        InputError: MOPO_FAST_ISA names an instruction set that this processor lacks.
    """
    wanted = os.environ.get("MOPO_FAST_ISA", "")
    if wanted and wanted not in isas():
        raise InputError(f"MOPO_FAST_ISA={wanted} cannot run on this processor; it has: {', '.join(isas())}")
    return wanted or _best()


def _precision(dtype: str | None) -> int:
    """Return the Precision of csrc/common.h for a dtype.

    Without products of bfloat16, float32 is taken for bfloat16x3: it is more accurate, and no slower.
    """
    if dtype == "bfloat16x3" and isa() not in WITH_BFLOAT16:
        _say_float32(isa())
        dtype = None
    return TRAINING_DTYPES.index(dtype or "float32")


@functools.cache
def _say_float32(name: str) -> None:
    logger.info("bfloat16x3 is computed in float32: the instruction set %s has no products of it", name)


def bfloat16_gain() -> float:
    """Return how many times as fast as float32's the multiply-adds of bfloat16 are on one core; 0 without.

    The first call for an instruction set measures it, for some milliseconds.

    Raises:
        InputError: as `isa`.
    """
    return _measure_gain(isa())


@functools.cache
def _measure_gain(name: str) -> float:
    if name not in WITH_BFLOAT16_ROLLOUTS:
        return 0.0

    def rate(bfloat16: bool) -> float:
        began = time.perf_counter()
        flop: float = extension().multiply_adds(isa=name, bfloat16=bfloat16, rounds=_GAIN_ROUNDS, threads=1)
        return flop / (time.perf_counter() - began)

    # The best of each is the least disturbed.
    rates = [(rate(True), rate(False)) for _ in range(5)]
    half, single = (max(some) for some in zip(*rates, strict=True))
    return float(half / single)


@contextlib.contextmanager
def _within_resources() -> Iterator[None]:
    """Turn a kernel's lack of memory or threads into an `InputError` that says what to lower."""
    try:
        yield
    except MemoryError as error:
        raise InputError(
            "there is no memory for the kernel's arrays; lower threads, the horizon or the networks' sizes"
        ) from error
    except extension().ThreadError as error:
        raise InputError(f"the kernel cannot start its threads ({error}); lower threads") from error


def _network(
    weights: list[torch.Tensor], biases: list[torch.Tensor], activation: str, norms: Norms | None = None
) -> _Network:
    networks = weights[0].shape[0] if weights[0].ndim == 3 else 1
    sizes = [weights[0].shape[-2], *(weight.shape[-1] for weight in weights)]
    return (
        [weight.data_ptr() for weight in weights],
        [bias.data_ptr() for bias in biases],
        sizes,
        networks,
        ACTIVATIONS.index(activation),
        [scale.data_ptr() for scale in norms[0]] if norms else [],
        [shift.data_ptr() for shift in norms[1]] if norms else [],
    )


def _prepared(
    dynamics: DynamicsArrays, set_in_use: str, precision: int
) -> tuple[_Network, Any, tuple[torch.Tensor, ...]]:
    """Return the ensemble's network, its packed weights and `DynamicsArrays.spelled_out`.

    They are kept for later calls, since packing takes longer than a step of few rows. A policy is packed at
    every call: it is small, and training changes it between rollouts.
    """
    key = _prepared, set_in_use, precision
    kept: tuple[_Network, Any, tuple[torch.Tensor, ...]] | None = dynamics.kept.get(key)
    if kept is None or not kept[1].resembles(kept[0]):
        network = _network(dynamics.weights, dynamics.biases, dynamics.activation, dynamics.norms)
        with _within_resources():
            packed = extension().pack(network, isa=set_in_use, precision=precision)
        kept = dynamics.kept[key] = network, packed, dynamics.spelled_out()
    return kept


def _launch(
    call: StepCall | RolloutCall,
    out: Destination,
    *,
    actions: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
) -> RolloutCounts:
    """Run the rollout kernel."""
    dynamics, policy = call.dynamics, call.policy
    set_in_use, precision = isa(), _precision(call.settings.operands)
    network, packed, (max_logvar, min_logvar, carry) = _prepared(dynamics, set_in_use, precision)
    arguments = dict(
        **kernel_arguments(call),
        isa=set_in_use,
        dynamics=network,
        packed=packed,
        max_logvar=max_logvar.data_ptr(),
        min_logvar=min_logvar.data_ptr(),
        carry=carry.data_ptr(),
        policy=_network(policy.weights, policy.biases, policy.activation) if policy else _NO_POLICY,
        actions=address(actions),
        penalties=call.penalties,
        precision=precision,
        keep_every_row=policy is None,
        out=out.addresses(),
        capacity=out.capacity,
        head=out.head,
        mean=address(mean),
        std=address(std),
        threads=call.settings.threads,
    )
    with _within_resources():
        return RolloutCounts(*extension().rollout(**arguments))


class CpuBackend(Backend):
    """Rollouts and training on CPU tensors of any shape: float32, or with less precise products."""

    name = "cpu"
    trains = "kernels"

    @override
    def status(self) -> BackendStatus:
        module, reason = _load()
        if module is None:
            return BackendStatus(self.name, False, reason)
        try:
            return BackendStatus(self.name, True, f"{isa()}, of {', '.join(isas())}")
        except InputError as error:
            return BackendStatus(self.name, False, str(error))

    @override
    def refusal(self, need: Need) -> str | None:
        if need.device.type != "cpu":
            return f"serves CPU tensors, not {need.device}"
        if need.dtype not in TRAINING_DTYPES:
            return f"serves {', '.join(TRAINING_DTYPES)}, not {need.dtype}"
        return refuse_penalty(need, extension().penalties())

    @override
    def step(self, call: StepCall) -> StepResult:
        batch, obs_dim = call.observations.shape
        arrays: dict[str, torch.Tensor] = {}
        for name in call.arrays:
            row, dtype = array_layout(name, obs_dim, call.actions.shape[1], torch.float32)
            # Without torch's default type and device, which a user may have changed.
            arrays[name] = call.observations.new_empty(batch, *row, dtype=dtype)
        mean, std = call.empty_distributions()
        _launch(call, Destination(arrays, 0), actions=call.actions, mean=mean, std=std)
        return StepResult(**arrays, mean=mean, std=std)

    @override
    def rollout(self, call: RolloutCall) -> RolloutCounts:
        return _launch(call, call.out)

    @override
    def least_values(self, call: ValuesCall) -> torch.Tensor:
        members, rows, obs_dim = call.mean.shape
        policy, settings = call.policy, call.settings
        q = call.mean.new_empty(call.samples, members, rows)
        with _within_resources():
            extension().least_values(
                isa=isa(),
                obs_dim=obs_dim,
                act_dim=policy.biases[-1].shape[0] // 2,
                policy=_network(policy.weights, policy.biases, policy.activation),
                critics=_network(call.weights, call.biases, "relu"),
                log_std_min=policy.log_std_min,
                log_std_max=policy.log_std_max,
                mean=call.mean.data_ptr(),
                std=call.std.data_ptr(),
                samples=call.samples,
                members=members,
                rows=rows,
                seed=settings.seed,
                precision=_precision(settings.operands),
                q=q.data_ptr(),
                threads=settings.threads,
            )
        return q

    @override
    def sac_updates(self, calls: Sequence[SacUpdates], threads: int) -> list[list[float]]:
        # The calls run side by side, each on its share of the threads.
        packed = [sac_call(extension(), call, _precision(call.config.dtype)) for call in calls]
        with _within_resources():
            each = max(1, threads // len(calls))
            sums: list[list[float]] = extension().sac_updates(packed, isa=isa(), threads=each)
        return sums

    @override
    def fit_steps(self, calls: Sequence[FitSteps], threads: int) -> list[float]:
        # The calls run one after the other, since each keeps every core busy.
        packed = [fit_call(extension(), call, _precision(call.config.dtype)) for call in calls]
        with _within_resources():
            losses: list[float] = extension().fit_steps(packed, isa=isa(), threads=threads)
        return losses
