"""The fused rollout in C++ (csrc/), one thread a core, for the best instruction set of the processor."""

import functools
import importlib
import os
from types import ModuleType

import torch

from mopo_fast.backends import (
    ROLLOUT_ARRAYS,
    BackendStatus,
    Destination,
    DynamicsArrays,
    PolicyArrays,
    Settings,
    StepResult,
)
from mopo_fast.config import ACTIVATIONS, PENALTIES
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


def _run(
    dynamics: DynamicsArrays,
    policy: PolicyArrays | None,
    actions: torch.Tensor | None,
    start: torch.Tensor,
    rows: torch.Tensor,
    out: Destination,
    settings: Settings,
    *,
    horizon: int = 1,
    first_step: int = 0,
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
) -> tuple[int, int]:
    """Hand the arrays' addresses to the kernel; without a policy every row is kept."""
    addresses = [out.arrays[name].data_ptr() if name in out.arrays else 0 for name in ROLLOUT_ARRAYS]
    written, cut = extension().rollout(
        isa=isa(),
        obs_dim=start.shape[1],
        act_dim=len(dynamics.input_mean) - start.shape[1],
        dynamics=_network(dynamics.weights, dynamics.biases, dynamics.activation),
        input_mean=dynamics.input_mean.data_ptr(),
        input_std=dynamics.input_std.data_ptr(),
        max_logvar=dynamics.max_logvar.data_ptr(),
        min_logvar=dynamics.min_logvar.data_ptr(),
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
        rows=rows.data_ptr(),
        horizon=horizon,
        first_step=first_step,
        seed=settings.seed,
        deterministic=settings.deterministic,
        keep_every_row=policy is None,
        out=addresses,
        capacity=out.capacity,
        head=out.head,
        mean=0 if mean is None else mean.data_ptr(),
        std=0 if std is None else std.data_ptr(),
        threads=settings.threads,
    )
    return written, cut


class CpuBackend:
    """float32 on CPU tensors of any shape."""

    name = "cpu"

    def status(self) -> BackendStatus:
        module, reason = _load()
        if module is None:
            return BackendStatus(self.name, False, reason)
        try:
            return BackendStatus(self.name, True, f"{isa()}, of {', '.join(isas())}")
        except InputError as error:
            return BackendStatus(self.name, False, str(error))

    def refusal(self, dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"serves CPU tensors, not {device}"
        if dtype != torch.float32:
            return f"serves float32, not {dtype}".replace("torch.", "")
        return None

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
        batch, obs_dim = observations.shape
        scalars = {name: torch.empty(batch) for name in ("rewards", "raw_rewards", "penalties")} | {
            "terminals": torch.empty(batch, dtype=torch.bool),
            "members": torch.empty(batch, dtype=torch.int32),
        }
        arrays = scalars | {"next_observations": torch.empty_like(observations)}
        mean = std = None
        if distributions:
            shape = (dynamics.weights[0].shape[0], batch, obs_dim + 1)
            mean, std = torch.empty(shape), torch.empty(shape)
        _run(
            dynamics,
            None,
            actions,
            observations,
            rows,
            Destination(arrays, 0),
            settings,
            first_step=step,
            mean=mean,
            std=std,
        )
        return StepResult(**arrays, mean=mean, std=std)

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
        return _run(dynamics, policy, None, start, rows, out, settings, horizon=horizon)
