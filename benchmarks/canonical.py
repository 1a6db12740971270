"""Extrapolate the hours of a canonical MOPO run from measured pieces: `python -m benchmarks.canonical`.

The run has halfcheetah's sizes: a fit on 1,000,000 transitions, then 1000 epochs, each a rollout of 50,000
starts and 5 steps, 1000 SAC updates and an evaluation of 10 episodes. In each round every way of doing it
measures every piece; the medians are multiplied up. Data are random; the evaluation is in MuJoCo.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command import run_command
from benchmarks.compare import BASELINES
from benchmarks.record import RESULTS, write_record
from mopo_fast import Actor
from mopo_fast.bench.measure import fit_work, interleave, rollout_work, sac_work
from mopo_fast.doctor import examine
from mopo_fast.environments import make_environment
from mopo_fast.evaluate import evaluate
from mopo_fast.tasks import get_task
from mopo_fast.utils.machine import resolve_threads, torch_threads

TRANSITIONS, EPOCHS, UPDATES, EPISODES = 1_000_000, 1000, 1000, 10
# Long enough that the first steps, whose data lie in no cache yet, take the share that they have in a run.
STEPS_MEASURED = 512
PHASES = ("fit", "rollout", "sac", "evaluate")

# The contender for each phase, by its name in `mopo_fast.bench.measure` or in `BASELINES`.
WAYS = {
    "mopo_fast": ("cpu", "cpu", "cpu", "side by side"),
    "mopo_fast, high": ("cpu bfloat16x3", "cpu bfloat16x3", "cpu bfloat16x3", "side by side"),
    "mopo_fast, medium": ("cpu bfloat16", "cpu bfloat16", "cpu bfloat16", "side by side"),
    "as OfflineRL-Kit": ("PyTorch, eager", "PyTorch, NumPy between", "PyTorch, plain", "one by one"),
    "torch.compile": ("torch.compile", "torch.compile", "torch.compile", "side by side"),
    "torch.compile, bfloat16": (
        "torch.compile, bfloat16",
        "torch.compile, bfloat16",
        "torch.compile, bfloat16",
        "side by side",
    ),
}


def canonical(
    *,
    rounds: int = 20,
    fit_epochs: int = 100,
    threads: int | None = None,
    json: Path | None = None,
    quiet: bool = False,
) -> None:
    """Print the hours of a canonical run, phase by phase, for each way of doing it.

    Args:
        rounds: Rounds, each of a rollout, an evaluation, an epoch's updates and 512 steps of the fit.
        fit_epochs: Passes over the data that the fit is assumed to need.
        threads: CPU threads (default: one for each core).
        json: File of the results (default: benchmarks/results/canonical-cpu-ISA.json).
        quiet: Show no progress bar.
    """
    threads, findings = resolve_threads(threads), examine()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    works = {
        "fit": fit_work(
            backend="cpu",
            dtype="bfloat16",
            steps=STEPS_MEASURED,
            rows=TRANSITIONS,
            threads=threads,
            baselines=_used("fit", 0),
        ),
        "rollout": rollout_work(
            backend="cpu", dtype="bfloat16", threads=threads, baselines=_used("rollout", 1)
        ),
        "sac": sac_work(
            backend="cpu",
            dtype="bfloat16",
            updates=UPDATES,
            real_rows=TRANSITIONS,
            threads=threads,
            baselines=_used("sac", 2),
        ),
    }
    pieces: dict[str, Callable[[], object]] = {
        f"{phase}: {name}": run
        for phase, work in works.items()
        for name, run in work.contenders.items()
        if name in {way[PHASES.index(phase)] for way in WAYS.values()}
    }
    task = get_task("halfcheetah")
    actor = Actor(task.obs_dim, task.act_dim, generator=torch.Generator().manual_seed(0))
    pieces["evaluate: side by side"] = lambda: evaluate(
        actor, task, episodes=EPISODES, seed=0, threads=threads
    )
    pieces["evaluate: one by one"] = lambda: _evaluate_one_by_one(actor, task.env_id)
    with torch_threads(threads):
        seconds = interleave(pieces, rounds, "canonical run: rounds", quiet)
    config_batch = works["fit"].shape["batch"]
    times = {
        "fit": fit_epochs * TRANSITIONS / (config_batch * STEPS_MEASURED),
        "rollout": EPOCHS,
        "sac": EPOCHS,
        "evaluate": EPOCHS,
    }
    hours = {
        name: {
            phase: seconds[f"{phase}: {piece}"] * times[phase] / 3600.0
            for phase, piece in zip(PHASES, way, strict=True)
        }
        for name, way in WAYS.items()
        # Some instruction sets have no kernels between bfloat16 and float32.
        if f"{PHASES[0]}: {way[0]}" in seconds
    }
    _show(hours)
    path = json or RESULTS / f"canonical-cpu-{findings.machine.isa}.json"
    settings = {"rounds": rounds, "fit_epochs": fit_epochs, "threads": threads}
    results = {"settings": settings, "hours": hours, "ways": WAYS, "seconds_of_pieces": seconds}
    write_record(path, "canonical", findings, results)
    print(path)


def _used(kernel: str, phase: int) -> dict[str, Callable[..., Callable[[], object]]]:
    return {
        name: BASELINES[kernel][name] for name in {way[phase] for way in WAYS.values()} & {*BASELINES[kernel]}
    }


def _evaluate_one_by_one(actor: Actor, env_id: str) -> float:
    """Evaluate as OfflineRL-Kit does: one episode after the other, the network on one row at a time."""
    total = 0.0
    environment = make_environment(env_id)
    for episode in range(EPISODES):
        observation, _ = environment.reset(seed=episode)
        done = False
        while not done:
            row = torch.as_tensor(np.asarray(observation, dtype=np.float32)).unsqueeze(0)
            action = actor.act(row, None).numpy()[0]
            observation, reward, terminated, truncated, _ = environment.step(action)
            total += float(reward)
            done = terminated or truncated
    environment.close()
    return total / EPISODES


def _show(hours: dict[str, dict[str, float]]) -> None:
    table = Table("way", *(f"{phase}, h" for phase in PHASES), "whole, h", "times mopo_fast")
    ours = sum(hours["mopo_fast"].values())
    for name, phases in hours.items():
        whole = sum(phases.values())
        cells = [f"{phases[phase]:.2f} ({phases[phase] / whole:.0%})" for phase in PHASES]
        table.add_row(name, *cells, f"{whole:.2f}", f"{whole / ours:.2f}")
    Console().print(table)


if __name__ == "__main__":
    run_command(canonical)
