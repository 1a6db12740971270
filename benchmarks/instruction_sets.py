"""Compare the kernels of all instruction sets, in turn: `python -m benchmarks.instruction_sets`."""

import os

from rich.console import Console
from rich.table import Table

from benchmarks.command import run_command
from benchmarks.record import RESULTS, write_record
from mopo_fast.backends import cpu
from mopo_fast.bench.measure import WORKS, Contender, Work, interleave
from mopo_fast.doctor import examine
from mopo_fast.utils.machine import resolve_threads


def instruction_sets(*, rounds: int = 5, threads: int | None = None, quiet: bool = False) -> None:
    """Print the rates in float32 with each instruction set of this processor.

    Args:
        rounds: Rounds of each kernel, of which the median counts.
        threads: CPU threads (default: one for each core).
        quiet: Show no progress bar.
    """
    threads, findings, isas = resolve_threads(threads), examine(), cpu.isas()[::-1]
    table = Table("kernel", "unit", *isas)
    results = []
    for kernel in ("rollout", "sac", "fit"):
        works: dict[str, Work] = {}
        for isa in isas:
            os.environ["MOPO_FAST_ISA"] = isa
            works[isa] = WORKS[kernel](backend="cpu", threads=threads)
        # The first contender is the kernel itself.
        runs = {isa: _on(isa, next(iter(work.contenders.values()))) for isa, work in works.items()}
        seconds = interleave(runs, rounds, f"{kernel}: rounds", quiet)
        rates = {isa: work.amount / seconds[isa] for isa, work in works.items()}
        unit = works["portable"].unit
        table.add_row(kernel, unit, *(f"{rate:,.0f}" for rate in rates.values()))
        results.append({"kernel": kernel, "unit": unit, "rates": rates})
    Console().print(table)
    path = RESULTS / f"instruction-sets-{findings.machine.isa}.json"
    write_record(
        path, "instruction_sets", findings, {"rounds": rounds, "threads": threads, "kernels": results}
    )
    print(path)


def _on(isa: str, run: Contender) -> Contender:
    def switched() -> None:
        os.environ["MOPO_FAST_ISA"] = isa
        run()

    return switched


if __name__ == "__main__":
    run_command(instruction_sets)
