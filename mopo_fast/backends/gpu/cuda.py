"""The kernels in CUDA (csrc/cuda/).

The rollout is for Hopper: products in 16 bits, activations in registers. SAC and the fit are trained in
float32, on any GPU from Ampere on.
"""

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from mopo_fast.backends import (
    ROLLOUT_ARRAYS,
    BackendStatus,
    Destination,
    DynamicsArrays,
    PolicyArrays,
    Settings,
    Sizes,
    StepResult,
    network_sizes,
)
from mopo_fast.backends.gpu.record import Record, Run, recorded_rollout, recorded_step
from mopo_fast.backends.gpu.stream import ACTION_SLOTS, POLICY_WIDTH, Stream, stream
from mopo_fast.backends.training import FitRun, SacRun, fit_call, sac_call
from mopo_fast.config import ACTIVATIONS, PENALTIES
from mopo_fast.utils.interrupts import deferred

_SERVED = ("bfloat16", "float16")
DEVICE = "cuda"
"""The type of the devices whose tensors the kernels train."""
# The classes of sizes that there are kernels for: of hidden layers, and of 4 dimensions each of an
# observation and the reward.
_WIDTHS = (200, 256)
_SLOTS = (5, 8)
# What a block's shared memory on every such GPU has room for, in training.
_WIDEST_TRAINED = 1024
# Rollouts of a block, its threads that multiply, and blocks that work side by side.
_TILE, _THREADS, _CLUSTER = 128, 256, 2


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The extension, or None and the reason why it is not there."""
    try:
        return importlib.import_module("mopo_fast._cuda"), ""
    except ModuleNotFoundError:
        return None, "not built; that takes nvcc, and MOPO_FAST_CUDA=1 makes a failure to build it an error"
    except ImportError as error:
        return None, f"the extension mopo_fast._cuda did not load ({error})"


def _extension() -> ModuleType:
    module, _ = _load()
    assert module is not None, "the backend was chosen, so it is there"
    return module


def _capability(device: torch.device | None = None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _refusal_of_capability(device: torch.device | None) -> str | None:
    capability = _capability(device)
    if capability < (8, 0):
        return f"compute capability 8.0 or more is needed, the GPU has {'.'.join(map(str, capability))}"
    return None


def _refusal_of_driver(driver: int, runtime: int, capability: tuple[int, int]) -> str | None:
    """Why a driver cannot run what was built for a CUDA runtime; versions as 1000 major + 10 minor.

    Source: NVIDIA's guide "CUDA Compatibility", on minor versions and on PTX.
    """
    built = f"{runtime // 1000}.{runtime % 1000 // 10}"
    served = f"{driver // 1000}.{driver % 1000 // 10}"
    update = f"update the NVIDIA driver, or build with CUDA {served}"
    if driver == 0:
        return "no NVIDIA driver was found"
    if driver // 1000 < runtime // 1000:
        return f"built for CUDA {built}, the driver serves CUDA {served}: {update}"
    # Newer GPUs run what the driver compiles from PTX, and it compiles none that is newer than itself.
    if capability[0] > 9 and driver < runtime:
        return f"built for CUDA {built}, whose PTX the driver for CUDA {served} does not compile: {update}"
    return None


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _current_stream(device: torch.device) -> int:
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
            return "serves networks with a hidden layer at least"
        if size > most:
            return f"serves {what.format(f'at most {most}')}, not {size}"
    return None


def _run(
    dynamics: DynamicsArrays,
    policy: PolicyArrays | None,
    width: int,
    slots: int,
    weights: Stream,
    start: torch.Tensor,
    rows: torch.Tensor,
    record: Record,
    settings: Settings,
    *,
    horizon: int = 1,
    first_step: int = 0,
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
) -> None:
    """All steps of all rollouts, into the record; without a policy its actions are read."""
    (batch, obs_dim), device = start.shape, start.device
    members = len(dynamics.weights[0])
    clusters = min(-(-batch // (_CLUSTER * _TILE)), _multiprocessors(device) // _CLUSTER)
    scratch = start.new_empty(clusters * _CLUSTER, members, slots, 2, _THREADS, 2)
    max_logvar, min_logvar, carry = dynamics.spelled_out()
    exp_minus_max, exp_min = torch.exp(-max_logvar), torch.exp(min_logvar)
    _extension().rollout(
        bfloat16=settings.operands == "bfloat16",
        width=width,
        slots=slots,
        weights=weights.data.data_ptr(),
        chunk_bytes=weights.chunk_bytes.data_ptr(),
        chunks=len(weights.chunk_bytes),
        obs_dim=obs_dim,
        act_dim=len(dynamics.input_mean) - obs_dim,
        members=members,
        hidden_layers=len(dynamics.weights) - 1,
        activation=ACTIVATIONS.index(dynamics.activation),
        input_mean=dynamics.input_mean.data_ptr(),
        input_std=dynamics.input_std.data_ptr(),
        exp_minus_max=exp_minus_max.data_ptr(),
        exp_min=exp_min.data_ptr(),
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
        policy_hidden_layers=len(policy.weights) - 1 if policy else 0,
        policy_activation=ACTIVATIONS.index(policy.activation) if policy else 0,
        log_std_min=policy.log_std_min if policy else 0.0,
        log_std_max=policy.log_std_max if policy else 0.0,
        batch=batch,
        start=start.data_ptr(),
        rows=rows.data_ptr(),
        horizon=horizon,
        first_step=first_step,
        seed=settings.seed,
        deterministic=settings.deterministic,
        record=[array.data_ptr() for array in record],
        mean=0 if mean is None else mean.data_ptr(),
        std=0 if std is None else std.data_ptr(),
        scratch=scratch.data_ptr(),
        blocks=clusters * _CLUSTER,
        stream=_current_stream(device),
    )


def _prepared(dynamics: DynamicsArrays, policy: PolicyArrays | None, settings: Settings) -> Run:
    """`_run` with the weights packed, for the smallest kernel that they fit."""
    width = _smallest(_WIDTHS, max(network_sizes(dynamics.weights)[1:-1]))
    slots = _smallest(_SLOTS, -(-dynamics.max_logvar.shape[1] // 4))
    weights = stream(dynamics, policy, settings.operands, width, slots)
    return functools.partial(_run, dynamics, policy, width, slots, weights, settings=settings)


def _compact(start: torch.Tensor, rows: torch.Tensor, record: Record, out: Destination, head: int) -> None:
    """Copy the record's rows that exist into the ring, from row `head` on."""
    batch, horizon = record.rewards.shape
    arrays = [out.arrays.get(name) for name in ROLLOUT_ARRAYS]
    offsets = record.lengths.cumsum(0) - record.lengths
    _extension().compact(
        obs_dim=start.shape[1],
        act_dim=record.actions.shape[2],
        batch=batch,
        horizon=horizon,
        start=start.data_ptr(),
        rows=rows.data_ptr(),
        record=[array.data_ptr() for array in record],
        offsets=offsets.data_ptr(),
        out=[(0, 0) if array is None else (array.data_ptr(), array.stride(0)) for array in arrays],
        capacity=out.capacity,
        head=head,
        stream=_current_stream(start.device),
    )


