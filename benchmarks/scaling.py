"""Compare the kernels on one thread and on all threads, in turn: `python -m benchmarks.scaling`."""

from rich.console import Console
from rich.table import Table

from benchmarks.command import run_command
from benchmarks.record import RESULTS, write_record
from mopo_fast.bench.measure import WORKS, Work, interleave
from mopo_fast.doctor import examine
from mopo_fast.utils.machine import resolve_threads

BENCHES = (
    ("rollout", "float32"),
    ("rollout", "bfloat16"),
    ("sac", "float32"),
    ("sac", "bfloat16"),
    ("fit", "float32"),
    ("fit", "bfloat16"),
)


def scaling(*, rounds: int = 15, threads: int | None = None, quiet: bool = False) -> None:
    """Print the rates on `threads` threads, divided by those on one.

    Args:
        rounds: Rounds of each kernel, of which the median counts.
        threads: CPU threads (default: one for each core).
        quiet: Show no progress bar.
    """
    threads, findings = resolve_threads(threads), examine()
    table = Table("kernel", "dtype", "unit", "1 thread", f"{threads} threads", "times")
    results = []
    for kernel, dtype in BENCHES:
        works: dict[int, Work] = {}
        for count in (1, threads):
            works[count] = WORKS[kernel](backend="cpu", threads=count, dtype=dtype)
        # The first contender is the kernel itself in this dtype.
        runs = {str(count): next(iter(work.contenders.values())) for count, work in works.items()}
        seconds = interleave(runs, rounds, f"{kernel} {dtype}: rounds", quiet)
        work = works[threads]
        one, many = (work.amount / seconds[str(count)] for count in works)
        table.add_row(kernel, dtype, work.unit, f"{one:,.0f}", f"{many:,.0f}", f"{many / one:.2f}")
        results.append({"kernel": kernel, "dtype": dtype, "one": one, "many": many})
    Console().print(table)
    path = RESULTS / f"scaling-cpu-{findings.machine.isa}.json"
    write_record(path, "scaling", findings, {"rounds": rounds, "threads": threads, "rates": results})
    print(path)


if __name__ == "__main__":
    run_command(scaling)
