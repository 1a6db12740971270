"""Tests that the baselines do the reference's work: the same batches give the same parameters, in float64."""

import contextlib
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import baselines
from benchmarks.baselines import CompiledFit, EagerFit, PlainSAC
from benchmarks.baselines_rollout import PENALTY_COEF, LinearRollout
from benchmarks.compare import BASELINES, GPU_BASELINES
from mopo_fast import Actor, EnsembleDynamics
from mopo_fast.backends.reference import penalise
from mopo_fast.buffer import RingBuffer
from mopo_fast.config import DynamicsConfig, SACConfig
from mopo_fast.data.transitions import Transitions
from mopo_fast.fit import Fit
from mopo_fast.sac import SAC
from tests.helpers.kernel_cases import EagerGraph

OBS, ACT, BATCH = 5, 2, 16
SAC_CONFIG = SACConfig(hidden=(24, 12), batch_size=BATCH, real_ratio=0.5, polyak=0.05)
REDQ_CONFIG = dataclasses.replace(SAC_CONFIG, critics=10, target_critics=2, actor_q="mean")
FIT_CONFIG = DynamicsConfig(
    members=3, elites=1, hidden=(24, 12), weight_decay=(1e-2, 2e-2, 3e-2), batch_size=BATCH
)
KERNELS = ("sac", "fit", "rollout")
# Baselines for a GPU run on the CPU here.
MADE_OF = {
    kernel: {
        **BASELINES[kernel],
        **{name: make for key, some in GPU_BASELINES.items() if kernel in key for name, make in some.items()},
    }
    for kernel in KERNELS
}
# Without JAX these tests are skipped, but collected.
SAC_NAMES, FIT_NAMES, ROLLOUT_NAMES = (sorted({"JAX", *MADE_OF[kernel]}) for kernel in KERNELS)


def baseline(kernel: str, name: str) -> Any:
    if name == "JAX":
        pytest.importorskip("jax")
    return MADE_OF[kernel][name]


def precision(name: str) -> contextlib.AbstractContextManager[Any]:
    """Enable float64 in JAX, which is off by default."""
    if name != "JAX":
        return contextlib.nullcontext()
    import jax

    return jax.enable_x64(True)


def transitions(count: int, seed: int) -> Transitions:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    return Transitions(
        observations=normal(count, OBS),
        actions=normal(count, ACT).tanh(),
        rewards=normal(count),
        next_observations=normal(count, OBS),
        terminals=torch.rand(count, generator=g) < 0.3,
    )


def sources() -> tuple[Transitions, RingBuffer]:
    data, buffer = transitions(30, seed=1), RingBuffer(40, OBS, ACT)
    floats = {name: array.float() for name, array in data.arrays().items() if name != "terminals"}
    buffer.advance(40)
    return dataclasses.replace(data, **floats), buffer


def double_sac(config: SACConfig) -> SAC:
    sac = SAC(OBS, ACT, config, seed=3, backend="reference")
    for module in (sac.actor, sac.critic, sac.target):
        module.double()
    sac.log_alpha.data = torch.tensor(0.4, dtype=torch.float64)
    for optimizer in sac.optimizers.values():
        optimizer.exp_avgs = [moment.double() for moment in optimizer.exp_avgs]
        optimizer.exp_avg_sqs = [moment.double() for moment in optimizer.exp_avg_sqs]
    with torch.no_grad():
        for target in sac.target.parameters():
            target.mul_(1.3)
    return sac


def double_fit() -> Fit:
    fit = Fit(transitions(200, seed=1), 0, FIT_CONFIG, backend="reference")
    fit.model.double()
    fit.inputs, fit.targets = fit.inputs.double(), fit.targets.double()
    fit.optimizer.exp_avgs = [moment.double() for moment in fit.optimizer.exp_avgs]
    fit.optimizer.exp_avg_sqs = [moment.double() for moment in fit.optimizer.exp_avg_sqs]
    return fit


