"""The fused steps of the fit against autograd in float64, on every instruction set."""

from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import assert_trained_alike, fit_to_double

from mopo_fast import fit as fit_module
from mopo_fast.backends import cpu
from mopo_fast.config import DynamicsConfig
from mopo_fast.data import Transitions
from mopo_fast.fit import Fit, _Batch, fit_dynamics

# obs_dim, act_dim, rows of each member, config
CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "canonical": (17, 6, 600, {}),
    "short last batch": (11, 3, 100, {"hidden": (24, 33), "batch_size": 48, "members": 3}),
    "relu": (5, 2, 60, {"hidden": (17, 40), "activation": "relu", "batch_size": 20}),
    "tanh": (5, 2, 60, {"hidden": (17, 40), "activation": "tanh", "batch_size": 20}),
    "one member, one row": (3, 1, 3, {"hidden": (8,), "members": 1, "batch_size": 1}),
    "one unit": (3, 1, 30, {"hidden": (1, 1), "members": 2, "batch_size": 10}),
    "linear": (4, 2, 60, {"hidden": (), "members": 2, "batch_size": 30}),
    "humanoid": (376, 17, 70, {"hidden": (40,), "members": 2, "batch_size": 70}),
    "edges of tiles": (10, 5, 90, {"hidden": (32, 31, 48, 16), "batch_size": 37, "members": 3}),
    "batch larger than the data": (4, 2, 25, {"hidden": (20, 20), "members": 32, "batch_size": 1000}),
}


def transitions(count: int, obs_dim: int, act_dim: int, scale: float = 0.3) -> Transitions:
    g = torch.Generator().manual_seed(1)
    observations = torch.randn(count, obs_dim, generator=g)
    return Transitions(
        observations=observations,
        actions=torch.randn(count, act_dim, generator=g).tanh(),
        rewards=torch.randn(count, generator=g),
        next_observations=observations + scale * torch.randn(count, obs_dim, generator=g),
        terminals=torch.zeros(count, dtype=torch.bool),
    )


def make(case: str, backend: str, threads: int = 1, double: bool = False, dtype: str = "float32") -> Fit:
    obs_dim, act_dim, count, options = CASES[case]
    hidden = options.get("hidden", (200,) * 4)
    decay = tuple(1e-3 * (layer + 1) for layer in range(len(hidden) + 1))
    members = options.get("members", 7)
    config = DynamicsConfig(
        **{
            "hidden": hidden,
            "members": members,
            **options,
            "weight_decay": decay,
            "elites": 1,
            "dtype": dtype,
        }
    )
    fit = Fit(transitions(count + 200, obs_dim, act_dim), 0, config, "cpu", backend, threads)
    fit.rows = fit.rows[:, :count]
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for bias in fit.model.biases:
            bias.normal_(0.0, 0.2, generator=g)
        # Raw log-variances on both sides of the bounds, and far beyond them.
        fit.model.biases[-1][:, obs_dim + 1] = 60.0
        fit.model.biases[-1][:, -1] = -90.0
        fit.model.max_logvar.uniform_(-1.0, 0.5, generator=g)
        fit.model.min_logvar.uniform_(-8.0, -4.0, generator=g)
    if double:
        return fit_to_double(fit)
    return fit


def state(fit: Fit) -> dict[str, torch.Tensor]:
    """Of the parameters and of Adam."""
    parameters = {name for name, _ in fit.model.named_parameters()}
    return {
        name: tensor
        for name, tensor in fit._live_state().items()
        if name in parameters or name.rpartition(".")[0] in parameters
    }


def steps(fit: Fit, rows: np.ndarray) -> float:
    return fit.steps(torch.from_numpy(rows))


