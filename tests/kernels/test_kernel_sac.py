"""Test the fused SAC update against autograd in float64, on every instruction set."""

import dataclasses
import math

import pytest
import torch
from kernel_cases import (
    SAC_CASES,
    assert_no_denormals,
    assert_trained_alike,
    fill_with_denormals,
    first_layer,
    make_sac,
    random_transitions,
    run_sac,
    sac_sources,
    to_double,
    training_kernels,
)

from mopo_fast import sac as sac_module
from mopo_fast.backends import cpu
from mopo_fast.backends.philox import (
    ACTION_STREAM,
    CRITIC_STREAM,
    NEXT_ACTION_STREAM,
    random_normals,
    random_subset,
)
from mopo_fast.config import UPDATE_ORDERS, SACConfig
from mopo_fast.data.transitions import DATA_ARRAYS, Transitions
from mopo_fast.errors import InputError
from mopo_fast.sac import METRICS, Draws

# Relative errors of the gradients: at most of any parameter; at least and at most of all. A factor has errors
# up to 2^-8 in bfloat16; in bfloat16x3 up to 2^-16, and the product of the low parts is as small.
BOUNDS = [("bfloat16", 2.0**-5, 2.0**-12, 2.0**-7), ("bfloat16x3", 2.0**-14, 2.0**-21, 2.0**-16)]


@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize(("isa", "dtype"), training_kernels())
@pytest.mark.parametrize("case", SAC_CASES)
def test_as_accurate_as_pytorch(
    case: str, isa: str, dtype: str, updates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOPO_FAST_ISA", isa)
    obs_dim, act_dim, options = SAC_CASES[case]
    before = make_sac(obs_dim, act_dim, SACConfig(**options), "cpu").state()
    kernel, metrics = run_sac(case, "cpu", updates, dtype=dtype)
    same, same_metrics = run_sac(case, "reference", updates, dtype=dtype)
    exact, exact_metrics = run_sac(case, "reference", updates, double=True)
    assert_trained_alike(kernel, same, exact, before, one_step=updates == 1)
    unit = {"float32": 1e-6, "bfloat16x3": 1e-5, "bfloat16": 1e-4}[dtype]
    for name in METRICS:
        usual = abs(same_metrics[name] - exact_metrics[name])
        error = abs(metrics[name] - exact_metrics[name])
        assert error <= 2.0 * usual + unit * max(1.0, abs(exact_metrics[name])), name


@pytest.mark.parametrize(("dtype", "each", "least", "most"), BOUNDS)
@pytest.mark.parametrize("case", ["canonical", "canonical, others' options", "large batch"])
@pytest.mark.parametrize("isa", cpu.isas())
def test_gradients_of_rounded_factors(
    case: str, isa: str, dtype: str, each: float, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of the factors add up and partly cancel.

    Adam's first moments after one update are the gradients, up to a factor.
    """
    monkeypatch.setenv("MOPO_FAST_ISA", isa)
    if dtype == "bfloat16x3" and isa not in cpu.WITH_BFLOAT16:
        least = 0.0  # float32
    rounded, _ = run_sac(case, "cpu", 1, dtype=dtype)
    exact, _ = run_sac(case, "reference", 1, double=True)
    for network in ("actor", "critic"):
        if network == "actor" and dtype == "bfloat16x3" and case != "large batch":
            continue  # two inputs of ReLU that are nearly zero change their sign
        ours, truth = (gradients(state, network) for state in (rounded, exact))
        errors = {name: relative_error(ours[name], truth[name]) for name in truth}
        assert max(errors.values()) <= each, errors
        whole = [joined(ours), joined(truth)]
        assert least <= relative_error(*whole) <= most


@pytest.mark.parametrize(("dtype", "nearer"), [("bfloat16", 0.02), ("bfloat16x3", 0.2)])
@pytest.mark.parametrize("isa", cpu.isas())
def test_the_inner_layers_alone_are_rounded(
    isa: str, dtype: str, nearer: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results are nearer to PyTorch with these factors rounded than to PyTorch in float32."""
    monkeypatch.setenv("MOPO_FAST_ISA", isa)
    if dtype == "bfloat16x3" and isa not in cpu.WITH_BFLOAT16:
        pytest.skip("float32 is taken")
    case = "ten critics, three layers"
    kernel, _ = run_sac(case, "cpu", 1, dtype=dtype)
    rounded, _ = run_sac(case, "reference", 1, dtype=dtype)
    unrounded, _ = run_sac(case, "reference", 1)
    for network in ("actor", "critic"):
        ours, theirs, plain = (gradients(state, network) for state in (kernel, rounded, unrounded))
        assert relative_error(joined(ours), joined(theirs)) < nearer * relative_error(
            joined(ours), joined(plain)
        )
        if dtype == "bfloat16x3":
            continue  # in single parameters, other errors of float32 are as large
        for name in ours:
            error, distance = (relative_error(ours[name], other[name]) for other in (theirs, plain))
            assert error < nearer * distance, f"{name}: {error:.3g} beside {distance:.3g}"
    if first_layer(dtype) == "float32":
        # Without a layer between the first and the last nothing is rounded.
        flat = [run_sac("one critic, one layer", "cpu", 2, dtype=dtype)[0] for dtype in ("float32", dtype)]
        assert all(torch.equal(flat[0][name], flat[1][name]) for name in flat[0])


def gradients(state: dict[str, torch.Tensor], network: str) -> dict[str, torch.Tensor]:
    """Return the gradient by each parameter after one update, up to a factor."""
    prefix = f"adam.{network}"
    return {name: x for name, x in state.items() if name.startswith(prefix) and name.endswith("exp_avg")}


def joined(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()])


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x.double() - truth.double()).norm() / truth.double().norm())


