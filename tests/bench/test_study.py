"""Test what the study measures: true errors, fits, data sets, and quantities of a training."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from benchmarks.study import data
from benchmarks.study.calibration import (
    COEFS,
    Subject,
    calibrate,
    compare_open_loop,
    compare_returns,
    tables,
)
from benchmarks.study.discount import play, table_rows
from benchmarks.study.fits import judge
from benchmarks.study.parity import Case, _of_run
from benchmarks.study.simulator import Simulator, TrueSteps
from mopo_fast import Actor, EnsembleDynamics, Transitions, load_dataset
from mopo_fast.cli import main
from mopo_fast.collect import collect
from mopo_fast.environments import make_environment
from mopo_fast.errors import InputError
from mopo_fast.evaluate import episode_seed, evaluate
from mopo_fast.tasks import get_task

SHIFT, SIGMA, GAP, REWARD = 0.01, 0.5, 1.2, 3.0


@pytest.mark.parametrize("task", ["halfcheetah", "hopper", "walker2d"])
def test_true_steps_are_those_of_the_environment(task: str) -> None:
    name = {"halfcheetah": "HalfCheetah", "hopper": "Hopper", "walker2d": "Walker2d"}[task]
    random, environment = np.random.default_rng(0), make_environment(f"{name}-v4").unwrapped
    rows = []
    observation = environment.reset(seed=0)[0]
    for _ in range(60):
        action = random.uniform(-1, 1, environment.action_space.shape)
        successor, reward, terminal = environment.step(action)[:3]
        rows.append((observation, action, successor, reward, terminal))
        observation = environment.reset()[0] if terminal else successor
    observations, actions, successors, rewards, terminals = (np.array(x) for x in zip(*rows, strict=True))
    made = Simulator(task).step(observations, actions)
    assert made.known.mean() > 0.2
    known = made.known
    # The solver starts cold here, and from the step before there.
    np.testing.assert_allclose(made.next_observations[known], successors[known], atol=2e-3)
    np.testing.assert_allclose(made.rewards[known], rewards[known], atol=2e-3)
    np.testing.assert_array_equal(made.terminals[known], terminals[known])


def test_a_clipped_velocity_hides_the_state() -> None:
    simulator = Simulator("hopper")
    observations = np.zeros((2, 11))
    observations[:, 0] = 1.25
    observations[1, -1] = 10.0
    assert simulator.step(observations, np.zeros((2, 3))).known.tolist() == [True, False]


def test_a_task_whose_state_is_not_observed() -> None:
    with pytest.raises(InputError, match="states can be rebuilt for halfcheetah, hopper, walker2d, not"):
        Simulator("ant")


@dataclass
class Line:
    """Every step adds SHIFT + GAP to each dimension; the reward is REWARD + GAP."""

    gap: float = GAP

    def knows(self, observations: Any) -> Any:
        return np.ones(len(observations), dtype=bool)

    def step(self, observations: Any, actions: Any) -> TrueSteps:
        count = len(observations)
        return TrueSteps(
            observations + SHIFT + self.gap,
            np.full(count, REWARD + self.gap),
            np.zeros(count, dtype=bool),
            np.ones(count, dtype=bool),
        )


@pytest.fixture
def subject() -> Subject:
    """Return an ensemble that predicts SHIFT, and reward REWARD, with std SIGMA everywhere."""
    ensemble = EnsembleDynamics(17, 6, members=3, elites=2, hidden=(4,))
    with torch.no_grad():
        for parameter in (*ensemble.weights, *ensemble.biases):
            parameter.zero_()
        ensemble.biases[-1][:, :17] = SHIFT
        ensemble.biases[-1][:, 17] = REWARD
        # Far inside its bounds, the soft clamp leaves a logarithm as it is.
        ensemble.max_logvar.fill_(30.0)
        ensemble.min_logvar.fill_(-30.0)
        ensemble.biases[-1][:, 18:] = 2 * math.log(SIGMA)
    starts = torch.randn(500, 17, generator=torch.Generator().manual_seed(0))
    simulator: Any = Line()
    return Subject(
        *("halfcheetah", ensemble, Actor(17, 6), starts, np.full(17, 2.0)),
        *("max_aleatoric", 0.5, 0.9, simulator),
    )


def test_coverage_by_hand(subject: Subject) -> None:
    made = calibrate(subject, 200, 3, seed=0)
    assert made["step"] == [1, 2, 3] and made["rows"] == [200] * 3
    error, penalty = GAP * math.sqrt(18), SIGMA * math.sqrt(18)
    assert made["error"][0]["median"] == pytest.approx(error, rel=1e-5)
    columns = made["penalties"]["max_aleatoric"]
    assert columns["value"][2]["mean"] == pytest.approx(penalty, rel=1e-5)
    for coef in COEFS:
        assert columns[f"coverage_{coef:g}"] == [float(error <= coef * penalty)] * 3
    # All members agree, so their deviation covers nothing.
    assert made["penalties"]["max_deviation"]["coverage_5"] == [0.0] * 3


def test_open_loop_by_hand(subject: Subject) -> None:
    made = compare_open_loop(subject, 50, 4, seed=0)
    medians = [error["median"] for error in made["error"]]
    assert medians == pytest.approx([GAP * t / 2.0 for t in (1, 2, 3, 4)], rel=1e-4)


@pytest.mark.parametrize(("gap", "below"), [(GAP, 1.0), (-GAP, 0.0)])
def test_returns_by_hand(subject: Subject, gap: float, below: float) -> None:
    subject.simulator.gap = gap  # type: ignore[attr-defined]
    for row in compare_returns(subject, 40, seed=0):
        discounts = (1 - 0.9 ** row["steps"]) / 0.1
        assert row["true"]["mean"] == pytest.approx((REWARD + gap) * discounts, rel=1e-6)
        # The model's rewards are sampled, with std SIGMA.
        noise = 5 * SIGMA * math.sqrt(discounts) / math.sqrt(40 * 16)
        assert row["model"]["mean"] == pytest.approx(REWARD * discounts, abs=noise)
        penalised = (REWARD - 0.5 * SIGMA * math.sqrt(18)) * discounts
        assert row["penalised"]["mean"] == pytest.approx(penalised, abs=noise)
        assert row["starts"] == 40
    assert row["below_true"] == below


def test_tables_of_several_runs(subject: Subject) -> None:
    runs = []
    for gap in (1.0, 3.0):
        subject.simulator.gap = gap  # type: ignore[attr-defined]
        runs.append(
            {
                "by_step": calibrate(subject, 100, 2, seed=0),
                "open_loop": compare_open_loop(subject, 20, 2, seed=0),
                "returns": compare_returns(subject, 20, seed=0),
            }
        )
    penalties, open_loop, returns = tables(runs)
    assert penalties[1][2:] == ["step 1", "step 2"]
    # The mean of 0.5 and 1.5, and the half-width 12.706 / sqrt(2) * sqrt(0.5).
    assert open_loop[2][0][1] == "1 ± 6.35"
    assert [row[0] for row in returns[2]] == ["1", "5", "20", "100"]
    assert tables(runs[:1])[1][2][0][1:] == ["0.5", "1"]


def test_fits_are_judged_by_hand(subject: Subject) -> None:
    """Test the error, the likelihood of the density's formula, and the penalty."""
    states = torch.randn(50, 17, generator=torch.Generator().manual_seed(0))
    rows = Transitions(
        states, torch.zeros(50, 6), torch.full((50,), REWARD + GAP), states + SHIFT + GAP, torch.zeros(50) > 0
    )
    made = judge(subject.ensemble, rows)
    assert made["mse"] == pytest.approx(GAP**2, rel=1e-4)
    density = -0.5 * (GAP / SIGMA) ** 2 - math.log(SIGMA * math.sqrt(2 * math.pi))
    assert made["log_likelihood"] == pytest.approx(18 * density, rel=1e-4)
    assert made["penalty"]["0.5"] == pytest.approx(SIGMA * math.sqrt(18), rel=1e-5)