def assert_same(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], before: dict[str, torch.Tensor]
) -> None:
    for name, value in theirs.items():
        moved = (ours[name] - before[name]).abs().max()
        assert moved > 1e-6, f"{name} did not move, so nothing was compared"
        error = (ours[name] - value).abs().max()
        assert error < 1e-6 * moved, f"{name}: {error} beside a movement of {moved}"


@pytest.mark.parametrize("name", ROLLOUT_NAMES)
def test_rollout_step(name: str) -> None:
    """Compare a step with the reference's formulas on the same random numbers."""
    rows, g = 40, torch.Generator().manual_seed(0)
    ensemble = EnsembleDynamics(OBS, ACT, hidden=(24, 12), members=3, elites=2, generator=g)
    actor = Actor(OBS, ACT, hidden=(16, 8), generator=g)
    with torch.no_grad():
        for parameter in [*ensemble.biases, *actor.biases, ensemble.input_mean]:
            parameter.normal_(0.0, 0.3, generator=g)
    ensemble, actor = ensemble.double(), actor.double()
    start = torch.randn(rows, OBS, generator=g, dtype=torch.float64)
    action_noise = torch.randn(rows, ACT, generator=g, dtype=torch.float64)
    noise = torch.randn(3, rows, OBS + 1, generator=g, dtype=torch.float64)
    draw = torch.randint(2, (rows,), generator=g)
    members, everyone = ensemble.elites[draw], torch.arange(rows)
    with torch.no_grad():
        mean, log_std = actor(start)
        actions = torch.tanh(mean + log_std.exp() * action_noise)
        means, logvars = ensemble(torch.cat([start, actions], dim=-1))
        variances = logvars.exp()
        sample = means[members, everyone] + variances[members, everyone].sqrt() * noise[members, everyone]
        rewards = sample[:, -1] - PENALTY_COEF * penalise("max_aleatoric", means, variances)
    drawn = noise if name == "PyTorch, NumPy between" else noise[members, everyone]
    given = [start, action_noise, draw, drawn]
    with torch.no_grad(), precision(name):
        other = baseline("rollout", name)(ensemble, actor, start, 3)
        arrays = given if isinstance(other, LinearRollout) else [array.numpy() for array in given]
        results = other.model_step(*arrays)
        results = [x if isinstance(x, torch.Tensor) else torch.tensor(np.array(x)) for x in results]
    tolerance = 0.05 if "float16" in name else 1e-9
    for ours, theirs in zip((start, actions, rewards, start + sample[:, :-1]), results, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("name", ROLLOUT_NAMES)
def test_rollout_is_whole(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    ensemble, actor = EnsembleDynamics(OBS, ACT, generator=g), Actor(OBS, ACT, generator=g)
    start = torch.randn(50, OBS, generator=g)
    arrays = baseline("rollout", name)(ensemble, actor, start, 3)()
    assert {name: tuple(array.shape) for name, array in arrays.items()} == {
        **{"observations": (150, OBS), "actions": (150, ACT), "next_observations": (150, OBS)},
        **{"rewards": (150,), "terminals": (150,)},
    }
    observations, following = (torch.as_tensor(arrays[key]) for key in ("observations", "next_observations"))
    # Every state but the first is the prediction of the step before.
    assert torch.equal(observations[:50].sort(0).values, start.sort(0).values)
    assert torch.equal(observations[50:].sort(0).values, following[:100].sort(0).values)
    assert not torch.equal(
        torch.as_tensor(arrays["actions"][:50]), torch.as_tensor(arrays["actions"][50:100])
    )


def copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("config", [SAC_CONFIG, REDQ_CONFIG], ids=["two critics", "REDQ"])
@pytest.mark.parametrize("name", SAC_NAMES)
def test_sac(name: str, config: SACConfig) -> None:
    make = baseline("sac", name)
    data, buffer = sources()
    reference = double_sac(config)
    before = copied(reference.state())
    g = torch.Generator().manual_seed(0)
    with precision(name):
        other = make(double_sac(config), data, buffer, 2)
        for i in range(3):
            batch = transitions(BATCH, seed=i)
            noise, next_noise = torch.randn(2, BATCH, ACT, generator=g, dtype=torch.float64)
            drawn = None
            if config.target_critics is not None:
                drawn = torch.randperm(config.critics, generator=g)[: config.target_critics]
            reference.update(batch, noise, next_noise, drawn)
            other.update(list(batch.arrays().values()), noise, next_noise, drawn)
        theirs = other.state()
    assert theirs.keys() == {key for key in before if not key.startswith(("adam.", "updates"))}
    assert_same(reference.state(), theirs, before)


@pytest.mark.parametrize("config", [SAC_CONFIG, REDQ_CONFIG], ids=["two critics", "REDQ"])
@pytest.mark.parametrize("name", SAC_NAMES)
def test_sac_draws_its_batches(name: str, config: SACConfig) -> None:
    make = baseline("sac", name)
    sac = SAC(OBS, ACT, config, seed=3, backend="reference")
    before = copied(sac.state())
    other = make(sac, *sources(), 2)
    other()
    for key, value in other.state().items():
        assert torch.isfinite(value).all() and not torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", FIT_NAMES)
def test_fit(name: str) -> None:
    make = baseline("fit", name)
    reference = double_fit()
    rows = torch.randint(len(reference.inputs), (3, 3 * BATCH), generator=torch.Generator().manual_seed(0))
    before = copied(dict(reference.model.named_parameters()))
    reference.steps(rows)
    with precision(name):
        other = make(double_fit(), rows)
        other()
        theirs = other.state()
    assert theirs.keys() == before.keys()
    # Autocast does not change float64.
    assert_same(dict(reference.model.named_parameters()), theirs, before)


@pytest.fixture
def graphs_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "records", lambda device: True)
    monkeypatch.setattr(baselines, "Graph", EagerGraph)


@pytest.mark.usefixtures("graphs_without_a_gpu")
def test_recorded_updates_are_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare on the same random numbers, with the changes of warm-up and recording undone."""
    states, before = [], copied(double_sac(SAC_CONFIG).state())
    for make in (baselines.RecordedSAC, baselines.CompiledSAC):
        learner = make(double_sac(SAC_CONFIG), *sources(), 20)
        draws = iter(range(1000))

        def drawn(of: Any = learner, draws: Any = draws) -> None:
            i = next(draws)
            noise = torch.randn(
                2, BATCH, ACT, generator=torch.Generator().manual_seed(i), dtype=torch.float64
            )
            of.update(list(transitions(BATCH, seed=i).arrays().values()), *noise)

        if make is baselines.CompiledSAC:
            next(i for i in draws if i == 19)
        monkeypatch.setattr(learner, "draw_and_update", drawn)
        learner()
        states.append(learner.state())
    assert_same(*states, before)


@pytest.mark.usefixtures("graphs_without_a_gpu")
def test_recorded_steps_are_the_others() -> None:
    """Compare a pass whose last batch is smaller."""
    count, generator = len(double_fit().inputs), torch.Generator().manual_seed(0)
    rows = torch.randint(count, (3, 2 * BATCH + 5), generator=generator)
    before = copied(dict(double_fit().model.named_parameters()))
    recorded, compiled = (make(double_fit(), rows) for make in (baselines.RecordedFit, CompiledFit))
    recorded()
    compiled()
    assert len(recorded.graphs) == 2
    assert_same(recorded.state(), compiled.state(), before)


def on_meta(module: torch.nn.Module) -> None:
    """Move parameters and buffers to the meta device, which has shapes but no data."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            part._parameters[name] = None if parameter is None else torch.nn.Parameter(parameter.to("meta"))
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to("meta")


@pytest.mark.parametrize(
    ("kernel", "name"), [(kernel, name) for kernel in GPU_BASELINES for name in GPU_BASELINES[kernel]]
)
def test_one_device_is_enough(kernel: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a baseline for a GPU makes no tensor on the CPU: mixing it with meta tensors would fail."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    adam = torch.optim.Adam  # Adam's fused kernel does not support the meta device.
    monkeypatch.setattr(torch.optim, "Adam", lambda groups, lr, fused=False: adam(groups, lr))
    make = GPU_BASELINES[kernel][name]
    if kernel == "sac":
        data, buffer = sources()
        sac = SAC(OBS, ACT, SAC_CONFIG, backend="reference")
        for module in (sac.actor, sac.critic, sac.target):
            on_meta(module)
        sac.log_alpha = torch.nn.Parameter(sac.log_alpha.to("meta"))
        buffer.storage = buffer.storage.to("meta")
        made = make(sac, data.to("meta"), buffer, 2)
    elif kernel == "fit":
        fit = Fit(transitions(200, seed=1), 0, FIT_CONFIG, backend="reference")
        places = {id(parameter): key for key, parameter in fit.model.named_parameters()}
        names = [places[id(parameter)] for parameter in fit.parameters]
        on_meta(fit.model)
        fit.parameters = [fit.model.get_parameter(key) for key in names]
        fit.inputs, fit.targets = fit.inputs.to("meta"), fit.targets.to("meta")
        made = make(fit, torch.zeros(3, 2 * BATCH, dtype=torch.int64, device="meta"))
    else:
        ensemble, actor = EnsembleDynamics(OBS, ACT, hidden=(24, 12)), Actor(OBS, ACT, hidden=(16, 8))
        on_meta(ensemble)
        on_meta(actor)
        made = make(ensemble, actor, torch.zeros(150, OBS, device="meta"), 2)
    made()


@pytest.mark.parametrize("name", [name for name in SAC_NAMES if "bfloat16" in name])
def test_sac_in_bfloat16(name: str) -> None:
    def fresh() -> SAC:
        return SAC(OBS, ACT, SAC_CONFIG, seed=3, backend="reference")

    before = copied(fresh().state())
    other, exact = baseline("sac", name)(fresh(), *sources(), 2), PlainSAC(fresh(), *sources(), 2)
    # Adam's first step is as large for every gradient, so it hides the rounding.
    for i in range(3):
        arrays = transitions(BATCH, seed=i).arrays().values()
        batch = [array.float() if array.is_floating_point() else array for array in arrays]
        noise, next_noise = torch.randn(2, BATCH, ACT, generator=torch.Generator().manual_seed(i))
        for learner in (other, exact):
            learner.update(batch, noise, next_noise)
    for key, value in exact.state().items():
        error, moved = ((value - x).abs().mean() for x in (other.state()[key], before[key]))
        assert error < 0.2 * moved, f"{key}: {error} beside a movement of {moved}"
        assert error > 0.0 or "weights" not in key, f"{key} was not rounded"


@pytest.mark.parametrize("name", [name for name in FIT_NAMES if "bfloat16" in name])
def test_fit_in_bfloat16(name: str) -> None:
    def fresh() -> Fit:
        return Fit(transitions(200, seed=1), 0, FIT_CONFIG, backend="reference")

    rows = torch.randint(len(fresh().inputs), (3, BATCH), generator=torch.Generator().manual_seed(0))
    before = copied(dict(fresh().model.named_parameters()))
    other, exact = baseline("fit", name)(fresh(), rows), EagerFit(fresh(), rows)
    other()
    exact()
    for key, value in exact.state().items():
        error, moved = ((value - x).abs().mean() for x in (other.state()[key], before[key]))
        assert error < 0.2 * moved, f"{key}: {error} beside a movement of {moved}"
        assert error > 0.0 or not key.startswith("weights"), f"{key} was not rounded"
