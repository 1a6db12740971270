"""Test the CUDA kernels of SAC and the fit against autograd in float64, on a GPU or in the emulator."""

import re
import shutil
import subprocess
from pathlib import Path

import cuda_emulator
import numpy as np
import pytest
import torch
from kernel_cases import (
    FIT_CASES,
    SAC_CASES,
    assert_trained_alike,
    fit_state,
    fit_steps,
    fit_transitions,
    make_fit,
    make_sac,
    run_sac,
    sac_sources,
)

from mopo_fast import fit, sac
from mopo_fast.backends.gpu import cuda
from mopo_fast.buffer import RingBuffer
from mopo_fast.config import DynamicsConfig, SACConfig
from mopo_fast.data import Transitions
from mopo_fast.errors import InputError
from mopo_fast.fit import Fit
from mopo_fast.run.population import FitPopulation, SacPopulation
from mopo_fast.sac import METRICS, SAC

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
# Numbers of multiprocessors and seeds of the emulator. With many multiprocessors, tiles are small.
MACHINES = [(1, 0), (2, 1), (2, 2), (2, 3), (3, 4), (24, 0)]


def make_cuda_sac(case: str, device: str) -> SAC:
    """Make the SAC of `make_sac` with the cuda backend."""
    obs_dim, act_dim, options = SAC_CASES[case]
    config = SACConfig(**options)
    result = SAC(obs_dim, act_dim, config, device=device, backend="cuda")
    result.load_state(make_sac(obs_dim, act_dim, config, "reference").state())
    return result


def cuda_sources(case: str, device: str) -> tuple[Transitions, RingBuffer]:
    data, buffer = sac_sources(*SAC_CASES[case][:2])
    moved = RingBuffer(buffer.capacity, data.obs_dim, data.act_dim, device)
    for name, array in moved.storage.arrays().items():
        array.copy_(getattr(buffer.storage, name))
    moved.advance(len(buffer))
    return data.to(device), moved


def update(sacs: list[SAC], case: str, updates: int) -> list[dict[str, float]]:
    """Update several SACs together; the first has the seed of `run_sac`, each other one the next seed."""
    data, buffer = cuda_sources(case, sacs[0].log_alpha.device.type)
    seeds = [7 + place for place in range(len(sacs))]
    return SacPopulation(sacs).update_many(data, [buffer] * len(sacs), updates, seeds)


def make_cuda_fit(case: str, device: str, place: int = 0) -> Fit:
    """Make the fit of `make_fit` with the cuda backend, with its rows rotated by `place`."""
    twin = make_fit(case, "reference")
    obs_dim, act_dim, count, _ = FIT_CASES[case]
    result = Fit(fit_transitions(count + 200, obs_dim, act_dim), 0, twin.config, device, "cuda")
    with torch.no_grad():
        for mine, theirs in zip(result.parameters, twin.parameters, strict=True):
            mine.copy_(theirs)
    result.rows = np.roll(twin.rows, place, axis=1)
    return result


def step(fits: list[Fit], count: int | None = None) -> list[float]:
    """Step several fits together, on the first `count` rows or on all."""
    rows = [torch.from_numpy(each.rows[:, :count]).to(each.inputs.device) for each in fits]
    return FitPopulation(fits).steps(rows)


