"""Test the checks in front of the kernels, of modules, buffers and runs changed after creation."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import inputs, make_ensemble, make_policy, make_sac, sac_sources

from mopo_fast import EnsembleDynamics, InputError, RolloutEngine
from mopo_fast.backends import checked, cpu
from mopo_fast.backends.gpu.triton import TritonBackend
from mopo_fast.buffer import RingBuffer
from mopo_fast.config import DynamicsConfig, SACConfig
from mopo_fast.data import Transitions
from mopo_fast.fit import Fit
from mopo_fast.rollout import allocate
from mopo_fast.run.population import FitPopulation, SacPopulation

BACKENDS = ["reference", "cpu"]


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)


def set_weight(layer: int, *shape: int) -> Callable[[EnsembleDynamics], None]:
    return lambda model: model.weights.__setitem__(layer, parameter(*shape))


def set_bias(layer: int, *shape: int) -> Callable[[EnsembleDynamics], None]:
    return lambda model: model.biases.__setitem__(layer, parameter(*shape))


def set_tensor(name: str, tensor: torch.Tensor) -> Callable[[EnsembleDynamics], None]:
    return lambda model: setattr(model, name, tensor)


# Changes of an ensemble with three members, 5 + 2 inputs and hidden layers of 37 and 20 units.
CHANGES: dict[str, tuple[Callable[[EnsembleDynamics], None], str]] = {
    "no elites": (set_tensor("elites", torch.zeros(0, dtype=torch.int64)), r"elites must be .* got \[\]"),
    "int32 elites": (set_tensor("elites", torch.zeros(1, dtype=torch.int32)), "elites must be int64"),
    "float elites": (set_tensor("elites", torch.zeros(1)), "elites must be int64"),
    "repeated elites": (set_tensor("elites", torch.tensor([1, 1])), "elites must be distinct"),
    "elites in two dimensions": (set_tensor("elites", torch.tensor([[0, 1]])), "elites must be int64"),
    "an elite beyond": (set_tensor("elites", torch.tensor([3])), "elites must be distinct"),
    "a negative elite": (set_tensor("elites", torch.tensor([-1])), "elites must be distinct"),
    "a short bias": (set_bias(0, 3, 36), r"the ensemble's weights\[0\] must be .*\[3, 7, 36\]"),
    "a last bias of other width": (set_bias(2, 3, 11), r"biases\[2\] must be .*\[3, 12\] .* got .*\[3, 11\]"),
    "a bias of fewer members": (set_bias(1, 2, 20), r"biases\[1\] must be .*\[3, 20\] .* got .*\[2, 20\]"),
    "a weight of fewer members": (set_weight(1, 2, 37, 20), r"weights\[1\] must be .*\[3, 37, 20\]"),
    "a narrow weight": (set_weight(1, 3, 36, 20), r"weights\[1\] must be .*\[3, 37, 20\]"),
    "a first weight of fewer inputs": (set_weight(0, 3, 6, 37), r"input_mean must be .*\[6\] .* got .*\[7\]"),
    "a flat weight": (set_weight(0, 7, 37), r"weights \[members, in, out\]"),
    "short input_mean": (set_tensor("input_mean", torch.zeros(6)), r"input_mean must be .*\[7\]"),
    "long input_std": (set_tensor("input_std", torch.ones(8)), r"input_std must be .*\[7\]"),
    "short max_logvar": (lambda m: setattr(m, "max_logvar", parameter(5)), r"max_logvar must be .*\[1, 6\]"),
    "min_logvar of two members": (
        lambda m: setattr(m, "min_logvar", parameter(2, 6)),
        r"min_logvar must be .*\[1, 6\] .* got .*\[2, 6\]",
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHANGES)
def test_a_live_ensemble_that_is_none_any_more(name: str, backend: str) -> None:
    change, message = CHANGES[name]
    engine = RolloutEngine(make_ensemble(5, 2, members=3, hidden=(37, 20)), backend=backend)
    observations, actions = inputs(8, 5, 2)
    engine.step(observations, actions, seed=0)
    change(engine.ensemble)
    with pytest.raises(InputError, match=message):
        engine.step(observations, actions, seed=0)
    with pytest.raises(InputError, match=message):
        engine.rollout(make_policy(5, 2), observations, 2, seed=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [False, True])
def test_a_live_policy_that_is_none_any_more(backend: str, function: bool) -> None:
    ended = (lambda o, a, n: n[:, 0] > 9.0) if function else None
    engine = RolloutEngine(make_ensemble(5, 2), backend=backend, termination=ended)
    policy = make_policy(5, 2)
    policy.biases[1] = parameter(3)
    with pytest.raises(InputError, match=r"the policy's weights\[1\] must be"):
        engine.rollout(policy, inputs(8, 5, 2)[0], 2, seed=0)
    policy = make_policy(5, 2)
    policy.weights[-1] = parameter(policy.hidden[-1], 5)
    with pytest.raises(InputError, match=r"the policy's weights\[\d\] must be .* got"):
        engine.rollout(policy, inputs(8, 5, 2)[0], 2, seed=0)


def without(**changes: Any) -> Transitions:
    return dataclasses.replace(allocate(16, 5, 2, "cpu"), **changes)


STORAGES: dict[str, tuple[Callable[[], Transitions], str]] = {
    "short rewards": (lambda: without(rewards=torch.zeros(15)), "the same number of rows"),
    "short terminals": (
        lambda: without(terminals=torch.zeros(15, dtype=torch.bool)),
        "the same number of rows",
    ),
    "narrow observations": (lambda: without(observations=torch.zeros(16, 4)), "observations must be"),
    "flat actions": (lambda: without(actions=torch.zeros(16)), "actions must be"),
    "float64 penalties": (
        lambda: without(penalties=torch.zeros(16, dtype=torch.float64)),
        "penalties must be",
    ),
    "int64 members": (lambda: without(members=torch.zeros(16, dtype=torch.int64)), "members must be"),
    "int32 indices": (
        lambda: without(rollout_index=torch.zeros(16, dtype=torch.int32)),
        "rollout_index must",
    ),
    "uint8 terminals": (lambda: without(terminals=torch.zeros(16, dtype=torch.uint8)), "terminals must be"),
    "rows in one place": (
        lambda: without(next_observations=torch.zeros(1, 5).expand(16, 5)),
        "next_observations must be .* contiguous rows",
    ),
    "overlapping rows": (
        lambda: without(observations=torch.zeros(40).as_strided((16, 5), (2, 1))),
        "observations must be .* contiguous rows",
    ),
    "columns apart": (lambda: without(observations=torch.zeros(5, 16).T), "observations must be"),
    "no actions": (lambda: without(actions=None), "the buffer lacks actions"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [False, True])
@pytest.mark.parametrize("name", STORAGES)
def test_a_buffer_that_does_not_fit(name: str, function: bool, backend: str) -> None:
    storage, message = STORAGES[name]
    ended = (lambda o, a, n: n[:, 0] > 9.0) if function else None
    engine = RolloutEngine(make_ensemble(5, 2), backend=backend, termination=ended)
    with pytest.raises(InputError, match=message):
        ring = RingBuffer.over(storage())
        engine.rollout(make_policy(5, 2), inputs(4, 5, 2)[0], 2, seed=0, out=ring)


@pytest.mark.parametrize("head", [-1, 16, 2**40])
def test_a_head_that_is_no_row(head: int) -> None:
    engine, ring = RolloutEngine(make_ensemble(5, 2)), RingBuffer(16, 5, 2)
    ring.head = head
    with pytest.raises(InputError, match="the buffer's head must be a whole number, 0 <="):
        engine.rollout(make_policy(5, 2), inputs(4, 5, 2)[0], 2, seed=0, out=ring)


@pytest.mark.parametrize("backend", BACKENDS)
def test_starts_from_the_buffer_that_is_written(backend: str) -> None:
    """Start states are read before rows are written, so the result is that of a copy."""
    engine, policy = RolloutEngine(make_ensemble(5, 2), backend=backend), make_policy(5, 2)

    def written(copied: bool) -> torch.Tensor:
        ring = RingBuffer(3000, 5, 2)
        engine.rollout(policy, inputs(1000, 5, 2)[0], 1, seed=0, out=ring)
        ring.clear()
        start = ring.storage.next_observations[:1000]
        engine.rollout(policy, start.clone() if copied else start, 3, seed=1, out=ring)
        return ring.storage.observations

    assert torch.equal(written(copied=False), written(copied=True))


SAC_CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "a short bias": (
        lambda sac: setattr(sac.optimizers["actor"].parameters[3], "data", torch.zeros(3)),
        r"the actor's weights\[0\] must be",
    ),
    "a short moment": (
        lambda sac: sac.optimizers["critic"].exp_avgs.__setitem__(0, torch.zeros(1)),
        r"the critic's weights\[0\]'s exp_avg must be",
    ),
    "a target of other width": (
        lambda sac: sac._targets.__setitem__(1, torch.zeros(2, 4, 5)),
        r"the critic's weights\[1\]'s target must be",
    ),
    "no target": (
        lambda sac: sac._targets.__setitem__(0, None),
        r"the critic's weights\[0\]'s target must be .* got NoneType",
    ),
    "two temperatures": (
        lambda sac: setattr(sac.optimizers["alpha"].parameters[0], "data", torch.zeros(2)),
        "log_alpha must be",
    ),
    "another number of critics": (
        lambda sac: setattr(sac, "config", dataclasses.replace(sac.config, critics=3)),
        r"the critic's weights\[0\] must be .*\[3, 7, 4\]",
    ),
}


@pytest.mark.parametrize("name", SAC_CHANGES)
def test_live_networks_that_are_none_any_more(name: str) -> None:
    change, message = SAC_CHANGES[name]
    sac = make_sac(5, 2, SACConfig(hidden=(4, 4), batch_size=8), "cpu")
    data, buffer = sac_sources(5, 2)
    change(sac)
    with pytest.raises(InputError, match=message):
        sac.update_many(data, buffer, 1, 0)


@pytest.mark.parametrize(
    ("where", "name", "array"),
    [
        ("data", "rewards", torch.zeros(3)),
        ("data", "terminals", torch.zeros(50)),
        ("data", "next_observations", torch.zeros(50, 4)),
        ("buffer", "actions", torch.zeros(1, 2).expand(40, 2)),
        ("buffer", "rewards", torch.zeros(1)),
    ],
)
def test_rows_that_are_none_any_more(where: str, name: str, array: torch.Tensor) -> None:
    sac = make_sac(5, 2, SACConfig(hidden=(4,), batch_size=8, real_ratio=0.5), "cpu")
    data, buffer = sac_sources(5, 2)
    setattr(data if where == "data" else buffer.storage, name, array)
    with pytest.raises(InputError, match=f"the {where}'s {name} must be"):
        sac.update_many(data, buffer, 1, 0)


@pytest.fixture
def fit() -> Fit:
    data, _ = sac_sources(5, 2)
    config = DynamicsConfig(members=3, elites=2, hidden=(8,), batch_size=4, weight_decay=(0.0, 0.0))
    return Fit(data, 0, config, backend="cpu", threads=1)


FIT_CHANGES: dict[str, tuple[Callable[[Fit], None], str]] = {
    "a short bias": (
        lambda fit: fit.parameters.__setitem__(2, torch.zeros(3, 7)),
        r"the ensemble's weights\[0\] must be .*\[3, 7, 7\]",
    ),
    "a bound of other width": (
        lambda fit: fit.parameters.__setitem__(4, torch.zeros(5)),
        "max_logvar must be",
    ),
    "a short moment": (
        lambda fit: fit.optimizer.exp_avg_sqs.__setitem__(0, torch.zeros(1)),
        r"weights\[0\]'s exp_avg_sq must be",
    ),
    "a narrow table": (lambda fit: setattr(fit, "table", torch.zeros(40, 12)), "the table's columns must be"),
    "columns of a table": (
        lambda fit: setattr(fit, "table", torch.zeros(40, 32)[:, :16]),
        "the fit's table must be",
    ),
}


@pytest.mark.parametrize("name", FIT_CHANGES)
def test_a_live_fit_that_is_none_any_more(name: str, fit: Fit) -> None:
    change, message = FIT_CHANGES[name]
    rows = torch.zeros(3, 8, dtype=torch.int32)
    fit.steps(rows)
    change(fit)
    with pytest.raises(InputError, match=message):
        fit.steps(rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.full((3, 8), 40, dtype=torch.int32), r"rows must be 0 to 39, got 40 to 40"),
        (torch.full((3, 8), -1, dtype=torch.int32), r"rows must be 0 to 39, got -1 to -1"),
        (torch.zeros(3, 0, dtype=torch.int32), r"rows \[members, count\]"),
        (torch.zeros(2, 8, dtype=torch.int32), r"weights\[0\] must be .*\[2, 7, 8\]"),
        (torch.zeros(3, 8, dtype=torch.int64), "the fit's rows must be torch.int32"),
        (torch.zeros(8, 3, dtype=torch.int32).T, "the fit's rows must be torch.int32"),
    ],
)
def test_rows_that_the_table_lacks(rows: torch.Tensor, message: str, fit: Fit) -> None:
    with pytest.raises(InputError, match=message):
        fit.steps(rows)


@pytest.mark.parametrize("function", [False, True])
def test_every_call_is_checked(function: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(checked, "_check_call", lambda *arguments: seen.append(arguments) or 1 / 0)
    ended = (lambda o, a, n: n[:, 0] > 9.0) if function else None
    engine = RolloutEngine(make_ensemble(5, 2), termination=ended)
    observations, actions = inputs(8, 5, 2)
    with pytest.raises(ZeroDivisionError):
        engine.step(observations, actions, seed=0)
    with pytest.raises(ZeroDivisionError):
        engine.rollout(make_policy(5, 2), observations, 1, seed=0)
    assert len(seen) == 2


def test_checked_arguments_are_left_as_they_are() -> None:
    """A refused call writes nothing."""
    sac = make_sac(5, 2, SACConfig(hidden=(4, 4), batch_size=8), "cpu")
    data, buffer = sac_sources(5, 2)
    before = copy.deepcopy(sac.state())
    buffer.storage.rewards = torch.zeros(1)
    with pytest.raises(InputError):
        sac.update_many(data, buffer, 1, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sac.state().items())


def test_an_unknown_instruction_set_is_an_error_for_whoever_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPO_FAST_ISA", "avx9")
    for backend in ("auto", "cpu", "reference"):
        with pytest.raises(InputError, match="MOPO_FAST_ISA=avx9 cannot run on this processor; it has: "):
            RolloutEngine(make_ensemble(5, 2), backend=backend)
    with pytest.raises(InputError, match="MOPO_FAST_ISA=avx9"):
        make_sac(5, 2, SACConfig(hidden=(4,)), "auto")
    assert "MOPO_FAST_ISA=avx9" in cpu.CpuBackend().status().reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_torchs_default_type_changes_nothing(dtype: torch.dtype) -> None:
    engine, policy = RolloutEngine(make_ensemble(5, 2), backend="cpu"), make_policy(5, 2)
    observations, actions = inputs(300, 5, 2)
    expected = engine.step(observations, actions, seed=0, distributions=True)
    rolled = engine.rollout(policy, observations, 3, seed=0)
    torch.set_default_dtype(dtype)
    try:
        made = engine.step(observations, actions, seed=0, distributions=True)
        again = engine.rollout(policy, observations, 3, seed=0, out=RingBuffer(900, 5, 2))
    finally:
        torch.set_default_dtype(torch.float32)
    for field in dataclasses.fields(made):
        if field.name == "truncations":
            continue
        assert torch.equal(getattr(made, field.name), getattr(expected, field.name)), field.name
    assert torch.equal(again.rewards, rolled.rewards)


def test_memory_that_is_no_longer_held() -> None:
    engine, policy = RolloutEngine(make_ensemble(5, 2), backend="cpu"), make_policy(5, 2)
    observations, _ = inputs(8, 5, 2)
    engine.ensemble.weights[1].untyped_storage().resize_(0)
    with pytest.raises(InputError, match=r"weights\[1\] must be"):
        engine.rollout(policy, observations, 1, seed=0)
    sac = make_sac(5, 2, SACConfig(hidden=(4,), batch_size=8), "cpu")
    sac.critic.weights[0].untyped_storage().resize_(8)
    with pytest.raises(InputError, match=r"the critic's weights\[0\] must be"):
        sac.update_many(*sac_sources(5, 2), 1, 0)


def test_numbers_that_address_memory_are_copied(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread or a signal handler may change such numbers after they are checked."""
    handed: list[Any] = []
    monkeypatch.setattr(cpu.CpuBackend, "fit_steps", lambda self, runs, threads: handed.extend(runs) or [0.0])
    rows = torch.zeros(3, 8, dtype=torch.int32)
    fit.steps(rows)
    rows.fill_(2**30)
    assert not handed[0].rows.any()
    engine = RolloutEngine(make_ensemble(5, 2))
    elites = engine._dynamics().elites
    engine.ensemble.elites.fill_(99)
    assert elites.max() < 99


