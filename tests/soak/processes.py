"""Commands in processes of their own: started, signalled, waited for with a bound, and read."""

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
    """A command that has ended."""

    code: int
    """As `subprocess` has it: negative for a signal."""
    output: str
    errors: str
    """The text of standard error; on a terminal, of both outputs, as they came."""
    seconds: float
    """From the signal that ended it, else from its start."""

    @property
    def lines(self) -> list[str]:
        """The lines of standard error that are not blank."""
        return [line.strip() for line in self.errors.splitlines() if line.strip()]


class Process:
    """One command, whose outputs go to `{log}.out` and `{log}.err`.

    Args:
        terminal: both outputs are a terminal, which `{log}.err` records.
        memory: bytes of address space; None: no limit.
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
                # A group of its own, as a shell makes it: Ctrl-C is a signal to the group.
                start_new_session=True,
                # A soak in the background ignores SIGINT, and its children would too.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            if terminal:
                os.close(theirs)
        if self._reader is not None:
            self._reader.start()
        self._exit = os.pidfd_open(self.process.pid)

    def wait(self, seconds: float) -> bool:
        """Wait for its end, so many seconds at most; return whether it has ended."""
        if self.process.returncode is None and select.select([self._exit], [], [], max(0.0, seconds))[0]:
            self.process.wait()
        return self.process.returncode is not None

    def signal(self, number: int, *, group: bool = False) -> None:
        self.began = time.monotonic()
        (os.killpg if group else os.kill)(self.process.pid, number)

    def ended(self) -> Ended:
        """Return its exit code and outputs; it must have ended."""
        assert self.process.returncode is not None
        seconds = time.monotonic() - self.began
        os.close(self._exit)
        if self._reader is not None:
            # Daemons that hold the terminal open are another check's.
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
        # All who had the other end have closed it.
        pass
    finally:
        os.close(terminal)
        os.close(file)


def marked(mark: str) -> dict[int, str]:
    """{process: its command line} of those alive whose environment has the mark."""
    found = {}
    wanted = f"{MARK}={mark}\0".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes():
                words = (folder / "cmdline").read_bytes().split(b"\0")
                # A zombie has no command line.
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
    """Bytes of address space that the process has had at most; 0 when it is gone."""
    try:
        found = re.search(r"VmPeak:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        found = None
    return int(found[1]) << 10 if found else 0


def count_libraries(pid: int) -> int:
    """Count the shared libraries that the process has loaded; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return 0
    # Each has one part that is executed.
    return sum(" r-xp " in line and ".so" in line for line in lines)
