"""Ensembles, policies, tolerances and checks shared by the tests of kernels."""

import copy
import dataclasses
import platform
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mopo_fast.backends import cpu
from mopo_fast.backends.gpu import padded
from mopo_fast.buffer import RingBuffer
from mopo_fast.config import PENALTIES, TRAINING_DTYPES, Activation, DynamicsConfig, SACConfig
from mopo_fast.data import Transitions
from mopo_fast.data.transitions import DATA_ARRAYS
from mopo_fast.ensemble import EnsembleDynamics, trained_mlp
from mopo_fast.fit import Fit
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine, make_truncation
from mopo_fast.sac import SAC
from mopo_fast.tasks import Box, make_box
from mopo_fast.utils.cuda_graphs import Graph


def make_ensemble(
    obs_dim: int,
    act_dim: int,
    *,
    members: int = 7,
    elites: int | None = None,
    hidden: tuple[int, ...] = (33, 50),
    activation: Activation = "silu",
    seed: int = 0,
    **declared: Any,
) -> EnsembleDynamics:
    """Make an ensemble unlike a fresh one, with biases, input scales, variance bounds and elites."""
    generator = torch.Generator().manual_seed(seed)
    elites = elites or max(1, members - 2)
    ensemble = EnsembleDynamics(
        obs_dim,
        act_dim,
        members=members,
        elites=elites,
        hidden=hidden,
        activation=activation,
        generator=generator,
        **declared,
    )
    with torch.no_grad():
        for bias in ensemble.biases:
            bias.normal_(0.0, 0.2, generator=generator)
        for weight in ensemble.weights:
            weight.mul_(1.5)
        for scale, shift in zip(ensemble.norm_scales, ensemble.norm_shifts, strict=True):
            scale.normal_(1.0, 0.5, generator=generator)
            shift.normal_(0.0, 0.5, generator=generator)
        ensemble.input_mean.normal_(0.0, 0.5, generator=generator)
        ensemble.input_std.uniform_(0.5, 2.0, generator=generator)
        ensemble.max_logvar.uniform_(-1.0, 0.5, generator=generator)
        ensemble.min_logvar.uniform_(-8.0, -4.0, generator=generator)
        ensemble.elites.copy_(torch.randperm(members, generator=generator)[:elites])
    return ensemble


# Options of ensembles converted from other code.
DECLARED: dict[str, dict[str, Any]] = {
    "log-stds": {"log_scale": "std"},
    "bounds of each member": {"member_bounds": True},
    "next observations": {"absolute": (0, 3)},
    "all of it": {"log_scale": "std", "member_bounds": True, "absolute": range(5)},
}
# Ensembles with layer norms, which the CUDA kernels do not have.
NORMED: dict[str, dict[str, Any]] = {
    "odd": {"hidden": (33, 51, 7)},
    "canonical": {"hidden": (200,) * 4, "activation": "tanh"},
    "one layer": {"hidden": (16,), "activation": "relu"},
    "other code's": {"hidden": (40, 24), **DECLARED["all of it"]},
}


def make_policy(obs_dim: int, act_dim: int, *, hidden: tuple[int, ...] = (41, 30), seed: int = 1) -> Actor:
    generator = torch.Generator().manual_seed(seed)
    policy = Actor(obs_dim, act_dim, hidden=hidden, generator=generator)
    with torch.no_grad():
        for bias in policy.biases:
            bias.normal_(0.0, 0.2, generator=generator)
    return policy