def test_a_kernel_keeps_the_memory_that_it_writes_to() -> None:
    sac = make_sac(5, 2, SACConfig(hidden=(4,), batch_size=8), "cpu")
    value, *_ = sac._parameters("actor")[0]
    address = value.data_ptr()
    sac.actor.weights[0].data = torch.zeros(5, 4)
    assert value.data_ptr() == address


@pytest.mark.parametrize("operands", ["float64", "float16", "tfloat32"])
def test_a_backend_that_cannot_serve_is_not_called(operands: str) -> None:
    engine = RolloutEngine(make_ensemble(5, 2), backend="cpu")
    engine.operands = operands
    with pytest.raises(
        InputError, match=f"serves float32, bfloat16, bfloat16x3, not {operands}|must be contiguous"
    ):
        engine.step(*inputs(8, 5, 2), seed=0)


def test_a_backend_that_cannot_train_is_not_called(fit: Fit) -> None:
    run = fit.kernel_call(torch.zeros(3, 8, dtype=torch.int32))
    with pytest.raises(InputError, match="triton: makes rollouts, does not train"):
        checked.fit_steps(TritonBackend(), [run], 1)
    elsewhere: Any = [[tensor.to("meta") for tensor in bound[:3]] for bound in run.bounds]
    with pytest.raises(InputError, match="cpu: serves CPU tensors, not meta"):
        checked.fit_steps(cpu.CpuBackend(), [dataclasses.replace(run, bounds=elsewhere)], 1)


