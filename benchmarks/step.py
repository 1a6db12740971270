"""Compare a step of the model with PyTorch's, from one row on: `python -m benchmarks.step`.

The caller gives the actions, as other code's `dynamics.step` does. The ensemble has 7 members of 4 x 200.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command import run_command
from benchmarks.record import RESULTS, write_record
from mopo_fast import EnsembleDynamics, RolloutEngine
from mopo_fast.backends.interface import StepResult
from mopo_fast.bench.measure import interleave, times
from mopo_fast.doctor import examine
from mopo_fast.utils.machine import resolve_threads, torch_threads

OBS_DIM, ACT_DIM = 17, 6
BATCHES = (1, 4, 16, 256, 10_000)
# Rows that a contender computes in a turn, in as many calls as that takes, but at most some calls.
ROWS_IN_TURN, MOST_CALLS = 20_000, 200


def main(
    *,
    rounds: int = 15,
    threads: int | None = None,
    json: Path | None = None,
    quiet: bool = False,
) -> None:
    """Print the milliseconds of a step for each batch size.

    Args:
        rounds: Rounds in which all contenders take turns; medians count.
        threads: CPU threads (default: one for each core).
        json: File of the results (default: benchmarks/results/step-cpu-ISA.json).
        quiet: Show no progress bar.
    """
    threads, findings = resolve_threads(threads), examine()
    ensemble = EnsembleDynamics(OBS_DIM, ACT_DIM, generator=torch.Generator().manual_seed(0))
    engines = {
        backend: RolloutEngine(ensemble, backend=backend, threads=threads) for backend in ("cpu", "reference")
    }
    table = Table("rows", "mopo_fast, ms", "PyTorch, ms", "times as fast")
    milliseconds: dict[str, dict[str, float]] = {}
    for batch in BATCHES:
        calls = min(MOST_CALLS, max(1, ROWS_IN_TURN // batch))
        contenders = {name: times(calls, one_step(engine, batch)) for name, engine in engines.items()}
        with torch_threads(threads):
            seconds = interleave(contenders, rounds, f"step: {batch} rows", quiet)
        ours, theirs = (1e3 * seconds[name] / calls for name in engines)
        milliseconds[str(batch)] = {"cpu": ours, "reference": theirs}
        table.add_row(f"{batch:,}", f"{ours:.3f}", f"{theirs:.3f}", f"{theirs / ours:.2f}")
    Console().print(table)
    path = json or RESULTS / f"step-cpu-{findings.machine.isa}.json"
    settings = {"rounds": rounds, "threads": threads}
    write_record(path, "step", findings, {"settings": settings, "milliseconds": milliseconds})
    print(path)


def one_step(engine: RolloutEngine, batch: int) -> Callable[[], StepResult[torch.Tensor]]:
    """Return a function that makes a step of `batch` rows."""
    generator = torch.Generator().manual_seed(2)
    observations = torch.randn(batch, OBS_DIM, generator=generator)
    actions = torch.rand(batch, ACT_DIM, generator=generator) * 2.0 - 1.0
    return partial(engine.step, observations, actions, seed=0)


if __name__ == "__main__":
    run_command(main)