# kSacMetrics in csrc/sac.h.
_SAC_METRICS = 6


def _train(kernel: str, calls: Sequence[Any], shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The calls by an extension's function, all in one launch: the sums that it gives, of this shape."""
    sums = torch.zeros(shape, dtype=torch.float64, device=device)
    memory: list[torch.Tensor] = []

    def allocate(size: int) -> int:
        memory.append(torch.empty(size, dtype=torch.uint8, device=device))
        return memory[-1].data_ptr()

    with torch.cuda.device_of(sums):
        getattr(_extension(), kernel)(calls, sums.data_ptr(), allocate, _current_stream(device))
    return sums


def _count(steps: Sequence[torch.Tensor], made: int) -> None:
    for step in steps:
        step.fill_(made)


def sac_updates(runs: Sequence[SacRun], threads: int) -> list[list[float]]:
    """SAC updates of each run in place, side by side: the sums over them of each of `sac.METRICS`."""
    calls = [sac_call(_extension(), run) for run in runs]
    device = runs[0].log_alpha[0].device
    with deferred():
        metrics: list[list[float]] = _train("sac_updates", calls, (len(runs), _SAC_METRICS), device).tolist()
        for run in runs:
            run.count.fill_(run.updates_before + run.updates)
            _count(run.steps, int(run.count))
    return metrics


def fit_steps(runs: Sequence[FitRun], threads: int) -> list[float]:
    """Steps of the fit of each run in place, side by side: the sums of their losses without weight decay."""
    calls = [fit_call(_extension(), run) for run in runs]
    with deferred():
        losses: list[float] = _train("fit_steps", calls, (len(runs),), runs[0].table.device).tolist()
        for run in runs:
            _count(run.steps, run.steps_before + -(-run.rows.shape[1] // run.config.batch_size))
    return losses


class CudaBackend:
    """float32 arrays on a GPU, the rollout's products in bfloat16 or float16. By name alone."""

    name = "cuda"
    trains = True

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
        # Until its numbers on a GPU have been seen, "auto" does not choose it.
        reason = f"{torch.cuda.get_device_name()}; not tested on a GPU yet"
        return BackendStatus(self.name, True, reason, by_name_only=True)

    def refusal(
        self, dtype: str, device: torch.device, ensemble: Sizes | None = None, policy: Sizes | None = None
    ) -> str | None:
        if dtype not in _SERVED:
            return f"serves {' and '.join(_SERVED)}, not {dtype}"
        if device.type != DEVICE:
            return f"serves CUDA tensors, not {device}"
        if _capability(device) != (9, 0):
            return f"makes rollouts on compute capability 9.0, not {'.'.join(map(str, _capability(device)))}"
        return None if ensemble is None else _refusal_of_sizes(ensemble, policy)

    def training_refusal(self, dtype: str, device: torch.device, widest: int) -> str | None:
        if dtype != "float32":
            return f"trains in float32, not {dtype}"
        if device.type != DEVICE:
            return f"serves CUDA tensors, not {device}"
        if widest > _WIDEST_TRAINED:
            return f"trains layers of at most {_WIDEST_TRAINED} inputs and outputs, not {widest}"
        return _refusal_of_capability(device)

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
        members = len(dynamics.weights[0]) if distributions else 0
        return recorded_step(_prepared(dynamics, None, settings), observations, actions, rows, step, members)

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
        run = _prepared(dynamics, policy, settings)
        act_dim = policy.weights[-1].shape[-1] // 2
        return recorded_rollout(run, _compact, start, rows, act_dim, horizon, out)
