"""The last checks in front of every kernel, made at every call.

C++ gets addresses and trusts them, and a user may have replaced a weight, the elites or the buffer since the
last call. So the shape, type, device and strides of every array are checked, in some tens of microseconds.

Callers check a user's arguments before, in the user's words.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mopo_fast.backends.interface import (
    Backend,
    Destination,
    DynamicsArrays,
    FitSteps,
    Need,
    Parameter,
    RolloutCall,
    RolloutCounts,
    SacUpdates,
    StepCall,
    StepResult,
    ValuesCall,
)
from mopo_fast.config import ACTIVATIONS, MAX_MEMBERS, PENALTIES, ROLLOUT_DTYPES, TRAINING_DTYPES
from mopo_fast.data.transitions import DATA_ARRAYS, array_layout
from mopo_fast.ensemble import check_members
from mopo_fast.errors import InputError
from mopo_fast.utils.machine import MAX_THREADS


def step(backend: Backend, call: StepCall) -> StepResult:
    """Check a call, then pass it to `backend.step`.

    Raises:
        InputError: names an argument, its value and what it must be, here and in the functions below.
    """
    layout, _, act_dim = _check_call(backend, call)
    layout.check("actions", call.actions, len(call.observations), act_dim)
    check_range("step", call.step, 0, 2**32)
    if call.dynamics.penalty_coef and not call.penalties:
        raise InputError(f"penalty_coef={call.dynamics.penalty_coef:g} needs penalties=True")
    if call.dynamics.truncation.needs_penalties and not call.penalties:
        raise InputError(f"truncate_at={call.dynamics.truncation.at:g} needs penalties=True")
    return backend.step(call)


def rollout(backend: Backend, call: RolloutCall) -> RolloutCounts:
    """Check a call, then pass it to `backend.rollout`."""
    check_rollout(backend, call)
    return backend.rollout(call)


def check_rollout(backend: Backend, call: RolloutCall) -> None:
    """Check the call of a rollout."""
    layout, obs_dim, act_dim = _check_call(backend, call)
    policy = call.policy
    layout.network("the policy", policy.weights, policy.biases, (), obs_dim, 2 * act_dim)
    check_known("the policy's activation", policy.activation, ACTIVATIONS)
    check_range("horizon", call.horizon, 1, 2**31)
    check_destination(call.out, layout, obs_dim, act_dim, len(call.observations) * call.horizon)


def least_values(backend: Backend, call: ValuesCall) -> torch.Tensor:
    """Check a call, then pass it to `backend.least_values`."""
    settings, policy = call.settings, call.policy
    check_known("dtype", settings.operands, ROLLOUT_DTYPES)
    _check_serves(backend, Need(settings.operands, call.mean.device))
    check_range("threads", settings.threads, 1, MAX_THREADS)
    check_range("seed", settings.seed, 0, 2**64)
    check_range("samples", call.samples, 1, 2**31)
    layout = Layout(torch.float64 if settings.operands == "float64" else torch.float32, call.mean.device)
    if call.mean.ndim != 3 or min(call.mean.shape) < 1:
        raise _other("the states' mean", call.mean, "[members, rows, obs_dim], none of them 0")
    for name, array in (("mean", call.mean), ("std", call.std)):
        layout.check(f"the states' {name}", array, *call.mean.shape)
    obs_dim = call.mean.shape[2]
    act_dim = policy.biases[-1].shape[-1] // 2
    layout.network("the policy", policy.weights, policy.biases, (), obs_dim, 2 * act_dim)
    check_known("the policy's activation", policy.activation, ACTIVATIONS)
    critics = call.weights[0].shape[0]
    layout.network("the critics", call.weights, call.biases, (critics,), obs_dim + act_dim, 1)
    return backend.least_values(call)


def sac_updates(backend: Backend, calls: Sequence[SacUpdates], threads: int) -> list[list[float]]:
    """Check calls, then pass them to `backend.sac_updates`."""
    check_range("threads", threads, 1, MAX_THREADS)
    for call in calls:
        _check_sac(backend, call)
    parameters = [one for call in calls for one in (*call.actor, *call.critic, call.log_alpha)]
    with _written(parameters):
        return backend.sac_updates(calls, threads)


def fit_steps(backend: Backend, calls: Sequence[FitSteps], threads: int) -> list[float]:
    """Check calls, then pass them to `backend.fit_steps`."""
    check_range("threads", threads, 1, MAX_THREADS)
    for call in calls:
        _check_fit(backend, call)
    parameters = [one for call in calls for one in (*call.layers, *call.norms, *call.bounds)]
    with _written(parameters):
        return backend.fit_steps(calls, threads)


@contextlib.contextmanager
def _written(parameters: Sequence[Parameter]) -> Iterator[None]:
    """Count the writes of a kernel to these tensors as PyTorch counts its own, so that they are noticed.

    Autograd notices that a saved tensor has changed, and `RolloutEngine` that its ensemble has.
    """
    try:
        yield
    finally:
        for tensor in itertools.chain(*parameters):
            if tensor is not None and not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)


@dataclass(frozen=True)
class Layout:
    """The type and the device of all floating-point arrays of a call."""

    dtype: torch.dtype
    device: torch.device

    def check(self, name: str, array: Any, *shape: int, dtype: torch.dtype | None = None) -> None:
        """Raise `InputError` unless `array` is a contiguous tensor of this shape."""
        if not (
            isinstance(array, torch.Tensor)
            and array.shape == shape
            and array.dtype == (dtype or self.dtype)
            and array.device == self.device
            and array.is_contiguous()
            and _is_held(array, array.numel())
        ):
            raise _other(name, array, f"contiguous {dtype or self.dtype} {list(shape)} on {self.device}")

    def check_rows(self, name: str, array: Any, *shape: int, dtype: torch.dtype | None = None) -> None:
        """Raise `InputError` unless `array` is a tensor of this shape with contiguous, separate rows."""
        width = shape[1] if len(shape) > 1 else 1
        if not (
            isinstance(array, torch.Tensor)
            and array.shape == shape
            and array.dtype == (dtype or self.dtype)
            and array.device == self.device
            and (width == 1 or array.stride(1) == 1)
            and (len(array) < 2 or array.stride(0) >= width)
            and _is_held(array, (len(array) - 1) * array.stride(0) + width)
        ):
            expected = f"{dtype or self.dtype} {list(shape)} with contiguous rows on {self.device}"
            raise _other(name, array, expected)

    def network(
        self,
        what: str,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor],
        networks: tuple[int, ...],
        inputs: int,
        outputs: int,
    ) -> None:
        """Raise `InputError` unless the layers lead from `inputs` to `outputs`.

        Args:
            what: name of the network in errors.
            weights: [*networks, in, out] of each layer.
            biases: [*networks, out] of each layer.
            networks: leading dimensions.
            inputs: number of inputs.
            outputs: number of outputs.
        """
        if not weights or len(weights) != len(biases):
            raise InputError(f"{what} has {len(weights)} weights and {len(biases)} biases")
        last = len(weights) - 1
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            width = outputs if i == last else (bias.shape[-1] if bias.ndim else 0)
            self.check(f"{what}'s weights[{i}]", weight, *networks, inputs, width)
            self.check(f"{what}'s biases[{i}]", bias, *networks, width)
            inputs = width


def _is_held(array: torch.Tensor, elements: int) -> bool:
    """Tell whether the storage, which may have been resized, holds so many elements."""
    held = array.untyped_storage().nbytes()
    return (array.storage_offset() + elements) * array.itemsize <= held or not array.numel()


def _other(name: str, array: Any, expected: str) -> InputError:
    if not isinstance(array, torch.Tensor):
        return InputError(f"{name} must be {expected}, got {type(array).__name__}")
    if array.layout != torch.strided:
        return InputError(f"{name} must be {expected}, got one of layout {array.layout}")
    return InputError(
        f"{name} must be {expected}, got {array.dtype} {list(array.shape)} with strides"
        f" {list(array.stride())} on {array.device}"
    )


def check_range(name: str, value: int, low: int, high: int) -> None:
    """Raise `InputError` unless `value` is an int with low <= value < high."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < high:
        raise InputError(f"{name} must be a whole number, {low} <= {name} < {high}, got {value!r}")