@pytest.mark.parametrize("one_step", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_pytorch(
    case: str, isa: str, dtype: str, one_step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOPO_FAST_ISA", isa)
    before = state(make(case, "cpu"))
    fits = [make(case, backend, dtype=dtype) for backend in ("cpu", "reference")]
    fits.append(make(case, "reference", double=True))
    batch = fits[0].config.batch_size
    losses = [steps(fit, fit.rows[:, :batch] if one_step else fit.rows) for fit in fits]
    kernel, same, exact = map(state, fits)
    assert_trained_alike(kernel, same, exact, before, one_step)
    usual, error = abs(losses[1] - losses[2]), abs(losses[0] - losses[2])
    assert error <= 2.0 * usual + 1e-6 * abs(losses[2])


def test_every_parameter_moves() -> None:
    fit = make("canonical", "cpu")
    before = {name: tensor.clone() for name, tensor in state(fit).items()}
    steps(fit, fit.rows)
    for name, tensor in state(fit).items():
        assert not torch.equal(tensor, before[name]), name
    assert fit.steps_made == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [2, 3, 6, 64])
@pytest.mark.parametrize(
    "case", ["short last batch", "linear", "edges of tiles", "batch larger than the data"]
)
@pytest.mark.parametrize("isa", cpu.isas())
def test_result_does_not_depend_on_threads(
    isa: str, case: str, threads: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOPO_FAST_ISA", isa)
    one, many = make(case, "cpu", dtype=dtype), make(case, "cpu", threads, dtype=dtype)
    assert steps(one, one.rows) == steps(many, many.rows)
    ours, theirs = state(one), state(many)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("isa", cpu.isas())
def test_bfloat16_rounds_every_factor(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far nearer to PyTorch on the same rounded factors than to unrounded ones."""
    monkeypatch.setenv("MOPO_FAST_ISA", isa)
    fits = [make("tanh", "cpu", dtype="bfloat16"), make("tanh", "reference", dtype="bfloat16")]
    fits.append(make("tanh", "reference"))
    for fit in fits:
        steps(fit, fit.rows[:, :20])
    kernel, rounded, unrounded = map(state, fits)
    for layer in range(3):
        name = f"weights.{layer}.exp_avg"
        error, distance = (float((kernel[name] - other[name]).norm()) for other in (rounded, unrounded))
        assert error < 0.02 * distance, f"{name}: {error:.3g} beside {distance:.3g}"


def test_result_does_not_depend_on_the_calls() -> None:
    whole, parts = make("short last batch", "cpu"), make("short last batch", "cpu")
    steps(whole, whole.rows)
    # The columns of a wider matrix are not contiguous.
    steps(parts, parts.rows[:, :48])
    steps(parts, parts.rows[:, 48:])
    ours, theirs = state(whole), state(parts)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_fit_goes_through_the_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fused(self: Fit, rows: torch.Tensor) -> float:
        seen.append(("cpu", rows.shape[1]))
        return 0.0

    def batched(self: _Batch, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(("reference", inputs.shape[1]))
        return torch.zeros(())

    monkeypatch.setattr(Fit, "fused_steps", fused)
    monkeypatch.setattr(_Batch, "__call__", batched)
    monkeypatch.setattr(fit_module, "_STEPS_AT_ONCE", 2)
    config = DynamicsConfig(
        hidden=(8,), weight_decay=(0.0, 0.0), batch_size=16, max_epochs=1, members=2, elites=1
    )
    fit_dynamics(transitions(100, 3, 1), config=config, backend=backend)
    assert seen == [(backend, n) for n in (32, 32, 16)]


def test_backends_fit_alike() -> None:
    config = DynamicsConfig(hidden=(32, 32), weight_decay=(1e-5,) * 3, batch_size=32, max_epochs=15)
    data = transitions(600, 3, 1, scale=0.0)
    data.next_observations = data.observations + 0.5 * data.observations.sin() * data.actions
    data.rewards = data.observations[:, 0] - data.actions[:, 0].square()
    held_out = {}
    for backend in ("cpu", "reference"):
        records = []
        fit_dynamics(data, config=config, backend=backend, on_epoch=records.append)
        held_out[backend] = np.array([record.holdout_mse for record in records])
    assert held_out["cpu"][-1].mean() < 0.2 * held_out["cpu"][0].mean()
    np.testing.assert_allclose(held_out["cpu"], held_out["reference"], rtol=0.02)