def test_every_parameter_moves() -> None:
    obs_dim, act_dim, options = SAC_CASES["canonical"]
    before = make_sac(obs_dim, act_dim, SACConfig(**options), "cpu").state()
    after, _ = run_sac("canonical", "cpu", 2)
    for name, tensor in after.items():
        assert not torch.equal(tensor, before[name]), name
    assert after["updates"] == 2
    assert all(float(step) == 2.0 for name, step in after.items() if name.endswith(".step"))


@pytest.mark.parametrize(
    "case",
    [
        "canonical",
        "canonical, others' options",
        "canonical, Unifloral's options",
        "Unifloral's options",
        "ten critics, three layers",
        "REDQ's options",
        "two critics' mean, Unifloral's order",
        "large batch",
    ],
)
@pytest.mark.parametrize("threads", [2, 3, 64])
@pytest.mark.parametrize(("isa", "dtype"), training_kernels())
def test_result_does_not_depend_on_threads(
    isa: str, case: str, dtype: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOPO_FAST_ISA", isa)
    one, one_metrics = run_sac(case, "cpu", 3, dtype=dtype)
    many, many_metrics = run_sac(case, "cpu", 3, dtype=dtype, threads=threads)
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert one_metrics == many_metrics


@pytest.mark.parametrize("case", ["canonical", "Unifloral's options", "REDQ's options"])
@pytest.mark.parametrize(("isa", "dtype"), training_kernels())
def test_result_does_not_depend_on_the_calls(
    isa: str, dtype: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOPO_FAST_ISA", isa)
    whole, _ = run_sac(case, "cpu", 5, dtype=dtype)
    monkeypatch.setattr(sac_module, "_UPDATES_AT_ONCE", 2)
    parts, _ = run_sac(case, "cpu", 5, dtype=dtype)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("order", UPDATE_ORDERS)
@pytest.mark.parametrize("count", range(1, 11))
def test_the_drawn_critics_are_the_reference_s(count: int, order: str) -> None:
    """Targets of critics that differ by far agree, so the kernel draws the same critics in each update."""
    config = SACConfig(critics=10, target_critics=count, hidden=(12,), batch_size=20, order=order)
    states = []
    for backend in ("cpu", "reference"):
        sac = make_sac(4, 2, config, backend)
        with torch.no_grad():
            for target in (sac.critic, sac.target):
                target.biases[-1].add_(100.0 * torch.arange(10).view(-1, 1))
        metrics = sac.update_many(*sac_sources(4, 2), 5, seed=count)
        states.append((sac.state(), metrics["critic_loss"]))
    (kernel, loss), (reference, expected) = states
    assert loss == pytest.approx(expected, rel=1e-4)
    for name in (name for name in reference if name.startswith(("critic", "target"))):
        torch.testing.assert_close(kernel[name], reference[name], rtol=1e-3, atol=1e-4)


def test_critics_that_are_not_drawn_leave_the_targets_alone() -> None:
    """A target critic with Q of minus infinity spoils the updates that draw it, and no other."""
    config = SACConfig(critics=5, target_critics=2, hidden=(12,), batch_size=20)
    drawn = random_subset(torch.arange(30), CRITIC_STREAM, 2, 5, 3)
    first = int((drawn == 4).any(1).nonzero()[0])
    assert 0 < first < 29
    sac = make_sac(4, 2, config, "cpu")
    with torch.no_grad():
        sac.target.biases[-1][4] = -torch.inf
    assert math.isfinite(sac.update_many(*sac_sources(4, 2), first, seed=3)["critic_loss"])
    sac.updates = 0
    with pytest.raises(InputError, match=f"diverged before update {first + 1}"):
        sac.update_many(*sac_sources(4, 2), first + 1, seed=3)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", cpu.isas())
def test_denormal_moments_become_zero(isa: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPO_FAST_ISA", isa)
    obs_dim, act_dim, options = SAC_CASES["canonical"]
    sac = make_sac(obs_dim, act_dim, SACConfig(**options), "cpu", threads)
    with torch.no_grad():  # a unit that no input turns on
        sac.actor.weights[0][..., 0] = 0.0
        sac.actor.biases[0][..., 0] = -1.0
    moments = [
        moment
        for name in ("actor", "critic")
        for moment in (*sac.optimizers[name].exp_avgs, *sac.optimizers[name].exp_avg_sqs)
    ]
    fill_with_denormals(moments)
    sac.update_many(*sac_sources(obs_dim, act_dim), 2, 7)
    assert_no_denormals(moments)


def test_seed_decides_the_draws() -> None:
    one, same, other = (run_sac("one row", "cpu", 2, seed=seed)[0] for seed in (7, 7, 2**64 - 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["actor.weights.0"], other["actor.weights.0"])


def test_arrays_of_other_layouts_are_read_right() -> None:
    obs_dim, act_dim, options = SAC_CASES["large batch"]
    data, buffer = sac_sources(obs_dim, act_dim)
    states = []
    for variant in (
        data,
        dataclasses.replace(data, observations=data.observations.double()),
        dataclasses.replace(data, actions=data.actions.repeat_interleave(2, dim=1)[:, ::2]),
    ):
        sac = make_sac(obs_dim, act_dim, SACConfig(**options), "cpu")
        sac.update_many(variant, buffer, 2, seed=0)
        states.append({name: tensor.clone() for name, tensor in sac.state().items()})
    assert all(torch.equal(states[0][name], other[name]) for other in states[1:] for name in states[0])


def test_refuses_parameters_that_it_cannot_train_in_place() -> None:
    sac = to_double(make_sac(5, 2, SACConfig(hidden=(4,)), "cpu"))
    with pytest.raises(InputError, match=r"train contiguous torch.float32 .*use backend reference"):
        sac.update_many(*sac_sources(5, 2), 1, seed=0)


def test_refuses_terminals_that_are_not_bool() -> None:
    sac = make_sac(5, 2, SACConfig(hidden=(4,)), "cpu")
    data, buffer = sac_sources(5, 2)
    data.terminals = data.terminals.float()
    with pytest.raises(
        InputError, match=r"the data's terminals must be torch.bool \[50\] .* got torch.float32"
    ):
        sac.update_many(data, buffer, 1, seed=0)


def test_divergence_is_one_clear_error() -> None:
    sac = make_sac(5, 2, SACConfig(hidden=(4,)), "cpu")
    data, buffer = sac_sources(5, 2)
    buffer.storage.rewards.fill_(math.inf)
    with pytest.raises(InputError, match="SAC diverged before update 2"):
        sac.update_many(data, buffer, 2, seed=0)


@pytest.mark.parametrize(("isa", "dtype"), training_kernels())
def test_memory_that_is_kept_between_calls(isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test that a call does not depend on the numbers or the sizes of the one before it."""
    monkeypatch.setenv("MOPO_FAST_ISA", isa)
    obs_dim, act_dim, options = SAC_CASES["MOBILE's options"]
    expected, _ = run_sac("MOBILE's options", "cpu", 2, dtype=dtype)
    for case in ("canonical", "one row", "humanoid, no real rows"):
        run_sac(case, "cpu", 1, dtype=dtype)
        again, _ = run_sac("MOBILE's options", "cpu", 2, dtype=dtype)
        assert all(torch.equal(again[name], expected[name]) for name in expected), case
    diverged = make_sac(obs_dim, act_dim, SACConfig(**options, dtype=dtype), "cpu")
    data, buffer = sac_sources(obs_dim, act_dim)
    data.observations.fill_(torch.nan)
    buffer.storage.observations.fill_(torch.nan)
    with pytest.raises(InputError, match="not finite"):
        diverged.update_many(data, buffer, 2, 0)
    again, _ = run_sac("MOBILE's options", "cpu", 2, dtype=dtype)
    assert all(torch.equal(again[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_batches_in_order(backend: str) -> None:
    """Test that batches in order are the rows of both sources in turn, and that no other row is read."""
    obs_dim, act_dim, options = SAC_CASES["MOBILE's options"]
    config = SACConfig(**options)
    rows = random_transitions(90, obs_dim, act_dim, seed=2)
    more = random_transitions(70, obs_dim, act_dim, seed=3)
    sac = make_sac(obs_dim, act_dim, config, backend)
    draws = Draws(rows, more, (90, 70), (30, 20), 3, 5, in_order=True)
    sums = sac.make(draws)
    other, parts = make_sac(obs_dim, act_dim, config, "reference"), []
    for update in range(3):
        mixed = [rows[30 * update :][:30], more[20 * update :][:20]]
        batch = Transitions(
            **{name: torch.cat([getattr(one, name) for one in mixed]) for name in DATA_ARRAYS}
        )
        counters = torch.arange(50), torch.full((50,), update)
        noise = [
            random_normals(*counters, stream, act_dim, 5, torch.float32)
            for stream in (ACTION_STREAM, NEXT_ACTION_STREAM)
        ]
        parts.append(other.update(batch, *noise))
    torch.testing.assert_close(torch.tensor(sums), torch.stack(parts).sum(0), rtol=1e-4, atol=1e-4)
    for name, value in other.state().items():
        torch.testing.assert_close(sac.state()[name], value, rtol=1e-3, atol=1e-5)
    with pytest.raises(InputError, match="the buffer's rows must be"):
        make_sac(obs_dim, act_dim, config, "cpu").make(dataclasses.replace(draws, sizes=(90, 59)))
