"""Test the fused steps of the fit against autograd in float64, on every instruction set."""

import numpy as np
import pytest
import torch
from kernel_cases import (
    FIT_CASES,
    assert_no_denormals,
    assert_trained_alike,
    fill_with_denormals,
    fit_state,
    fit_steps,
    fit_transitions,
    make_fit,
    training_kernels,
)

from mopo_fast import fit as fit_module
from mopo_fast.backends import cpu
from mopo_fast.backends.cpu import CpuBackend
from mopo_fast.backends.interface import FitSteps
from mopo_fast.config import DynamicsConfig
from mopo_fast.fit import PyTorchSteps, fit_dynamics


@pytest.mark.parametrize("one_step", [True, False])
@pytest.mark.parametrize(("isa", "dtype"), training_kernels())
@pytest.mark.parametrize("case", FIT_CASES)
def test_as_accurate_as_pytorch(
    case: str, isa: str, dtype: str, one_step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOPO_FAST_ISA", isa)
    before = fit_state(make_fit(case, "cpu"))
    fits = [make_fit(case, backend, dtype=dtype) for backend in ("cpu", "reference")]
    fits.append(make_fit(case, "reference", double=True))
    batch = fits[0].config.batch_size
    losses = [fit_steps(fit, fit.rows[:, :batch] if one_step else fit.rows) for fit in fits]
    kernel, same, exact = map(fit_state, fits)
    assert_trained_alike(kernel, same, exact, before, one_step)
    usual, error = abs(losses[1] - losses[2]), abs(losses[0] - losses[2])
    assert error <= 2.0 * usual + 1e-6 * abs(losses[2])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("isa", "dtype"), training_kernels())
def test_layer_norms_of_outliers(isa: str, dtype: str, first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPO_FAST_ISA", isa)
    fits = [make_fit("wide layer norm", backend, dtype=dtype) for backend in ("cpu", "reference")]
    fits.append(make_fit("wide layer norm", "reference", double=True))
    for fit in fits:
        with torch.no_grad():
            fit.model.biases[0][:, 0 if first else -1] += 1000.0
        fit_steps(fit, fit.rows)
    kernel, same, exact = (fit_state(fit)["weights.0.exp_avg"].double() for fit in fits)
    error, usual = (float((some - exact).norm()) for some in (kernel, same))
    assert error <= 2.0 * usual


def test_every_parameter_moves() -> None:
    fit = make_fit("canonical", "cpu")
    before = {name: tensor.clone() for name, tensor in fit_state(fit).items()}
    fit_steps(fit, fit.rows)
    for name, tensor in fit_state(fit).items():
        assert not torch.equal(tensor, before[name]), name
    assert fit.steps_made == 3


@pytest.mark.parametrize("threads", [2, 3, 6, 64])
@pytest.mark.parametrize(
    "case", ["short last batch", "linear", "edges of tiles", "batch larger than the data"]
)
@pytest.mark.parametrize(("isa", "dtype"), training_kernels())
def test_result_does_not_depend_on_threads(
    isa: str, case: str, threads: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOPO_FAST_ISA", isa)
    one, many = make_fit(case, "cpu", dtype=dtype), make_fit(case, "cpu", threads, dtype=dtype)
    assert fit_steps(one, one.rows) == fit_steps(many, many.rows)
    ours, theirs = fit_state(one), fit_state(many)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("isa", cpu.isas())
def test_denormal_moments_become_zero(isa: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPO_FAST_ISA", isa)
    fit = make_fit("relu", "cpu", threads)
    with torch.no_grad():  # a unit of each member that no input turns on, and that decay leaves alone
        for array in (fit.model.weights[0], fit.model.biases[0]):
            array[..., 0] = 0.0
        fit.model.biases[0][..., 0] = -1.0
        fit.model.weights[1][:, 0] = 0.0
    moments = [*fit.optimizer.exp_avgs, *fit.optimizer.exp_avg_sqs]
    fill_with_denormals(moments)
    fit_steps(fit, fit.rows)
    assert_no_denormals(moments)


@pytest.mark.parametrize(("dtype", "nearer"), [("bfloat16", 0.02), ("bfloat16x3", 0.3)])
@pytest.mark.parametrize("isa", cpu.isas())
def test_every_factor_is_rounded(
    isa: str, dtype: str, nearer: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results are nearer to PyTorch with rounded factors than to PyTorch with unrounded ones."""
    monkeypatch.setenv("MOPO_FAST_ISA", isa)
    if dtype == "bfloat16x3" and isa not in cpu.WITH_BFLOAT16:
        pytest.skip("float32 is taken")
    fits = [make_fit("tanh", "cpu", dtype=dtype), make_fit("tanh", "reference", dtype=dtype)]
    fits.append(make_fit("tanh", "reference"))
    for fit in fits:
        fit_steps(fit, fit.rows[:, :20])
    kernel, rounded, unrounded = map(fit_state, fits)
    for layer in range(3):
        name = f"weights.{layer}.exp_avg"
        error, distance = (float((kernel[name] - other[name]).norm()) for other in (rounded, unrounded))
        assert error < nearer * distance, f"{name}: {error:.3g} beside {distance:.3g}"


def test_result_does_not_depend_on_the_calls() -> None:
    whole, parts = make_fit("short last batch", "cpu"), make_fit("short last batch", "cpu")
    fit_steps(whole, whole.rows)
    # Columns of a wider matrix are not contiguous.
    fit_steps(parts, parts.rows[:, :48])
    fit_steps(parts, parts.rows[:, 48:])
    ours, theirs = fit_state(whole), fit_state(parts)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_fit_goes_through_the_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fused(self: CpuBackend, runs: list[FitSteps], threads: int) -> list[float]:
        seen.append(("cpu", runs[0].rows.shape[1]))
        return [0.0]

    def batched(self: PyTorchSteps, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(("reference", inputs.shape[1]))
        return torch.zeros(())

    monkeypatch.setattr(CpuBackend, "fit_steps", fused)
    monkeypatch.setattr(PyTorchSteps, "__call__", batched)
    monkeypatch.setattr(fit_module, "_STEPS_AT_ONCE", 2)
    config = DynamicsConfig(
        hidden=(8,), weight_decay=(0.0, 0.0), batch_size=16, max_epochs=1, members=2, elites=1
    )
    fit_dynamics(fit_transitions(100, 3, 1), config=config, backend=backend)
    assert seen == [(backend, n) for n in (32, 32, 16)]


def test_backends_fit_alike() -> None:
    config = DynamicsConfig(hidden=(32, 32), weight_decay=(1e-5,) * 3, batch_size=32, max_epochs=15)
    data = fit_transitions(600, 3, 1, scale=0.0)
    data.next_observations = data.observations + 0.5 * data.observations.sin() * data.actions
    data.rewards = data.observations[:, 0] - data.actions[:, 0].square()
    held_out = {}
    for backend in ("cpu", "reference"):
        records = []
        fit_dynamics(data, config=config, backend=backend, on_epoch=records.append)
        held_out[backend] = np.array([record.holdout_mse for record in records])
    assert held_out["cpu"][-1].mean() < 0.2 * held_out["cpu"][0].mean()
    np.testing.assert_allclose(held_out["cpu"], held_out["reference"], rtol=0.02)
