"""The compiled rollout against the float64 oracle, on every instruction set of this machine."""

import dataclasses

import pytest
import torch
from kernel_cases import (
    assert_as_accurate,
    assert_same,
    check_step,
    inputs,
    make_ensemble,
    make_policy,
    narrow_box,
    oracle,
)

from mopo_fast.backends import cpu
from mopo_fast.buffer import RingBuffer
from mopo_fast.config import ACTIVATIONS, PENALTIES
from mopo_fast.rollout import RolloutEngine

SHAPES = [(3, 1), (11, 3), (17, 6), (111, 8), (376, 17)]


@pytest.fixture(params=cpu.isas(), autouse=True)
def isa(request, monkeypatch):
    monkeypatch.setenv("MOPO_FAST_ISA", request.param)
    return request.param


pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("batch", [1, 7, 1000])
@pytest.mark.parametrize("members", ["all", "elites"])
def test_every_penalty(penalty, batch, members):
    ensemble = make_ensemble(17, 6)
    check_step(RolloutEngine(ensemble, penalty=penalty, penalty_coef=0.7, penalty_members=members), batch)


@pytest.mark.parametrize(
    "ensemble",
    [
        make_ensemble(17, 6, hidden=(200,) * 4),
        # Odd numbers of inputs: the last of them has no pair.
        make_ensemble(3, 2, hidden=(33, 51), activation="tanh"),
        make_ensemble(11, 3, hidden=(), members=2),
        make_ensemble(376, 17, hidden=(50,), activation="relu", members=3),
    ],
    ids=["canonical", "odd", "linear", "humanoid"],
)
def test_bfloat16(ensemble):
    engine = RolloutEngine(ensemble, dtype="bfloat16", penalty="mixture_std")
    observations, actions = inputs(1000, ensemble.obs_dim, ensemble.act_dim)
    call = {"seed": 5, "distributions": True}
    kernel = engine.step(observations, actions, **call)
    same, float32 = (
        oracle(engine, dtype).step(observations, actions, **call) for dtype in ("bfloat16", "float32")
    )
    exact = oracle(engine, "float64").step(observations.double(), actions.double(), **call)
    for name in ("next_observations", "rewards", "raw_rewards", "penalties", "mean", "std"):
        ours, theirs, plain, truth = (getattr(result, name) for result in (kernel, same, float32, exact))
        assert_as_accurate(ours, theirs, truth, name)
        # The roundings of the factors are the same ones, and far larger than those of the sums.
        error = (theirs - truth).norm()
        assert (ours - theirs).norm() < 0.5 * error, name
        assert error > 30.0 * (plain - truth).norm(), name


def test_bfloat16_policy():
    """Its actions too: hidden layers of odd widths, a head that fills no block."""
    engine = RolloutEngine(make_ensemble(11, 3), dtype="bfloat16")
    policy, start = make_policy(11, 3), inputs(1000, 11, 3)[0]
    kernel = engine.rollout(policy, start, 1, seed=3)
    same, float32 = (
        oracle(engine, dtype).rollout(policy, start, 1, seed=3) for dtype in ("bfloat16", "float32")
    )
    exact = oracle(engine, "float64").rollout(policy, start.double(), 1, seed=3)
    assert_as_accurate(kernel.actions, same.actions, exact.actions, "actions")
    error = (same.actions - exact.actions).norm()
    assert (kernel.actions - same.actions).norm() < 0.5 * error
    assert error > 30.0 * (float32.actions - exact.actions).norm()


@pytest.mark.parametrize(("obs_dim", "act_dim"), SHAPES)
@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_every_shape(obs_dim, act_dim, batch):
    check_step(RolloutEngine(make_ensemble(obs_dim, act_dim), penalty="mixture_std"), batch)


@pytest.mark.parametrize("members", [1, 2, 5, 13, 32])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_every_number_of_members(members, penalty):
    check_step(RolloutEngine(make_ensemble(11, 3, members=members), penalty=penalty), 131)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(), (1,), (200, 200, 200, 200), (64, 7, 129)])
def test_every_activation_and_depth(activation, hidden):
    check_step(RolloutEngine(make_ensemble(17, 6, hidden=hidden, activation=activation)), 300)


def test_deterministic_is_the_mean_over_all_members():
    check_step(RolloutEngine(make_ensemble(17, 6)), 100, deterministic=True)


@pytest.mark.slow
def test_a_large_odd_batch():
    check_step(RolloutEngine(make_ensemble(17, 6, members=3, hidden=(200, 200, 200, 200))), 50_001)


@pytest.fixture(params=["float32", "bfloat16"])
def rollout(request):
    """An engine, a policy and start states whose rollouts end at every step."""
    engine = RolloutEngine(make_ensemble(11, 3), termination=narrow_box(11), threads=2, dtype=request.param)
    return engine, make_policy(11, 3), inputs(1003, 11, 3)[0]


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("rollout", ["float32"], indirect=True)
def test_rollout_against_the_oracle(rollout, penalty):
    engine, policy, start = rollout
    engine = RolloutEngine(engine.ensemble, penalty=penalty, termination=narrow_box(11))
    kernel = engine.rollout(policy, start, 4, seed=3)
    same = oracle(engine, "float32").rollout(policy, start, 4, seed=3)
    exact = oracle(engine, "float64").rollout(policy, start.double(), 4, seed=3)
    assert kernel.terminals.sum() > 200
    for name in ("rollout_index", "step", "members", "terminals"):
        assert torch.equal(getattr(kernel, name), getattr(exact, name)), name
    for name in ("observations", "actions", "next_observations", "rewards", "raw_rewards", "penalties"):
        assert_as_accurate(getattr(kernel, name), getattr(same, name), getattr(exact, name), name)