def on_cpu(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


# The canonical shape takes seconds in the emulator.
@pytest.mark.parametrize(
    ("case", "updates"),
    [(case, updates) for case in SAC_CASES for updates in (1, 3) if updates == 1 or "canonical" not in case],
)
def test_updates_are_as_accurate_as_pytorch(device: str, case: str, updates: int) -> None:
    kernel = make_cuda_sac(case, device)
    before = on_cpu(kernel.state())
    (metrics,) = update([kernel], case, updates)
    usual, usual_metrics = run_sac(case, "reference", updates)
    exact, exact_metrics = run_sac(case, "reference", updates, double=True)
    assert_trained_alike(on_cpu(kernel.state()), usual, exact, before, one_step=updates == 1)
    for name in METRICS:
        error, pytorch = (abs(some[name] - exact_metrics[name]) for some in (metrics, usual_metrics))
        assert error <= 2.0 * pytorch + 1e-6 * max(1.0, abs(exact_metrics[name])), name


@pytest.mark.parametrize(
    ("case", "one_step"),
    [
        (case, one)
        for case, (*_, options) in FIT_CASES.items()
        for one in (True, False)
        if (one or case != "canonical") and "layer_norm" not in options
    ],
)
def test_steps_are_as_accurate_as_pytorch(device: str, case: str, one_step: bool) -> None:
    kernel, usual, exact = (
        make_cuda_fit(case, device),
        make_fit(case, "reference"),
        make_fit(case, "reference", double=True),
    )
    before = on_cpu(fit_state(kernel))
    count = kernel.config.batch_size if one_step else None
    (loss,) = step([kernel], count)
    losses = [fit_steps(each, each.rows[:, :count]) for each in (usual, exact)]
    assert_trained_alike(on_cpu(fit_state(kernel)), fit_state(usual), fit_state(exact), before, one_step)
    assert abs(loss - losses[1]) <= 2.0 * abs(losses[0] - losses[1]) + 1e-6 * abs(losses[1])


UPDATED = (
    "three critics, many rows",
    "others' options, many rows",
    "others' options, one layer",
    "Unifloral's options",
)
STEPPED = ("short last batch", "edges of tiles", "linear")


@pytest.mark.parametrize("case", UPDATED)
def test_updates_together_are_updates_alone(device: str, case: str) -> None:
    together, alone = ([make_cuda_sac(case, device) for _ in range(3)] for _ in range(2))
    metrics = update(together, case, 3)
    assert metrics[0] != metrics[1]
    assert metrics[0] == update(alone[:1], case, 3)[0]
    data, buffer = cuda_sources(case, device)
    for place in (1, 2):
        assert metrics[place] == alone[place].update_many(data, buffer, 3, 7 + place)
    assert all(same(one.state(), other.state()) for one, other in zip(together, alone, strict=True))


@pytest.mark.parametrize("case", STEPPED)
def test_steps_together_are_steps_alone(device: str, case: str) -> None:
    together, alone = ([make_cuda_fit(case, device, place) for place in range(3)] for _ in range(2))
    losses = step(together)
    assert len(set(losses)) == 3
    assert losses == [step([each])[0] for each in alone]
    assert all(same(fit_state(one), fit_state(other)) for one, other in zip(together, alone, strict=True))


def on_machine(monkeypatch: pytest.MonkeyPatch, multiprocessors: int, schedule: int) -> None:
    monkeypatch.setenv(cuda_emulator.MULTIPROCESSORS, str(multiprocessors))
    monkeypatch.setenv(cuda_emulator.SEED, str(schedule))


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("case", UPDATED)
def test_updates_do_not_depend_on_the_machine(
    device: str, case: str, machine: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, other = make_cuda_sac(case, device), [make_cuda_sac(case, device) for _ in range(2)]
    metrics = update([usual], case, 3)
    on_machine(monkeypatch, *machine)
    assert metrics[0] == update(other, case, 3)[0]
    assert same(usual.state(), other[0].state())


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("case", STEPPED)
def test_steps_do_not_depend_on_the_machine(
    device: str, case: str, machine: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, other = make_cuda_fit(case, device), [make_cuda_fit(case, device, place) for place in range(2)]
    losses = step([usual])
    on_machine(monkeypatch, *machine)
    assert losses[0] == step(other)[0]
    assert same(fit_state(usual), fit_state(other[0]))


@pytest.mark.parametrize("case", ["others' options, many rows", "Unifloral's options"])
def test_result_does_not_depend_on_the_calls(device: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = make_cuda_sac(case, device), make_cuda_sac(case, device)
    update([whole], case, 5)
    monkeypatch.setattr(sac, "_UPDATES_AT_ONCE", 2)
    update([parts], case, 5)
    assert same(whole.state(), parts.state())


def test_a_fit_by_the_backend(device: str) -> None:
    """Several epochs, with the holdout and the best weights, give the results of the reference backend."""
    data = fit_transitions(300, 3, 1)
    config = DynamicsConfig(
        hidden=(16, 16), weight_decay=(1e-5,) * 3, batch_size=32, max_epochs=4, members=3, elites=2
    )
    held_out = []
    for backend in ("cuda", "reference"):
        records: list[fit.FitEpoch] = []
        fit.fit_dynamics(data, config=config, backend=backend, device=device, on_epoch=records.append)
        held_out.append([record.holdout_mse for record in records])
    np.testing.assert_allclose(held_out[0], held_out[1], rtol=1e-3)


def test_divergence_is_one_clear_error(device: str) -> None:
    case = "one critic, one layer"
    data, buffer = cuda_sources(case, device)
    buffer.storage.rewards.fill_(float("inf"))
    with pytest.raises(InputError, match="SAC diverged before update 2"):
        make_cuda_sac(case, device).update_many(data, buffer, 2, seed=0)


def test_refuses_what_it_cannot_train(device: str) -> None:
    with pytest.raises(InputError, match="cuda: trains layers of at most 1024 inputs and outputs, not 1025"):
        SAC(3, 1, SACConfig(hidden=(1025,)), device=device, backend="cuda")
    with pytest.raises(InputError, match="cuda: trains in float32, not bfloat16"):
        Fit(fit_transitions(300, 3, 1), 0, DynamicsConfig(dtype="bfloat16"), device, "cuda")
    case = "one unit"
    kernel = make_cuda_sac(case, device)
    kernel.actor.double()
    with pytest.raises(
        InputError, match=r"the actor's weights\[0\] must be contiguous torch.float32 .* got torch.float64"
    ):
        update([kernel], case, 1)


def test_refuses_an_old_gpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_capability", lambda device=None: (7, 5))
    with pytest.raises(InputError, match=r"compute capability 8\.0 or more is needed, the GPU has 7\.5"):
        SAC(3, 1, SACConfig(), device=device, backend="cuda")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not there")
@pytest.mark.parametrize("source", ["sac.cu", "fit.cu"])
def test_registers_suffice(source: str, tmp_path: Path) -> None:
    """On the oldest supported architecture, few registers are spilled."""
    command = ["nvcc", "-std=c++20", "-O3", "-fmad=false", f"-I{cuda_emulator.CSRC}", "-cubin", "-Xptxas=-v"]
    command += ["-gencode=arch=compute_80,code=sm_80", "-o", str(tmp_path / "kernels.cubin")]
    command.append(str(cuda_emulator.CSRC / "cuda" / source))
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spilled and all(int(count) <= 64 for pair in spilled for count in pair)
