"""Test the compiled rollout against the float64 oracle, on every instruction set of this machine."""

import pytest
import torch
from kernel_cases import (
    DECLARED,
    NORMED,
    assert_same,
    check_actions,
    check_kept_member,
    check_made_of_steps,
    check_not_finite,
    check_ring,
    check_rollout,
    check_rounded_policy,
    check_rounded_step,
    check_split,
    check_step,
    check_terminals,
    check_truncation,
    check_without_penalties,
    inputs,
    make_ensemble,
    make_policy,
    narrow_box,
    oracle,
)

from mopo_fast.backends import cpu
from mopo_fast.config import ACTIVATIONS, PENALTIES, TRAINING_DTYPES
from mopo_fast.rollout import RolloutEngine

SHAPES = [(3, 1), (11, 3), (17, 6), (111, 8), (376, 17)]


@pytest.fixture(params=cpu.isas(), autouse=True)
def isa(request, monkeypatch):
    monkeypatch.setenv("MOPO_FAST_ISA", request.param)
    return request.param


@pytest.fixture(
    params=[("bfloat16", {}), ("bfloat16x3", {"above": 8.0, "apart": 0.75})], ids=["bfloat16", "bfloat16x3"]
)
def rounded(request, isa):
    """Return a dtype, and the bounds of its error for `check_rounded_step`."""
    if request.param[0] == "bfloat16x3" and isa not in cpu.WITH_BFLOAT16:
        pytest.skip("float32 is taken")
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
        # With an odd number of inputs, the last one has no partner in a pair.
        make_ensemble(3, 2, hidden=(33, 51), activation="tanh"),
        make_ensemble(11, 3, hidden=(), members=2),
        make_ensemble(376, 17, hidden=(50,), activation="relu", members=3),
    ],
    ids=["canonical", "odd", "linear", "humanoid"],
)
def test_rounded_factors(ensemble, rounded):
    dtype, bounds = rounded
    check_rounded_step(RolloutEngine(ensemble, dtype=dtype, penalty="mixture_std"), 1000, **bounds)


def test_rounded_policy(rounded):
    """Actions are rounded too, with odd widths of hidden layers and a head smaller than a block."""
    dtype, bounds = rounded
    engine = RolloutEngine(make_ensemble(11, 3), dtype=dtype)
    check_rounded_policy(engine, make_policy(11, 3), inputs(1000, 11, 3)[0], **bounds)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_outputs_reach_no_row(dtype):
    """Infinity times a padding weight is NaN, which the next layer must not read."""
    ensemble = make_ensemble(1, 1, hidden=(33, 51), activation="tanh", members=3)
    # Rounded to bfloat16, it is infinite.
    observations, actions = torch.full((20, 1), torch.finfo(torch.float32).max), torch.zeros(20, 1)
    rewards = RolloutEngine(ensemble, dtype=dtype).step(observations, actions, seed=0).rewards
    assert rewards.isfinite().all()


@pytest.mark.parametrize("declared", DECLARED)
def test_models_of_other_code(declared):
    ensemble = make_ensemble(5, 2, members=3, **DECLARED[declared])
    check_step(RolloutEngine(ensemble, penalty="mixture_std"), 300)
    check_step(RolloutEngine(ensemble), 300, deterministic=True)
    engine = RolloutEngine(ensemble, termination=narrow_box(5))
    check_rollout(engine, make_policy(5, 2), inputs(1003, 5, 2)[0], 3)


@pytest.mark.parametrize("normed", NORMED)
@pytest.mark.parametrize("batch", [3, 301])
def test_layer_norms(normed, batch):
    ensemble = make_ensemble(5, 2, members=3, layer_norm=True, **NORMED[normed])
    check_step(RolloutEngine(ensemble, penalty="mixture_std"), batch)
    engine = RolloutEngine(ensemble, termination=narrow_box(5))
    check_rollout(engine, make_policy(5, 2), inputs(1003, 5, 2)[0], 3)


def test_layer_norms_do_not_cancel():
    """A mean that is large beside the deviation costs no more than in PyTorch."""
    ensemble = make_ensemble(5, 2, members=3, layer_norm=True, hidden=(200, 40))
    with torch.no_grad():
        ensemble.biases[0] += 300.0
    check_step(RolloutEngine(ensemble), 301)


