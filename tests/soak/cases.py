"""Cases: one scenario with one fault, drawn from a seed, and the checks during and after it."""

import fcntl
import random
import re
import shlex
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from disks import Disk
from processes import MARK, Ended, Process, count_libraries, end_marked, marked, peak_memory
from results import contents, difference, leftovers
from scenarios import DISK, Scenario, environment

# A command hangs if it takes longer than this many seconds and than ten times its undisturbed time.
_HANG = 60.0
# Limit of the seconds from SIGINT to the end. An idle machine needs 0.5; a busy one must not fail.
INTERRUPT_BOUND = 20.0
# Seconds after a command's end within which its children must end too.
_CHILDREN = 60.0

_UGLY = re.compile(
    r"Traceback \(most recent call last\)|Fatal Python error|Exception ignored|terminate called|"
    r"Segmentation fault|Bus error|core dumped|^Aborted|resource_tracker"
)
# The last line of an exception, of a C++ abort, and of our own errors.
_TELLING = re.compile(r"^(\w+\.)*\w*(Error|Exception|Interrupt)\b|^error: |^stopped|what\(\):|^Fatal|libgomp")
# Ends without memory that a command cannot turn into a sentence: Rust's libraries (safetensors) abort; HDF5
# has a SIGSEGV when it opens a file with less than 0.5 MiB of address space left; MuJoCo's exception has no
# text; NumPy's OpenBLAS exits.
_CRASHES = re.compile(
    r"^memory allocation of \d+ bytes failed$|h5py/.* in make_fid$|^RuntimeError: Caught an unknown exc|"
    r"^OpenBLAS error: Memory allocation still failed",
    re.MULTILINE,
)
# Data are opened soon after the imports.
_HDF5_OPENS = 2 << 20
_OF_RAY = ("ray",)
_OLD = b"what was there before\n"


class Failure(Exception):
    """A failed check, as a sentence; `detail` holds numbers that differ between cases."""

    def __init__(self, what: str, detail: str = "") -> None:
        super().__init__(what)
        self.detail = detail


@dataclass(frozen=True)
class Reference:
    """Results of a scenario's undisturbed run."""

    contents: dict[str, str]
    output: str
    began: float
    """Seconds until its first file existed."""
    seconds: float
    disk: int
    """Bytes of its files at the end."""
    memory_began: int
    """Bytes of address space after the imports."""
    memory: int
    """Peak of the address space in bytes."""


@dataclass(eq=False)
class Case:
    """One case; everything random comes from `rng`.

    Attributes:
        folder: the case's folder, in which the command runs.
        interrupts: seconds from each SIGINT to the end.
        crashed: True if a library has ended a process for want of memory.
    """

    scenario: Scenario
    fault: str
    rng: random.Random
    folder: Path
    inputs: Path
    mark: str
    interrupts: list[float] = field(default_factory=list)
    crashed: bool = False
    log: list[str] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)

    @property
    def disk(self) -> Path:
        return self.folder / DISK

    def __post_init__(self) -> None:
        self.disk.mkdir(parents=True)
        # A short path, since the paths of Ray's sockets in it are limited.
        self.temporary = Path(tempfile.mkdtemp(prefix="soak-"))
        self.terminal = self.rng.random() < 0.3
        self.quiet = self.rng.random() < 0.3

    def start(self, *, again: bool = False, memory: int | None = None) -> Process:
        argv = self.scenario.argv(self.inputs, again=again, quiet=self.quiet)
        number = len(self.processes) + 1
        where = "on a terminal" if self.terminal else "into files"
        limit = f", ulimit -v {memory >> 10}" if memory else ""
        self.note(f"[{number}] {shlex.join(argv)}   ({where}{limit})")
        variables = environment(self.temporary) | {MARK: self.mark}
        log = self.folder / f"attempt-{number}"
        process = Process(argv, self.folder, variables, log, terminal=self.terminal, memory=memory)
        self.processes.append(process)
        return process

    def close(self) -> None:
        """Kill the processes that a failed case has left."""
        end_marked(self.mark)
        for process in self.processes:
            process.wait(60)
        shutil.rmtree(self.temporary, ignore_errors=True)

    def note(self, line: str) -> None:
        self.log.append(line)

    def end(self, process: Process, bound: float) -> Ended:
        """Wait for the end of a process and of its children."""
        ended = self.end_alone(process, bound)
        self.end_children()
        return ended

    def end_alone(self, process: Process, bound: float) -> Ended:
        """Wait for the end of a process; one that hangs prints its stacks and is killed."""
        if not process.wait(bound):
            # Makes Python print the stack of every thread.
            process.signal(signal.SIGABRT)
            if not process.wait(10):
                process.signal(signal.SIGKILL)
                process.wait(60)
            process.ended()
            raise Failure("the command hangs", f"for {bound:.0f} s; its stacks are in its .err")
        ended = process.ended()
        self.note(f"    exit code {ended.code} after {ended.seconds:.2f} s")
        return ended

    def end_children(self) -> None:
        """Wait for the children of commands that have ended."""
        deadline = time.monotonic() + _CHILDREN
        while alive := marked(self.mark):
            if time.monotonic() > deadline:
                raise Failure("processes are alive after the command has ended", "; ".join(alive.values()))
            time.sleep(0.05)

    def finish(self, reference: Reference, *, again: bool) -> None:
        """Run the command again; it must succeed and leave the files of an undisturbed run."""
        bound = _HANG + 10 * reference.seconds
        ended = self.end(self.start(again=again), bound)
        if ended.code != 0:
            raise Failure(f"the command given again ends with {_said(ended)}", f"exit code {ended.code}")
        self.check_result(reference)

    def check_result(self, reference: Reference) -> None:
        if left := leftovers(self.disk):
            raise Failure(f"temporary files are left: {_pattern(left[0])}", ", ".join(left))
        if differs := difference(contents(self.disk), reference.contents):
            raise Failure(f"the result differs from an undisturbed run's: {differs}")
        # A killed process cannot remove its files there.
        others = sorted(path.name for path in self.temporary.iterdir() if path.name not in _OF_RAY)
        if others and self.fault not in KILLING and not self.crashed:
            raise Failure(f"files are left in TMPDIR: {_pattern(others[0])}", ", ".join(others))


