"""Compare large ensembles and layer norms with the canonical ensemble: `python -m benchmarks.ensembles`."""

from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command import run_command
from benchmarks.record import RESULTS, write_record
from mopo_fast.bench.measure import Contender, interleave
from mopo_fast.config import DynamicsConfig, TrainingDtype
from mopo_fast.data import Transitions
from mopo_fast.doctor import examine
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.fit import Fit
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine
from mopo_fast.utils.machine import resolve_threads

_OBS, _ACT, _CANONICAL = 17, 6, 7
# Transitions times members of a rollout, and steps times members of a fit, in a round.
_TRANSITIONS, _STEPS = 2_500_000, 64 * 7
# Steps of a fit in one call, as in a training.
_STEPS_AT_ONCE = 64
_DTYPES: tuple[TrainingDtype, ...] = ("float32", "bfloat16")
_MEMBERS = (_CANONICAL, 32, 128, 256)


def ensembles(*, rounds: int = 5, threads: int | None = None, quiet: bool = False) -> None:
    """Print the rates per member of ensembles of all sizes, and of one with layer norms, beside 7 members.

    Args:
        rounds: Rounds of each kernel, of which the median counts.
        threads: CPU threads (default: one for each core).
        quiet: Show no progress bar.
    """
    threads, findings = resolve_threads(threads), examine()
    names = [f"{members} members" for members in _MEMBERS]
    table = Table("thousands/s", "dtype", *map(str, _MEMBERS), "7, layer norms")
    results = []
    for kernel, make, unit in (
        ("rollout", _rollout, "transitions*members/s"),
        ("fit", _fit, "samples*members/s"),
    ):
        for dtype in _DTYPES:
            works = {
                name: make(members, dtype, False, threads)
                for name, members in zip(names, _MEMBERS, strict=True)
            }
            works["7 members, layer norms"] = make(_CANONICAL, dtype, True, threads)
            runs = {name: run for name, (run, _) in works.items()}
            seconds = interleave(runs, rounds, f"{kernel} in {dtype}: rounds", quiet)
            rates = {name: amount / seconds[name] for name, (_, amount) in works.items()}
            first = rates[names[0]]
            rows = (f"{rate / 1000:,.0f} ({rate / first:.2f})" for rate in rates.values())
            table.add_row(kernel, dtype, *rows)
            results.append({"kernel": kernel, "dtype": dtype, "unit": unit, "rates": rates})
    Console().print(table)
    path = RESULTS / f"ensembles-cpu-{findings.machine.isa}.json"
    write_record(path, "ensembles", findings, {"rounds": rounds, "threads": threads, "kernels": results})
    print(path)


def _rollout(members: int, dtype: str, layer_norm: bool, threads: int) -> tuple[Contender, int]:
    """Return a rollout of 5 steps with a penalty of all members, and its transitions times members."""
    generator = torch.Generator().manual_seed(0)
    ensemble = EnsembleDynamics(
        _OBS, _ACT, members=members, elites=5, layer_norm=layer_norm, generator=generator
    )
    engine = RolloutEngine(ensemble, penalty="ensemble_std", backend="cpu", dtype=dtype, threads=threads)
    starts = torch.randn(_TRANSITIONS // members // 5, _OBS, generator=generator)
    actor = Actor(_OBS, _ACT, generator=generator)
    return partial(engine.rollout, actor, starts, 5, seed=0), len(starts) * 5 * members


def _fit(members: int, dtype: TrainingDtype, layer_norm: bool, threads: int) -> tuple[Contender, int]:
    """Return steps of a fit, made 64 at a time, and its samples times members."""
    config = DynamicsConfig(members=members, dtype=dtype, layer_norm=layer_norm)
    fit = Fit(_data(), 0, config, backend="cpu", threads=threads)
    calls = max(1, _STEPS // members // _STEPS_AT_ONCE)
    generator = torch.Generator().manual_seed(0)
    size = members, _STEPS_AT_ONCE * config.batch_size
    rows = torch.randint(len(fit.table), size, dtype=torch.int32, generator=generator)

    def run() -> None:
        for _ in range(calls):
            fit.steps(rows)

    return run, calls * rows.numel()


def _data(rows: int = 100_000) -> Transitions:
    generator = torch.Generator().manual_seed(0)
    normal: Any = partial(torch.randn, generator=generator)
    return Transitions(
        observations=normal(rows, _OBS),
        actions=normal(rows, _ACT).tanh(),
        rewards=normal(rows),
        next_observations=normal(rows, _OBS),
        terminals=torch.zeros(rows, dtype=torch.bool),
    )


if __name__ == "__main__":
    run_command(ensembles)
