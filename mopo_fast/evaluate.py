"""Evaluate a policy in its environment: returns and D4RL's normalised score."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Self

import gymnasium
import numpy as np
import numpy.typing as npt
import torch

from mopo_fast.errors import InputError
from mopo_fast.policy import Actor, Policy
from mopo_fast.rollout import RolloutEngine
from mopo_fast.simulation import make_episodes
from mopo_fast.tasks import Task, get_task, make_box
from mopo_fast.utils.machine import resolve_threads, torch_threads
from mopo_fast.utils.seeds import EVALUATE, derive_seed

Array = npt.NDArray[Any]

# Second element of a seed's path.
_RESET, _NOISE = range(2)


@dataclass(frozen=True)
class Evaluation:
    """The result of evaluating a policy.

    Attributes:
        returns: sum of rewards of each episode.
        lengths: number of steps of each episode.
        return_mean: mean of the returns.
        return_std: standard deviation of the returns.
        score_mean: mean on D4RL's scale from 0 (random) to 100 (expert); None where the task has no reference
            returns.
        score_std: standard deviation on that scale, or None.
    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    return_mean: float
    return_std: float
    score_mean: float | None
    score_std: float | None


def episode_seed(seed: int, episode: int) -> int:
    """Return the seed with which an evaluation's environment of this episode, from 0, is reset."""
    return derive_seed(seed, EVALUATE, _RESET, episode)


def evaluate(
    policy: Policy,
    task: Task | str,
    *,
    episodes: int = 10,
    seed: int,
    deterministic: bool = True,
    on_actions: Callable[[np.ndarray[Any, Any]], None] | None = None,
    on_rewards: Callable[[np.ndarray[Any, Any]], None] | None = None,
    threads: int | None = None,
) -> Evaluation:
    """Evaluate a policy for some episodes in its environment.

    The episodes run side by side, and the policy computes the actions of all of them in one batch. Its
    actions in [-1, 1] are scaled to the environment's range.

    Args:
        policy: an `Actor`, or any function of observations [episodes, obs_dim] that returns actions
            [episodes, act_dim] in [-1, 1]. It is called with a NumPy array; a torch module is called with a
            tensor of its parameters' type and device.
        task: task with the gymnasium environment `task.env_id`, or its name, see `get_task`.
        episodes: number of episodes.
        seed: seed. Episode i starts from a seed derived from (seed, i).
        deterministic: act by tanh(mean) instead of sampling. Only an `Actor` can be sampled.
        on_actions: called with the actions [episodes, act_dim] of each step, in the environment's range. Rows
            of episodes that have ended have no meaning.
        on_rewards: called with the rewards [episodes] of each step. Those of episodes that have ended are 0.
        threads: number of threads that simulate the MuJoCo environments of the built-in tasks, by default one
            per core. Any other environment is stepped by gymnasium in one. The result does not depend on it.

    Raises:
        InputError: the task is unknown or has no environment, or it cannot be made; `episodes` or `seed` is
            too small; `threads` is out of range; the policy's sizes do not fit the environment; its actions
            are not finite or not in [-1, 1]; or `deterministic` is False for a function.
    """
    task = get_task(task) if isinstance(task, str) else task
    if not callable(policy):
        raise InputError(
            "policy must be a mopo_fast.Actor or a function of observations that returns actions, got"
            f" {type(policy).__name__}"
        )
    if not deterministic and not isinstance(policy, Actor):
        raise InputError(
            "deterministic=False samples an Actor's actions; a function draws its own noise, so leave it out"
        )
    if episodes < 1:
        raise InputError(f"episodes must be at least 1, got {episodes}")
    if seed < 0:
        raise InputError(f"seed must not be negative, got {seed}")
    threads = resolve_threads(threads)
    if not task.env_id:
        raise InputError(
            f"the task {task.name} has no environment to evaluate in; the run's summary.json has returns that"
            " the model predicts"
        )
    try:
        together = make_episodes(task.env_id, episodes, threads)
    except (gymnasium.error.Error, ImportError) as error:
        raise InputError(
            f"cannot make the environment of the task {task.name} ({error}); install its packages"
        ) from error
    with together, _policy_threads(policy):
        spaces = together.environment
        sizes = (spaces.observation_space.shape[0], spaces.action_space.shape[0])
        if isinstance(policy, Actor) and sizes != (policy.obs_dim, policy.act_dim):
            raise InputError(
                f"the policy has {policy.obs_dim} observation and {policy.act_dim} action dimensions,"
                f" {task.env_id} has {sizes[0]} and {sizes[1]}; evaluate it on the task it was trained for"
            )
        low, high = spaces.action_space.low, spaces.action_space.high
        act = _actor_function(policy, deterministic, seed) if isinstance(policy, Actor) else None
        observations = np.stack([together.reset(i, episode_seed(seed, i)) for i in range(episodes)])
        returns, lengths = np.zeros(episodes), np.zeros(episodes, dtype=np.int64)
        running = np.arange(episodes)
        while len(running):
            # Ended episodes stay in the batch, so that rows do not depend on who is still running.
            actions = act(observations) if act else _call(policy, observations, sizes[1])
            if not np.isfinite(actions).all():
                raise InputError("the policy gave actions that are not finite; train it again")
            actions = low + 0.5 * (actions + 1.0) * (high - low)
            if on_actions is not None:
                on_actions(actions)
            step = together.step(actions, running)
            observations = step.observations
            rewards = np.zeros(episodes)
            rewards[running] = step.rewards[running]
            if on_rewards is not None:
                on_rewards(rewards)
            returns += rewards
            lengths[running] += 1
            running = running[~(step.terminated | step.truncated)[running]]
    mean, std = float(np.mean(returns)), float(np.std(returns))
    scores = task.normalized_score(mean), task.normalized_std(std)
    return Evaluation(tuple(returns.tolist()), tuple(lengths.tolist()), mean, std, *scores)


