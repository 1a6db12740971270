"""Test what a user may bring to rollouts: penalties, rewards, start states, noise that is switched off."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import (
    assert_same,
    check_made_of_steps,
    data_of,
    inputs,
    make_ensemble,
    make_policy,
    narrow_box,
)

from mopo_fast.buffer import RingBuffer
from mopo_fast.data import Transitions
from mopo_fast.errors import InputError
from mopo_fast.rollout import RolloutEngine

BACKENDS = ["reference", "cpu"]


def widest(means: torch.Tensor, stds: torch.Tensor) -> torch.Tensor:
    """Return "max_aleatoric" as a user would write it."""
    return stds.square().sum(-1).amax(0).sqrt()


def action_cost(_: torch.Tensor, actions: torch.Tensor, next_observations: torch.Tensor) -> torch.Tensor:
    return next_observations[:, 0] - actions.square().sum(-1)


def make_data(rows: int = 60) -> Transitions:
    return data_of(*inputs(rows, 5, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("members", ["all", "elites"])
@pytest.mark.parametrize("limits", [{}, {"truncate_at": 1.78}, {"truncate_at": 1.78, "halt_reward": -3.0}])
def test_a_penalty_function_equals_the_penalty(backend: str, members: Any, limits: dict[str, float]) -> None:
    ensemble, policy, start = make_ensemble(5, 2), make_policy(5, 2), inputs(500, 5, 2)[0]
    options = {"backend": backend, "penalty_members": members, "penalty_coef": 0.7, **limits}
    own, named = (
        RolloutEngine(ensemble, penalty=penalty, termination=narrow_box(5), **options)
        for penalty in (widest, "max_aleatoric")
    )
    made, expected = (each.rollout(policy, start, 4, seed=1) for each in (own, named))
    assert made.info == expected.info and bool(made.info["truncated"]) == bool(limits)
    for name, array in expected.arrays().items():
        torch.testing.assert_close(getattr(made, name), array, rtol=1e-5, atol=1e-5, msg=name)
    check_made_of_steps(own, policy, start, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reward_function_takes_the_place_of_the_models(backend: str) -> None:
    ensemble, policy, start = make_ensemble(5, 2), make_policy(5, 2), inputs(300, 5, 2)[0]
    engine = RolloutEngine(ensemble, reward=action_cost, penalty_coef=0.5, backend=backend)
    free = RolloutEngine(ensemble, penalty_coef=0.5, backend=backend)
    made, other = (each.rollout(policy, start, 3, seed=1) for each in (engine, free))
    cost = action_cost(made.observations, made.actions, made.next_observations)
    assert torch.equal(made.raw_rewards, cost) and not torch.equal(made.raw_rewards, other.raw_rewards)
    torch.testing.assert_close(made.rewards, cost - 0.5 * made.penalties)
    torch.testing.assert_close(made.next_observations, other.next_observations)
    check_made_of_steps(engine, policy, start, 3)


def test_a_halting_reward_replaces_that_of_a_function() -> None:
    engine = RolloutEngine(make_ensemble(5, 2), reward=action_cost, truncate_at=1.78, halt_reward=-7.0)
    made = engine.rollout(make_policy(5, 2), inputs(300, 5, 2)[0], 3, seed=1)
    above = made.penalties > engine.truncation.at
    assert above.any() and not above.all()
    assert torch.equal(made.rewards == -7.0, above) and torch.equal(made.terminals, above)


def test_functions_get_arrays_of_the_callers_kind() -> None:
    seen: list[type] = []

    def penalty(means: Any, stds: Any) -> Any:
        seen.extend((type(means), type(stds)))
        return stds.max((0, 2))

    def reward(observations: Any, actions: Any, successors: Any) -> Any:
        seen.extend((type(observations), type(actions), type(successors)))
        return observations[:, 0]

    engine = RolloutEngine(make_ensemble(5, 2), penalty=penalty, reward=reward, penalty_coef=0.1)
    observations, actions = (array.numpy() for array in inputs(9, 5, 2))
    result = engine.step(observations, actions, seed=0)
    assert seen == [np.ndarray] * 5 and isinstance(result.rewards, np.ndarray)
    assert result.mean is None and result.std is None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda means, stds: stds,
            r"must return floats \[8\], got torch.float32 \[7, 8, 6\]",
        ),
        (lambda means, stds: torch.ones(8, dtype=torch.int64), "must return floats .*, got torch.int64"),
        (lambda means, stds: None, "what the penalty function returns must be"),
        (
            lambda means, stds: torch.full((8,), math.nan),
            "the penalty function must return finite numbers, got nan at row 0",
        ),
    ],
)
def test_bad_penalty_functions(function: Any, message: str) -> None:
    engine = RolloutEngine(make_ensemble(5, 2), penalty=function)
    with pytest.raises(InputError, match=message):
        engine.step(*inputs(8, 5, 2), seed=0)
    with pytest.raises(InputError, match="the penalty function"):
        engine.rollout(make_policy(5, 2), inputs(8, 5, 2)[0], 2, seed=0)


def test_bad_reward_functions() -> None:
    with pytest.raises(InputError, match="reward must be a function or None, got 3"):
        RolloutEngine(make_ensemble(5, 2), reward=3)
    engine = RolloutEngine(make_ensemble(5, 2), reward=lambda *arrays: torch.zeros(3))
    with pytest.raises(InputError, match=r"the reward function must return floats \[8\]"):
        engine.step(*inputs(8, 5, 2), seed=0)


def test_functions_need_not_be_finite_where_the_prediction_is_not() -> None:
    ensemble = make_ensemble(5, 2)
    with torch.no_grad():
        ensemble.biases[-1].fill_(torch.inf)
    engine = RolloutEngine(ensemble, reward=action_cost, penalty=widest)
    made = engine.rollout(make_policy(5, 2), inputs(8, 5, 2)[0], 2, seed=0)
    assert len(made) == 0 and made.info["non_finite"] == 8


def test_a_penalty_function_is_seen_in_the_repr() -> None:
    engine = RolloutEngine(make_ensemble(5, 2), penalty=widest, reward=action_cost)
    assert "penalty='widest'" in repr(engine) and "reward='action_cost'" in repr(engine)


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_is_switched_off_apart(backend: str) -> None:
    engine = RolloutEngine(make_ensemble(5, 2), backend=backend)
    policy, start = make_policy(5, 2), inputs(200, 5, 2)[0]

    def made(seed: int, deterministic: Any) -> Transitions:
        return engine.rollout(policy, start, 1, seed=seed, deterministic=deterministic)

    acting, model, both = (made(1, which) for which in ("policy", "model", True))
    assert torch.equal(acting.actions, both.actions) and (acting.members >= 0).all()
    assert not torch.equal(acting.next_observations, both.next_observations)
    assert torch.equal(model.actions, made(1, False).actions) and (model.members == -1).all()
    assert torch.equal(acting.members, made(1, False).members)
    # The model's mean at the drawn actions.
    expected = engine.step(start, model.actions, seed=9, deterministic=True)
    assert torch.equal(model.next_observations, expected.next_observations)
    with pytest.raises(
        InputError, match='deterministic must be True, False, "policy" or "model", got \'both\''
    ):
        made(1, "both")


@pytest.mark.parametrize("backend", BACKENDS)
def test_uniform_actions(backend: str) -> None:
    engine = RolloutEngine(make_ensemble(5, 2), backend=backend)
    start = inputs(4000, 5, 2)[0]
    made = engine.rollout("uniform", start, 2, seed=3)
    assert_same(made, engine.rollout("uniform", start, 2, seed=3))
    assert made.actions.abs().max() < 1.0
    torch.testing.assert_close(made.actions.mean(0), torch.zeros(2), atol=0.03, rtol=0)
    torch.testing.assert_close(made.actions.var(0), torch.full((2,), 1 / 3), atol=0.02, rtol=0)
    assert not torch.equal(made.actions[made.step == 0], made.actions[made.step == 1])
    for policy in ("gaussian", 3):
        with pytest.raises(InputError, match=r"policy must be a mopo_fast\.Actor, .*, or a function"):
            engine.rollout(policy, start, 2, seed=3)


def test_start_states_of_a_data_set(tmp_path: Path) -> None:
    engine, policy, data = RolloutEngine(make_ensemble(5, 2)), make_policy(5, 2), make_data()
    made = engine.rollout(policy, data, 3, seed=2, count=500)
    first = made.observations[made.step == 0]
    assert len(first) == 500
    match = (first[:, None] == data.observations[None]).all(-1)
    assert match.any(1).all() and match.any(0).all()
    np.savez(tmp_path / "data.npz", **{name: array.numpy() for name, array in data.arrays().items()})
    assert_same(made, engine.rollout(policy, tmp_path / "data.npz", 3, seed=2, count=500))
    assert_same(made, engine.rollout(policy, str(tmp_path / "data.npz"), 3, seed=2, count=500))
    other = engine.rollout(policy, data, 3, seed=3, count=500)
    assert not torch.equal(other.observations[other.step == 0], first)


@pytest.mark.parametrize(
    ("start", "count", "message"),
    [
        (make_data(), None, "start states from a data set need count"),
        (make_data(), 0, "count must be a whole number"),
        (inputs(8, 5, 2)[0], 8, "count is for start states that are drawn from a data set"),
        ("hoper-medium-v2", 8, "hoper-medium-v2"),
    ],
)
def test_bad_start_states(start: Any, count: Any, message: str) -> None:
    engine = RolloutEngine(make_ensemble(5, 2))
    with pytest.raises(InputError, match=message):
        engine.rollout(make_policy(5, 2), start, 1, seed=0, count=count)


def test_a_quantile_of_the_datas_penalties() -> None:
    engine, data = RolloutEngine(make_ensemble(5, 2)), make_data(301)
    penalties = engine.step(data.observations, data.actions, seed=0).penalties
    for quantile in (0.0, 0.37, 1.0):
        expected = float(np.quantile(penalties.numpy(), quantile))
        assert engine.penalty_quantile(data, quantile) == pytest.approx(expected, rel=1e-6)
    own = RolloutEngine(engine.ensemble, penalty=widest, penalty_coef=0.0)
    assert own.penalty_quantile(data, 0.5) == pytest.approx(
        float(np.quantile(penalties.numpy(), 0.5)), rel=1e-5
    )
    with pytest.raises(InputError, match=r"quantile must be in \[0, 1\], got 1.5"):
        engine.penalty_quantile(data, 1.5)
    with pytest.raises(InputError, match="data must be Transitions or the name of a data set, got Tensor"):
        engine.penalty_quantile(data.observations, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"truncate_at": -1.0}, "truncate_at must be finite and not negative, got -1.0"),
        ({"truncate_at": math.nan}, "truncate_at must be finite"),
        ({"truncate_at": "1"}, "truncate_at must be finite"),
        ({"halt_reward": 1.0}, "halt_reward=1.0 needs truncate_at"),
        ({"truncate_at": 1.0, "halt_reward": math.inf}, "halt_reward must be a finite number"),
        ({"truncate_at": 1.0, "penalty_coef": 0.0, "penalties": False}, "truncate_at=1 needs penalties"),
        ({"member": "per_epoch"}, "unknown member 'per_epoch'; there are: per_step, per_rollout"),
    ],
)
def test_bad_limits(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RolloutEngine(make_ensemble(5, 2), **arguments)


def test_a_ring_need_not_store_the_penalties_that_truncate() -> None:
    engine = RolloutEngine(make_ensemble(5, 2), penalty_coef=0.0, truncate_at=1.78)
    policy, start = make_policy(5, 2), inputs(300, 5, 2)[0]
    ring = RingBuffer(2000, 5, 2, penalties=False)
    made, expected = (
        engine.rollout(policy, start, 4, seed=1, out=ring),
        engine.rollout(policy, start, 4, seed=1),
    )
    assert made.penalties is None and made.info == expected.info and made.info["truncated"] > 0
    assert torch.equal(made.next_observations, expected.next_observations)


def test_functions_may_write_into_their_arguments() -> None:
    def reward(observations: Any, actions: Any, successors: Any) -> Any:
        for array in (observations, actions, successors):
            array.mul_(0.0)
        return torch.zeros(len(observations))

    def penalty(means: Any, stds: Any) -> Any:
        means.zero_()
        return stds.square_().sum((0, 2))

    engine = RolloutEngine(make_ensemble(5, 2), reward=reward, penalty=penalty, penalty_coef=0.0)
    plain = RolloutEngine(engine.ensemble)
    (observations, actions), kept = inputs(40, 5, 2), inputs(40, 5, 2)
    made, expected = (
        each.step(observations, actions, seed=1, distributions=True) for each in (engine, plain)
    )
    assert torch.equal(observations, kept[0]) and torch.equal(actions, kept[1])
    for name in ("next_observations", "mean", "std"):
        assert torch.equal(getattr(made, name), getattr(expected, name)), name
    made.rewards.add_(1.0)
    assert not made.raw_rewards.any()


def test_a_broken_member_ends_rollouts_under_an_own_penalty() -> None:
    ensemble = make_ensemble(5, 2, members=4)
    with torch.no_grad():
        ensemble.biases[-1][0, -1] = torch.nan
    policy, start = make_policy(5, 2), inputs(20, 5, 2)[0]
    for penalty_coef in (0.0, 1.0):
        engine = RolloutEngine(ensemble, penalty=widest, penalty_coef=penalty_coef, penalties=True)
        made = engine.rollout(policy, start, 2, seed=0)
        assert len(made) == 0 and made.info["non_finite"] == 20


def test_the_models_reward_does_not_matter_beside_an_own_one() -> None:
    ensemble = make_ensemble(5, 2)
    with torch.no_grad():
        ensemble.biases[-1][:, 5] = torch.nan
    engine = RolloutEngine(ensemble, reward=action_cost, penalty_coef=0.0, termination=narrow_box(5))
    made = engine.rollout(make_policy(5, 2), inputs(300, 5, 2)[0], 3, seed=0)
    box = narrow_box(5)
    assert torch.equal(made.terminals, ~box.contains(made.next_observations)) and (made.step == 2).any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_highest_penalty_of_the_data_ends_nothing_in_them(dtype: str) -> None:
    data = make_data(200)
    for seed in range(8):
        free = RolloutEngine(make_ensemble(5, 2, seed=seed), dtype=dtype, backend="reference")
        at = free.penalty_quantile(data, 1.0)
        engine = RolloutEngine(free.ensemble, dtype=dtype, backend="reference", truncate_at=at)
        result = engine.step(data.observations, data.actions, seed=0)
        assert result.truncations is not None and not result.truncations.any()


@pytest.mark.parametrize("arguments", [{"truncate_at": 1e39}, {"truncate_at": 10**400}])
def test_limits_beyond_float32(arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="truncate_at must be finite"):
        RolloutEngine(make_ensemble(5, 2), **arguments)
