"""Test the values of a policy at sampled states against PyTorch in float64, on every instruction set."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import training_kernels

from mopo_fast import Actor, EnsembleDynamics, InputError, RolloutEngine
from mopo_fast.backends import checked
from mopo_fast.backends.choose import get_backend
from mopo_fast.backends.interface import PolicyArrays, Settings, ValuesCall
from mopo_fast.policy import Critic

# Observation and action dimensions, hidden layers, critics, members, rows, samples.
CASES: dict[str, tuple[int, int, tuple[int, ...], int, int, int, int]] = {
    "canonical": (17, 6, (256, 256), 2, 5, 25, 2),
    "one of all": (3, 1, (8,), 1, 1, 1, 1),
    "odd sizes": (5, 3, (24, 17), 3, 4, 13, 3),
    "many critics, three layers": (11, 3, (24, 17, 33), 10, 2, 37, 1),
    "humanoid": (376, 17, (40, 31), 2, 3, 20, 2),
}


def make_call(case: str, dtype: str, *, threads: int = 1, seed: int = 5) -> ValuesCall:
    obs_dim, act_dim, hidden, critics, members, rows, samples = CASES[case]
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    actor = Actor(obs_dim, act_dim, hidden=hidden, generator=generator)
    critic = Critic(obs_dim, act_dim, critics=critics, hidden=hidden, generator=generator)
    for bias in (*actor.biases, *critic.biases):
        bias.data = 0.3 * normal(*bias.shape)
    mean, std = normal(members, rows, obs_dim), normal(members, rows, obs_dim).exp()
    policy = PolicyArrays(
        [weight.detach() for weight in actor.weights],
        [bias.detach() for bias in actor.biases],
        "relu",
        -0.5,
        0.5,
    )
    weights, biases = ([one.detach() for one in some] for some in (critic.weights, critic.biases))
    return ValuesCall(mean, std, samples, policy, weights, biases, Settings(seed, False, dtype, threads))


def in_double(call: ValuesCall) -> ValuesCall:
    def double(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor.double() for tensor in tensors]

    policy = dataclasses.replace(
        call.policy, weights=double(call.policy.weights), biases=double(call.policy.biases)
    )
    return dataclasses.replace(
        call,
        mean=call.mean.double(),
        std=call.std.double(),
        policy=policy,
        weights=double(call.weights),
        biases=double(call.biases),
        settings=dataclasses.replace(call.settings, operands="float64"),
    )


def evaluate(backend: str, call: ValuesCall) -> torch.Tensor:
    return checked.least_values(get_backend(backend), call)


@pytest.mark.parametrize(("isa", "dtype"), training_kernels())
@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_pytorch(case: str, isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPO_FAST_ISA", isa)
    call = make_call(case, dtype)
    exact = evaluate("reference", in_double(call))
    usual = (evaluate("reference", call) - exact).abs().max()
    kernel = evaluate("cpu", call)
    assert kernel.shape == exact.shape and kernel.dtype == torch.float32
    assert (kernel - exact).abs().max() <= 2.0 * usual + 1e-6 * exact.abs().max()
    # Samples differ, members differ.
    assert len(torch.unique(kernel)) == kernel.numel()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bfloat16x3"])
def test_does_not_depend_on_threads(dtype: str) -> None:
    for case in CASES:
        one = evaluate("cpu", make_call(case, dtype))
        for threads in (2, 3, 16):
            assert torch.equal(evaluate("cpu", make_call(case, dtype, threads=threads)), one)
        assert not torch.equal(evaluate("cpu", make_call(case, dtype, seed=6)), one)


def test_a_value_that_is_nan_is_not_hidden() -> None:
    call = make_call("odd sizes", "float32")
    call.biases[-1][1] = torch.nan
    assert evaluate("cpu", call).isnan().all()
    call = make_call("odd sizes", "float32")
    call.mean[2, 4, 1] = torch.nan
    nan = evaluate("cpu", call).isnan()
    assert nan[:, 2, 4].all() and nan.sum() == len(nan)


def test_calls_that_cannot_be_made() -> None:
    call = make_call("odd sizes", "float32")
    for change, message in (
        ({"samples": 0}, "samples must be"),
        ({"std": call.std[:, :-1]}, "the states' std must be"),
        ({"mean": call.mean[0]}, "the states' mean must be"),
        ({"weights": call.weights[:-1]}, "the critics has 2 weights and 3 biases"),
        ({"biases": [bias[:2] for bias in call.biases]}, r"the critics's biases\[0\]"),
        ({"settings": Settings(0, False, "int8", 1)}, "unknown dtype"),
        ({"settings": Settings(0, False, "float32", 0)}, "threads must be"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate("cpu", dataclasses.replace(call, **change))


# --- RolloutEngine.bellman_inconsistency


def engine_of(**options: Any) -> tuple[RolloutEngine, Actor, Critic]:
    torch.manual_seed(0)
    ensemble = EnsembleDynamics(3, 2, members=5, elites=3, hidden=(16, 16))
    ensemble.elites = torch.tensor([4, 0, 2])
    with torch.no_grad():
        # Members far apart, each sure of itself.
        ensemble.biases[-1][:, 0] = 2.0 * torch.arange(5)
        ensemble.biases[-1][:, 4:] = -4.0
    engine = RolloutEngine(ensemble, penalty_coef=0.0, **options)
    return engine, Actor(3, 2, hidden=(16,)), Critic(3, 2, hidden=(16,))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_inconsistency_is_what_its_definition_says(backend: str) -> None:
    engine, actor, critic = engine_of(backend=backend)
    observations, actions = torch.randn(40, 3), torch.randn(40, 2).tanh()
    made = engine.bellman_inconsistency(observations, actions, actor, critic, seed=0, samples=2000)
    step = engine.step(observations, actions, seed=0, distributions=True)
    assert step.mean is not None and step.std is not None
    values = []
    for member in (4, 0, 2):
        mean, std = step.mean[member, :, :3], step.std[member, :, :3]
        states = observations + mean + std * torch.randn(2000, 40, 3)
        states = states.view(-1, 3)
        chosen = actor.act(states, torch.randn(80_000, 2))
        values.append(critic(states, chosen).amin(0).view(2000, 40).mean(0))
    expected = torch.stack(values).std(0)
    # Both are means over samples.
    assert ((made - expected).abs() < 0.05 * expected.mean()).all() and expected.mean() > 0.3
    same = engine.bellman_inconsistency(
        observations.numpy(), actions.numpy(), actor, critic, seed=0, samples=2000
    )
    assert torch.equal(same, made) and not np.allclose(
        engine.bellman_inconsistency(observations, actions, actor, critic, seed=1, samples=2000), made
    )


def test_inconsistency_that_cannot_be_computed() -> None:
    engine, actor, critic = engine_of()
    rows = torch.zeros(4, 3), torch.zeros(4, 2)
    with pytest.raises(InputError, match=r"observations must be \[batch, 3\]"):
        engine.bellman_inconsistency(torch.zeros(4, 2), rows[1], actor, critic, seed=0)
    with pytest.raises(InputError, match="4 observations but 3 actions"):
        engine.bellman_inconsistency(rows[0], rows[1][:3], actor, critic, seed=0)
    with pytest.raises(InputError, match="the critics's weights"):
        engine.bellman_inconsistency(*rows, actor, Critic(3, 3), seed=0)
    with pytest.raises(InputError, match="the policy is for 2 observation"):
        engine.bellman_inconsistency(*rows, Actor(2, 2), critic, seed=0)
    with pytest.raises(InputError, match="seed must be"):
        engine.bellman_inconsistency(*rows, actor, critic, seed=-1)
    with pytest.raises(InputError, match=r"policy must be a mopo_fast\.Actor"):
        engine.bellman_inconsistency(*rows, lambda x: x, critic, seed=0)  # type: ignore[arg-type]
    engine.ensemble.elites = torch.tensor([1])
    with pytest.raises(InputError, match="at least two of them, there is one"):
        engine.bellman_inconsistency(*rows, actor, critic, seed=0)
