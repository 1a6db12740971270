"""Run a command as in a terminal, and see what it would show."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Sequence

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def run_on_terminal(command: Sequence[str], columns: int = 80) -> tuple[int, list[str]]:
    """Run a command whose output and errors go to a terminal of 24 lines.

    Returns:
        The exit code, and every line that was drawn, in order, without colours. A line that was drawn again
        is listed again.
    """
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    environment["TERM"] = "xterm-256color"
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=environment)
    os.close(child)
    drawn = bytearray()
    while True:
        try:
            block = os.read(parent, 2**16)
        except OSError:  # Linux's way to say that the other end is closed.
            break
        if not block:
            break
        drawn += block
    os.close(parent)
    lines = re.split(r"[\r\n]+", _ESCAPES.sub("", drawn.decode()))
    return process.wait(), lines