def _policy_threads(policy: Policy) -> contextlib.AbstractContextManager[None]:
    # One thread is faster on some tens of rows, and torch rounds a single row differently on several. A
    # function may be a large network.
    return torch_threads(1) if isinstance(policy, Actor) else contextlib.nullcontext()


def _actor_function(actor: Actor, deterministic: bool, seed: int) -> Callable[[Array], Array]:
    """Return a function of observations [episodes, obs_dim] that returns the actor's actions."""
    act, parameter = actor.acting(), actor.biases[0]
    generator = torch.Generator().manual_seed(derive_seed(seed, EVALUATE, _NOISE))

    def actions(observations: Array) -> Array:
        noise = None
        if not deterministic:
            noise = torch.randn(len(observations), actor.act_dim, generator=generator).to(parameter)
        found: Array = act(torch.from_numpy(observations).to(parameter), noise).cpu().numpy()
        return found

    return actions


def _call(policy: Callable[[Any], Any], observations: Array, act_dim: int) -> Array:
    """Return a function's actions [episodes, act_dim] in [-1, 1]."""
    # A copy, so that a function which writes into its argument changes no observation.
    given: Any = observations.copy()
    if isinstance(policy, torch.nn.Module):
        given = torch.from_numpy(given).to(next(policy.parameters(), torch.empty(0)))
    with torch.no_grad():
        found = policy(given)
    actions = found.cpu().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
    if actions.dtype.kind not in "fiu":
        raise InputError(f"the policy must return an array of actions, got {type(found).__name__}")
    if actions.shape != (len(observations), act_dim):
        raise InputError(
            f"the policy must return actions [{len(observations)}, {act_dim}], a row for each observation,"
            f" got shape {list(actions.shape)}"
        )
    largest = np.abs(actions).max()
    if largest > 1.0 + 1e-3:
        raise InputError(
            f"the policy gave actions up to {largest:.4g}; return actions in [-1, 1], which are scaled to the"
            " environment's range"
        )
    return actions


def evaluate_in_model(
    engine: RolloutEngine, policy: Policy, start_observations: torch.Tensor, horizon: int, *, seed: int
) -> Evaluation:
    """Evaluate a policy in the ensemble instead of an environment.

    Each start state gives one episode of at most `horizon` steps, with deterministic actions. Its return is
    the sum of predicted rewards, without penalties; there are no scores. The policy was trained in this
    ensemble, so the result says little about the environment.

    Args:
        engine: engine with the ensemble.
        policy: an `Actor`, or a function as for `RolloutEngine.rollout`.
        start_observations: [episodes, obs_dim].
        horizon: most steps of an episode.
        seed: seed of the rollouts.
    """
    rows = engine.rollout(policy, start_observations, horizon, seed=seed, deterministic=True)
    assert rows.raw_rewards is not None and rows.rollout_index is not None
    index, count = rows.rollout_index.cpu(), len(start_observations)
    returns = torch.zeros(count, dtype=torch.float64).index_add_(0, index, rows.raw_rewards.cpu().double())
    lengths = tuple(torch.bincount(index, minlength=count).tolist())
    mean, std = returns.mean().item(), returns.std(correction=0).item()
    return Evaluation(tuple(returns.tolist()), lengths, mean, std, None, None)


class Evaluator:
    """Evaluates policies, in this process or in others; a context manager.

    Args:
        workers: number of processes that evaluate. With 0, `submit` evaluates at once and the caller waits.
    """

    def __init__(self, workers: int = 0) -> None:
        self._pool: ProcessPoolExecutor | None = None
        if workers:
            # A forked process would share the GPU's state and the locks of this process's threads.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is None:
            return
        if kind is not None:
            # Running evaluations have lost their use. Python 3.14 has `kill_workers` for this.
            for process in list((self._pool._processes or {}).values()):
                process.kill()
        self._pool.shutdown(cancel_futures=True)

    def submit(self, actor: Actor, task: Task, **options: Any) -> "Future[Evaluation]":
        """Start `evaluate` with these options on the present parameters of the actor."""
        if self._pool is not None:
            # The pool sends the arrays later, when updates may have changed the actor.
            arrays = {name: value.cpu().numpy().copy() for name, value in actor.state_dict().items()}
            # A termination function cannot be sent and is not needed. The worker reads a task file itself.
            sent = task.name if task.name.endswith(".py") else replace(task, box=make_box(task.obs_dim))
            # The first call starts the workers, which inherit the mask: only the parent handles Ctrl-C.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                # Several workers share the cores, so each has one thread.
                options |= {"threads": 1}
                return self._pool.submit(_evaluate_arrays, actor.settings(), arrays, sent, options)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        future: Future[Evaluation] = Future()
        future.set_result(evaluate(actor, task, **options))
        return future


def _begin_worker() -> None:
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    # Without this thread a worker whose parent was killed would wait forever.
    threading.Thread(target=exit_with_parent, daemon=True).start()


def _evaluate_arrays(
    settings: dict[str, Any], arrays: dict[str, np.ndarray], task: Task | str, options: dict[str, Any]
) -> Evaluation:
    task = get_task(task) if isinstance(task, str) else task
    actor = Actor(**settings)
    actor.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return evaluate(actor, task, **options)