def inputs(batch: int, obs_dim: int, act_dim: int, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    observations = torch.randn(batch, obs_dim, generator=generator)
    return observations, torch.tanh(torch.randn(batch, act_dim, generator=generator))


def oracle(engine: RolloutEngine, dtype: str) -> RolloutEngine:
    """Make an engine with the reference backend for the same problem."""
    twin = RolloutEngine(
        engine.ensemble,
        penalty=engine.penalty,
        penalty_coef=engine.penalty_coef,
        penalty_members=engine.penalty_members,
        truncate_at=engine.truncation.at if engine.truncation.needs_penalties else None,
        halt_reward=engine.truncation.halt_reward,
        member=engine.member,
        backend="reference",
        dtype=dtype,
    )
    twin._low, twin._high = engine._low.to(twin.dtype), engine._high.to(twin.dtype)
    return twin


def assert_as_accurate(
    kernel: torch.Tensor,
    same: torch.Tensor,
    exact: torch.Tensor,
    what: str,
    rows: int | None = None,
    units: float = 0.0,
) -> None:
    """Check that the kernel's error is at most twice PyTorch's, both against float64.

    The root mean square error is compared, or the largest error if the kernel has fewer than 1000 values.
    PyTorch's error, `same - exact`, is taken over all its rows, the kernel's over the first `rows`. `units`
    in the last place of the largest value are added to the limit, since few values of PyTorch may happen to
    be exact.
    """
    assert torch.isfinite(kernel).all(), f"{what} holds values that are not finite"
    truth = exact if rows is None else exact.narrow(exact.ndim - 2 if exact.ndim > 1 else 0, 0, rows)
    few = kernel.numel() < 1000
    error, usual = (
        float(x.abs().max() if few else x.square().mean().sqrt()) for x in (kernel - truth, same - exact)
    )
    allowed = 2.0 * usual + units * torch.finfo(torch.float32).eps * float(exact.abs().max())
    assert error <= allowed, f"{what}: error {error:.3g}, PyTorch's {usual:.3g}"


def truncation(engine: RolloutEngine, policy: Actor | None = None) -> float:
    """Return the error of a tensor core's sums in units in the last place, or 0 on a CPU.

    A tensor core truncates 16 products and the running sum to the last place of the largest of them. The
    error is 17 units of 2^-23 for every 16 inputs of a layer (Fasi et al. 2021, "Numerical behavior of
    NVIDIA tensor cores"), and the errors of layers add up.
    """
    if engine.device.type == "cpu":
        return 0.0
    networks = [engine.ensemble.weights, *([] if policy is None else [policy.weights])]
    return sum(17.0 * -(-weight.shape[-2] // 16) for network in networks for weight in network)


def check_step(engine: RolloutEngine, batch: int, *, deterministic: bool = False) -> None:
    """Compare a step of the kernel with the oracle in float32 and in float64."""
    ensemble, device = engine.ensemble, engine.device
    # The oracles get at least 1000 rows, so that PyTorch's own error is well estimated.
    observations, actions = (
        array.to(device) for array in inputs(max(batch, 1000), ensemble.obs_dim, ensemble.act_dim)
    )
    rows = torch.arange(len(observations), device=device) * 3 + 2**33
    call = {"seed": 2**63 + 11, "step": 4, "deterministic": deterministic, "distributions": True}
    kernel = engine.step(observations[:batch], actions[:batch], rows=rows[:batch], **call)
    same = oracle(engine, "float32").step(observations, actions, rows=rows, **call)
    exact = oracle(engine, "float64").step(observations.double(), actions.double(), rows=rows, **call)
    assert torch.equal(kernel.members, exact.members[:batch])
    assert torch.equal(kernel.terminals, exact.terminals[:batch])
    for name in ("next_observations", "rewards", "raw_rewards", "penalties", "mean", "std"):
        assert_as_accurate(getattr(kernel, name), getattr(same, name), getattr(exact, name), name, batch)


def narrow_box(obs_dim: int) -> Box:
    """Make bounds that end about a tenth of all steps."""
    return make_box(obs_dim, {0: (-1.8, 2.5), 1: (-3.0, 1.6)})


def assert_same(a: Transitions, b: Transitions) -> None:
    """Check that all arrays are equal bit for bit."""
    left, right = a.arrays(), b.arrays()
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def check_rounded_step(
    engine: RolloutEngine,
    batch: int,
    *,
    deterministic: bool = False,
    apart: float = 0.5,
    above: float = 30.0,
) -> None:
    """Check a step with rounded factors against PyTorch with the same roundings.

    The kernel must be as accurate as PyTorch, and differ from it by less than `apart` of PyTorch's error.
    That error must exceed `above` times the one of float32, which shows that factors are rounded. With a low
    `above` this is asked of the means alone: in the rest, other errors of float32 are as large.
    """
    ensemble = engine.ensemble
    observations, actions = (
        array.to(engine.device) for array in inputs(batch, ensemble.obs_dim, ensemble.act_dim)
    )
    call = {"seed": 5, "distributions": True, "deterministic": deterministic}
    kernel = engine.step(observations, actions, **call)
    same, float32 = (
        oracle(engine, dtype).step(observations, actions, **call) for dtype in (engine.operands, "float32")
    )
    exact = oracle(engine, "float64").step(observations.double(), actions.double(), **call)
    assert torch.equal(kernel.members, exact.members)
    for name in ("next_observations", "rewards", "raw_rewards", "penalties", "mean", "std"):
        ours, theirs, plain, truth = (getattr(result, name) for result in (kernel, same, float32, exact))
        assert_as_accurate(ours, theirs, truth, name, units=truncation(engine))
        if above < 30.0 and name != "mean":
            continue
        error = (theirs - truth).norm()
        assert (ours - theirs).norm() < apart * error, name
        assert error > above * (plain - truth).norm(), name


def check_rounded_policy(
    engine: RolloutEngine, policy: Actor, start: torch.Tensor, *, apart: float = 0.5, above: float = 30.0
) -> None:
    """Check a policy's actions as `check_rounded_step` checks a step."""
    kernel = engine.rollout(policy, start, 1, seed=3)
    same, float32 = (
        oracle(engine, dtype).rollout(policy, start, 1, seed=3) for dtype in (engine.operands, "float32")
    )
    exact = oracle(engine, "float64").rollout(policy, start.double(), 1, seed=3)
    assert_as_accurate(
        kernel.actions, same.actions, exact.actions, "actions", units=truncation(engine, policy)
    )
    error = (same.actions - exact.actions).norm()
    assert (kernel.actions - same.actions).norm() < apart * error
    assert error > above * (float32.actions - exact.actions).norm()


def check_actions(engine: RolloutEngine, policy: Actor, start: torch.Tensor) -> None:
    """Compare a policy's actions in float32 with the oracle."""
    kernel = engine.rollout(policy, start, 1, seed=1)
    same = oracle(engine, "float32").rollout(policy, start, 1, seed=1)
    exact = oracle(engine, "float64").rollout(policy, start.double(), 1, seed=1)
    assert_as_accurate(kernel.actions, same.actions, exact.actions, "actions")


def check_rollout(
    engine: RolloutEngine, policy: Actor, start: torch.Tensor, horizon: int, *, ended: int = 0
) -> None:
    """Compare rollouts in float32 with the oracle; at least `ended` of them must end in a terminal."""
    kernel = engine.rollout(policy, start, horizon, seed=3)
    same = oracle(engine, "float32").rollout(policy, start, horizon, seed=3)
    exact = oracle(engine, "float64").rollout(policy, start.double(), horizon, seed=3)
    assert kernel.terminals.sum() >= ended
    for name in ("rollout_index", "step", "members", "terminals"):
        assert torch.equal(getattr(kernel, name), getattr(exact, name)), name
    for name in ("observations", "actions", "next_observations", "rewards", "raw_rewards", "penalties"):
        assert_as_accurate(getattr(kernel, name), getattr(same, name), getattr(exact, name), name)


def check_made_of_steps(engine: RolloutEngine, policy: Actor, start: torch.Tensor, horizon: int) -> None:
    """Check that a rollout equals single steps bit for bit, in the order of the start states."""
    whole = engine.rollout(policy, start, horizon, seed=9)
    following = start
    rows = torch.arange(len(start), device=start.device)
    for t in range(horizon):
        part = whole[whole.step == t]
        assert torch.equal(part.rollout_index, rows)
        assert torch.equal(part.observations, following)
        result = engine.step(part.observations, part.actions, seed=9, step=t, rows=rows)
        for field in dataclasses.fields(result):
            if field.name in ("mean", "std", "truncations") or getattr(result, field.name) is None:
                continue
            assert torch.equal(getattr(part, field.name), getattr(result, field.name)), field.name
        assert (part.penalties is None) == (result.penalties is None)
        ended = result.terminals if result.truncations is None else result.terminals | result.truncations
        following, rows = result.next_observations[~ended], rows[~ended]
    order = whole.rollout_index * horizon + whole.step
    assert (order.diff() > 0).all()


def check_split(
    engine: RolloutEngine, policy: Actor, start: torch.Tensor, horizon: int, *, split: int
) -> None:
    """Check that two calls on parts of a batch give the same rows as one call on all of it."""
    rows = torch.arange(len(start), device=start.device) + 10**10
    whole = engine.rollout(policy, start, horizon, seed=1, rows=rows)
    parts = [
        engine.rollout(policy, start[at], horizon, seed=1, rows=rows[at])
        for at in (slice(split), slice(split, None))
    ]
    for name, array in whole.arrays().items():
        assert torch.equal(array, torch.cat([getattr(part, name) for part in parts])), name


def check_turns(
    engine: RolloutEngine, policy: Actor, start: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that a batch too large for the buffer is rolled out 100 rows at a time, with the same result."""
    whole = engine.rollout(policy, start, 2, seed=1)
    row_words = start.shape[1] + policy.act_dim + 5
    monkeypatch.setattr(padded, "PADDED_BYTES", 100 * 2 * 4 * row_words)
    turns, empty = [], padded._empty

    def counted(some: torch.Tensor, act_dim: int, horizon: int) -> padded.PaddedRollouts:
        turns.append(len(some))
        return empty(some, act_dim, horizon)

    monkeypatch.setattr(padded, "_empty", counted)
    assert_same(engine.rollout(policy, start, 2, seed=1), whole)
    assert turns == [100] * (len(start) // 100) + [len(start) % 100]


def check_deterministic(engine: RolloutEngine, policy: Actor, start: torch.Tensor) -> None:
    """Check deterministic rollouts: no seed matters, no member is drawn, and actions equal the oracle's."""
    kernel = engine.rollout(policy, start, 2, seed=1, deterministic=True)
    assert_same(kernel, engine.rollout(policy, start, 2, seed=2, deterministic=True))
    assert (kernel.members == -1).all()
    expected = oracle(engine, engine.operands).rollout(policy, start, 2, seed=1, deterministic=True)
    torch.testing.assert_close(kernel.actions, expected.actions, rtol=1e-3, atol=1e-3)


def check_ring(
    engine: RolloutEngine, policy: Actor, start: torch.Tensor, horizon: int, *, capacity: int
) -> None:
    """Check that a rollout writes to a ring buffer in place, wraps around, and changes only the new rows."""
    expected = engine.rollout(policy, start, horizon, seed=1)
    count = len(expected)
    ring = RingBuffer(capacity, start.shape[1], expected.actions.shape[1], start.device)
    ring.storage.rewards.fill_(float("nan"))
    ring.head = head = capacity - count // 2
    result = engine.rollout(policy, start, horizon, seed=1, out=ring)
    assert set(result.arrays()) == set(ring.storage.arrays())
    for name, array in result.arrays().items():
        assert torch.equal(array, getattr(expected, name)), name
    assert 0 < ring.head == count - count // 2 < head and ring.size == count
    assert torch.equal(ring.storage.rewards[: ring.head], expected.rewards[count // 2 :])
    assert ring.storage.rewards[ring.head : head].isnan().all()


def check_missing_arrays(engine: RolloutEngine, policy: Actor, start: torch.Tensor) -> None:
    """Check that a buffer needs none of the arrays after the terminals."""
    expected = engine.rollout(policy, start, 2, seed=1).arrays()
    arrays: dict[str, Any] = {
        name: expected[name].new_empty(2 * len(start), *expected[name].shape[1:]) for name in DATA_ARRAYS
    }
    made = engine.rollout(policy, start, 2, seed=1, out=RingBuffer.over(Transitions(**arrays))).arrays()
    assert made.keys() == arrays.keys()
    for name, array in made.items():
        assert torch.equal(array, expected[name]), name


def check_without_penalties(engine: RolloutEngine, policy: Actor, start: torch.Tensor, horizon: int) -> None:
    """Check that an engine with a penalty_coef of 0 makes no penalties, and all else as with them."""
    assert engine.penalty_coef == 0.0 and engine.penalties is None
    asked = copy.copy(engine)
    asked.penalties = True
    calls: list[Callable[[RolloutEngine], Any]] = [
        lambda engine: engine.rollout(policy, start, horizon, seed=4),
        lambda engine: engine.rollout(policy, start, 1, seed=4, deterministic=True),
        # With a policy that is a function, PyTorch makes the rollout of the kernel's steps.
        lambda engine: engine.rollout(policy.act, start, 1, seed=4),
    ]
    for call in calls:
        made, penalised = call(engine), call(asked)
        assert made.penalties is None and penalised.penalties is not None
        assert len(penalised.penalties) == len(made) and penalised.penalties.isfinite().all()
        assert made.info == penalised.info
        penalised.penalties = None
        assert_same(made, penalised)
    actions = torch.tanh(start[:, : policy.act_dim])
    for options in ({}, {"deterministic": True}, {"distributions": True}):
        result, penalised = (each.step(start, actions, seed=4, step=7, **options) for each in (engine, asked))
        assert result.penalties is None and penalised.penalties.isfinite().all()
        for field in dataclasses.fields(result):
            if field.name != "penalties" and getattr(result, field.name) is not None:
                assert torch.equal(getattr(result, field.name), getattr(penalised, field.name)), field.name
    # A ring that stores penalties asks for them.
    sizes = len(start) * horizon, start.shape[1], policy.act_dim, start.device
    with_array = engine.rollout(policy, start, horizon, seed=4, out=RingBuffer(*sizes))
    assert torch.equal(with_array.penalties, asked.rollout(policy, start, horizon, seed=4).penalties)
    without = engine.rollout(policy, start, horizon, seed=4, out=RingBuffer(*sizes, penalties=False))
    assert without.penalties is None and torch.equal(without.rewards, with_array.rewards)
    assert torch.equal(without.raw_rewards, without.rewards)


def check_terminals(
    engine: RolloutEngine, policy: Actor, start: torch.Tensor, horizon: int, box: Box
) -> None:
    """Check that terminal rows are kept and end their rollout, and that other rollouts reach the horizon."""
    whole = engine.rollout(policy, start, horizon, seed=2)
    assert torch.equal(whole.terminals, ~box.contains(whole.next_observations))
    last = torch.cat([whole.rollout_index.diff() != 0, torch.ones_like(whole.terminals[:1])])
    assert whole.terminals.any() and not whole.terminals[~last].any()
    assert (whole.step[last & ~whole.terminals] == horizon - 1).all()
    assert whole.rollout_index[last].equal(torch.arange(len(start), device=start.device))


def check_truncation(
    engine: RolloutEngine, policy: Actor, start: torch.Tensor, horizon: int, halt_reward: float | None
) -> None:
    """Check that rollouts end after a step with a penalty above `truncate_at`, the median of all."""
    free = engine.rollout(policy, start, horizon, seed=2)
    at = float(free.penalties.median())
    engine = copy.copy(engine)
    engine._kept, engine.truncation = None, make_truncation(at, halt_reward)
    made = engine.rollout(policy, start, horizon, seed=2)
    above = made.penalties > engine.truncation.at
    assert made.info["truncated"] == int(above.sum()) > len(start) // 4
    # They are the first steps of the rollouts that nothing truncates, up to the first such step.
    keys = made.rollout_index * horizon + made.step
    same = free[torch.searchsorted(free.rollout_index * horizon + free.step, keys)]
    for name in ("observations", "actions", "next_observations", "raw_rewards", "penalties", "members"):
        assert torch.equal(getattr(made, name), getattr(same, name)), name
    last = torch.cat([made.rollout_index.diff() != 0, torch.ones_like(above[:1])])
    assert not above[~last].any()
    ended = torch.cat([same.rollout_index.diff() != 0, torch.ones_like(above[:1])])
    assert (last == ended).all() and (above | made.terminals | (made.step == horizon - 1))[last].all()
    if halt_reward is None:
        assert torch.equal(made.rewards, same.rewards) and torch.equal(made.terminals, same.terminals)
    else:
        assert torch.equal(made.terminals, same.terminals | above)
        assert torch.equal(made.rewards, same.rewards.masked_fill(above, engine.truncation.halt_reward))
    check_made_of_steps(engine, policy, start, horizon)
    kernel, exact = (each.rollout(policy, start, 1, seed=3) for each in (engine, oracle(engine, "float32")))
    near = (kernel.penalties - engine.truncation.at).abs() < 1e-2 * engine.truncation.at
    for name in ("terminals", "members"):
        assert torch.equal(getattr(kernel, name)[~near], getattr(exact, name)[~near]), name


def check_kept_member(engine: RolloutEngine, policy: Actor, start: torch.Tensor, horizon: int) -> None:
    """Check that a rollout draws one member, and different rollouts different ones."""
    engine = copy.copy(engine)
    engine._kept, engine.member = None, "per_rollout"
    made = engine.rollout(policy, start, horizon, seed=2)
    first = made.members[made.step == 0]
    assert torch.equal(made.members, first[made.rollout_index])
    assert torch.equal(first, oracle(engine, "float32").rollout(policy, start, 1, seed=2).members)
    assert len(first.unique()) == len(engine.ensemble.elites)
    check_made_of_steps(engine, policy, start, horizon)


def check_not_finite(
    make_engine: Callable[..., RolloutEngine],
    ensemble: EnsembleDynamics,
    policy: Actor,
    start: torch.Tensor,
    member: int,
) -> None:
    """Check that rows are dropped if an overflowing member predicts them or takes part in their penalty."""
    with torch.no_grad():
        ensemble.weights[0][member, 0, :] = 3e38
    start = start.clone()
    start[::5, 0] = 1e5
    for penalty in PENALTIES:
        engine = make_engine(ensemble, penalty=penalty, termination=None)
        kernel = engine.rollout(policy, start, 1, seed=1)
        exact = oracle(engine, "float32").rollout(policy, start, 1, seed=1)
        assert kernel.info["non_finite"] == exact.info["non_finite"] > 0
        assert torch.equal(kernel.rollout_index, exact.rollout_index)
        kernel.validate()
        step = engine.step(start, start.new_zeros(len(start), ensemble.act_dim), seed=1)
        finite = torch.isfinite(step.next_observations).all(1) & torch.isfinite(step.rewards)
        assert torch.equal(step.terminals, ~finite) and not finite.all()


def check_nothing_finite(make_engine: Callable[..., RolloutEngine], start: torch.Tensor) -> None:
    """Check that no rows are kept if no prediction is finite."""
    ensemble = make_ensemble(5, 2)
    with torch.no_grad():
        ensemble.biases[-1].fill_(torch.inf)
    result = make_engine(ensemble).rollout(make_policy(5, 2), start, 7, seed=0)
    assert len(result) == 0 and result.info["non_finite"] == len(start)


Case = tuple[RolloutEngine, Actor, torch.Tensor]


class RolloutTests:
    """Tests of rollouts for each GPU backend.

    The test file has a fixture `case`: rollouts of 11 observation dimensions that end by `narrow_box(11)`.
    """

    def test_a_batch_may_take_turns(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        check_turns(*case, monkeypatch)

    def test_ring(self, case: Case) -> None:
        check_ring(*case, 2, capacity=400)

    def test_terminal_rows_are_kept_and_end_the_rollout(self, case: Case) -> None:
        check_terminals(*case, 3, narrow_box(11))

    def test_deterministic_rollout(self, case: Case) -> None:
        check_deterministic(*case)

    def test_without_penalties(self, case: Case) -> None:
        engine, policy, start = case
        engine.penalty_coef = 0.0
        check_without_penalties(engine, policy, start, 2)

    @pytest.mark.parametrize("halt_reward", [None, -3.3])
    def test_truncation(self, case: Case, halt_reward: float | None) -> None:
        check_truncation(*case, 2, halt_reward)

    def test_a_rollout_may_keep_its_member(self, case: Case) -> None:
        check_kept_member(*case, 2)

    def test_arrays_after_the_terminals_may_be_missing(self, case: Case) -> None:
        check_missing_arrays(*case)


def assert_trained_alike(
    kernel: dict[str, torch.Tensor],
    same: dict[str, torch.Tensor],
    exact: dict[str, torch.Tensor],
    before: dict[str, torch.Tensor],
    one_step: bool,
) -> None:
    """Compare trained parameters and Adam's moments with PyTorch's; `exact` is the result in float64.

    After one step from moments of zero, the moments are gradients and squared gradients up to a factor, so
    `assert_as_accurate` applies. Otherwise rounding may change the sign of a ReLU's input or of a small
    gradient, and Adam's steps are as large for small gradients as for large ones. The error may then also be
    0.1 % of the change since `before`.
    """
    assert kernel.keys() == exact.keys()
    for name, truth in exact.items():
        if one_step and ".exp_avg" in name:
            assert_as_accurate(kernel[name], same[name], truth, name, units=8.0)
            continue
        error, usual, moved = (
            float((x.detach() - truth).double().norm()) for x in (kernel[name], same[name], before[name])
        )
        allowed = max(2.0 * usual, 1e-3 * moved)
        assert error <= allowed, f"{name}: error {error:.3g}, PyTorch's {usual:.3g}, movement {moved:.3g}"
        assert moved > 0.0, f"{name} did not move, so nothing was compared"


def to_double(sac: SAC) -> SAC:
    """Convert parameters and Adam's moments to float64, for the reference backend."""
    for module in (sac.actor, sac.critic, sac.target):
        module.double()
    sac.log_alpha.data = sac.log_alpha.data.double()
    for optimizer in sac.optimizers.values():
        optimizer.exp_avgs = [moment.double() for moment in optimizer.exp_avgs]
        optimizer.exp_avg_sqs = [moment.double() for moment in optimizer.exp_avg_sqs]
    return sac


def fit_to_double(fit: Fit) -> Fit:
    """Convert data, parameters and Adam's moments to float64, for the reference backend."""
    fit.model.double()
    fit.inputs, fit.targets = fit.inputs.double(), fit.targets.double()
    fit.optimizer.exp_avgs = [moment.double() for moment in fit.optimizer.exp_avgs]
    fit.optimizer.exp_avg_sqs = [moment.double() for moment in fit.optimizer.exp_avg_sqs]
    return fit


def data_of(observations: torch.Tensor, actions: torch.Tensor) -> Transitions:
    """Return a data set of these observations and actions, in which nothing happens."""
    return Transitions(
        observations=observations,
        actions=actions,
        rewards=torch.zeros(len(observations)),
        next_observations=observations,
        terminals=torch.zeros(len(observations), dtype=torch.bool),
    )


def random_transitions(
    count: int, obs_dim: int, act_dim: int, seed: int, dtype: torch.dtype = torch.float32
) -> Transitions:
    """Make transitions of standard normals, with squashed actions and three terminals in ten rows."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=dtype)

    return Transitions(
        observations=normal(count, obs_dim),
        actions=normal(count, act_dim).tanh(),
        rewards=normal(count),
        next_observations=normal(count, obs_dim),
        terminals=torch.rand(count, generator=g) < 0.3,
        raw_rewards=normal(count),
        penalties=normal(count),
    )


def training_kernels() -> list[tuple[str, str]]:
    """Return the CPU's instruction sets, each with the precisions that have kernels of their own there.

    bfloat16x3 is float32 on some; tests/core/test_precision.py tests that.
    """
    return [
        (isa, dtype)
        for isa in cpu.isas()
        for dtype in TRAINING_DTYPES
        if dtype != "bfloat16x3" or isa in cpu.WITH_BFLOAT16
    ]


def first_layer(dtype: str) -> str:
    """Return the precision of SAC's first layers on the instruction set in use."""
    return "bfloat16x3" if cpu.isa() == "avx512_amx" and dtype != "float32" else "float32"


OTHERS = {
    "order": "critic_first",
    "critic_loss": "mse",
    "alpha_max": 1.0,
    "log_std_min": -5.0,
    "log_prob_epsilon": 1e-6,
    "target_entropy": "act_dim",
    "actor_learning_rate": 1e-4,
    "alpha_learning_rate": 1e-2,
}
MOBILE = {
    **OTHERS,
    "critic_loss": "mean_mse",
    "critics": 3,
    "entropy_backup": False,
    "target_min": 0.0,
}
UNIFLORAL = {
    "order": "actor_first",
    "adam_epsilon": 1e-5,
    "critic_loss": "mse",
    "log_std_min": -5.0,
    "target_entropy": "act_dim",
    "actor_learning_rate": 1e-4,
    "alpha_learning_rate": 1e-2,
}
SMALL = {"hidden": (20, 12), "batch_size": 37}
REDQ = {"critics": 10, "target_critics": 2, "actor_q": "mean", "order": "critic_first", "critic_loss": "mse"}
# Observation dimensions, action dimensions, settings.
SAC_CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "canonical": (17, 6, {}),
    "canonical, others' options": (17, 6, OTHERS),
    "others' options, many rows": (5, 3, {"hidden": (24, 17), "batch_size": 45, **OTHERS}),
    "others' options, one layer": (4, 2, {"hidden": (12,), "batch_size": 20, **OTHERS}),
    "canonical, Unifloral's options": (17, 6, UNIFLORAL),
    "Unifloral's options": (7, 2, {"hidden": (24, 17, 33), "critics": 5, "batch_size": 45, **UNIFLORAL}),
    "Unifloral's options, one layer": (4, 2, {"hidden": (12,), "batch_size": 20, "polyak": 0.3, **UNIFLORAL}),
    "MOBILE's options": (7, 2, {"hidden": (24, 17), "batch_size": 45, **MOBILE}),
    "REDQ's options": (7, 2, {"hidden": (24, 17, 33), "batch_size": 45, **REDQ}),
    "one of three critics": (
        4,
        1,
        {**SMALL, **REDQ, "order": "simultaneous", "critics": 3, "target_critics": 1},
    ),
    "four of five critics, Unifloral's order": (
        4,
        2,
        {**SMALL, **UNIFLORAL, "critics": 5, "target_critics": 4},
    ),
    "two critics' mean, Unifloral's order": (5, 3, {**SMALL, **UNIFLORAL, "critics": 2, "actor_q": "mean"}),
    "one action": (3, 1, {"hidden": (24, 40), "batch_size": 7}),
    "one row": (11, 3, {"hidden": (16, 8), "batch_size": 1}),
    "one unit": (5, 2, {"hidden": (1,), "batch_size": 20}),
    "ten critics, three layers": (11, 3, {"hidden": (24, 17, 33), "critics": 10, "batch_size": 37}),
    "three critics, many rows": (4, 2, {"hidden": (20, 12), "critics": 3, "batch_size": 45}),
    "one critic, one layer": (5, 2, {"hidden": (65,), "critics": 1, "batch_size": 50}),
    "ant, real rows only": (111, 8, {"hidden": (50, 31), "batch_size": 100, "real_ratio": 1.0}),
    "humanoid, no real rows": (376, 17, {"hidden": (48, 31), "batch_size": 64, "real_ratio": 0.0}),
    "large batch": (4, 2, {"hidden": (20, 20), "batch_size": 301, "discount": 0.9, "polyak": 0.3}),
}


def sac_sources(obs_dim: int, act_dim: int) -> tuple[Transitions, RingBuffer]:
    """Make a data set, and a buffer whose unused rows are NaN."""
    buffer = RingBuffer(100, obs_dim, act_dim)
    for array in buffer.storage.arrays().values():
        array.fill_(True if array.dtype == torch.bool else float("nan"))
    rows = random_transitions(60, obs_dim, act_dim, seed=2).arrays()
    for name, array in buffer.storage.arrays().items():
        array[:60] = rows[name]
    buffer.advance(60)
    return random_transitions(50, obs_dim, act_dim, seed=1), buffer


def make_sac(obs_dim: int, act_dim: int, config: SACConfig, backend: str, threads: int = 1) -> SAC:
    """Make a SAC unlike a fresh one: shifted targets, biases, and some log stds out of bounds."""
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


def run_sac(
    case: str,
    backend: str,
    updates: int,
    *,
    dtype: str = "float32",
    double: bool = False,
    threads: int = 1,
    seed: int = 7,
):
    obs_dim, act_dim, options = SAC_CASES[case]
    sac = make_sac(obs_dim, act_dim, SACConfig(**options, dtype=dtype), backend, threads)
    # The reference rounds what the kernel of this instruction set rounds.
    sac._network = trained_mlp(dtype, first=first_layer(dtype), last="float32")
    if double:
        to_double(sac)
    metrics = sac.update_many(*sac_sources(obs_dim, act_dim), updates, seed)
    return {name: tensor.detach().clone() for name, tensor in sac.state().items()}, metrics


# Observation dimensions, action dimensions, rows for each member, settings.
FIT_CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "canonical": (17, 6, 600, {}),
    "short last batch": (11, 3, 100, {"hidden": (24, 33), "batch_size": 48, "members": 3}),
    "relu": (5, 2, 60, {"hidden": (17, 40), "activation": "relu", "batch_size": 20}),
    "tanh": (5, 2, 60, {"hidden": (17, 40), "activation": "tanh", "batch_size": 20}),
    "one member, one row": (3, 1, 3, {"hidden": (8,), "members": 1, "batch_size": 1}),
    "one unit": (3, 1, 30, {"hidden": (1, 1), "members": 2, "batch_size": 10}),
    "linear": (4, 2, 60, {"hidden": (), "members": 2, "batch_size": 30}),
    "humanoid": (376, 17, 70, {"hidden": (40,), "members": 2, "batch_size": 70}),
    "edges of tiles": (10, 5, 90, {"hidden": (32, 31, 48, 16), "batch_size": 37, "members": 3}),
    "layer norms": (11, 3, 100, {"hidden": (25, 33, 18), "batch_size": 40, "members": 3, "layer_norm": True}),
    "few normed units": (3, 1, 30, {"hidden": (4, 7), "members": 2, "batch_size": 9, "layer_norm": True}),
    "wide layer norm": (11, 3, 64, {"hidden": (512,), "batch_size": 64, "members": 2, "layer_norm": True}),
    "canonical with layer norms": (17, 6, 600, {"layer_norm": True, "activation": "relu", "members": 3}),
    "batch larger than the data": (4, 2, 25, {"hidden": (20, 20), "members": 32, "batch_size": 1000}),
}


def fit_transitions(count: int, obs_dim: int, act_dim: int, scale: float = 0.3) -> Transitions:
    g = torch.Generator().manual_seed(1)
    observations = torch.randn(count, obs_dim, generator=g)
    return Transitions(
        observations=observations,
        actions=torch.randn(count, act_dim, generator=g).tanh(),
        rewards=torch.randn(count, generator=g),
        next_observations=observations + scale * torch.randn(count, obs_dim, generator=g),
        terminals=torch.zeros(count, dtype=torch.bool),
    )


def make_fit(case: str, backend: str, threads: int = 1, double: bool = False, dtype: str = "float32") -> Fit:
    obs_dim, act_dim, count, options = FIT_CASES[case]
    hidden = options.get("hidden", (200,) * 4)
    decay = tuple(1e-3 * (layer + 1) for layer in range(len(hidden) + 1))
    members = options.get("members", 7)
    config = DynamicsConfig(
        **{
            "hidden": hidden,
            "members": members,
            **options,
            "weight_decay": decay,
            "elites": 1,
            "dtype": dtype,
        }
    )
    fit = Fit(fit_transitions(count + 200, obs_dim, act_dim), 0, config, "cpu", backend, threads)
    # Some of the rows of an epoch, for the tests that make its steps themselves.
    fit.rows = fit.bootstrap()[:, :count]
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for bias in fit.model.biases:
            bias.normal_(0.0, 0.2, generator=g)
        for scale, shift in zip(fit.model.norm_scales, fit.model.norm_shifts, strict=True):
            scale.normal_(1.0, 0.3, generator=g)
            shift.normal_(0.0, 0.3, generator=g)
        # The raw log-variances lie within the bounds, beyond them and far beyond them.
        fit.model.biases[-1][:, obs_dim + 1] = 60.0
        fit.model.biases[-1][:, -1] = -90.0
        fit.model.max_logvar.uniform_(-1.0, 0.5, generator=g)
        fit.model.min_logvar.uniform_(-8.0, -4.0, generator=g)
    if double:
        return fit_to_double(fit)
    return fit


def fit_state(fit: Fit) -> dict[str, torch.Tensor]:
    """Return the parameters and Adam's moments."""
    parameters = {name for name, _ in fit.model.named_parameters()}
    return {
        name: tensor
        for name, tensor in fit.live_state().items()
        if name in parameters or name.rpartition(".")[0] in parameters
    }


def fit_steps(fit: Fit, rows: np.ndarray) -> float:
    return fit.steps(torch.from_numpy(rows))


class EagerGraph(Graph):
    """Stand-in for `Graph` that runs the function on the CPU, including the runs before the first call."""

    def __init__(
        self,
        function: Callable[..., torch.Tensor],
        arguments: Sequence[torch.Tensor],
        state: Sequence[torch.Tensor],
    ) -> None:
        self.function, self.arguments = function, [argument.clone() for argument in arguments]
        before = [tensor.detach().clone() for tensor in state]
        # A real graph runs once to warm up and once to record; neither run may change the state.
        for _ in range(2):
            function(*self.arguments)
            with torch.no_grad():
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)

    def __call__(self, *arguments: torch.Tensor) -> torch.Tensor:
        for mine, argument in zip(self.arguments, arguments, strict=True):
            mine.copy_(argument)
        return self.function(*self.arguments)


LEAST_NORMAL = torch.finfo(torch.float32).tiny


def fill_with_denormals(moments: Sequence[torch.Tensor]) -> None:
    for moment in moments:
        moment.fill_(LEAST_NORMAL / 8)


def assert_no_denormals(moments: Sequence[torch.Tensor]) -> None:
    """Assert that the kernel has made zeros of the denormal moments of parameters without gradient, and that
    this thread's arithmetic is as before."""
    if platform.machine() in ("x86_64", "AMD64", "aarch64", "arm64"):
        assert any((moment == 0.0).any() for moment in moments)
        for moment in moments:
            assert not ((moment != 0.0) & (moment.abs() < LEAST_NORMAL)).any()
    assert (torch.tensor([LEAST_NORMAL]) / 2 != 0.0).all()
