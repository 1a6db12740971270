"""The kernels in C++ (csrc/), one thread a core, for the best instruction set of the processor."""

import functools
import importlib
import math
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
    Sizes,
    StepResult,
)
from mopo_fast.config import ACTIVATIONS, PENALTIES, DynamicsConfig, SACConfig
from mopo_fast.data.transitions import Transitions
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


def use_large_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Ask for large pages for a CPU tensor that has not been written to yet, if the extension is there.

    Rows drawn from it at random then cost fewer walks through page tables.
    """
    module, _ = _load()
    if module is not None and tensor.device.type == "cpu":
        module.use_large_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def in_large_pages(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor's copy in memory of `use_large_pages`; another device's tensor itself."""
    return use_large_pages(torch.empty_like(tensor)).copy_(tensor) if tensor.device.type == "cpu" else tensor


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
    arrays = [out.arrays.get(name) for name in ROLLOUT_ARRAYS]
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


# A parameter under training: its value, Adam's two moments and the target that follows it, if any.
Parameter = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


def _address(tensor: torch.Tensor | None, dtype: torch.dtype = torch.float32) -> int:
    """Where a tensor's numbers are; 0 for None.

    Raises:
        InputError: the kernel cannot read it as it is.
    """
    if tensor is None:
        return 0
    _check(tensor, dtype, tensor.is_contiguous())
    return tensor.data_ptr()


def _array(tensor: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Where an array's rows are, and how many elements they are apart: it may be columns of a table.

    Raises:
        InputError: the kernel cannot read it as it is.
    """
    _check(tensor, dtype, tensor.ndim == 1 or tensor.shape[1] == 1 or tensor.stride(1) == 1)
    return tensor.data_ptr(), tensor.stride(0)


def _check(tensor: torch.Tensor, dtype: torch.dtype, side_by_side: bool) -> None:
    if tensor.dtype != dtype or tensor.device.type != "cpu" or not side_by_side:
        raise InputError(
            f"the cpu backend reads and trains contiguous {dtype} tensors where they are, got {tensor.dtype},"
            f" strides {tensor.stride()}, on {tensor.device}; use backend reference"
        )


def _trained(parameters: list[Parameter]) -> list[tuple[int, int, list[int]]]:
    """(in, out, addresses) of each layer, from all weights and then all biases."""
    depth = len(parameters) // 2
    return [
        (*weight[0].shape[-2:], [_address(tensor) for tensor in (*weight, *bias)])
        for weight, bias in zip(parameters[:depth], parameters[depth:], strict=True)
    ]


def _source(data: Transitions, size: int) -> tuple[list[tuple[int, int]], int]:
    floats = (data.observations, data.actions, data.rewards, data.next_observations)
    return [*map(_array, floats), _array(data.terminals, torch.bool)], size


def sac_updates(
    *,
    actor: list[Parameter],
    critic: list[Parameter],
    log_alpha: Parameter,
    config: SACConfig,
    actor_learning_rate: float,
    target_entropy: float,
    real: Transitions,
    model: Transitions,
    sizes: tuple[int, int],
    rows: tuple[int, int],
    updates: int,
    updates_before: int,
    first_draw: int,
    seed: int,
    threads: int,
) -> list[float]:
    """SAC updates in place (csrc/sac.h): the sum over them of each of `sac.METRICS`.

    Args:
        actor, critic: the weights of all layers, then the biases; the critics' with targets.
        real, model: to draw from, their first `sizes` rows; `rows` of each make a batch. CPU tensors of
            float32, terminals bool, the numbers of a row side by side.
        updates_before: Adam's steps so far.
        first_draw: number of the first update for the random counters, with `seed` as their key.
    """
    sums: list[float] = extension().sac_updates(
        isa=isa(),
        obs_dim=real.obs_dim,
        act_dim=real.act_dim,
        critics=config.critics,
        actor=_trained(actor),
        critic=_trained(critic),
        log_alpha=[_address(tensor) for tensor in log_alpha[:3]],
        learning_rates=[actor_learning_rate, config.critic_learning_rate, config.alpha_learning_rate],
        discount=config.discount,
        polyak=config.polyak,
        target_entropy=target_entropy,
        log_std_min=config.log_std_min,
        log_std_max=config.log_std_max,
        alpha_max=math.inf if config.alpha_max is None else config.alpha_max,
        critic_loss_scale=0.5 if config.critic_loss == "half_mse" else 1.0,
        simultaneous=config.simultaneous,
        real=_source(real, sizes[0]),
        model=_source(model, sizes[1]),
        real_rows=rows[0],
        model_rows=rows[1],
        updates=updates,
        updates_before=updates_before,
        first_draw=first_draw,
        seed=seed,
        threads=threads,
    )
    return sums


def fit_steps(
    *,
    layers: list[Parameter],
    bounds: tuple[Parameter, Parameter],
    activation: str,
    table: torch.Tensor,
    dims: int,
    rows: torch.Tensor,
    config: DynamicsConfig,
    steps_before: int,
    threads: int,
) -> float:
    """Steps of the ensemble's fit in place (csrc/fit.h): the sum of their losses, weight decay left out.

    Args:
        layers: the weights of all layers, then the biases.
        bounds: max_logvar and min_logvar.
        table: [n, obs + act + obs + 1 or more], the inputs, standardised, and the `dims` = obs + 1 targets.
        rows: int64 [members, count], the rows that each member sees; may be columns of a wider matrix.
        steps_before: Adam's steps so far.
    """
    width = layers[0][0].shape[1]
    stride = _array(rows, torch.int64)[1]
    max_logvar, min_logvar = ([_address(tensor) for tensor in bound[:3]] for bound in bounds)
    loss: float = extension().fit_steps(
        isa=isa(),
        members=rows.shape[0],
        dims=dims,
        layers=_trained(layers),
        activation=ACTIVATIONS.index(activation),
        max_logvar=max_logvar,
        min_logvar=min_logvar,
        inputs=_address(table),
        targets=_address(table) + width * table.element_size(),
        stride=table.shape[1],
        rows=rows.data_ptr(),
        count=rows.shape[1],
        rows_stride=stride,
        batch=config.batch_size,
        learning_rate=config.learning_rate,
        logvar_bound_weight=config.logvar_bound_weight,
        weight_decay=list(config.weight_decay),
        steps_before=steps_before,
        bfloat16=config.dtype == "bfloat16",
        threads=threads,
    )
    return loss


class CpuBackend:
    """float32 on CPU tensors of any shape."""

    name = "cpu"
    trains = True

    def status(self) -> BackendStatus:
        module, reason = _load()
        if module is None:
            return BackendStatus(self.name, False, reason)
        try:
            return BackendStatus(self.name, True, f"{isa()}, of {', '.join(isas())}")
        except InputError as error:
            return BackendStatus(self.name, False, str(error))

    def refusal(
        self, dtype: str, device: torch.device, ensemble: Sizes | None = None, policy: Sizes | None = None
    ) -> str | None:
        if device.type != "cpu":
            return f"serves CPU tensors, not {device}"
        if dtype not in ("float32", "bfloat16"):
            return f"serves float32 and bfloat16, not {dtype}"
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
