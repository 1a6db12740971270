"""Compare ways to simulate episodes side by side: `python -m benchmarks.simulation`.

Each contender makes the same steps. `mujoco.rollout` returns no warm start: its solver starts each step from
zero, and its results differ. Medians are over rounds in which all contenders take turns.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import mujoco
import mujoco.rollout
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command import run_command
from benchmarks.record import RESULTS, write_record
from mopo_fast import Actor, simulation
from mopo_fast.bench.measure import interleave
from mopo_fast.doctor import examine
from mopo_fast.environments import make_environment
from mopo_fast.evaluate import evaluate
from mopo_fast.simulation import Episodes, GymnasiumEpisodes, make_episodes
from mopo_fast.tasks import get_task
from mopo_fast.utils.machine import resolve_threads, torch_threads

GYMNASIUM = "gymnasium"


def main(
    *,
    task: str = "halfcheetah",
    episodes: int = 10,
    steps: int = 100,
    rounds: int = 20,
    threads: int | None = None,
    json: Path | None = None,
    quiet: bool = False,
) -> None:
    """Print the milliseconds of a step of all episodes, and of whole evaluations.

    Args:
        task: Task with a MuJoCo environment.
        episodes: Number of episodes side by side.
        steps: Steps of a contender in a round.
        rounds: Rounds, each with all contenders.
        threads: Most threads (default: one for each core).
        json: File of the results (default: benchmarks/results/simulation-TASK.json).
        quiet: Show no progress bar.
    """
    threads, findings, spec = resolve_threads(threads), examine(), get_task(task)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    counts = sorted({1, threads})
    actor = Actor(spec.obs_dim, spec.act_dim, generator=torch.Generator().manual_seed(0))
    with contextlib.ExitStack() as stack, torch_threads(1):
        plain = GymnasiumEpisodes(make_environment(spec.env_id), spec.env_id, episodes)
        space = plain.environment.action_space
        noise = np.random.default_rng(0).uniform(-1.0, 1.0, (steps, episodes, spec.act_dim))
        actions = (noise * space.high).astype(np.float32)
        per_step: dict[str, Callable[[], object]] = {GYMNASIUM: _steps(stack.enter_context(plain), actions)}
        for count in counts:
            bulk = stack.enter_context(make_episodes(spec.env_id, episodes, count))
            per_step[f"in bulk, threads: {count}"] = _steps(bulk, actions)
            pool = stack.enter_context(mujoco.rollout.Rollout(nthread=count))
            per_step[f"mujoco.rollout, threads: {count}"] = _rollouts(plain, pool, count, actions)
        act, rows = actor.acting(), torch.randn(episodes, spec.obs_dim)
        per_step["policy"] = lambda: [act(rows, None) for _ in range(steps)]
        whole: dict[str, Callable[[], object]] = {
            f"evaluation: in bulk, threads: {count}": (
                lambda count=count: evaluate(actor, spec, episodes=episodes, seed=0, threads=count)
            )
            for count in counts
        }
        whole[f"evaluation: {GYMNASIUM}"] = lambda: _evaluate_by_gymnasium(actor, task, episodes)
        seconds = interleave(per_step | whole, rounds, "simulation: rounds", quiet)
    table = Table("contender", "ms", "times as fast as gymnasium")
    for name, value in seconds.items():
        reference = seconds[f"evaluation: {GYMNASIUM}" if name in whole else GYMNASIUM]
        unit = 1e3 if name in whole else 1e3 / steps
        table.add_row(name, f"{value * unit:.3f}", "" if name == "policy" else f"{reference / value:.2f}")
    Console().print(table)
    path = json or RESULTS / f"simulation-{task}.json"
    settings = {"task": task, "episodes": episodes, "steps": steps, "rounds": rounds, "threads": threads}
    write_record(path, "simulation", findings, {"settings": settings, "seconds": seconds})
    print(path)


def _steps(episodes: Episodes, actions: np.ndarray) -> Callable[[], object]:
    rows = np.arange(actions.shape[1])

    def run() -> None:
        for i in rows:
            episodes.reset(i, int(i))
        for step in actions:
            episodes.step(step, rows)

    return run


def _rollouts(
    plain: GymnasiumEpisodes, pool: mujoco.rollout.Rollout, threads: int, actions: np.ndarray
) -> Callable[[], object]:
    inner = plain.environment.unwrapped
    model, skip, full = inner.model, inner.frame_skip, mujoco.mjtState.mjSTATE_FULLPHYSICS
    scratch = [mujoco.MjData(model) for _ in range(threads)]
    starts = np.empty((actions.shape[1], mujoco.mj_stateSize(model, full)))

    def run() -> None:
        for i, environment in enumerate(plain.environments):
            plain.reset(i, i)
            mujoco.mj_getState(model, environment.unwrapped.data, starts[i], full)
        states = starts
        for step in actions:
            controls = np.repeat(step[:, None].astype(np.float64), skip, axis=1)
            states = pool.rollout(model, scratch, states, controls)[0][:, -1]

    return run


def _evaluate_by_gymnasium(actor: Actor, task: str, episodes: int) -> object:
    with mock.patch.object(simulation, "rules_of", lambda environment: None):
        return evaluate(actor, task, episodes=episodes, seed=0)


if __name__ == "__main__":
    run_command(main)
