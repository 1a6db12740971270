"""Steps in processes of their own with time limits: a step that hangs is ended, and the next one runs.

For machines that are available for minutes. Each step's output goes to a file; a table at the end says how
each step ended.
"""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# Seconds for an interrupted process to report how far it came, and for a killed one to exit. A process that
# is stuck in a driver may never exit.
_SECONDS_TO_EXIT = 5.0
_LAST_LINES = 15
_PYTEST_SUMMARY = re.compile(r"\d+ (?:passed|failed|skipped|errors?|deselected)\b.* in [\d.]+s")


@dataclass(frozen=True)
class Step:
    """A command with a time limit.

    Attributes:
        environment: variables added to those of this process.
        needs: names of steps that must have passed, unless they are not among the steps to run.
        gates: True if the whole run fails with this step; otherwise a failure is only reported.
    """

    name: str
    seconds: float
    command: Sequence[str | Path]
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    gates: bool = True


@dataclass(frozen=True)
class Outcome:
    """The outcome of a step.

    Attributes:
        state: "passed", "skipped", "failed", "cut" by its time limit, "absent" if there is no such command,
            or "not run".
        detail: the most informative line of its output.
    """

    step: Step
    state: str
    seconds: float
    detail: str

    @property
    def is_bad(self) -> bool:
        """Tell whether the whole run fails with this step. The caller decides on skipped steps."""
        return self.step.gates and self.state not in ("passed", "skipped")


def run_steps(steps: Sequence[Step], logs: Path, seconds: float) -> list[Outcome]:
    """Run the steps in order within `seconds`, and print a table of how they ended.

    A step whose time is over is interrupted, so that it can report how far it came; five seconds later it is
    killed with all processes that it has started. The same happens to the current step when this process is
    interrupted or terminated.

    Args:
        steps: the steps.
        logs: folder for a file NAME.log of each step.
        seconds: time limit for all steps together. Steps that would begin after it are not run.
    """
    console = Console(highlight=False)
    logs.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    deadline = time.monotonic() + seconds
    with _ended_by_signals():
        try:
            for step in steps:
                console.print(f"== {escape(step.name)}")
                lacking = [o.step.name for o in outcomes if o.step.name in step.needs and o.state != "passed"]
                if lacking:
                    outcome = Outcome(step, "not run", 0.0, f"{', '.join(lacking)} did not pass")
                else:
                    outcome = _run(step, logs / f"{step.name}.log", deadline - time.monotonic())
                outcomes.append(outcome)
                console.print(f"== {escape(step.name)}: {outcome.state}, {outcome.seconds:.0f} s\n")
        finally:
            console.print(_table(outcomes))
    return outcomes


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the program as Ctrl-C does, so that it ends its step."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, end) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _run(step: Step, path: Path, left: float) -> Outcome:
    if left < 1.0:
        return Outcome(step, "not run", 0.0, "no time was left")
    limit, began = min(step.seconds, left), time.monotonic()
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
            log.write(f"{error}\n".encode())
            return Outcome(step, "absent", 0.0, str(error))
        code: int | None = None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGINT)
        finally:
            _signal(process, signal.SIGKILL)
    taken = time.monotonic() - began
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    print("\n".join(lines[-_LAST_LINES:]), flush=True)
    if code is None:
        stays = "" if process.poll() is not None else "; killed, but it is still there"
        return Outcome(step, "cut", taken, f"ended after {limit:.0f} s{stays}; {_last(lines)}")
    # pytest exits with 0 if all tests were skipped, and with 5 if all files were.
    summary = _last(lines)
    if code in (0, 5) and " skipped" in summary and " passed" not in summary:
        reasons = [line.partition(": ")[2] for line in lines if line.startswith("SKIPPED")]
        return Outcome(step, "skipped", taken, reasons[0] if reasons else summary)
    if code != 0:
        errors = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
        detail = summary if _PYTEST_SUMMARY.search(summary) or not errors else errors[0].strip()
        return Outcome(step, "failed", taken, f"exit status {code}; {detail}")
    return Outcome(step, "passed", taken, summary if _PYTEST_SUMMARY.search(summary) else "")


def _last(lines: Sequence[str]) -> str:
    return lines[-1].strip(" =") if lines else "it wrote nothing"


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to the process and its group, and wait for its exit."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_SECONDS_TO_EXIT)


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table("step", "state", "seconds", "what it said")
    for outcome in outcomes:
        name = outcome.step.name + ("" if outcome.step.gates else " (reported only)")
        table.add_row(escape(name), outcome.state, f"{outcome.seconds:.0f}", escape(outcome.detail))
    return table