def check_known(name: str, value: str, known: Iterable[str]) -> None:
    """Raise `InputError` unless `value` is one of `known`."""
    if value not in known:
        raise InputError(f"unknown {name} {value!r}; there are: {', '.join(known)}")


def _check_serves(backend: Backend, need: Need) -> None:
    if (refusal := backend.refusal(need)) is not None:
        raise InputError(f"{backend.name}: {refusal}")


def _check_call(backend: Backend, call: StepCall | RolloutCall) -> tuple[Layout, int, int]:
    """Check the arguments that a step and a rollout share; return the layout, obs_dim and act_dim."""
    dynamics, observations, settings = call.dynamics, call.observations, call.settings
    check_known("dtype", settings.operands, ROLLOUT_DTYPES)
    layer_norm = dynamics.norms is not None
    _check_serves(backend, Need(settings.operands, observations.device, layer_norm=layer_norm))
    check_range("threads", settings.threads, 1, MAX_THREADS)
    check_range("seed", settings.seed, 0, 2**64)
    dtype = torch.float64 if settings.operands == "float64" else torch.float32
    layout = Layout(dtype, observations.device)
    if observations.ndim != 2 or min(observations.shape) < 1:
        raise _other("observations", observations, "[batch, obs_dim], neither of them 0")
    batch, obs_dim = observations.shape
    layout.check("observations", observations, batch, obs_dim)
    layout.check("rows", call.rows, batch, dtype=torch.int64)
    # The arrays of an object that was checked have not changed since; see `DynamicsArrays`.
    if dynamics.kept.get(_check_dynamics) != (layout, obs_dim):
        _check_dynamics(layout, dynamics, obs_dim)
        dynamics.kept[_check_dynamics] = layout, obs_dim
    return layout, obs_dim, len(dynamics.input_mean) - obs_dim


