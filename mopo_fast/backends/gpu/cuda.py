"""The CUDA backend: kernels in csrc/cuda/.

Rollouts run on Hopper, with products in 16 bits and activations in registers. SAC and the fit train in
float32 on Ampere and newer GPUs.
"""

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from typing_extensions import override

from mopo_fast.backends.gpu.hopper_weights import ACTION_SLOTS, POLICY_WIDTH, HopperWeights, hopper_weights
from mopo_fast.backends.gpu.padded import Launch, PaddedRollouts, padded_rollout, padded_step
from mopo_fast.backends.interface import (
    Backend,
    BackendStatus,
    FitSteps,
    Need,
    RolloutCall,
    RolloutCounts,
    SacUpdates,
    Sizes,
    StepCall,
    StepResult,
    ValuesCall,
    address,
    kernel_arguments,
    network_sizes,
    refuse_penalty,
)
from mopo_fast.backends.reference import least_values
from mopo_fast.backends.training_calls import fit_call, sac_call
from mopo_fast.config import ACTIVATIONS
from mopo_fast.utils.interrupts import deferred

_SERVED = ("bfloat16", "float16")
# Type of the device whose tensors the kernels take.
_DEVICE = "cuda"
# Sizes that kernels are compiled for: widths of hidden layers, and groups of four dimensions of (observation,
# reward).
_WIDTHS = (200, 256)
_SLOTS = (5, 8)
# Width of the widest layer that training has shared memory for, on every GPU that it serves.
_WIDEST_TRAINED = 1024
# Rollouts of a block, its threads that multiply, and blocks of a cluster.
_TILE, _THREADS, _CLUSTER = 128, 256, 2


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """Return the extension, or None and the reason why it cannot be loaded."""
    try:
        return importlib.import_module("mopo_fast._cuda"), ""
    except ModuleNotFoundError:
        return None, "not built; that takes nvcc, and a GPU or MOPO_FAST_CUDA=1 at the installation"
    except ImportError as error:
        return None, f"the extension mopo_fast._cuda did not load ({error})"


def _extension() -> ModuleType:
    module, _ = _load()
    assert module is not None, "a backend that was chosen can be loaded"
    return module