@pytest.mark.parametrize("dtype", TRAINING_DTYPES)
@pytest.mark.parametrize("width", [1, 7, 33])
def test_equal_outputs_are_normalised_to_zero(dtype, width):
    """Their mean must be exact, since what is left of it would be divided by the root of the epsilon."""
    ensemble = make_ensemble(5, 2, members=2, layer_norm=True, hidden=(width,))
    with torch.no_grad():
        ensemble.weights[0].zero_()
        ensemble.biases[0].fill_(1.0e4)
    observations, actions = inputs(67, 5, 2)
    engine = RolloutEngine(ensemble, dtype=dtype)
    kernel = engine.step(observations, actions, seed=0, distributions=True)
    same = oracle(engine, "float32").step(observations, actions, seed=0, distributions=True)
    torch.testing.assert_close(kernel.mean, same.mean, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("normed", NORMED)
def test_rounded_factors_with_layer_norms(normed, rounded):
    dtype, bounds = rounded
    ensemble = make_ensemble(5, 2, members=3, layer_norm=True, **NORMED[normed])
    check_rounded_step(RolloutEngine(ensemble, dtype=dtype), 1000, **bounds)


@pytest.mark.parametrize(("obs_dim", "act_dim"), SHAPES)
@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_every_shape(obs_dim, act_dim, batch):
    check_step(RolloutEngine(make_ensemble(obs_dim, act_dim), penalty="mixture_std"), batch)


@pytest.mark.parametrize("members", [1, 2, 5, 13, 256])
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


@pytest.fixture(params=TRAINING_DTYPES)
def rollout(request):
    """Return an engine, a policy and start states, with rollouts that end at every step."""
    engine = RolloutEngine(make_ensemble(11, 3), termination=narrow_box(11), threads=2, dtype=request.param)
    return engine, make_policy(11, 3), inputs(1003, 11, 3)[0]


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("rollout", ["float32"], indirect=True)
def test_rollout_against_the_oracle(rollout, penalty):
    engine, policy, start = rollout
    engine = RolloutEngine(engine.ensemble, penalty=penalty, termination=narrow_box(11))
    check_rollout(engine, policy, start, 4, ended=200)


@pytest.mark.parametrize("halt_reward", [None, -3.3])
def test_truncation(rollout, halt_reward):
    engine, policy, start = rollout
    check_truncation(engine, policy, start, 4, halt_reward)


@pytest.mark.parametrize("penalty_coef", [0.0, 1.0])
def test_a_rollout_may_keep_its_member(rollout, penalty_coef):
    engine, policy, start = rollout
    engine.penalty_coef = penalty_coef
    check_kept_member(engine, policy, start, 4)


def test_rollout_is_made_of_steps(rollout):
    check_made_of_steps(*rollout, 4)


@pytest.mark.parametrize("dtype", TRAINING_DTYPES)
@pytest.mark.parametrize(
    ("sizes", "batch"),
    [
        ({"members": 7, "hidden": (200,) * 4}, 1003),
        ({"members": 1, "hidden": ()}, 50),
        # Most groups have few rows or none.
        ({"members": 256, "elites": 200, "hidden": (33, 51), "layer_norm": True}, 97),
        ({"members": 32, "elites": 2, "activation": "tanh"}, 301),
        ({"members": 3, "activation": "relu", "log_scale": "std", "member_bounds": True}, 1),
    ],
    ids=["canonical", "one", "many", "two elites", "one row"],
)
def test_only_the_drawn_member_computes(dtype, sizes, batch):
    """Without penalties, all else is the same to the bit."""
    engine = RolloutEngine(
        make_ensemble(11, 3, **sizes),
        **{"penalty_coef": 0.0, "dtype": dtype, "termination": narrow_box(11), "threads": 2},
    )
    check_without_penalties(engine, make_policy(11, 3), inputs(batch, 11, 3)[0], 4)


@pytest.mark.parametrize("dtype", TRAINING_DTYPES)
@pytest.mark.parametrize(
    ("hidden", "activation"),
    [((200,) * 4, "silu"), ((64,), "tanh"), ((33, 51), "tanh"), ((1,), "relu"), ((), "silu")],
)
@pytest.mark.parametrize("layer_norm", [False, True])
def test_few_rows_are_those_of_a_large_batch(dtype, hidden, activation, layer_norm):
    """Up to four rows have a layout of their own, and the same bits."""
    ensemble = make_ensemble(11, 3, hidden=hidden, activation=activation, layer_norm=layer_norm)
    engine = RolloutEngine(ensemble, dtype=dtype)
    observations, actions = inputs(101, 11, 3)
    rows = torch.arange(101)
    whole = engine.step(observations, actions, seed=3, distributions=True)
    first = 0
    for count in (1, 2, 3, 4, 5, 1):
        at = slice(first, first + count)
        few = engine.step(observations[at], actions[at], rows=rows[at], seed=3, distributions=True)
        for name in ("next_observations", "rewards", "terminals", "raw_rewards", "members", "penalties"):
            assert torch.equal(getattr(few, name), getattr(whole, name)[at]), (count, name)
        assert torch.equal(few.mean, whole.mean[:, at]) and torch.equal(few.std, whole.std[:, at])
        first += count


@pytest.fixture(params=TRAINING_DTYPES)
def unpenalised(request):
    """Return what `rollout` returns, with an engine that computes no penalties."""
    options = {"termination": narrow_box(11), "threads": 2, "dtype": request.param}
    engine = RolloutEngine(make_ensemble(11, 3), penalty_coef=0.0, **options)
    return engine, make_policy(11, 3), inputs(1003, 11, 3)[0]


def test_unpenalised_rollout_is_made_of_steps(unpenalised):
    check_made_of_steps(*unpenalised, 4)


@pytest.mark.parametrize("split", [1, 333, 1002])
def test_unpenalised_rollout_does_not_depend_on_the_split(unpenalised, split):
    check_split(*unpenalised, 4, split=split)


@pytest.mark.parametrize("threads", [1, 3, 7])
def test_unpenalised_rollout_does_not_depend_on_threads(unpenalised, threads):
    """There are more chunks than can be held at once, of different lengths."""
    engine, policy, _ = unpenalised
    start = inputs(30_011, 11, 3)[0]
    whole = engine.rollout(policy, start, 3, seed=1)
    engine.threads = threads
    assert_same(engine.rollout(policy, start, 3, seed=1), whole)


def test_other_members_need_not_be_finite_without_penalties():
    """A row is cut where its own member's prediction is not finite, and only there."""
    ensemble, policy, start = make_ensemble(11, 3), make_policy(11, 3), inputs(1003, 11, 3)[0]
    engine, whole = (RolloutEngine(ensemble, penalty_coef=coef, threads=2) for coef in (0.0, 1.0))
    broken = int(ensemble.elites[1])
    before = engine.rollout(policy, start, 1, seed=1)
    with torch.no_grad():
        ensemble.biases[-1][broken, -2] = torch.nan
    after = engine.rollout(policy, start, 1, seed=1)
    kept = before.members != broken
    assert 0 < kept.sum() < len(before) and after.info["non_finite"] == int((~kept).sum())
    assert_same(after, before[kept])
    assert len(whole.rollout(policy, start, 1, seed=1)) == 0


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_threads_do_not_matter(rollout, threads):
    engine, policy, start = rollout
    other = RolloutEngine(engine.ensemble, termination=narrow_box(11), threads=threads, dtype=engine.operands)
    assert_same(engine.rollout(policy, start, 5, seed=1), other.rollout(policy, start, 5, seed=1))


@pytest.mark.parametrize("threads", [2, 7])
def test_threads_do_not_matter_among_many_chunks(rollout, threads):
    """There are more chunks than can be held at once, of different lengths."""
    engine, policy, _ = rollout
    start = inputs(20_011, 11, 3)[0]
    one, other = (
        RolloutEngine(engine.ensemble, termination=narrow_box(11), threads=n, dtype=engine.operands)
        for n in (1, threads)
    )
    for _ in range(3):
        assert_same(one.rollout(policy, start, 3, seed=1), other.rollout(policy, start, 3, seed=1))


@pytest.mark.parametrize("split", [1, 24, 480, 1002])
def test_splits_do_not_matter(rollout, split):
    check_split(*rollout, 3, split=split)


def test_ring(rollout):
    check_ring(*rollout, 3, capacity=4000)


def test_terminal_rows_are_kept_and_end_the_rollout(rollout):
    check_terminals(*rollout, 6, narrow_box(11))


@pytest.mark.parametrize("member", [0, 6])
def test_what_is_not_finite_is_not_kept(member):
    ensemble = make_ensemble(11, 3, elites=7)
    check_not_finite(RolloutEngine, ensemble, make_policy(11, 3), inputs(200, 11, 3)[0], member)


@pytest.mark.parametrize("rollout", ["float32"], indirect=True)
def test_log_std_is_clipped(rollout):
    engine, policy, start = rollout
    with torch.no_grad():
        policy.biases[-1][3:] = torch.tensor([50.0, -50.0, float(policy.log_std_max)])
    check_actions(engine, policy, start)


def test_a_second_thread_may_call_too(rollout):
    from concurrent.futures import ThreadPoolExecutor

    engine, policy, start = rollout
    expected = engine.rollout(policy, start, 3, seed=1)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: engine.rollout(policy, start, 3, seed=1), range(8)))
    for result in results:
        assert_same(result, expected)