def _check_dynamics(layout: Layout, dynamics: DynamicsArrays, obs_dim: int) -> None:
    check_known("penalty", dynamics.penalty, PENALTIES)
    check_known("the ensemble's activation", dynamics.activation, ACTIVATIONS)
    weights = dynamics.weights
    if not weights or weights[0].ndim != 3:
        raise InputError("the ensemble needs at least one layer, with weights [members, in, out]")
    members, inputs, _ = weights[0].shape
    act_dim, dims = inputs - obs_dim, obs_dim + 1
    check_range("the ensemble's members", members, 1, MAX_MEMBERS + 1)
    if act_dim < 1:
        raise InputError(f"the ensemble has {inputs} inputs, too few for {obs_dim} observation dimensions")
    layout.network("the ensemble", weights, dynamics.biases, (members,), inputs, 2 * dims)
    for name, norms in zip(("norm_scales", "norm_shifts"), dynamics.norms or (), strict=False):
        if len(norms) != len(weights) - 1:
            raise InputError(f"the ensemble has {len(norms)} {name}, but {len(weights) - 1} hidden layers")
        for i, norm in enumerate(norms):
            layout.check(f"the ensemble's {name}[{i}]", norm, members, weights[i].shape[2])
    layout.check("input_mean", dynamics.input_mean, inputs)
    layout.check("input_std", dynamics.input_std, inputs)
    for name in ("max_logvar", "min_logvar"):
        bound = getattr(dynamics, name)
        layout.check(name, bound, members if len(bound) == members else 1, dims)
    if dynamics.carry is not None:
        layout.check("carry", dynamics.carry, obs_dim)
    layout.check("the termination's low", dynamics.low, obs_dim)
    layout.check("the termination's high", dynamics.high, obs_dim)
    for name in ("elites", "penalty_members"):
        numbers = getattr(dynamics, name)
        check_members(name, numbers, members)
        layout.check(name, numbers, len(numbers), dtype=torch.int64)