def test_rollout_is_made_of_steps(rollout):
    engine, policy, start = rollout
    whole = engine.rollout(policy, start, 4, seed=9)
    following = start
    rows = torch.arange(len(start))
    for t in range(4):
        part = whole[whole.step == t]
        assert torch.equal(part.rollout_index, rows)
        assert torch.equal(part.observations, following)
        result = engine.step(part.observations, part.actions, seed=9, step=t, rows=rows)
        for field in dataclasses.fields(result):
            if field.name not in ("mean", "std"):
                assert torch.equal(getattr(part, field.name), getattr(result, field.name)), field.name
        following, rows = result.next_observations[~result.terminals], rows[~result.terminals]
    order = whole.rollout_index * 4 + whole.step
    assert (order.diff() > 0).all()


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_threads_do_not_matter(rollout, threads):
    engine, policy, start = rollout
    other = RolloutEngine(engine.ensemble, termination=narrow_box(11), threads=threads, dtype=engine.operands)
    assert_same(engine.rollout(policy, start, 5, seed=1), other.rollout(policy, start, 5, seed=1))


@pytest.mark.parametrize("split", [1, 24, 480, 1002])
def test_splits_do_not_matter(rollout, split):
    engine, policy, start = rollout
    rows = torch.arange(len(start)) + 10**10
    whole = engine.rollout(policy, start, 3, seed=1, rows=rows)
    parts = [
        engine.rollout(policy, start[at], 3, seed=1, rows=rows[at])
        for at in (slice(split), slice(split, None))
    ]
    for name, array in whole.arrays().items():
        assert torch.equal(array, torch.cat([getattr(part, name) for part in parts])), name


def test_ring(rollout):
    """Written in place, wrapping around, and nothing but the new rows is touched."""
    engine, policy, start = rollout
    expected = engine.rollout(policy, start, 3, seed=1)
    ring = RingBuffer(4000, 11, 3)
    ring.storage.rewards.fill_(float("nan"))
    ring.head = 2500
    result = engine.rollout(policy, start, 3, seed=1, out=ring)
    assert set(result.arrays()) == set(ring.storage.arrays())
    for name, array in result.arrays().items():
        assert torch.equal(array, getattr(expected, name)), name
    count = len(expected)
    assert count > 1500 and ring.head == (2500 + count) % 4000 and ring.size == count
    assert torch.equal(ring.storage.rewards[: ring.head], expected.rewards[1500:])
    assert ring.storage.rewards[ring.head : 2500].isnan().all()


def test_terminal_rows_are_kept_and_end_the_rollout(rollout):
    engine, policy, start = rollout
    whole = engine.rollout(policy, start, 6, seed=2)
    box = narrow_box(11)
    assert torch.equal(whole.terminals, ~box.contains(whole.next_observations))
    last = torch.cat([whole.rollout_index.diff() != 0, torch.tensor([True])])
    assert not whole.terminals[~last].any()
    assert (whole.step[last & ~whole.terminals] == 5).all()
    assert whole.rollout_index[last].equal(torch.arange(len(start)))


@pytest.mark.parametrize("member", [0, 6])
def test_what_is_not_finite_is_not_kept(member):
    """One member overflows where an observation is large: its rows go, and all rows that it penalises."""
    ensemble = make_ensemble(11, 3, elites=7)
    with torch.no_grad():
        ensemble.weights[0][member, 0, :] = 3e38
    start = inputs(200, 11, 3)[0]
    start[::5, 0] = 1e5
    policy = make_policy(11, 3)
    for penalty in PENALTIES:
        engine = RolloutEngine(ensemble, penalty=penalty, termination=None)
        kernel = engine.rollout(policy, start, 1, seed=1)
        exact = oracle(engine, "float32").rollout(policy, start, 1, seed=1)
        assert kernel.info["non_finite"] == exact.info["non_finite"] > 0
        assert torch.equal(kernel.rollout_index, exact.rollout_index)
        kernel.validate()
        step = engine.step(start, torch.zeros(200, 3), seed=1)
        finite = torch.isfinite(step.next_observations).all(1) & torch.isfinite(step.rewards)
        assert torch.equal(step.terminals, ~finite) and not finite.all()


@pytest.mark.parametrize("rollout", ["float32"], indirect=True)
def test_log_std_is_clipped(rollout):
    engine, policy, start = rollout
    with torch.no_grad():
        policy.biases[-1][3:] = torch.tensor([50.0, -50.0, float(policy.log_std_max)])
    kernel = engine.rollout(policy, start, 1, seed=1)
    exact = oracle(engine, "float64").rollout(policy, start.double(), 1, seed=1)
    same = oracle(engine, "float32").rollout(policy, start, 1, seed=1)
    assert_as_accurate(kernel.actions, same.actions, exact.actions, "actions")


def test_a_second_thread_may_call_too(rollout):
    from concurrent.futures import ThreadPoolExecutor

    engine, policy, start = rollout
    expected = engine.rollout(policy, start, 3, seed=1)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: engine.rollout(policy, start, 3, seed=1), range(8)))
    for result in results:
        assert_same(result, expected)
