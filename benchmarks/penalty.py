"""Compare rollouts with and without a penalty: `python -m benchmarks.penalty`.

With one, every member computes every row. Without one, only the member that a row has drawn does. All cases
of a precision take turns.
"""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.command import run_command
from benchmarks.record import RESULTS, write_record
from mopo_fast.bench.measure import Contender, interleave, rollout_work
from mopo_fast.doctor import examine
from mopo_fast.utils.machine import resolve_threads

STARTS, HORIZON = 50_000, 5
# Members, elites and weight of the penalty of each case. The first is the one that others are compared with.
CASES = {
    "7 members with the penalty": (7, 5, 1.0),
    "7 members without, 5 of them elites": (7, 5, 0.0),
    "7 members without, all of them elites": (7, 7, 0.0),
    "32 members without, all of them elites": (32, 32, 0.0),
    "32 members with the penalty": (32, 5, 1.0),
}
DTYPES = ("float32", "bfloat16")


def main(
    *,
    rounds: int = 7,
    threads: int | None = None,
    json: Path | None = None,
    quiet: bool = False,
) -> None:
    """Print the transitions per second of each case, and its ratio to the first.

    Args:
        rounds: Rounds in which all cases take turns; medians count.
        threads: CPU threads (default: one for each core).
        json: File of the results (default: benchmarks/results/penalty-cpu-ISA.json).
        quiet: Show no progress bar.
    """
    threads, findings = resolve_threads(threads), examine()
    rates: dict[str, dict[str, float]] = {}
    table = Table("rollout", *(f"{dtype}, transitions/s" for dtype in DTYPES), *DTYPES)
    for dtype in DTYPES:
        cases = {name: rollouts(name, dtype, threads) for name in CASES}
        seconds = interleave(cases, rounds, f"penalty: {dtype}", quiet)
        rates[dtype] = {name: STARTS * HORIZON / value for name, value in seconds.items()}
    first = next(iter(CASES))
    for name in CASES:
        table.add_row(
            name,
            *(f"{rates[dtype][name]:,.0f}" for dtype in DTYPES),
            *(f"{rates[dtype][name] / rates[dtype][first]:.2f}" for dtype in DTYPES),
        )
    Console().print(table)
    path = json or RESULTS / f"penalty-cpu-{findings.machine.isa}.json"
    settings = {"starts": STARTS, "horizon": HORIZON, "rounds": rounds, "threads": threads}
    write_record(path, "penalty", findings, {"settings": settings, "transitions_per_second": rates})
    print(path)


def rollouts(case: str, dtype: str, threads: int | None = None) -> Contender:
    """Return a function that makes the rollouts of a case of `CASES`."""
    members, elites, penalty_coef = CASES[case]
    work = rollout_work(
        backend="cpu",
        dtype=dtype,
        starts=STARTS,
        horizon=HORIZON,
        members=members,
        elites=elites,
        penalty_coef=penalty_coef,
        threads=threads,
    )
    return next(iter(work.contenders.values()))


if __name__ == "__main__":
    run_command(main)
