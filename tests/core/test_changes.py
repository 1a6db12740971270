"""Test that an engine notices every change of its ensemble and policy between two calls."""

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from kernel_cases import inputs, make_ensemble, make_policy
from small_fits import SMALL, toy_data
from small_sacs import CONFIG, filled, transitions

from mopo_fast.backends import cpu
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.fit import Fit
from mopo_fast.rollout import RolloutEngine
from mopo_fast.sac import SAC
from mopo_fast.utils.adam import Adam

OBS, ACT = 5, 2


def results(engine: RolloutEngine) -> list[torch.Tensor]:
    """Return results of a step and of a rollout of the engine."""
    start, actions = inputs(9, OBS, ACT)
    step = engine.step(start, actions, seed=1, distributions=True)
    rows = engine.rollout(make_policy(OBS, ACT), start, 2, seed=1)
    assert step.mean is not None and step.std is not None
    return [step.rewards, step.mean, step.std, rows.rewards, rows.observations]


def check(engine: RolloutEngine, before: list[torch.Tensor]) -> None:
    """Check that the engine's results are a new engine's, and not those of before."""
    fresh = RolloutEngine(engine.ensemble, dtype=engine.operands, backend=engine.backend)
    ours = results(engine)
    assert all(torch.equal(one, other) for one, other in zip(ours, results(fresh), strict=True))
    assert not torch.equal(ours[0], before[0])


@torch.no_grad()
def _in_place(model: EnsembleDynamics) -> None:
    model.weights[1][0, 3, 2] += 1.0


@torch.no_grad()
def _through_a_view(model: EnsembleDynamics) -> None:
    model.weights[0].view(-1)[7] += 1.0


@torch.no_grad()
def _through_detach(model: EnsembleDynamics) -> None:
    model.weights[0].detach().mul_(2.0)


def _load_state_dict(model: EnsembleDynamics) -> None:
    model.load_state_dict(make_ensemble(OBS, ACT, seed=7).state_dict())


def _assign_state_dict(model: EnsembleDynamics) -> None:
    model.load_state_dict(make_ensemble(OBS, ACT, seed=7).state_dict(), assign=True)


def _set_data(model: EnsembleDynamics) -> None:
    model.weights[1].data = model.weights[1].data * 2.0


def _to_and_back(model: EnsembleDynamics) -> None:
    model.to(torch.float64)
    with torch.no_grad():
        model.weights[2].mul_(1.5)
    model.to(torch.float32)


def _replace(model: EnsembleDynamics) -> None:
    model.weights[1] = torch.nn.Parameter(model.weights[1].detach() * 2.0)


def _replace_at_the_same_address(model: EnsembleDynamics) -> None:
    memory = model.weights[1].detach().numpy()
    memory *= 2.0
    model.weights[1] = torch.nn.Parameter(torch.from_numpy(memory))
    assert model.weights[1].data_ptr() == memory.ctypes.data


def _replace_twice(model: EnsembleDynamics) -> None:
    # The second tensor may get the memory of the one before the first.
    for factor in (3.0, 0.5):
        model.weights[0].data = model.weights[0].data * factor


def _bounds(model: EnsembleDynamics) -> None:
    with torch.no_grad():
        model.max_logvar.sub_(2.0)


def _inputs(model: EnsembleDynamics) -> None:
    model.input_mean.add_(0.5)


def _elites(model: EnsembleDynamics) -> None:
    model.elites = torch.tensor([6])


def _buffer_in_place(model: EnsembleDynamics) -> None:
    model.elites.copy_(torch.tensor([6, 5, 4, 3, 2]))


def _activation(model: EnsembleDynamics) -> None:
    model.activation = "tanh"


def _own_adam(model: EnsembleDynamics) -> None:
    parameters = list(model.parameters())
    Adam(parameters, 0.01).step([torch.ones_like(parameter) for parameter in parameters])


def _torch_adam(fused: bool) -> Callable[[EnsembleDynamics], None]:
    def change(model: EnsembleDynamics) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.Adam(model.parameters(), lr=0.01, fused=fused).step()

    return change


def _inference_mode(model: EnsembleDynamics) -> None:
    with torch.inference_mode():
        model.weights[1].mul_(2.0)


CHANGES = {
    change.__name__.strip("_"): change
    for change in (
        *(_in_place, _through_a_view, _through_detach, _load_state_dict, _assign_state_dict, _set_data),
        *(_to_and_back, _replace, _replace_at_the_same_address, _replace_twice, _bounds, _inputs, _elites),
        *(_buffer_in_place, _activation, _own_adam, _inference_mode),
    )
} | {"torch's Adam": _torch_adam(False), "torch's fused Adam, which counts nothing": _torch_adam(True)}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("cpu", "float32"), ("cpu", "bfloat16"), ("cpu", "bfloat16x3"), ("reference", "float32")],
)
def test_changes_are_noticed(backend: str, dtype: str, change: Callable[[EnsembleDynamics], None]) -> None:
    engine = RolloutEngine(make_ensemble(OBS, ACT), backend=backend, dtype=dtype)
    before = results(engine)
    # Twice, so that the change meets arrays that were kept.
    assert torch.equal(results(engine)[0], before[0])
    change(engine.ensemble)
    check(engine, before)


