"""A policy in the real environment: returns and D4RL's normalised score."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Self

import gymnasium
import numpy as np
import torch

from mopo_fast.environments import make_environment
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine
from mopo_fast.tasks import Task, get_task, make_box
from mopo_fast.utils.seeds import EVALUATE, derive_seed

# Second element of a seed's path.
_RESET, _NOISE = range(2)


@dataclass(frozen=True)
class Evaluation:
    """What a policy reached.

    Attributes:
        returns: sum of raw rewards, per episode.
        lengths: steps, per episode.
        return_mean, return_std: over the episodes.
        score_mean, score_std: the same on D4RL's scale of 0 (random) to 100 (expert); None where the task
            has no reference returns.
    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    return_mean: float
    return_std: float
    score_mean: float | None
    score_std: float | None


def evaluate(
    actor: Actor, task: Task, *, episodes: int = 10, seed: int, deterministic: bool = True
) -> Evaluation:
    """Run `episodes` side by side, each to its own first end, the actor acting on all of them at once.

    Args:
        actor: its actions in [-1, 1] are scaled to the environment's range.
        task: `task.env_id` is the gymnasium environment.
        seed: episode i starts from a seed derived from (seed, i).
        deterministic: act by tanh(mean); else sample.

    Raises:
        InputError: no environment, or it cannot be made; no episodes, sizes that do not fit the
            environment, or actions that are not finite.
    """
    if episodes < 1:
        raise InputError(f"episodes must be at least 1, got {episodes}")
    if seed < 0:
        raise InputError(f"seed must not be negative, got {seed}")
    # A plain list took 1.35 s for ten halfcheetahs of 1000 steps on two cores, SyncVectorEnv 1.7 s,
    # AsyncVectorEnv 5.7 s.
    if not task.env_id:
        raise InputError(f"the task {task.name} has no environment; a run's returns are those of its model")
    try:
        environments = [make_environment(task.env_id) for _ in range(episodes)]
    except (gymnasium.error.Error, ImportError) as error:
        raise InputError(f"the environment of the task {task.name} cannot be made ({error})") from error
    try:
        sizes = (environments[0].observation_space.shape[0], environments[0].action_space.shape[0])
        if sizes != (actor.obs_dim, actor.act_dim):
            raise InputError(
                f"the policy takes {actor.obs_dim} observation and gives {actor.act_dim} action dimensions,"
                f" {task.env_id} has {sizes[0]} and {sizes[1]}; evaluate it on the task it was trained for"
            )
        low, high = environments[0].action_space.low, environments[0].action_space.high
        observations = np.stack(
            [
                environment.reset(seed=derive_seed(seed, EVALUATE, _RESET, i))[0]
                for i, environment in enumerate(environments)
            ]
        )
        generator = torch.Generator().manual_seed(derive_seed(seed, EVALUATE, _NOISE))
        parameter = actor.biases[0]
        returns, lengths = [0.0] * episodes, [0] * episodes
        running = set(range(episodes))
        while running:
            noise = None
            if not deterministic:
                noise = torch.randn(episodes, actor.act_dim, generator=generator).to(parameter)
            # Ended episodes stay in the batch, so that rows do not depend on who is still running.
            actions = actor.act(torch.from_numpy(observations).to(parameter), noise).cpu().numpy()
            if not np.isfinite(actions).all():
                raise InputError("the policy's actions are not finite; its parameters may not be either")
            actions = low + 0.5 * (actions + 1.0) * (high - low)
            for i in sorted(running):
                observations[i], reward, terminated, truncated, _ = environments[i].step(actions[i])
                returns[i] += float(reward)
                lengths[i] += 1
                if terminated or truncated:
                    running.remove(i)
    finally:
        for environment in environments:
            environment.close()
    mean, std = float(np.mean(returns)), float(np.std(returns))
    return Evaluation(
        tuple(returns), tuple(lengths), mean, std, task.normalized_score(mean), task.normalized_std(std)
    )


def evaluate_in_model(
    engine: RolloutEngine, actor: Actor, start_observations: torch.Tensor, horizon: int, *, seed: int
) -> Evaluation:
    """What the ensemble predicts of the policy, without noise; an "episode" is `horizon` steps from a start.

    Returns are sums of predicted rewards, without the penalty; there are no scores. A model's praise of a
    policy that was trained in it is no proof.
    """
    rows = engine.rollout(actor, start_observations, horizon, seed=seed, deterministic=True)
    assert rows.raw_rewards is not None and rows.rollout_index is not None
    index, count = rows.rollout_index.cpu(), len(start_observations)
    returns = torch.zeros(count, dtype=torch.float64).index_add_(0, index, rows.raw_rewards.cpu().double())
    lengths = tuple(torch.bincount(index, minlength=count).tolist())
    mean, std = returns.mean().item(), returns.std(correction=0).item()
    return Evaluation(tuple(returns.tolist()), lengths, mean, std, None, None)


class Evaluator:
    """Evaluates policies, one after the other or beside the caller; a context manager.

    Args:
        workers: processes that evaluate; 0: the caller waits, in its own process.
    """

    def __init__(self, workers: int = 0) -> None:
        self._pool: ProcessPoolExecutor | None = None
        if workers:
            # A forked child would share the GPU's state and the locks of the parent's threads.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is None:
            return
        if kind is not None:
            # Nobody waits for the evaluations that run. Python 3.14 has `kill_workers` for this.
            for process in list((self._pool._processes or {}).values()):
                process.kill()
        self._pool.shutdown(cancel_futures=True)

    def submit(self, actor: Actor, task: Task, **options: Any) -> "Future[Evaluation]":
        """`evaluate` with these options, of the actor as it is now."""
        if self._pool is not None:
            # Copies: they are sent off later, and the actor may learn meanwhile.
            arrays = {name: value.cpu().numpy().copy() for name, value in actor.state_dict().items()}
            # A function of the user's own cannot be sent, nor is it needed; a task's file is read again.
            sent = task.name if task.name.endswith(".py") else replace(task, box=make_box(task.obs_dim))
            # The first call starts the workers, which inherit the mask: an interrupt at the terminal is the
            # parent's to answer.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
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

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    # A worker whose parent was killed would wait for work forever.
    threading.Thread(target=follow, daemon=True).start()


def _evaluate_arrays(
    settings: dict[str, Any], arrays: dict[str, np.ndarray], task: Task | str, options: dict[str, Any]
) -> Evaluation:
    task = get_task(task) if isinstance(task, str) else task
    actor = Actor(**settings)
    actor.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return evaluate(actor, task, **options)
