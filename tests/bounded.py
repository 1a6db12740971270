"""Steps in processes of their own, each bounded in time: a hang costs its step, and the next one goes on.

For machines that are there for minutes. A step's output goes to a file; a table at the end says how each
ended.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# For the last words of a process whose time is over; and for one that was killed to go: one that waits for a
# driver may never.
_SECONDS_TO_GO = 5.0
_LAST_LINES = 15


@dataclass(frozen=True)
class Step:
    """A command, the seconds that it may take, and variables that it gets beside those of this process."""

    name: str
    seconds: float
    command: Sequence[str | Path]
    environment: dict[str, str] = field(default_factory=dict)
    gates: bool = True
    """Whether its failure is one of the whole; else it is reported alone."""


@dataclass(frozen=True)
class Outcome:
    """How a step ended: passed, skipped, failed, cut or not run; `detail` is the last line that it wrote."""

    step: Step
    state: str
    seconds: float
    detail: str

    @property
    def is_bad(self) -> bool:
        return self.step.gates and self.state in ("failed", "cut", "not run")


def run_steps(steps: Sequence[Step], logs: Path, seconds: float) -> list[Outcome]:
    """Run the steps in order, all of them within `seconds`, and print a table of how they ended.

    Args:
        steps: once a step's time is over its process is interrupted, so that it can say how far it came, and
            killed a few seconds later with all that it has started.
        logs: the folder that gets a file NAME.log for each.
        seconds: for all; a step gets what is left of it, and is not run where nothing is.
    """
    console = Console(highlight=False)
    logs.mkdir(parents=True, exist_ok=True)
    outcomes, deadline = [], time.monotonic() + seconds
    try:
        for step in steps:
            console.print(f"== {escape(step.name)}")
            outcomes.append(_run(step, logs, deadline - time.monotonic()))
            console.print(f"== {escape(step.name)}: {outcomes[-1].state}, {outcomes[-1].seconds:.0f} s\n")
    finally:
        console.print(_table(outcomes))
    return outcomes


def _run(step: Step, logs: Path, left: float) -> Outcome:
    if left < 1.0:
        return Outcome(step, "not run", 0.0, "no time was left")
    path, limit, began = (
        logs / f"{step.name.replace(' ', '-')}.log",
        min(step.seconds, left),
        time.monotonic(),
    )
    with path.open("wb") as log:
        try:
            process = subprocess.Popen(
                list(map(str, step.command)),
                env=os.environ | step.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(step, "failed", 0.0, str(error))
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGINT)
                process.wait(_SECONDS_TO_GO)
        finally:
            gone = _kill(process)
    taken = time.monotonic() - began
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    print("\n".join(lines[-_LAST_LINES:]), flush=True)
    last = lines[-1].strip(" =") if lines else "it wrote nothing"
    if code is None:
        stays = "" if gone else "; killed, but it is still there"
        return Outcome(step, "cut", taken, f"ended after {limit:.0f} s{stays}; last: {last}")
    if code != 0:
        return Outcome(step, "failed", taken, f"exit status {code}; last: {last}")
    # pytest ends well where all tests were skipped.
    skipped = " skipped" in last and " passed" not in last
    return Outcome(step, "skipped" if skipped else "passed", taken, last)


def _kill(process: subprocess.Popen[bytes]) -> bool:
    """Kill the process and all of its group; whether it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(_SECONDS_TO_GO)
    except subprocess.TimeoutExpired:
        return False
    return True


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table("step", "state", "seconds", "last line")
    for outcome in outcomes:
        name = outcome.step.name + ("" if outcome.step.gates else " (reported only)")
        table.add_row(escape(name), outcome.state, f"{outcome.seconds:.0f}", escape(outcome.detail))
    return table
