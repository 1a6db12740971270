"""The fused SAC update against autograd in float64, on every instruction set."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from kernel_cases import assert_trained_alike, random_transitions, to_double

from mopo_fast import sac as sac_module
from mopo_fast.backends import cpu
from mopo_fast.buffer import RingBuffer
from mopo_fast.config import SACConfig
from mopo_fast.data import Transitions
from mopo_fast.errors import InputError
from mopo_fast.sac import METRICS, SAC

OTHERS = {
    "simultaneous": False,
    "critic_loss": "mse",
    "alpha_max": 1.0,
    "log_std_min": -5.0,
    "target_entropy": "act_dim",
    "actor_learning_rate": 1e-4,
    "alpha_learning_rate": 1e-2,
}
# obs_dim, act_dim, config
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "canonical": (17, 6, {}),
    "canonical, others' options": (17, 6, OTHERS),
    "one action": (3, 1, {"hidden": (24, 40), "batch_size": 7}),
    "one row": (11, 3, {"hidden": (16, 8), "batch_size": 1}),
    "one unit": (5, 2, {"hidden": (1,), "batch_size": 20}),
    "ten critics, three layers": (11, 3, {"hidden": (24, 17, 33), "critics": 10, "batch_size": 37}),
    "one critic, one layer": (5, 2, {"hidden": (65,), "critics": 1, "batch_size": 50}),
    "ant, real rows only": (111, 8, {"hidden": (50, 31), "batch_size": 100, "real_ratio": 1.0}),
    "humanoid, no real rows": (376, 17, {"hidden": (48, 31), "batch_size": 64, "real_ratio": 0.0}),
    "large batch": (4, 2, {"hidden": (20, 20), "batch_size": 301, "discount": 0.9, "polyak": 0.3}),
}


def sources(obs_dim: int, act_dim: int) -> tuple[Transitions, RingBuffer]:
    """A data set, and a buffer whose unused rows are poisoned."""
    buffer = RingBuffer(100, obs_dim, act_dim)
    for array in buffer.storage.arrays().values():
        array.fill_(True if array.dtype == torch.bool else float("nan"))
    rows = random_transitions(60, obs_dim, act_dim, seed=2).arrays()
    for name, array in buffer.storage.arrays().items():
        array[:60] = rows[name]
    buffer.advance(60)
    return random_transitions(50, obs_dim, act_dim, seed=1), buffer


def make(obs_dim: int, act_dim: int, config: SACConfig, backend: str, threads: int = 1) -> SAC:
    """As different from a fresh one as a trained one: targets apart, biases, some log stds out of bounds."""
    sac = SAC(obs_dim, act_dim, config, seed=3, backend=backend, threads=threads)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for target in sac.target.parameters():
            target.mul_(1.3)
        for bias in (*sac.actor.biases, *sac.critic.biases):
            bias.normal_(0.0, 0.2, generator=g)
        sac.actor.biases[-1][act_dim] = config.log_std_max + 1.0
        sac.actor.biases[-1][-1] = config.log_std_min - 1.0
        sac.log_alpha.fill_(0.4)
    return sac


def run(case: str, backend: str, updates: int, *, double: bool = False, threads: int = 1, seed: int = 7):
    obs_dim, act_dim, options = CASES[case]
    sac = make(obs_dim, act_dim, SACConfig(**options), backend, threads)
    if double:
        to_double(sac)
    metrics = sac.update_many(*sources(obs_dim, act_dim), updates, seed)
    return {name: tensor.detach().clone() for name, tensor in sac.state().items()}, metrics


@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_pytorch(case: str, isa: str, updates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPO_FAST_ISA", isa)
    obs_dim, act_dim, options = CASES[case]
    before = make(obs_dim, act_dim, SACConfig(**options), "cpu").state()
    kernel, metrics = run(case, "cpu", updates)
    same, same_metrics = run(case, "reference", updates)
    exact, exact_metrics = run(case, "reference", updates, double=True)
    assert_trained_alike(kernel, same, exact, before, one_step=updates == 1)
    for name in METRICS:
        usual = abs(same_metrics[name] - exact_metrics[name])
        error = abs(metrics[name] - exact_metrics[name])
        assert error <= 2.0 * usual + 1e-6 * max(1.0, abs(exact_metrics[name])), name


def test_every_parameter_moves() -> None:
    obs_dim, act_dim, options = CASES["canonical"]
    before = make(obs_dim, act_dim, SACConfig(**options), "cpu").state()
    after, _ = run("canonical", "cpu", 2)
    for name, tensor in after.items():
        assert not torch.equal(tensor, before[name]), name
    assert after["updates"] == 2
    assert all(float(step) == 2.0 for name, step in after.items() if name.endswith(".step"))


@pytest.mark.parametrize("case", ["canonical", "canonical, others' options", "ten critics, three layers"])
@pytest.mark.parametrize("threads", [2, 3, 64])
@pytest.mark.parametrize("isa", cpu.isas())
def test_result_does_not_depend_on_threads(
    isa: str, case: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOPO_FAST_ISA", isa)
    one, one_metrics = run(case, "cpu", 3)
    many, many_metrics = run(case, "cpu", 3, threads=threads)
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert one_metrics == many_metrics


def test_result_does_not_depend_on_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run("canonical", "cpu", 5)
    monkeypatch.setattr(sac_module, "_UPDATES_AT_ONCE", 2)
    parts, _ = run("canonical", "cpu", 5)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_seed_decides_the_draws() -> None:
    one, same, other = (run("one row", "cpu", 2, seed=seed)[0] for seed in (7, 7, 2**64 - 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["actor.weights.0"], other["actor.weights.0"])


def test_arrays_of_other_layouts_are_read_right() -> None:
    obs_dim, act_dim, options = CASES["large batch"]
    data, buffer = sources(obs_dim, act_dim)
    states = []
    for variant in (
        data,
        dataclasses.replace(data, observations=data.observations.double()),
        dataclasses.replace(data, actions=data.actions.repeat_interleave(2, dim=1)[:, ::2]),
    ):
        sac = make(obs_dim, act_dim, SACConfig(**options), "cpu")
        sac.update_many(variant, buffer, 2, seed=0)
        states.append({name: tensor.clone() for name, tensor in sac.state().items()})
    assert all(torch.equal(states[0][name], other[name]) for other in states[1:] for name in states[0])


def test_refuses_parameters_that_it_cannot_train_in_place() -> None:
    sac = to_double(make(5, 2, SACConfig(hidden=(4,)), "cpu"))
    with pytest.raises(InputError, match=r"trains contiguous torch.float32 .*use backend reference"):
        sac.update_many(*sources(5, 2), 1, seed=0)


def test_refuses_terminals_that_are_not_bool() -> None:
    sac = make(5, 2, SACConfig(hidden=(4,)), "cpu")
    data, buffer = sources(5, 2)
    data.terminals = data.terminals.float()
    with pytest.raises(InputError, match=r"contiguous torch.bool tensors .* got torch.float32"):
        sac.update_many(data, buffer, 1, seed=0)


def test_divergence_is_one_clear_error() -> None:
    sac = make(5, 2, SACConfig(hidden=(4,)), "cpu")
    data, buffer = sources(5, 2)
    buffer.storage.rewards.fill_(math.inf)
    with pytest.raises(InputError, match="SAC diverged before update 2"):
        sac.update_many(data, buffer, 2, seed=0)