def test_a_data_set_is_described(tmp_path: Path) -> None:
    path = collect("hopper-random", 300, out=tmp_path / "hopper_random-local.hdf5", quiet=True)
    data.main((str(path),), kept=tmp_path)
    made = json.loads((tmp_path / "data-hopper-random-local.json").read_text())
    with h5py.File(path) as file:
        rewards, ends = file["rewards"][()], file["terminals"][()] | file["timeouts"][()]
    last = np.flatnonzero(ends)
    returns = [float(part.sum()) for part in np.split(rewards.astype(float), last + 1)[: len(last)]]
    assert (made["transitions"], made["episodes"]) == (300, len(returns))
    assert made["return"]["mean"] == pytest.approx(np.mean(returns))
    assert made["return"]["best"] == pytest.approx(max(returns))
    assert made["score"]["best"] == pytest.approx(get_task("hopper").normalized_score(max(returns)))


def test_a_run_has_the_quantities_of_the_parity(tmp_path: Path) -> None:
    path = collect("hopper-random", 600, out=tmp_path / "hopper_random-local.hdf5", quiet=True)
    run = tmp_path / "preset"
    small = ("--rollout.interval", "10", "--rollout.batch-size", "50", "--dynamics.hidden", "16", "16")
    small += ("--dynamics.weight-decay", "1e-5", "1e-5", "1e-5", "--dynamics.max-epochs", "2")
    words = ("train", str(path), "--preset", "offlinerl-kit", "--steps", "20", "--out", str(run), *small)
    assert main([*words, "--evaluation.episodes", "1", "--threads", "1", "--quiet"]) == 0
    made = _of_run(Case("hopper-random-local", 0, tmp_path, load_dataset(path, compat="offlinerl-kit"), 2))
    assert made["updates"] == [10, 20] and len(made["score"]) == len(made["alpha"]) == 2
    # The temperature moves by its learning rate at each update.
    assert made["alpha_at_end"] == pytest.approx(made["alpha"][-1], abs=20 * 1e-4)
    assert math.isfinite(made["q_at_end"]) and math.isfinite(made["entropy_at_end"])


