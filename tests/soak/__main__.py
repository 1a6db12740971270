"""Test commands under faults at random moments: `python tests/soak --minutes M --seed S`.

Every case is a real command line that is killed, interrupted, or left without disk, rights or memory. The
case checks its output and its files; then the same command, run again, must give the bits of an undisturbed
run. A case depends only on the seed and its number: `--seed S --case N` repeats one.
"""

import argparse
import concurrent.futures
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter

import disks
from cases import FAULTS, MOUNTED, Case, Failure, Reference, References, undisturbed
from processes import MARK, end_marked
from scenarios import ROOT, SCENARIOS, Scenario, environment, input_commands

FOLDER = ROOT / "build" / "soak"
# A slow scenario is part of one round of all pairs in so many.
_RARE = 6


def pairs(seed: int, round_: int, scenarios: list[Scenario], faults: list[str]) -> list[tuple[Scenario, str]]:
    """Return all pairs of scenario and fault, shuffled; Ray gets no memory limits and no small disks."""
    found = [
        (scenario, fault)
        for scenario in scenarios
        for fault in faults
        if not scenario.rare or len(scenarios) == 1 or round_ % _RARE == 1
        if not (scenario.rare and fault == "memory")
    ]
    random.Random(f"{seed}/{round_}").shuffle(found)
    return found


class Soak:
    """A sequence of cases and their outcomes."""

    def __init__(self, seed: int, scenarios: list[Scenario], faults: list[str]) -> None:
        self.seed, self.scenarios, self.faults = seed, scenarios, faults
        self.inputs = FOLDER / "inputs"
        self.references = References(self._undisturbed)
        self.cases: Counter[tuple[str, str]] = Counter()
        self.failures: Counter[tuple[str, str]] = Counter()
        self.distinct: dict[tuple[str, str, str], list[str]] = {}
        self.interrupts: dict[str, list[float]] = {}
        self._lock = threading.Lock()
        self._running: set[Case] = set()

    def stop(self) -> None:
        """End the running commands, whose cases then fail."""
        for case in list(self._running):
            end_marked(case.mark)

    def prepare(self) -> None:
        """Make the scenarios' inputs."""
        shutil.rmtree(FOLDER, ignore_errors=True)
        self.inputs.mkdir(parents=True)
        (FOLDER / "tmp").mkdir()
        for argv in input_commands(self.inputs):
            subprocess.run(
                argv,
                cwd=FOLDER,
                env=environment(FOLDER / "tmp"),
                check=True,
                capture_output=True,
                timeout=300,
            )

    def _undisturbed(self, scenario: Scenario) -> Reference:
        case = self._case(scenario, "undisturbed", random.Random(0), f"undisturbed-{scenario.name}")
        try:
            reference = undisturbed(case)
        finally:
            self._close(case)
        shutil.rmtree(case.folder)
        return reference

    def _case(self, scenario: Scenario, fault: str, rng: random.Random, name: str) -> Case:
        case = Case(scenario, fault, rng, FOLDER / name, self.inputs, f"{os.getpid()}-{name}")
        self._running.add(case)
        return case

    def _close(self, case: Case) -> None:
        case.close()
        self._running.discard(case)

    def draw(self, number: int) -> tuple[Scenario, str]:
        """Draw the scenario and the fault of a case."""
        round_ = 0
        while number >= len(found := pairs(self.seed, round_, self.scenarios, self.faults)):
            number, round_ = number - len(found), round_ + 1
        return found[number]

    def run(self, number: int) -> None:
        scenario, fault = self.draw(number)
        name = f"{number:04}-{scenario.name}-{fault}"
        case = self._case(scenario, fault, random.Random(f"{self.seed}/case/{number}"), name)
        failure: Failure | None = None
        try:
            FAULTS[fault](case, self.references.get(scenario))
        except Failure as found:
            failure = found
        except Exception:
            failure = Failure("the soak itself fails", traceback.format_exc())
        finally:
            self._close(case)
        with self._lock:
            self.cases[scenario.name, fault] += 1
            self.interrupts.setdefault(scenario.name, []).extend(case.interrupts)
            if failure is None:
                shutil.rmtree(case.folder, ignore_errors=True)
                print(f"  ok    {name}", flush=True)
                return
            self.failures[scenario.name, fault] += 1
            self.distinct.setdefault((scenario.name, fault, str(failure)), []).append(name)
            print(f"  FAIL  {name}: {failure}", flush=True)
            lines = [f"seed {self.seed}, case {number}: {scenario.name}, {fault}", *case.log]
            lines += [f"FAILURE: {failure}", failure.detail, "", f"{MARK}={case.mark}"]
            (case.folder / "case.txt").write_text("\n".join(lines) + "\n")

    def table(self) -> str:
        """Return a table of failures by scenario and fault, with the slowest answer to SIGINT."""
        names = [scenario.name for scenario in self.scenarios]
        rows = [["failures/cases", *self.faults, "slowest SIGINT"]]
        for name in names:
            counts = [
                f"{self.failures[name, fault]}/{self.cases[name, fault]}" if self.cases[name, fault] else "-"
                for fault in self.faults
            ]
            times = sorted(self.interrupts.get(name, []))
            slowest = f"{times[-1]:.2f} s, median {times[len(times) // 2]:.2f} s" if times else "-"
            rows.append([name, *counts, slowest])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows
        ]
        for (name, fault, what), folders in sorted(self.distinct.items()):
            lines.append(
                f"\n{name}, {fault}, {len(folders)} times, first in build/soak/{folders[0]}:\n  {what}"
            )
        return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument(
        "--minutes", type=float, default=1.0, help="time after which no case begins (default: 1)"
    )
    parser.add_argument("--seed", type=int, help="seed of all cases (default: random, and printed)")
    parser.add_argument("--case", type=int, help="run only this case of the seed")
    parser.add_argument("--scenario", action="append", choices=names, help="only these scenarios")
    parser.add_argument("--fault", action="append", choices=list(FAULTS), help="only these faults")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time (default: 2)")
    options = parser.parse_args()
    disks.enter_namespace()
    # End as by Ctrl-C, so that nothing is left running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    scenarios = [one for one in SCENARIOS if options.scenario is None or one.name in options.scenario]
    faults = [fault for fault in FAULTS if options.fault is None or fault in options.fault]
    if reason := disks.why_not():
        print(f"skipped: {', '.join(fault for fault in faults if fault in MOUNTED)}: {reason}")
        faults = [fault for fault in faults if fault not in MOUNTED]
    print(f"seed {seed}, {options.minutes:g} minutes", flush=True)
    deadline = time.monotonic() + 60 * options.minutes
    soak = Soak(seed, scenarios, faults)
    soak.prepare()
    if options.case is not None:
        soak.run(options.case)
    else:
        numbers = iter(range(10**9))
        lock = threading.Lock()

        def work() -> None:
            while time.monotonic() < deadline:
                with lock:
                    number = next(numbers)
                soak.run(number)

        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            workers = [pool.submit(work) for _ in range(options.jobs)]
            try:
                for worker in workers:
                    worker.result()
            except KeyboardInterrupt:
                # Stopped by hand: the findings are still printed.
                deadline = 0.0
                soak.stop()
    print(f"\nseed {seed}\n{soak.table()}")
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main())
