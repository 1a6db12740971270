"""Test estimates of returns against sums by hand, and fitted Q evaluation against values in closed form."""

import math

import numpy as np
import pytest
import torch
from linear_models import constant_actor, linear_ensemble

from mopo_fast.data import Transitions
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.estimates import draw_starts, fitted_q, penalised_returns
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine
from mopo_fast.tasks import make_box

HALF = math.atanh(0.5)


def linear_engine(*numbers: float, coef: float = 0.0, **options) -> RolloutEngine:
    return RolloutEngine(
        linear_ensemble(*numbers), penalty="max_deviation", penalty_coef=coef, backend="reference", **options
    )


@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("coef", [0.0, 2.0])
def test_the_penalised_return_is_the_sum_by_hand(discount: float, coef: float) -> None:
    """With a = 1/2 the state goes to 1 by halves: s_t = 1 + (s_0 - 1) / 2^t."""
    starts, steps = torch.tensor([[0.0], [1.0], [5.0]]), 40
    engine = linear_engine(-0.5, 1.0, 0.25, coef=coef)
    result = penalised_returns(engine, constant_actor(HALF), starts, steps, seed=0, discount=discount)
    time = np.arange(steps)
    for start, penalised, unpenalised in zip(
        (0.0, 1.0, 5.0), result.penalised, result.unpenalised, strict=True
    ):
        rewards = 1.0 + (start - 1.0) / 2.0**time + 1.0
        assert unpenalised.item() == pytest.approx((discount**time * rewards).sum(), rel=1e-5)
        assert penalised.item() == pytest.approx((discount**time * (rewards - coef * 0.25)).sum(), rel=1e-5)
    assert result.steps.tolist() == [steps] * 3 and not result.non_finite.any()


def test_a_rollout_ends_at_its_terminal_state() -> None:
    """A state that doubles leaves the box at 16, and the step to it counts."""
    engine = linear_engine(1.0, 0.0, termination=make_box(1, {0: (-10.0, 10.0)}))
    starts = torch.tensor([[1.0], [4.0], [0.0]])
    result = penalised_returns(engine, constant_actor(0.0), starts, 6, seed=0)
    assert result.steps.tolist() == [4, 2, 6]
    assert result.penalised.tolist() == [1 + 2 + 4 + 8 + 4, 4 + 8 + 2, 6]
    assert not result.non_finite.any()