def _capability(device: torch.device | None = None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _refusal_of_capability(device: torch.device | None) -> str | None:
    capability = _capability(device)
    if capability < (8, 0):
        return f"compute capability 8.0 or more is needed, the GPU has {'.'.join(map(str, capability))}"
    return None


def _refusal_of_driver(driver: int, runtime: int, capability: tuple[int, int]) -> str | None:
    """Return why a driver cannot run a build for a CUDA runtime, or None.

    Source: NVIDIA's guide "CUDA Compatibility", on minor versions and on PTX.

    Args:
        driver: newest CUDA version that the driver serves, 1000 major + 10 minor; 0 without a driver.
        runtime: CUDA version of the build, likewise.
        capability: the GPU's compute capability.
    """
    built = f"{runtime // 1000}.{runtime % 1000 // 10}"
    served = f"{driver // 1000}.{driver % 1000 // 10}"
    update = f"update the NVIDIA driver, or build with CUDA {served}"
    if driver == 0:
        return "no NVIDIA driver was found"
    if driver // 1000 < runtime // 1000:
        return f"built for CUDA {built}, the driver serves CUDA {served}: {update}"
    # GPUs after Hopper run PTX that the driver compiles, and no driver compiles PTX newer than itself.
    if capability[0] > 9 and driver < runtime:
        return f"built for CUDA {built}, whose PTX the driver for CUDA {served} does not compile: {update}"
    return None


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _cuda_stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _smallest(classes: tuple[int, ...], size: int) -> int:
    return next(each for each in classes if each >= size)


def _refusal_of_sizes(ensemble: Sizes, policy: Sizes | None) -> str | None:
    obs_dim = ensemble[-1] // 2 - 1
    limits = [
        ("observations of {} dimensions", obs_dim, 4 * _SLOTS[-1] - 1),
        ("actions of {} dimensions", ensemble[0] - obs_dim, 4 * ACTION_SLOTS),
        ("hidden layers {} wide", max(ensemble[1:-1], default=0), _WIDTHS[-1]),
        ("a policy's hidden layers {} wide", max(policy[1:-1], default=0) if policy else 1, POLICY_WIDTH),
    ]
    for what, size, most in limits:
        if size == 0:
            return "serves networks with at least one hidden layer"
        if size > most:
            return f"serves {what.format(f'at most {most}')}, not {size}"
    return None


def _launch(
    width: int,
    slots: int,
    weights: HopperWeights,
    call: StepCall | RolloutCall,
    padded: PaddedRollouts,
    *,
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
) -> None:
    """Make all steps of all rollouts; see `padded.Launch`."""
    dynamics, policy, start = call.dynamics, call.policy, call.observations
    members, device = len(dynamics.weights[0]), start.device
    clusters = min(-(-len(start) // (_CLUSTER * _TILE)), _multiprocessors(device) // _CLUSTER)
    scratch = start.new_empty(clusters * _CLUSTER, members, slots, 2, _THREADS, 2)
    max_logvar, min_logvar, carry = dynamics.spelled_out()
    exp_minus_max, exp_min = torch.exp(-max_logvar), torch.exp(min_logvar)
    _extension().rollout(
        **kernel_arguments(call),
        bfloat16=call.settings.operands == "bfloat16",
        width=width,
        slots=slots,
        weights=weights.data.data_ptr(),
        chunk_bytes=weights.chunk_bytes.data_ptr(),
        chunks=len(weights.chunk_bytes),
        members=members,
        hidden_layers=len(dynamics.weights) - 1,
        activation=ACTIVATIONS.index(dynamics.activation),
        exp_minus_max=exp_minus_max.data_ptr(),
        exp_min=exp_min.data_ptr(),
        carry=carry.data_ptr(),
        policy_hidden_layers=len(policy.weights) - 1 if policy else 0,
        policy_activation=ACTIVATIONS.index(policy.activation) if policy else 0,
        record=[array.data_ptr() for array in padded],
        mean=address(mean),
        std=address(std),
        scratch=scratch.data_ptr(),
        blocks=clusters * _CLUSTER,
        stream=_cuda_stream(device),
    )


def _prepared(call: StepCall | RolloutCall) -> Launch:
    """Pack the weights and return `_launch` for the smallest kernel that fits them."""
    dynamics = call.dynamics
    width = _smallest(_WIDTHS, max(network_sizes(dynamics.weights)[1:-1]))
    slots = _smallest(_SLOTS, -(-dynamics.max_logvar.shape[1] // 4))
    weights = hopper_weights(dynamics, call.policy, call.settings.operands, width, slots)
    return functools.partial(_launch, width, slots, weights)


def _compact(call: RolloutCall, padded: PaddedRollouts, head: int) -> None:
    """Copy the transitions that exist into the ring; see `padded.Compact`."""
    start, (batch, horizon) = call.observations, padded.rewards.shape
    offsets = padded.offsets()
    _extension().compact(
        obs_dim=start.shape[1],
        act_dim=padded.actions.shape[2],
        batch=batch,
        horizon=horizon,
        start=start.data_ptr(),
        rows=call.rows.data_ptr(),
        record=[array.data_ptr() for array in padded],
        offsets=offsets.data_ptr(),
        out=call.out.addresses(),
        capacity=call.out.capacity,
        head=head,
        stream=_cuda_stream(start.device),
    )


# As kSacMetrics in csrc/sac.h.
_SAC_METRICS = 6


def _train(kernel: str, calls: Sequence[Any], shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Make all calls in one launch.

    Args:
        kernel: name of the extension's function.
        calls: its packed calls.
        shape: shape of the sums that it returns.
        device: the GPU.

    Returns:
        The sums, float64.
    """
    sums = torch.zeros(shape, dtype=torch.float64, device=device)
    memory: list[torch.Tensor] = []

    def allocate(size: int) -> int:
        memory.append(torch.empty(size, dtype=torch.uint8, device=device))
        return memory[-1].data_ptr()

    with torch.cuda.device_of(sums):
        getattr(_extension(), kernel)(calls, sums.data_ptr(), allocate, _cuda_stream(device))
    return sums


def _set_steps(steps: Sequence[torch.Tensor], made: int) -> None:
    for step in steps:
        step.fill_(made)


class CudaBackend(Backend):
    """float32 arrays on an NVIDIA GPU, rollouts' products in bfloat16 or float16; chosen by name only."""

    name = "cuda"
    trains = "kernels"

    @override
    def status(self) -> BackendStatus:
        module, reason = _load()
        if module is None:
            return BackendStatus(self.name, False, reason)
        if not torch.cuda.is_available():
            return BackendStatus(self.name, False, "PyTorch sees no GPU")
        try:
            driver, runtime = module.versions()
        except RuntimeError as error:
            return BackendStatus(self.name, False, str(error))
        refusal = _refusal_of_capability(None) or _refusal_of_driver(driver, runtime, _capability())
        if refusal is not None:
            return BackendStatus(self.name, False, refusal)
        # "auto" does not choose it until it has been tested on a GPU.
        reason = f"{torch.cuda.get_device_name()}; not tested on a GPU yet"
        return BackendStatus(self.name, True, reason, by_name_only=True)

    @override
    def refusal(self, need: Need) -> str | None:
        if need.device.type != _DEVICE:
            return f"serves CUDA tensors, not {need.device}"
        if need.layer_norm:
            return "has no layer norm"
        if need.training is not None:
            if need.dtype != "float32":
                return f"trains in float32, not {need.dtype}"
            if need.training > _WIDEST_TRAINED:
                return f"trains layers of at most {_WIDEST_TRAINED} inputs and outputs, not {need.training}"
            return _refusal_of_capability(need.device)
        if need.dtype not in _SERVED:
            return f"serves {' and '.join(_SERVED)}, not {need.dtype}"
        capability = _capability(need.device)
        if capability != (9, 0):
            return f"makes rollouts on compute capability 9.0, not {'.'.join(map(str, capability))}"
        if reason := refuse_penalty(need, _extension().penalties()):
            return reason
        return None if need.ensemble is None else _refusal_of_sizes(need.ensemble, need.policy)

    @override
    def step(self, call: StepCall) -> StepResult:
        return padded_step(_prepared(call), call)

    @override
    def least_values(self, call: ValuesCall) -> torch.Tensor:
        return least_values(call)

    @override
    def rollout(self, call: RolloutCall) -> RolloutCounts:
        return padded_rollout(_prepared(call), _compact, call)

    @override
    def sac_updates(self, calls: Sequence[SacUpdates], threads: int) -> list[list[float]]:
        packed = [sac_call(_extension(), call) for call in calls]
        device = calls[0].log_alpha[0].device
        shape = len(calls), _SAC_METRICS + calls[0].config.critics
        with deferred():
            metrics: list[list[float]] = _train("sac_updates", packed, shape, device).tolist()
            for call in calls:
                call.count.fill_(call.updates_before + call.updates)
                _set_steps(call.steps, int(call.count))
        return metrics

    @override
    def fit_steps(self, calls: Sequence[FitSteps], threads: int) -> list[float]:
        packed = [fit_call(_extension(), call) for call in calls]
        with deferred():
            losses: list[float] = _train("fit_steps", packed, (len(calls),), calls[0].table.device).tolist()
            for call in calls:
                steps = -(-call.rows.shape[1] // call.config.batch_size)
                _set_steps(call.steps, call.steps_before + steps)
        return losses
