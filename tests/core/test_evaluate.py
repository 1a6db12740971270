"""Test evaluation against a plain loop over one environment, action scaling, scores and refusals."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from own_threads import count_threads

from mopo_fast.environments import make_environment
from mopo_fast.errors import InputError
from mopo_fast.evaluate import Evaluator, evaluate
from mopo_fast.policy import Actor
from mopo_fast.tasks import TASKS


def actor_for(name: str, seed: int = 0, **options: float) -> Actor:
    task = TASKS[name]
    generator = torch.Generator().manual_seed(seed)
    return Actor(task.obs_dim, task.act_dim, hidden=(16,), generator=generator, **options)


def test_every_episode_equals_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hopper's episodes have different lengths; each one runs exactly to its first end."""
    seeds: list[int] = []
    reset = gymnasium.wrappers.TimeLimit.reset

    def recorded(self, *, seed=None, options=None):
        seeds.append(seed)
        return reset(self, seed=seed, options=options)

    monkeypatch.setattr(gymnasium.wrappers.TimeLimit, "reset", recorded)
    # In float64 a row's rounded result does not depend on the batch size.
    actor = actor_for("hopper").double()
    result = evaluate(actor, TASKS["hopper"], episodes=5, seed=7)
    monkeypatch.undo()

    assert len(set(seeds)) == len(seeds) == 5
    assert len(set(result.lengths)) > 1
    for episode, seed in enumerate(seeds):
        environment = make_environment("Hopper-v4")
        observation, _ = environment.reset(seed=seed)
        total, length, ended = 0.0, 0, False
        while not ended:
            action = actor.act(torch.from_numpy(observation)[None])[0].numpy()
            observation, reward, terminated, truncated, _ = environment.step(action)
            total, length, ended = total + reward, length + 1, terminated or truncated
        assert result.lengths[episode] == length
        assert result.returns[episode] == pytest.approx(total, rel=1e-6)


def test_means_and_scores() -> None:
    result = evaluate(actor_for("hopper"), TASKS["hopper"], episodes=4, seed=0)
    assert len(result.returns) == len(result.lengths) == 4
    assert result.return_mean == pytest.approx(np.mean(result.returns))
    assert result.return_std == pytest.approx(np.std(result.returns))
    assert result.score_mean == pytest.approx(100 * (result.return_mean + 20.272305) / (3234.3 + 20.272305))
    assert result.score_std == pytest.approx(100 * result.return_std / (3234.3 + 20.272305))


def test_a_task_without_references_has_no_score() -> None:
    result = evaluate(actor_for("pendulum"), TASKS["pendulum"], episodes=1, seed=0)
    assert result.score_mean is None and result.score_std is None
    assert result.return_mean < 0


def test_the_seed_decides_and_an_episode_does_not_depend_on_the_others() -> None:
    actor, task = actor_for("hopper").double(), TASKS["hopper"]
    first = evaluate(actor, task, episodes=3, seed=1)
    assert evaluate(actor, task, episodes=3, seed=1) == first
    assert evaluate(actor, task, episodes=3, seed=2) != first
    assert evaluate(actor, task, episodes=2, seed=1).lengths == first.lengths[:2]


def test_stochastic_actions_are_seeded_too() -> None:
    actor, task = actor_for("hopper"), TASKS["hopper"]
    first = evaluate(actor, task, episodes=2, seed=1, deterministic=False)
    assert evaluate(actor, task, episodes=2, seed=1, deterministic=False) == first
    assert evaluate(actor, task, episodes=2, seed=1) != first