def check_destination(out: Destination, layout: Layout, obs_dim: int, act_dim: int, most: int) -> None:
    """Raise `InputError` where `out` cannot take up to `most` rows."""
    for name in DATA_ARRAYS:
        if out.arrays.get(name) is None:
            raise InputError(f"the buffer lacks {name}")
    capacity, floats = out.capacity, layout.dtype
    if floats == torch.float64 and out.arrays["rewards"].dtype == torch.float32:
        # Only the reference computes in float64, and it can write float32.
        floats = torch.float32
    for name, array in out.arrays.items():
        if array is not None:
            width, dtype = array_layout(name, obs_dim, act_dim, floats)
            layout.check_rows(f"the buffer's {name}", array, capacity, *width, dtype=dtype)
    if most > capacity:
        raise InputError(f"the rollouts can make {most} transitions, the buffer holds {capacity}")
    check_range("the buffer's head", out.head, 0, capacity)


def _check_parameter(
    layout: Layout, name: str, parameter: Parameter, *shape: int, target: bool = False
) -> None:
    value, exp_avg, exp_avg_sq, follower = parameter
    layout.check(name, value, *shape)
    layout.check(f"{name}'s exp_avg", exp_avg, *shape)
    layout.check(f"{name}'s exp_avg_sq", exp_avg_sq, *shape)
    if target:
        layout.check(f"{name}'s target", follower, *shape)


def _check_trained(
    layout: Layout,
    what: str,
    parameters: Sequence[Parameter],
    networks: tuple[int, ...],
    sizes: Sequence[int],
    *,
    target: bool = False,
) -> None:
    """Raise `InputError` unless all weights, then all biases, are those of layers of these sizes."""
    depth = len(sizes) - 1
    if len(parameters) != 2 * depth:
        raise InputError(f"{what} has {len(parameters)} parameters, {depth} layers have {2 * depth}")
    for i in range(depth):
        weight, bias = parameters[i], parameters[depth + i]
        shape = (*networks, sizes[i], sizes[i + 1])
        _check_parameter(layout, f"{what}'s weights[{i}]", weight, *shape, target=target)
        _check_parameter(layout, f"{what}'s biases[{i}]", bias, *networks, sizes[i + 1], target=target)


def _trained_layout(
    backend: Backend, dtype: str, example: torch.Tensor, *, layer_norm: bool = False
) -> Layout:
    """Return float32 on the device of `example`; raise `InputError` if the backend cannot train there."""
    if example.dtype != torch.float32:
        raise InputError(
            f"the kernels train contiguous torch.float32 tensors, got {example.dtype}; use backend reference"
        )
    _check_serves(backend, Need(dtype, example.device, training=0, layer_norm=layer_norm))
    return Layout(torch.float32, example.device)