def undisturbed(case: Case) -> Reference:
    """Run a case's command without a fault, and measure it."""
    case.terminal, case.quiet = False, True
    process = case.start()
    began, memory_began, memory, libraries = 0.0, 0, 0, 0
    while not process.wait(0.005):
        memory = max(memory, peak_memory(process.process.pid))
        # The last shared library is loaded by the last import.
        if (loaded := count_libraries(process.process.pid)) > libraries:
            libraries, memory_began = loaded, memory
        if not began and any(path.is_file() for path in case.disk.rglob("*")):
            began = time.monotonic() - process.began
        if time.monotonic() - process.began > 20 * _HANG:
            break
    ended = case.end(process, 0)
    if ended.code != 0:
        raise Failure(f"the undisturbed command ends with {_said(ended)}")
    if left := leftovers(case.disk):
        raise Failure(f"the undisturbed command leaves temporary files: {_pattern(left[0])}")
    size = sum(path.stat().st_blocks * 512 + 4096 for path in case.disk.rglob("*"))
    return Reference(contents(case.disk), ended.output, began, ended.seconds, size, memory_began, memory)


def _said(ended: Ended) -> str:
    """Return the exit code and the most informative line, for a failure's text."""
    telling = [line for line in ended.lines if _TELLING.search(line)] or ended.lines or ["nothing said"]
    return f"{_code(ended.code)}: {_pattern(telling[-1])}"