def test_numpy_views_need_a_refresh() -> None:
    """A write that PyTorch does not count changes nothing before `refresh`."""
    engine = RolloutEngine(make_ensemble(OBS, ACT), backend="cpu")
    before = results(engine)
    engine.ensemble.weights[1].detach().numpy()[:] *= 2.0
    assert torch.equal(results(engine)[0], before[0])
    engine.refresh()
    check(engine, before)


def test_a_converted_ensemble_is_read_at_every_call() -> None:
    ensemble = make_ensemble(OBS, ACT).double()
    engine = RolloutEngine(ensemble, backend="cpu")
    before = results(engine)
    ensemble.weights[1].detach().numpy()[:] *= 2.0
    check(engine, before)


def test_settings_of_the_engine_are_noticed() -> None:
    engine = RolloutEngine(make_ensemble(OBS, ACT))
    before = results(engine)
    engine.penalty_coef = 2.0
    twice = results(engine)
    assert not torch.equal(twice[0], before[0]) and torch.equal(twice[1], before[1])


def test_inference_tensors_are_read_at_every_call() -> None:
    with torch.inference_mode():
        ensemble = make_ensemble(OBS, ACT)
        for i in range(len(ensemble.weights)):
            ensemble.weights[i] = torch.nn.Parameter(ensemble.weights[i].clone(), requires_grad=False)
        engine = RolloutEngine(ensemble)
        assert ensemble.weights[1].is_inference()
        before = results(engine)
        ensemble.weights[1].mul_(2.0)
        check(engine, before)


@pytest.mark.parametrize("move", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_an_engine(move: Callable[[RolloutEngine], RolloutEngine]) -> None:
    engine = RolloutEngine(make_ensemble(OBS, ACT))
    before = results(engine)
    other = move(engine)
    _in_place(other.ensemble)
    check(other, before)
    if other.ensemble is not engine.ensemble:
        assert torch.equal(results(engine)[0], before[0])


def test_the_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    extension, packed = cpu.extension(), []
    pack = extension.pack

    def counted(*args: object, **options: object) -> object:
        packed.append(options)
        return pack(*args, **options)

    monkeypatch.setattr(extension, "pack", counted)
    engine = RolloutEngine(make_ensemble(OBS, ACT), backend="cpu")
    for _ in range(3):
        results(engine)
    assert len(packed) == 1
    _in_place(engine.ensemble)
    results(engine)
    assert len(packed) == 2


def test_the_instruction_set_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = RolloutEngine(make_ensemble(OBS, ACT), backend="cpu")
    for name in (*cpu.isas(), *cpu.isas()):
        monkeypatch.setenv("MOPO_FAST_ISA", name)
        fresh = RolloutEngine(engine.ensemble, backend="cpu")
        assert torch.equal(results(engine)[1], results(fresh)[1])


def test_the_fit_kernel_counts_its_writes() -> None:
    fit = Fit(toy_data(), 0, SMALL, backend="cpu", threads=1)
    engine = RolloutEngine(fit.model, backend="cpu")
    start, actions = inputs(9, engine.ensemble.obs_dim, engine.ensemble.act_dim)
    for _ in range(3):
        before = [parameter._version for parameter in fit.model.parameters()]
        old = engine.step(start, actions, seed=0).rewards
        fit.steps(torch.arange(48, dtype=torch.int32).reshape(3, 16))
        assert all(
            parameter._version > version
            for parameter, version in zip(fit.model.parameters(), before, strict=True)
        )
        new = engine.step(start, actions, seed=0).rewards
        assert not torch.equal(new, old)
        fresh = RolloutEngine(fit.model, backend="cpu")
        assert torch.equal(new, fresh.step(start, actions, seed=0).rewards)


def test_the_policy_may_change_between_rollouts() -> None:
    """Rollouts between updates of SAC by the kernel are those of the present policy."""
    sac, data, buffer = SAC(OBS, ACT, CONFIG, backend="cpu", threads=1), transitions(60, seed=1), filled(40)
    engine = RolloutEngine(make_ensemble(sac.actor.obs_dim, sac.actor.act_dim), backend="cpu")
    start, _ = inputs(9, sac.actor.obs_dim, sac.actor.act_dim)
    for round_ in range(3):
        versions = [parameter._version for parameter in sac.actor.parameters()]
        old = engine.rollout(sac.actor, start, 2, seed=0).actions
        sac.update_many(data, buffer, 3, seed=round_)
        assert all(
            parameter._version > version
            for parameter, version in zip(sac.actor.parameters(), versions, strict=True)
        )
        new = engine.rollout(sac.actor, start, 2, seed=0).actions
        assert not torch.equal(new, old)
        fresh = copy.deepcopy(sac.actor)
        assert torch.equal(new, engine.rollout(fresh, start, 2, seed=0).actions)
    state = {name: tensor.clone() for name, tensor in sac.state().items()}
    sac.update_many(data, buffer, 3, seed=9)
    sac.load_state(state, "here")
    assert torch.equal(new, engine.rollout(sac.actor, start, 2, seed=0).actions)
    # A policy's memory may change in any way.
    sac.actor.weights[0].detach().numpy()[:] *= np.float32(0.5)
    changed = engine.rollout(sac.actor, start, 2, seed=0).actions
    assert torch.equal(changed, engine.rollout(copy.deepcopy(sac.actor), start, 2, seed=0).actions)
    assert not torch.equal(changed, new)
