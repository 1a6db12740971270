"""Measure what functions and environments cost beside the kernel: `python -m benchmarks.pieces`.

All contenders make 5 steps of the same rollouts, and take turns.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command import run_command
from benchmarks.record import RESULTS, write_record
from mopo_fast import Actor, EnsembleDynamics, ModelVectorEnv, RolloutEngine
from mopo_fast.bench.measure import Contender, interleave, times
from mopo_fast.doctor import examine
from mopo_fast.utils.machine import resolve_threads, torch_threads

OBS_DIM, ACT_DIM, HORIZON = 17, 6, 5
ROLLOUTS = (64, 1024, 16_384)
# Transitions that a contender makes in a turn, in as many calls as that takes.
IN_TURN = 20_000


def penalty(means: torch.Tensor, stds: torch.Tensor) -> torch.Tensor:
    """Return the norm of the largest standard deviations, as "max_aleatoric" does."""
    return stds.square().sum(-1).amax(0).sqrt()


def reward(
    observations: torch.Tensor, actions: torch.Tensor, next_observations: torch.Tensor
) -> torch.Tensor:
    """Return a reward of a task like halfcheetah."""
    return next_observations[:, 8] - 0.1 * actions.square().sum(-1)


def termination(
    observations: torch.Tensor, actions: torch.Tensor, next_observations: torch.Tensor
) -> torch.Tensor:
    """Return True where a state is out of bounds that it hardly ever passes."""
    return (next_observations.abs() > 100.0).any(-1)


def make_contenders(count: int, threads: int | None = None) -> dict[str, Contender]:
    """Return functions that each make HORIZON steps of `count` rollouts; the first is the kernel alone."""
    generator = torch.Generator().manual_seed(0)
    ensemble = EnsembleDynamics(OBS_DIM, ACT_DIM, generator=generator)
    actor = Actor(OBS_DIM, ACT_DIM, generator=generator)
    start = torch.randn(count, OBS_DIM, generator=generator)

    def rollout(policy: Any = actor, **functions: Callable[..., Any]) -> Contender:
        engine = RolloutEngine(ensemble, threads=threads, **functions)
        return lambda: engine.rollout(policy, start, HORIZON, seed=0)

    return {
        "kernel": rollout(),
        "a policy as a function": rollout(lambda observations: actor.act(observations)),
        'the policy "uniform"': rollout("uniform"),
        "a reward": rollout(reward=reward),
        "a termination": rollout(termination=termination),
        "a penalty": rollout(penalty=penalty),
        "all four": rollout(actor.act, reward=reward, termination=termination, penalty=penalty),
        "`ModelVectorEnv`, given actions": environment(ensemble, start, None, threads),
        "`ModelVectorEnv`, an `Actor`": environment(ensemble, start, actor, threads),
    }


def environment(
    ensemble: EnsembleDynamics, start: torch.Tensor, actor: Actor | None, threads: int | None
) -> Contender:
    """Return a function that makes HORIZON steps of the model as an environment."""
    count, engine = len(start), RolloutEngine(ensemble, threads=threads)
    envs = ModelVectorEnv(engine, start, num_envs=count, horizon=HORIZON, seed=0, autoreset_mode="SameStep")
    latest, _ = envs.reset()
    given = np.random.default_rng(0).uniform(-1.0, 1.0, (count, ACT_DIM)).astype(np.float32)

    def run() -> None:
        nonlocal latest
        for _ in range(HORIZON):
            actions = given if actor is None else actor.predict(latest, deterministic=False)
            latest = envs.step(actions)[0]

    return run


def main(
    *,
    rounds: int = 15,
    threads: int | None = None,
    json: Path | None = None,
    quiet: bool = False,
) -> None:
    """Print the transitions per second of each contender, and the share of the kernel's that this is.

    Args:
        rounds: Rounds in which all contenders take turns; medians count.
        threads: CPU threads (default: one for each core).
        json: File of the results (default: benchmarks/results/pieces-cpu-ISA.json).
        quiet: Show no progress bar.
    """
    threads, findings = resolve_threads(threads), examine()
    rates: dict[str, dict[str, float]] = {}
    for count in ROLLOUTS:
        calls = max(1, IN_TURN // (count * HORIZON))
        turns = {name: times(calls, run) for name, run in make_contenders(count, threads).items()}
        with torch_threads(threads):
            seconds = interleave(turns, rounds, f"pieces: {count} rollouts", quiet)
        rates[str(count)] = {name: count * HORIZON * calls / value for name, value in seconds.items()}
    table = Table("transitions/s", *(f"{count:,} rollouts" for count in ROLLOUTS))
    for name in next(iter(rates.values())):
        table.add_row(
            name, *(f"{each[name]:,.0f} ({each[name] / each['kernel']:.2f})" for each in rates.values())
        )
    Console().print(table)
    path = json or RESULTS / f"pieces-cpu-{findings.machine.isa}.json"
    settings = {"horizon": HORIZON, "rounds": rounds, "threads": threads}
    write_record(path, "pieces", findings, {"settings": settings, "transitions_per_second": rates})
    print(path)


if __name__ == "__main__":
    run_command(main)