def test_a_rollout_ends_before_a_prediction_that_is_not_finite() -> None:
    """2^128 is no float32, so the last step that counts goes from 2^126 to 2^127."""
    result = penalised_returns(
        linear_engine(1.0, 0.0), constant_actor(0.0), torch.tensor([[1.0], [0.0]]), 1000, seed=0
    )
    assert result.non_finite.tolist() == [True, False]
    assert result.steps.tolist() == [127, 1000]
    assert result.penalised.tolist() == pytest.approx([2.0**127, 1000.0])


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_rollouts_are_those_of_the_engine(deterministic: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    ensemble = EnsembleDynamics(3, 2, members=3, elites=2, hidden=(8, 8), generator=generator)
    actor = Actor(3, 2, hidden=(8,), generator=generator)
    engine = RolloutEngine(
        ensemble, termination=make_box(3, {0: (-2.0, 2.0)}), penalty_coef=0.5, dtype="float64"
    )
    starts = torch.randn(30, 3, generator=generator).double().clamp(-1.5, 1.5)
    # The same actor in float64, as the engine computes it.
    actor = actor.double()
    policy = actor.act if deterministic else actor
    rows = engine.rollout(policy, starts, 7, seed=3)
    sums = torch.zeros(30, dtype=torch.float64).index_add_(0, rows.rollout_index, rows.rewards)
    shares: list[float] = []
    result = penalised_returns(
        *(engine, actor, starts, 7), seed=3, deterministic=deterministic, on_progress=shares.append
    )
    assert 1 < result.steps.double().mean() < 7
    assert result.steps.tolist() == torch.bincount(rows.rollout_index).tolist()
    torch.testing.assert_close(result.penalised, sums)
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_arguments_of_the_return_in_the_model_are_checked() -> None:
    engine, actor, starts = linear_engine(0.0, 0.0), constant_actor(0.0), torch.zeros(1, 1)
    with pytest.raises(InputError, match="horizon must be at least 1, got 0"):
        penalised_returns(engine, actor, starts, 0, seed=0)
    with pytest.raises(InputError, match="discount must be above 0"):
        penalised_returns(engine, actor, starts, 1, seed=0, discount=0.0)


def episodes(*lengths: int) -> Transitions:
    """Return data whose observation is the number of the row; the next episode begins elsewhere."""
    observations = torch.arange(float(sum(lengths)))[:, None]
    following = observations + 1.0
    following[torch.tensor(lengths).cumsum(0) - 1] += 0.5
    rows = len(observations)
    return Transitions(
        observations, torch.zeros(rows, 1), torch.ones(rows), following, torch.zeros(rows, dtype=torch.bool)
    )


def test_start_states_begin_different_episodes() -> None:
    data = episodes(5, 3, 10, 4)
    everyone = draw_starts(data, 9, seed=0)
    assert everyone.observations[:, 0].tolist() == [0.0, 5.0, 8.0, 18.0]
    assert everyone.of_episodes and everyone.available == 4
    some = {tuple(draw_starts(data, 2, seed=seed).observations[:, 0].tolist()) for seed in range(20)}
    assert len(some) > 2 and all(len(set(pair)) == 2 for pair in some)
    with pytest.raises(InputError, match="starts must be at least 1, got 0"):
        draw_starts(data, 0, seed=0)


def test_any_states_of_shuffled_data_are_start_states() -> None:
    data = episodes(50)[torch.randperm(50, generator=torch.Generator().manual_seed(0))]
    starts = draw_starts(data, 20, seed=0)
    assert not starts.of_episodes and starts.available == 50
    assert len(set(starts.observations[:, 0].tolist())) == 20


def chain(ends: bool = False) -> Transitions:
    """Return all transitions of two states, 1 and -1, with rewards 1 and 0.

    The action 1 moves to the other state, -1 stays. With `ends`, moving from -1 ends the episode.
    """
    states, actions = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    return Transitions(
        observations=states[:, None],
        actions=actions[:, None],
        rewards=(states > 0).float(),
        next_observations=(-states * actions)[:, None],
        terminals=(states < 0) & (actions > 0) if ends else torch.zeros(4, dtype=torch.bool),
    )


@pytest.mark.parametrize(
    ("raw", "ends", "expected"),
    [
        # V(1) = 1 + V(-1) / 2 and V(-1) = V(1) / 2.
        (5.0, False, (4 / 3, 2 / 3)),
        (-5.0, False, (2.0, 0.0)),
        (5.0, True, (1.0, 0.0)),
    ],
)
def test_fitted_q_of_a_chain_has_the_value_in_closed_form(
    raw: float, ends: bool, expected: tuple[float, float]
) -> None:
    result = fitted_q(
        *(constant_actor(raw), chain(ends), torch.tensor([[1.0], [-1.0]])),
        **dict(discount=0.5, updates=1500, seed=0, hidden=(32,), learning_rate=1e-3, batch_size=32),
    )
    assert result.values.tolist() == pytest.approx(expected, abs=0.01)
    assert result.earlier == pytest.approx(sum(expected) / 2, abs=0.01)
    assert result.loss < 1e-3 and not result.diverged


def test_fitted_q_samples_the_actions_of_a_stochastic_policy() -> None:
    """With the actions 1 and -1 at random, V(1) = 1 + (V(1) + V(-1)) / 4, and V(-1) is 1 less."""
    actor = constant_actor(0.0)
    with torch.no_grad():
        # tanh of normals with the deviation e^2 is near -1 or 1.
        actor.biases[-1][1] = 2.0
    starts = torch.tensor([[1.0], [-1.0]]).repeat_interleave(500, 0)
    result = fitted_q(
        *(actor, chain(), starts),
        **dict(discount=0.5, updates=1500, seed=0, hidden=(32,), learning_rate=1e-3, deterministic=False),
    )
    assert result.values.view(2, -1).mean(1).tolist() == pytest.approx((1.5, 0.5), abs=0.1)


def test_the_unit_of_rewards_does_not_matter() -> None:
    data, starts = chain(), torch.tensor([[1.0]])
    options = dict(discount=0.5, updates=200, seed=0, hidden=(8,))
    one = fitted_q(constant_actor(5.0), data, starts, **options)
    data.rewards *= 1024.0
    other = fitted_q(constant_actor(5.0), data, starts, **options)
    assert other.values.tolist() == pytest.approx([1024.0 * value for value in one.values.tolist()])
    assert other.loss == pytest.approx(1024.0**2 * one.loss)


def test_the_seed_decides_the_fitted_q() -> None:
    def values(seed: int) -> list[float]:
        result = fitted_q(constant_actor(5.0), chain(), torch.ones(1, 1), updates=150, seed=seed, hidden=(8,))
        return result.values.tolist()

    assert values(1) == values(1) != values(2)


def test_a_q_beyond_the_data_does_not_run_away() -> None:
    """Q at 10 and -10 is never fitted, but is the goal of Q at 1 and -1; a plain network diverges here."""
    data = chain()
    data.next_observations *= 10.0
    data.rewards.copy_(data.observations[:, 0])
    result = fitted_q(
        *(constant_actor(-5.0), data, torch.ones(1, 1)),
        **dict(
            discount=0.99, updates=1500, seed=0, hidden=(32,), polyak=0.5, batch_size=16, learning_rate=1e-2
        ),
    )
    assert not result.diverged


@pytest.mark.parametrize(("rate", "finite"), [(1e3, True), (1e30, False)])
def test_a_q_that_diverges_is_reported(rate: float, finite: bool) -> None:
    result = fitted_q(
        *(constant_actor(5.0), chain(), torch.ones(1, 1)),
        **dict(discount=0.5, updates=300, seed=0, hidden=(8,), batch_size=16, learning_rate=rate),
    )
    assert result.diverged and math.isfinite(result.loss) == finite


def test_rewards_of_zero_have_a_value_of_zero() -> None:
    data = chain()
    data.rewards.zero_()
    result = fitted_q(
        *(constant_actor(5.0), data, torch.ones(1, 1)),
        **dict(discount=0.5, updates=1500, seed=0, hidden=(8,), learning_rate=1e-3, batch_size=32),
    )
    assert result.values.item() == pytest.approx(0.0, abs=0.02) and not result.diverged


def test_arguments_of_fitted_q_are_checked() -> None:
    with pytest.raises(InputError, match="updates and batch_size must be at least 1, got 0 and 256"):
        fitted_q(constant_actor(0.0), chain(), torch.ones(1, 1), updates=0, seed=0)
    with pytest.raises(InputError, match=r"less than 1, got 1\.0"):
        fitted_q(constant_actor(0.0), chain(), torch.ones(1, 1), discount=1.0, seed=0)
    with pytest.raises(InputError, match="the policy is for 2 observation and 1 action dimensions, the data"):
        fitted_q(constant_actor(0.0, obs_dim=2), chain(), torch.ones(1, 1), seed=0)
