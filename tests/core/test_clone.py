"""Test behavior cloning and rollouts of the policy that made the data."""

import dataclasses
import math
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from kernel_cases import assert_same, data_of, make_ensemble, make_policy

import mopo_fast
from mopo_fast import Actor, InputError, RolloutEngine, Transitions, clone_policy
from mopo_fast.utils.adam import Adam


def acted(policy: Actor, rows: int = 20_000, noise: float = 1.0) -> Transitions:
    """Return transitions whose actions are the policy's, in observations of all kinds of scales."""
    generator = torch.Generator().manual_seed(0)
    observations = torch.randn(rows, 5, generator=generator)
    actions = policy.act(observations, noise * torch.randn(rows, 2, generator=generator))
    # A column that never changes, one that is far from 0, one that is large.
    observations[:, 4] = 3.0
    observations[:, 0] += 100.0
    observations[:, 1] *= 50.0
    return data_of(observations, actions)


def gaussian_policy() -> Actor:
    """Return a policy with known noise, whose mean is linear in the first three observations."""
    policy = Actor(5, 2, hidden=(), activation="tanh")
    with torch.no_grad():
        policy.weights[0].zero_()
        policy.weights[0][:3, :2] = torch.tensor([[0.5, -0.3], [0.2, 0.4], [-0.4, 0.1]])
        policy.biases[0].copy_(torch.tensor([0.1, -0.2, math.log(0.2), math.log(0.5)]))
    return policy


def test_a_clone_has_the_means_and_the_noise_of_the_data() -> None:
    policy = gaussian_policy()
    data = acted(policy)
    clone = clone_policy(data, seed=1)
    mean, log_std = clone(data.observations)
    plain = data.observations.clone()
    plain[:, 0] -= 100.0
    plain[:, 1] /= 50.0
    expected, _ = policy(plain)
    # The mean of 20,000 rows' noise is known to a few thousandths; the network has to be fitted too.
    assert (mean - expected).square().mean().sqrt() < 0.06
    assert (log_std.exp().mean(0) - torch.tensor([0.2, 0.5])).abs().max() < 0.03
    # Without the noise's own size, or with the actions' mean, both would be far off.
    assert expected.std(0).min() > 0.4


def test_a_clone_depends_on_the_seed_alone() -> None:
    data = acted(gaussian_policy(), rows=3000)
    first, again, other = (clone_policy(data, seed=seed, epochs=2) for seed in (1, 1, 2))
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same) and not torch.equal(first.weights[0], other.weights[0])


def test_a_clone_is_of_the_best_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    # So few rows are learned by heart, and the held-out ones get worse from some epoch on.
    data, others = acted(gaussian_policy(), rows=300), acted(gaussian_policy(), rows=5000)
    with mock.patch.object(Adam, "step", autospec=True, side_effect=Adam.step) as step:
        clone_policy(data, epochs=100)
    # 270 rows in batches of 32.
    assert 9 < step.call_count < 9 * 100
    monkeypatch.setattr("mopo_fast.clone._PATIENCE", 1000)
    assert loss(clone_policy(data, epochs=200), others) < loss(clone_policy(data, epochs=1), others) + 0.1


def loss(policy: Actor, data: Transitions) -> float:
    """Return the negative log-likelihood, but for a constant."""
    with torch.no_grad():
        mean, log_std = policy(data.observations)
        distance = (torch.atanh(data.actions) - mean) / log_std.exp()
        return (0.5 * distance.square() + log_std).sum(-1).mean().item()


def test_actions_at_the_bounds_are_cloned() -> None:
    data = acted(gaussian_policy(), rows=2000, noise=0.0)
    data = dataclasses.replace(data, actions=torch.where(data.actions > 0, 1.0, -1.0))
    clone = clone_policy(data, seed=0, epochs=20)
    assert all(bool(torch.isfinite(each).all()) for each in clone.parameters())
    agrees = (clone.act(data.observations) > 0) == (data.actions > 0)
    assert agrees.float().mean() > 0.8


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"epochs": 0}, "epochs must be a whole number, 1 <= epochs < .*, got 0"),
        ({}, {"epochs": 1.5}, "epochs must be a whole number, .*, got 1.5"),
        ({}, {"seed": -1}, "seed must be a whole number, .*, got -1"),
        ({}, {"hidden": 32}, "sizes must be whole numbers, 1 or more, .*, hidden 32"),
        ({}, {"hidden": (32.5,)}, "sizes must be whole numbers, 1 or more"),
        (
            {"actions": torch.tensor([[0.0, 3.0]] * 40)},
            {},
            r"actions must be in \[-1, 1\], got \[0.0, 3.0\] at row 0; scale them",
        ),
        ({"actions": torch.full((40, 2), math.nan)}, {}, "the data's actions must be finite"),
        ({"observations": torch.full((40, 5), math.inf)}, {}, "the data's observations must be finite"),
    ],
)
def test_bad_data(change: dict[str, Any], options: dict[str, Any], message: str) -> None:
    data = dataclasses.replace(acted(gaussian_policy(), rows=40), **change)
    with pytest.raises(InputError, match=message):
        clone_policy(data, **options)


def test_too_few_rows_and_no_data() -> None:
    with pytest.raises(InputError, match="needs 10 transitions or more, got 9"):
        clone_policy(acted(gaussian_policy(), rows=9))
    with pytest.raises(InputError, match="data must be Transitions, got str"):
        clone_policy("hopper-medium-v2")  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_rollouts_of_the_behavior_policy(backend: str, tmp_path: Path) -> None:
    engine, data = RolloutEngine(make_ensemble(5, 2), backend=backend), acted(make_policy(5, 2), rows=500)
    made = engine.rollout("behavior", data, 3, seed=4, count=200)
    assert_same(made, engine.rollout(clone_policy(data, seed=4), data, 3, seed=4, count=200))
    np.savez(tmp_path / "data.npz", **{name: array.numpy() for name, array in data.arrays().items()})
    assert_same(made, engine.rollout("behavior", tmp_path / "data.npz", 3, seed=4, count=200))


def test_the_behavior_policy_is_that_of_a_data_set() -> None:
    engine = RolloutEngine(make_ensemble(5, 2))
    for count in (None, 10):
        with pytest.raises(
            InputError, match='"behavior" clones the policy of a data set, but the start states'
        ):
            engine.rollout("behavior", torch.zeros(4, 5), 3, seed=4, count=count)
    with pytest.raises(
        InputError, match="data set has 5 observation and 2 action dimensions, the ensemble 4"
    ):
        RolloutEngine(make_ensemble(4, 2)).rollout(
            "uniform", acted(make_policy(5, 2), 50), 3, seed=4, count=9
        )
    with pytest.raises(InputError, match="start states from a data set need count"):
        engine.rollout("behavior", acted(make_policy(5, 2), rows=50), 3, seed=4)


def test_a_clone_is_saved_as_any_policy(tmp_path: Path) -> None:
    clone = mopo_fast.clone_policy(acted(gaussian_policy(), rows=100), epochs=1)
    clone.save(tmp_path)
    loaded = Actor.load(tmp_path)
    assert loaded.log_std_min == clone.log_std_min
    assert torch.equal(loaded.weights[0], clone.weights[0])