def _hidden(parameters: Sequence[Parameter]) -> list[int]:
    """Return the hidden layers' widths, read from their biases, the second half of all parameters."""
    biases = [bias[0] for bias in parameters[len(parameters) // 2 : -1]]
    return [bias.shape[-1] if bias.ndim else 0 for bias in biases]


def _check_sac(backend: Backend, call: SacUpdates) -> None:
    dtype = call.config.dtype or "float32"
    check_known("dtype", dtype, TRAINING_DTYPES)
    layout = _trained_layout(backend, dtype, call.log_alpha[0])
    _check_parameter(layout, "log_alpha", call.log_alpha)
    if call.real.observations.ndim != 2 or call.real.actions.ndim != 2:
        raise InputError("the data's observations and actions must be [n, dim]")
    obs_dim, act_dim, hidden = call.real.obs_dim, call.real.act_dim, _hidden(call.actor)
    if not hidden:
        raise InputError("the actor needs at least one hidden layer")
    _check_trained(layout, "the actor", call.actor, (), [obs_dim, *hidden, 2 * act_dim])
    sizes, critics = [obs_dim + act_dim, *hidden, 1], call.config.critics
    _check_trained(layout, "the critic", call.critic, (critics,), sizes, target=True)
    for what, data, size, rows in zip(
        ("the data", "the buffer"), (call.real, call.model), call.sizes, call.rows, strict=True
    ):
        for name, array in data.arrays().items():
            width, kind = array_layout(name, obs_dim, act_dim, layout.dtype)
            layout.check_rows(f"{what}'s {name}", array, len(data), *width, dtype=kind)
        needed = (call.first_draw + call.updates) * rows if call.in_order else min(1, rows)
        check_range(f"{what}'s rows", size, needed, len(data) + 1)
        check_range(f"a batch's rows of {what}", rows, 0, 2**31)
    check_range("a batch's rows", sum(call.rows), 1, 2**31)
    check_range("updates", call.updates, 1, 2**31)
    check_range("seed", call.seed, 0, 2**64)
    _check_steps(layout, call.steps)
    Layout(torch.int64, torch.device("cpu")).check("the count of updates", call.count)


def _check_fit(backend: Backend, call: FitSteps) -> None:
    dtype = call.config.dtype or "float32"
    check_known("dtype", dtype, TRAINING_DTYPES)
    layout = _trained_layout(backend, dtype, call.bounds[0][0], layer_norm=bool(call.norms))
    if call.table.ndim != 2 or call.rows.ndim != 2 or min(call.rows.shape) < 1:
        raise InputError("the fit's table and rows must be matrices, the rows [members, count]")
    members, count = call.rows.shape
    (rows, width), inputs = call.table.shape, call.layers[0][0].shape[-2]
    layout.check("the fit's table", call.table, rows, width)
    layout.check_rows("the fit's rows", call.rows, members, count, dtype=torch.int32)
    check_range("the table's columns", width, inputs + call.dims, 2**31)
    low, high = _extremes(call.rows)
    if not 0 <= low <= high < rows:
        raise InputError(f"the fit's rows must be 0 to {rows - 1}, got {low} to {high}")
    check_range("the ensemble's members", members, 1, MAX_MEMBERS + 1)
    hidden = _hidden(call.layers)
    _check_trained(layout, "the ensemble", call.layers, (members,), [inputs, *hidden, 2 * call.dims])
    if len(call.norms) not in (0, 2 * len(hidden)):
        raise InputError(
            f"the ensemble has {len(call.norms)} norm parameters for {len(hidden)} hidden layers"
        )
    for i, (width, norm) in enumerate(zip(2 * hidden, call.norms, strict=False)):
        name = "norm_scales" if i < len(hidden) else "norm_shifts"
        _check_parameter(layout, f"the ensemble's {name}[{i % len(hidden)}]", norm, members, width)
    for name, bound in zip(("max_logvar", "min_logvar"), call.bounds, strict=True):
        _check_parameter(layout, name, bound, call.dims)
    check_known("the ensemble's activation", call.activation, ACTIVATIONS)
    if len(call.config.weight_decay) != len(call.layers) // 2:
        raise InputError(f"weight_decay needs one value per layer, got {call.config.weight_decay}")
    check_range("batch_size", call.config.batch_size, 1, 2**31)
    _check_steps(layout, call.steps)


def _extremes(numbers: torch.Tensor) -> tuple[int, int]:
    if numbers.device.type == "cpu":
        # NumPy takes a tenth of the time of torch's aminmax.
        array = numbers.numpy()
        return int(array.min()), int(array.max())
    low, high = numbers.aminmax()
    return int(low), int(high)


def _check_steps(layout: Layout, steps: Sequence[torch.Tensor]) -> None:
    for step in steps:
        layout.check("Adam's count of steps", step)