def _code(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _pattern(text: str) -> str:
    """Replace parts that differ from case to case: paths, numbers, random names."""
    text = re.sub(r"\S*/build/soak/\S+?/(?=disk|tmp|inputs|hopper|run)", "", text)
    text = re.sub(r"\.[A-Za-z0-9_]{8}\.tmp", ".XXXXXXXX.tmp", text)
    return _digitless(text)[:200]


def _digitless(text: str) -> str:
    return re.sub(r"\d+", "N", text)


def _check_sentence(ended: Ended) -> None:
    """Check for exit code 2 and one sentence that begins with "error: "."""
    if ended.code != 2:
        raise Failure(f"in place of exit code 2, {_said(ended)}")
    _check_clean(ended)
    sentences = [line for line in ended.lines if line.startswith("error: ")]
    if len(sentences) != 1 or sentences[0] != ended.lines[-1]:
        raise Failure(f"exit code 2 without one sentence as its last line: {_said(ended)}")


def _check_clean(ended: Ended) -> None:
    for line in ended.lines:
        if found := _UGLY.search(line):
            raise Failure(f"{found[0]!r} on standard error, the last line: {_said(ended)}")


def _moment(case: Case, reference: Reference) -> float:
    """Draw seconds after the start, mostly after the first file is there, else also during the imports."""
    first = reference.began if case.rng.random() < 0.8 else 0.0
    return case.rng.uniform(first, reference.seconds)


def _stopped(case: Case, reference: Reference, number: signal.Signals) -> None:
    """Stop one attempt or two at random moments; then let the command finish."""
    for attempt in range(case.rng.choice([1, 1, 1, 2])):
        moment = _moment(case, reference)
        process = case.start(again=attempt > 0)
        if process.wait(moment):
            ended = case.end(process, 0)
            if ended.code != 0:
                raise Failure(f"the command ends before the signal with {_said(ended)}")
            break
        # Ctrl-C on a terminal goes to the whole group.
        process.signal(number, group=number == signal.SIGINT and case.terminal)
        case.note(f"    {number.name} after {moment:.2f} s")
        ended = case.end(process, _HANG)
        if number == signal.SIGINT:
            _check_interrupt(case, ended, reference)
        # Ray aborts on SIGTERM.
        elif ended.code not in (-number, 0) and not case.scenario.rare:
            raise Failure(f"after {number.name}: {_said(ended)}")
    case.finish(reference, again=True)


def _check_interrupt(case: Case, ended: Ended, reference: Reference) -> None:
    text = ended.output + ended.errors
    # Python prints its own traceback before the program's first line and after its last.
    early = ended.lines[-1:] in ([], ["KeyboardInterrupt"]) and ", in main" not in text
    late = _digitless(reference.output.strip().splitlines()[-1]) in _digitless(text)
    if early or late:
        case.note("    outside of the command itself")
        return
    case.interrupts.append(ended.seconds)
    _check_clean(ended)
    # A shell shows 130 for both. Python ends by the signal if it came within an exec(), which dataclasses
    # use.
    stopped = ended.code in (130, -signal.SIGINT) and ended.lines and ended.lines[-1].startswith("stopped")
    if not stopped:
        raise Failure(f"after SIGINT, in place of exit code 130 and a line: {_said(ended)}")
    if left := leftovers(case.disk):
        raise Failure(f"after SIGINT, temporary files are left: {_pattern(left[0])}", ", ".join(left))
    if ended.seconds > INTERRUPT_BOUND:
        raise Failure(f"more than {INTERRUPT_BOUND:g} s from SIGINT to the end", f"{ended.seconds:.2f} s")


def killed(case: Case, reference: Reference) -> None:
    _stopped(case, reference, signal.SIGKILL)


def terminated(case: Case, reference: Reference) -> None:
    _stopped(case, reference, signal.SIGTERM)


def interrupted(case: Case, reference: Reference) -> None:
    _stopped(case, reference, signal.SIGINT)


def full(case: Case, reference: Reference) -> None:
    """Run on a disk that is too small; then on the same disk, enlarged."""
    size = max(4096, int(reference.disk * case.rng.uniform(0.0, 1.1)))
    disk = Disk(case.disk, size)
    case.note(f"tmpfs of {size:,} bytes; an undisturbed run's files take {reference.disk:,}")
    try:
        _put_old(case)
        ended = case.end(case.start(), _HANG + 10 * reference.seconds)
        if ended.code != 0:
            _check_sentence(ended)
            _check_old(case)
            if left := leftovers(case.disk):
                raise Failure(f"temporary files are left on a full disk: {_pattern(left[0])}")
        disk.resize(4 * reference.disk + (64 << 20))
        case.finish(reference, again=True)
    finally:
        _keep(case, disk)


def read_only(case: Case, reference: Reference) -> None:
    """Run in a read-only folder, empty or of a killed run; then in a writable one."""
    disk = Disk(case.disk, 4 * reference.disk + (64 << 20))
    try:
        again = case.rng.random() < 0.5
        if again:
            process = case.start()
            if not process.wait(_moment(case, reference)):
                process.signal(signal.SIGKILL)
            case.end(process, _HANG)
        else:
            _put_old(case)
        before = contents(case.disk)
        disk.set_writable(False)
        case.note("the disk is read-only")
        ended = case.end(case.start(again=again), _HANG + 10 * reference.seconds)
        # A complete result need not be written again.
        if ended.code != 0 or before != reference.contents:
            _check_sentence(ended)
        disk.set_writable(True)
        if contents(case.disk) != before:
            raise Failure("a read-only folder has changed")
        case.finish(reference, again=True)
    finally:
        _keep(case, disk)


def memory(case: Case, reference: Reference) -> None:
    """Run with less address space than it needs, but enough for the imports."""
    limit = int(case.rng.uniform(reference.memory_began + _HDF5_OPENS, 1.02 * reference.memory))
    case.note(f"the imports take {reference.memory_began >> 20} MiB, the command {reference.memory >> 20}")
    _put_old(case)
    ended = case.end(case.start(memory=limit), _HANG + 10 * reference.seconds)
    if ended.code not in (0, 2) and (crash := _CRASHES.search(ended.errors)):
        case.note(f"    a library has ended the process: {crash[0]}")
        case.crashed = True
        _check_old(case)
    elif ended.code != 0:
        _check_sentence(ended)
        _check_old(case)
        if left := leftovers(case.disk):
            raise Failure(f"temporary files are left without memory: {_pattern(left[0])}")
    case.finish(reference, again=True)


def two(case: Case, reference: Reference) -> None:
    """Run two commands on one folder; the second begins a little later, or while the first is stopped."""
    held, bound = False, _HANG + 20 * reference.seconds
    if case.scenario.exclusive and case.rng.random() < 0.5:
        first = case.start()
        first.wait(case.rng.uniform(reference.began, reference.seconds))
        if first.process.returncode is None:
            first.signal(signal.SIGSTOP)
            held = any(_is_locked(path) for path in case.disk.rglob(".lock"))
            case.note(f"    SIGSTOP; its folder is {'locked' if held else 'not locked'}")
        if held:
            ended = case.end_alone(case.start(again=True), bound)
            _check_sentence(ended)
            if "another process is at work" not in ended.lines[-1]:
                raise Failure(f"the second process is refused otherwise: {_said(ended)}")
        if first.process.returncode is None:
            first.signal(signal.SIGCONT)
        ends = [case.end(first, bound)]
    else:
        first = case.start()
        time.sleep(case.rng.choice([0.0, case.rng.uniform(0, reference.seconds)]))
        second = case.start(again=True)
        ends = [case.end_alone(process, bound) for process in (first, second)]
        case.end_children()
    for ended in ends:
        if ended.code != 0:
            _check_sentence(ended)
    if all(ended.code != 0 for ended in ends):
        raise Failure("two processes on one folder, and both are refused", _said(ends[0]))
    case.check_result(reference)


def _is_locked(path: Path) -> bool:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _put_old(case: Case) -> None:
    if case.scenario.old is not None:
        try:
            (case.disk / case.scenario.old).write_bytes(_OLD)
        except OSError:
            (case.disk / case.scenario.old).unlink(missing_ok=True)


def _check_old(case: Case) -> None:
    if case.scenario.old is None:
        return
    path = case.disk / case.scenario.old
    if path.exists() and path.read_bytes() != _OLD:
        raise Failure("the old file is gone though the command has failed")


def _keep(case: Case, disk: Disk) -> None:
    """Copy the disk's files to a folder beside it."""
    copy = case.folder / "disk-kept"
    shutil.copytree(case.disk, copy, symlinks=True)
    disk.unmount()


FAULTS: dict[str, Callable[[Case, Reference], None]] = {
    "SIGKILL": killed,
    "SIGTERM": terminated,
    "SIGINT": interrupted,
    "full": full,
    "read-only": read_only,
    "memory": memory,
    "two": two,
}
KILLING = ("SIGKILL", "SIGTERM", "read-only")
MOUNTED = ("full", "read-only")


class References:
    """Undisturbed runs, each made on first use."""

    def __init__(self, make: Callable[[Scenario], Reference]) -> None:
        self._make = make
        self._locks: dict[str, threading.Lock] = {}
        self._made: dict[str, Reference | Failure] = {}
        self._lock = threading.Lock()

    def get(self, scenario: Scenario) -> Reference:
        with self._lock:
            lock = self._locks.setdefault(scenario.name, threading.Lock())
        with lock:
            if scenario.name not in self._made:
                try:
                    self._made[scenario.name] = self._make(scenario)
                except Failure as failure:
                    self._made[scenario.name] = failure
        made = self._made[scenario.name]
        if isinstance(made, Failure):
            raise made
        return made