def test_more_than_the_memory_holds() -> None:
    engine = RolloutEngine(make_ensemble(5, 2))
    with pytest.raises(InputError, match=r"transitions would take .* GiB"):
        engine.rollout(make_policy(5, 2), inputs(1, 5, 2)[0], 2**31 - 1, seed=0)


def test_sparse_observations() -> None:
    engine, (observations, actions) = RolloutEngine(make_ensemble(5, 2)), inputs(8, 5, 2)
    with pytest.raises(InputError, match="observations must be dense"):
        engine.step(observations.to_sparse(), actions, seed=0)


@pytest.mark.parametrize("size", [-5, 2.5, 101])
def test_a_buffers_size(size: Any) -> None:
    sac = make_sac(5, 2, SACConfig(hidden=(4,), batch_size=8), "cpu")
    data, buffer = sac_sources(5, 2)
    buffer.size = size
    with pytest.raises(InputError, match="the buffer's size must be 0 to 100"):
        sac.update_many(data, buffer, 1, 0)


def test_a_seed_that_is_none() -> None:
    sac = make_sac(5, 2, SACConfig(hidden=(4,), batch_size=8), "cpu")
    with pytest.raises(InputError, match="seed must be a whole number"):
        sac.update_many(*sac_sources(5, 2), 1, None)  # type: ignore[arg-type]


def test_a_population_of_one_twice(fit: Fit) -> None:
    sac = make_sac(5, 2, SACConfig(hidden=(4,)), "cpu")
    for others in (
        [sac],
        [make_sac(5, 2, SACConfig(hidden=(5,)), "cpu")],
        [make_sac(4, 2, SACConfig(hidden=(4,)), "cpu")],
    ):
        with pytest.raises(InputError, match="only different SACs of one config, backend and size"):
            SacPopulation([sac, *others])
    with pytest.raises(InputError, match="only different fits of one config, backend and size"):
        FitPopulation([fit, fit])
