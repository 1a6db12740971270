"""Feed every file reader with mutated files; print a table of the outcomes and keep the failures as files."""

import argparse
import contextlib
import csv
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from .children import FAILURES, Fuzzer, Limits, Verdict
from .readers import ENTRIES


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "--cases", type=int, default=2000, help="number of cases, fewer for slow readers (default: 2000)"
    )
    parser.add_argument("--seed", type=int, help="number of each reader's first case (default: random)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="only readers whose names contain one of these"
    )
    parser.add_argument("--jobs", type=int, default=2, help="child processes at a time (default: 2)")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="time limit of a case in seconds (default: 20)"
    )
    parser.add_argument(
        "--keep", type=Path, default=Path("build/fuzz"), help="folder for the failures (default: build/fuzz)"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table to this file")
    options = parser.parse_args(arguments)
    entries = [e for e in ENTRIES if not options.only or any(part in e.name for part in options.only)]
    if not entries:
        parser.error(f"no reader has such a name; there are: {', '.join(entry.name for entry in ENTRIES)}")
    seed = random.SystemRandom().randrange(10**9) if options.seed is None else options.seed
    share = options.cases / sum(1 / entry.cost for entry in entries)
    cases = [(entry, range(seed, seed + max(1, round(share / entry.cost)))) for entry in entries]
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    console.print(f"{len(entries)} readers from --seed {seed}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        fuzzer = Fuzzer(entries, Path(folder), options.jobs, Limits(seconds=options.seconds))
        unsound = [verdict for verdict in fuzzer.make_corpus() if verdict.kind != "read"]
        for verdict in unsound:
            console.print(
                f"{verdict.entry} does not read its own input: {_last_line(verdict.details)}", markup=False
            )
        began, cpu_before = time.monotonic(), _cpu_seconds()
        verdicts: list[Verdict] = []
        # After Ctrl-C or a kill a long run prints the table of the cases so far; also in the background,
        # where shells have SIGINT ignored.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt), contextlib.closing(fuzzer.run(cases)) as running:
            for verdict in running:
                verdicts.append(verdict)
        seconds, cpu = time.monotonic() - began, _cpu_seconds() - cpu_before
        unique = _unique(verdicts)
        shutil.rmtree(options.keep, ignore_errors=True)
        for number, group in enumerate(unique):
            fuzzer.keep(
                group[0], options.keep / f"{number:03}-{group[0].kind}-{group[0].entry.replace(' ', '-')}"
            )
    columns, rows = _count(verdicts)
    console.print(_table(columns, rows))
    if options.csv is not None:
        with options.csv.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
    rate = len(verdicts) / seconds
    console.print(
        f"{len(verdicts)} cases in {seconds:.0f} s, {rate:.1f} a second; {cpu:.0f} s of processor time"
    )
    for number, group in enumerate(unique):
        first = group[0]
        where = f" in {first.where}" if first.where else ""
        names = ", ".join(sorted({verdict.entry for verdict in group}))
        console.print(
            f"{number:03} {first.kind}: {first.what}{where}, {len(group)} cases of {names}", style="bold"
        )
        console.print(
            f"    --only '{first.entry}' --seed {first.number} --cases 1   ({first.mutation})", markup=False
        )
        console.print(f"    {_last_line(first.details)}", markup=False)
    if unique:
        console.print(f"Their files are in {options.keep}")
    return 1 if unique or unsound else 0


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _unique(verdicts: Sequence[Verdict]) -> list[list[Verdict]]:
    """Group failures by kind, exception and place, each group beginning with its smallest case."""
    groups: dict[tuple[str, str, str], list[Verdict]] = {}
    for verdict in sorted((v for v in verdicts if v.failed), key=lambda v: (v.number, v.entry)):
        groups.setdefault(verdict.key, []).append(verdict)
    return sorted(groups.values(), key=lambda group: (FAILURES.index(group[0].kind), -len(group)))


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def _count(verdicts: Sequence[Verdict]) -> tuple[list[str], list[list[str]]]:
    """Return column names, and a row for each reader and for all; `ms` is the mean time of a case."""
    seen = {verdict.kind for verdict in verdicts}
    kinds = ["read", "refused", *(kind for kind in FAILURES if kind in seen)]
    by_entry: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_entry.setdefault(verdict.entry, []).append(verdict)
    rows = []
    for name, some in [*by_entry.items(), ("all", list(verdicts))]:
        counts = Counter(verdict.kind for verdict in some)
        mean = 1000 * sum(verdict.seconds for verdict in some) / max(1, len(some))
        rows.append([name, str(len(some)), *(str(counts[kind] or "") for kind in kinds), f"{mean:.0f}"])
    return ["reader", "cases", *kinds, "ms"], rows


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column == "reader" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row, end_section=row is rows[-2])
    return table


if __name__ == "__main__":
    sys.exit(main())
