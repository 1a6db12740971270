"""Start commands as processes, send them signals, wait for them within a limit, and read their output."""

import os
import pty
import re
import select
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

MARK = "MOPO_FAST_SOAK"
"""Environment variable by which a case's processes are known, grandchildren and daemons too."""

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Ended:
    """Result of a command that has ended."""

    code: int
    """Exit code, or the negative number of the signal that ended it."""
    output: str
    errors: str
    """Text of standard error; on a terminal, text of both outputs in their order."""
    seconds: float
    """Seconds from the signal that ended it, or else from its start."""

    @property
    def lines(self) -> list[str]:
        """Return the non-blank lines of standard error."""
        return [line.strip() for line in self.errors.splitlines() if line.strip()]


class Process:
    """One command, whose outputs go to `{log}.out` and `{log}.err`.

    Args:
        terminal: True to connect both outputs to a terminal, which is recorded in `{log}.err`.
        memory: limit of address space in bytes, or None.
    """

    def __init__(
        self,
        argv: list[str],
        folder: Path,
        environment: dict[str, str],
        log: Path,
        *,
        terminal: bool = False,
        memory: int | None = None,
    ) -> None:
        self.log = log
        if memory is not None:
            argv = ["sh", "-c", 'ulimit -v "$0" && exec "$@"', str(memory >> 10), *argv]
        out, err = log.with_suffix(".out").open("wb"), log.with_suffix(".err").open("wb")
        self._reader: threading.Thread | None = None
        with out, err:
            streams = (out.fileno(), err.fileno())
            if terminal:
                ours, theirs = pty.openpty()
                streams = (theirs, theirs)
                self._reader = threading.Thread(target=_record, args=(ours, os.dup(err.fileno())))
            self.began = time.monotonic()
            self.process = subprocess.Popen(
                argv,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=streams[0],
                stderr=streams[1],
                # A process group, as a shell makes it, because Ctrl-C signals the group.
                start_new_session=True,
                # A background soak ignores SIGINT, which its children would inherit.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            if terminal:
                os.close(theirs)
        if self._reader is not None:
            self._reader.start()
        self._exit = os.pidfd_open(self.process.pid)

    def wait(self, seconds: float) -> bool:
        """Wait for the end, at most so many seconds; return whether the process has ended."""
        if self.process.returncode is None and select.select([self._exit], [], [], max(0.0, seconds))[0]:
            self.process.wait()
        return self.process.returncode is not None

    def signal(self, number: int, *, group: bool = False) -> None:
        self.began = time.monotonic()
        (os.killpg if group else os.kill)(self.process.pid, number)

    def ended(self) -> Ended:
        """Return the exit code and the outputs of the ended process."""
        assert self.process.returncode is not None
        seconds = time.monotonic() - self.began
        os.close(self._exit)
        if self._reader is not None:
            # Another check finds daemons that keep the terminal open.
            self._reader.join(5)
        output, errors = (
            _ESCAPES.sub("", self.log.with_suffix(suffix).read_text(errors="replace")).replace("\r", "\n")
            for suffix in (".out", ".err")
        )
        return Ended(self.process.returncode, output, errors, seconds)


def _record(terminal: int, file: int) -> None:
    try:
        while chunk := os.read(terminal, 1 << 16):
            os.write(file, chunk)
    except OSError:
        # The other end of the terminal is closed by all processes.
        pass
    finally:
        os.close(terminal)
        os.close(file)


def marked(mark: str) -> dict[int, str]:
    """Return {process: command line} of all living processes whose environment has the mark."""
    found = {}
    wanted = f"{MARK}={mark}\0".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes():
                words = (folder / "cmdline").read_bytes().split(b"\0")
                # An empty command line is a zombie's.
                if words[0]:
                    found[int(folder.name)] = b" ".join(words).decode(errors="replace")
        except OSError:
            continue
    return found


def end_marked(mark: str) -> None:
    """Kill every process with the mark."""
    for pid in marked(mark):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def peak_memory(pid: int) -> int:
    """Return the peak of a process's address space in bytes; 0 if the process is gone."""
    try:
        found = re.search(r"VmPeak:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        found = None
    return int(found[1]) << 10 if found else 0


def count_libraries(pid: int) -> int:
    """Count the shared libraries that a process has loaded; 0 if the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return 0
    # Each library has one executable mapping.
    return sum(" r-xp " in line and ".so" in line for line in lines)