def test_both_returns_are_of_the_episodes_of_an_evaluation() -> None:
    actor = Actor(11, 3, hidden=(8,))
    expected = evaluate(actor, "hopper", episodes=3, seed=7)
    returns, discounted, lengths = play(actor, "hopper", 1.0, 3, 7)
    assert returns.tolist() == discounted.tolist() == list(expected.returns)
    assert lengths.tolist() == list(expected.lengths)
    environment, whole, ended = make_environment("Hopper-v4"), 0.0, False
    observation = environment.reset(seed=episode_seed(7, 0))[0]
    for step in range(int(lengths[0])):
        assert not ended
        action = actor.act(torch.tensor(observation, dtype=torch.float32)[None], None)[0].numpy()
        observation, reward, ended = environment.step(action)[:3]
        whole += 0.9**step * float(reward)
    assert ended
    assert play(actor, "hopper", 0.9, 3, 7)[1][0] == pytest.approx(whole, rel=1e-5)


def test_discounted_returns_are_means_over_the_seeds_of_a_setting() -> None:
    runs = [
        {
            "seed": seed,
            "penalty_coef": 1.0,
            "updates": [10],
            "return": [whole],
            "discounted": [part],
            "length": [5],
        }
        for seed, whole, part in ((1, 3000.0, 20.0), (0, 1000.0, 10.0))
    ]
    assert table_rows(runs) == [["lambda 1", "10", "2,000", "5", "15", "10, 20"]]