@pytest.mark.parametrize(("mean", "action"), [(20.0, 2.0), (-20.0, -2.0), (0.0, 0.0)])
def test_actions_are_scaled_to_the_environments_range(
    mean: float, action: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pendulum's actions range from -2 to 2."""
    actor = actor_for("pendulum")
    with torch.no_grad():
        actor.weights[-1].zero_()
        actor.biases[-1].fill_(mean)
    taken: list[float] = []
    step = gymnasium.wrappers.TimeLimit.step

    def recorded(self, action):
        taken.append(float(action[0]))
        return step(self, action)

    monkeypatch.setattr(gymnasium.wrappers.TimeLimit, "step", recorded)
    evaluate(actor, TASKS["pendulum"], episodes=1, seed=0)
    assert set(np.round(taken, 5)) == {action}


def test_time_limits_end_an_episode() -> None:
    actor = actor_for("pendulum")
    task = dataclasses.replace(TASKS["pendulum"], env_id="HalfCheetah-v4")
    cheetah = actor_for("halfcheetah")
    assert evaluate(cheetah, TASKS["halfcheetah"], episodes=1, seed=0).lengths == (1000,)
    with pytest.raises(InputError, match=r"has 3 observation and 1 action .* has 17 and 6"):
        evaluate(actor, task, episodes=1, seed=0)


def test_says_nothing_of_v4_and_nothing_else_is_silenced(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        evaluate(actor_for("halfcheetah"), TASKS["halfcheetah"], episodes=1, seed=0)
        warnings.warn("heard", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["heard"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 0, "seed": 0}, "episodes must be at least 1, got 0"),
        ({"episodes": 1, "seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_refuses_bad_numbers(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(actor_for("hopper"), TASKS["hopper"], **options)


def test_refuses_actions_that_are_not_finite() -> None:
    actor = actor_for("hopper")
    with torch.no_grad():
        actor.biases[0].fill_(float("nan"))
    with pytest.raises(InputError, match="gave actions that are not finite"):
        evaluate(actor, TASKS["hopper"], episodes=1, seed=0)


def test_beside_the_caller_it_is_the_same() -> None:
    """A worker evaluates the policy as it was when it was submitted."""
    actor = actor_for("hopper")
    here = evaluate(actor, TASKS["hopper"], episodes=3, seed=1)
    with Evaluator(1) as evaluator:
        future = evaluator.submit(actor, TASKS["hopper"], episodes=3, seed=1)
        with torch.no_grad():
            actor.biases[0].fill_(9.0)
        assert future.result(60) == here
        refused = evaluator.submit(actor, TASKS["hopper"], episodes=0, seed=1)
        with pytest.raises(InputError, match="episodes must be at least 1"):
            refused.result(60)


def test_an_interrupt_does_not_wait_for_workers() -> None:
    """The workers are stopped. They block SIGINT, so that only their parent handles Ctrl-C."""
    actor, masks = actor_for("hopper"), []
    with pytest.raises(KeyboardInterrupt), Evaluator(1) as evaluator:
        evaluator.submit(actor, TASKS["hopper"], episodes=1, seed=0).result(60)
        assert evaluator._pool is not None
        masks.append(evaluator._pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, ()).result(60))
        endless = evaluator._pool.submit(time.sleep, 600)
        raise KeyboardInterrupt
    assert signal.SIGINT in masks[0]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert endless.done()


def test_no_worker_outlives_its_parent() -> None:
    code = """
import os
from mopo_fast.evaluate import Evaluator
if __name__ == "__main__":
    with Evaluator(1) as evaluator:
        print(evaluator._pool.submit(os.getpid).result(), flush=True)
        evaluator._pool.submit(__import__("time").sleep, 600).result()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            # A zombie has ended too; its new parent may not have waited for it yet.
            with open(f"/proc/{worker}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    pytest.fail(f"the worker {worker} is still there")


class TestAnyPolicy:
    """A policy is an actor or any function of observations."""

    def test_a_task_by_its_name(self) -> None:
        actor = actor_for("pendulum")
        assert evaluate(actor, "pendulum", episodes=1, seed=0) == evaluate(
            actor, TASKS["pendulum"], episodes=1, seed=0
        )
        with pytest.raises(InputError, match="unknown task 'hoper'; there are: halfcheetah"):
            evaluate(actor, "hoper", seed=0)

    def test_a_function_is_called_with_numpy_arrays(self) -> None:
        actor, given = actor_for("hopper"), []

        def policy(observations: np.ndarray) -> np.ndarray:
            given.append((type(observations), observations.shape))
            actions = actor.predict(observations)
            observations.fill(0.0)
            return actions

        assert evaluate(policy, "hopper", episodes=3, seed=1) == evaluate(actor, "hopper", episodes=3, seed=1)
        assert set(given) == {(np.ndarray, (3, 11))}

    def test_a_torch_module_is_called_with_tensors(self) -> None:
        actor = actor_for("pendulum")

        class Mean(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.actor = actor

            def forward(self, observations: torch.Tensor) -> torch.Tensor:
                return self.actor(observations)[0].tanh()

        found = evaluate(Mean(), "pendulum", episodes=2, seed=1)
        assert found == evaluate(actor, "pendulum", episodes=2, seed=1)

    @pytest.mark.parametrize(
        ("policy", "message"),
        [
            (lambda o: np.zeros(1), r"must return actions \[2, 1\], .* got shape \[1\]"),
            (lambda o: None, "must return an array of actions, got NoneType"),
            (lambda o: "left", "must return an array of actions, got str"),
            (lambda o: np.full((2, 1), 2.0), r"actions up to 2; return actions in \[-1, 1\]"),
            (lambda o: np.full((2, 1), np.nan), "actions that are not finite"),
            ("hopper", "policy must be a mopo_fast.Actor or a function .*, got str"),
        ],
    )
    def test_refusals(self, policy, message: str) -> None:
        with pytest.raises(InputError, match=message):
            evaluate(policy, "pendulum", episodes=2, seed=0)

    def test_a_function_draws_its_own_noise(self) -> None:
        with pytest.raises(InputError, match="a function draws its own noise"):
            evaluate(lambda o: np.zeros((1, 1)), "pendulum", episodes=1, seed=0, deterministic=False)


@pytest.mark.parametrize("name", ["hopper", "ant-angle", "pendulum"])
def test_threads_change_nothing(name: str) -> None:
    task, actor = TASKS[name], actor_for(name)
    for episodes in (1, 4):
        first = evaluate(actor, task, episodes=episodes, seed=0, threads=1)
        assert evaluate(actor, task, episodes=episodes, seed=0, threads=3) == first
    with pytest.raises(InputError, match="threads must be a whole number"):
        evaluate(actor, task, episodes=1, seed=0, threads=0)


def test_one_thread_is_one() -> None:
    """A run in a sweep has one core, and a policy of a few rows needs no more."""
    counts: list[tuple[int, int]] = []
    # Libraries start threads of their own at the first evaluation.
    evaluate(actor_for("hopper"), TASKS["hopper"], episodes=1, seed=0, threads=1)
    before, torch_threads = count_threads(), torch.get_num_threads()
    for threads in (1, 3):
        evaluate(
            actor_for("hopper"),
            TASKS["hopper"],
            episodes=2,
            seed=0,
            threads=threads,
            on_actions=lambda _: counts.append((count_threads() - before, torch.get_num_threads())),
        )
        assert set(counts) == {(0, 1)} if threads == 1 else counts[-1] == (1, 1)
    assert torch.get_num_threads() == torch_threads and count_threads() == before
