"""Progress with the time left: a bar on a terminal, plain lines in a log file, a pipe or a notebook."""

import collections
import contextlib
import math
import sys
import threading
import time
from collections.abc import Iterator

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mopo_fast.errors import printable

# FORCE_COLOR, which many CI systems set, turns colours on; it must not turn on moving bars in their logs.
console = Console(
    stderr=True,
    force_jupyter=False,
    force_interactive=None if sys.stderr is not None and sys.stderr.isatty() else False,
)

# Without a terminal: seconds between two lines while the position moves, and while it stands still.
_LINE_SECONDS, _STILL_SECONDS = 60.0, 600.0
# Seconds after which the speed of a first, unfinished unit is good enough for an estimate.
_FIRST_SECONDS = 10.0
# Widths of a bar in characters.
_BAR_WIDTHS = (6, 40)


def format_seconds(seconds: float) -> str:
    """Format a duration, such as "0.4s", "2m 05s", "3h 05m" or "2d 03h"."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    for size, unit, smaller_size, smaller in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // smaller_size:02}{smaller}"
    return f"{whole}s"


def _shorten(text: str, width: int) -> str:
    """Cut a text to so many columns of a terminal, with "…" at the end of what was cut."""
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 1) + "…" if width > 0 else ""


class Bar:
    """The progress of some work.

    This class shows nothing. Its subclasses show the progress on a terminal or in lines.

    Args:
        description: name of the work.
        total: number of units, or None where it is unknown.
        completed: units that an earlier session has made.
        unit: name of the units where fractions of them count, such as "epoch", or "".
        open_ended: the work may become longer than `total`.
    """

    def __init__(
        self,
        description: str = "",
        total: float | None = None,
        completed: float = 0,
        unit: str = "",
        open_ended: bool = False,
    ) -> None:
        self.description, self.unit, self.open_ended = description, unit, open_ended
        self.total, self.completed, self.note = total, completed, ""
        self._first, self._started = completed, time.monotonic()
        # Times and positions, from which the speed is measured.
        self._samples = collections.deque([(self._started, completed)])
        self._moved = self._started
        self._estimated = not unit

    def advance(self, amount: float = 1) -> None:
        """Move the position by `amount` units."""
        self.update(completed=self.completed + amount)

    def update(
        self, *, completed: float | None = None, total: float | None = None, note: str | None = None
    ) -> None:
        """Set the position, the length, or the note at the end."""
        if total is not None:
            self.total = total
        if note is not None:
            self.note = printable(note)
        if completed is not None and completed != self.completed:
            self.completed, self._moved = completed, time.monotonic()
            self._take_sample()
            if self.open_ended and self._moved - self._started >= _FIRST_SECONDS:
                self._tell_estimate()

    def report(self) -> None:
        """Say that a unit is finished. It is printed in a line, unless there is a bar to see."""
        self._moved = time.monotonic()
        self._take_sample()
        self._tell_estimate()

    def _say(self, text: str) -> None:
        """Print a line of text."""

    def _take_sample(self) -> None:
        elapsed = self._moved - self._started
        if self._moved - self._samples[-1][0] >= 0.01 * elapsed:
            self._samples.append((self._moved, self.completed))
        # The speed is that of the last half of the time, since the work may have begun faster or slower.
        while len(self._samples) > 2 and self._samples[1][0] <= self._moved - max(60.0, elapsed / 2):
            self._samples.popleft()

    def _unit_seconds(self) -> float | None:
        """Return the seconds that a unit takes, or None before the first movement."""
        since, position = self._samples[0]
        made = self.completed - position
        return (self._moved - since) / made if made > 0 else None

    def seconds_left(self) -> float | None:
        """Return the expected seconds until the end, or None where they are unknown."""
        each = self._unit_seconds()
        if each is None or self.total is None:
            return None
        return max(0.0, each * (self.total - self.completed) - (time.monotonic() - self._moved))

    def _tell_estimate(self) -> None:
        """Print once what a unit and the whole are expected to take."""
        each = self._unit_seconds()
        if self._estimated or each is None or self.total is None:
            return
        self._estimated = True
        whole = self.total - self._first
        more = " or more" if self.open_ended else ""
        self._say(
            f"{self.description}: about {format_seconds(each)} for each {self.unit},"
            f" {format_seconds(each * whole)}{more} for {whole:g}{more} {self.unit}s"
        )

    def _count(self) -> str:
        """Return the position and the length, such as "3.2/9+"."""
        count = f"{math.floor(10 * self.completed) / 10:.1f}" if self.unit else f"{int(self.completed)}"
        if self.total is None:
            return count
        whole = f"{int(self.total)}"
        return f"{count.rjust(len(whole) + 2 * bool(self.unit))}/{whole}{'+' * self.open_ended}"

    def _times(self) -> str:
        """Return the time since the start and the time left."""
        left, elapsed = self.seconds_left(), format_seconds(time.monotonic() - self._started)
        if left is None or self.completed == self.total:
            return elapsed
        return f"{elapsed}, {format_seconds(left)}{'+' * self.open_ended} left"


class _TerminalBar(Bar):
    """A line on the terminal that moves."""

    def _say(self, text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # A terminal that is one column too narrow would wrap the line and leave its remains behind.
        width = options.max_width - 1
        counted = f"{self._count()} {self._times()}"
        gaps = 4
        room = width - cell_len(counted) - _BAR_WIDTHS[0] - gaps
        description = _shorten(self.description, room)
        room = width - cell_len(description) - cell_len(counted) - gaps
        bar = min(_BAR_WIDTHS[1], max(_BAR_WIDTHS[0], room - cell_len(self.note)))
        line = Table.grid(padding=(0, 1, 0, 0))
        line.add_row(
            Text(description, style="bold"),
            ProgressBar(self.total, self.completed, width=bar, pulse=self.total is None),
            Text(counted),
            Text(_shorten(self.note, room - bar)),
        )
        yield line


class _Lines(Bar):
    """Plain lines: one for each finished unit that is reported, and some in between where that takes long."""

    _last_line: tuple[float, float] | None = None

    def _say(self, text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def report(self) -> None:
        """Print the position, the time left and the note."""
        super().report()
        self._print_line()

    def _print_line(self) -> None:
        self._last_line = time.monotonic(), self.completed
        unit = f" {self.unit}s" if self.unit else ""
        count = self._count().strip().replace(".0/", "/")
        parts = [f"{count}{unit}", self._times(), self.note]
        self._say(f"{self.description}: {', '.join(filter(None, parts))}")

    def finish(self) -> None:
        """Print the last position, unless it was."""
        if self._last_line is None or self._last_line[1] != self.completed:
            self._print_line()

    def keep_printing(self, stop: threading.Event) -> None:
        """Print a line a minute while the position moves, and one every ten minutes while it does not."""
        while True:
            when, position = self._last_line or (self._started, self._first)
            still = position == self.completed
            now = time.monotonic()
            if now - when >= (_STILL_SECONDS if still else _LINE_SECONDS):
                self._print_line()
            if stop.wait(min(1.0, _LINE_SECONDS)):
                return


@contextlib.contextmanager
def progress_bar(
    description: str,
    total: float | None,
    *,
    completed: float = 0,
    unit: str = "",
    open_ended: bool = False,
    quiet: bool = False,
) -> Iterator[Bar]:
    """Show the progress of the block: by a bar on a terminal, otherwise by lines, with `quiet` not at all.

    Args:
        description: name of the work.
        total: number of units of the work, or None where it is unknown.
        completed: units that an earlier session has made.
        unit: name of the units where fractions of them count, such as "epoch". Their expected time is printed
            once it is known.
        open_ended: the work may become longer than `total`.
        quiet: show nothing.
    """
    arguments = (printable(description), total, completed, unit, open_ended)
    if quiet:
        yield Bar(*arguments)
    elif console.is_interactive:
        bar = _TerminalBar(*arguments)
        live = Live(bar, console=console, refresh_per_second=10)
        try:
            # If start() finds no memory for its thread, stop() must still show the cursor.
            live.start(refresh=True)
            yield bar
        finally:
            live.stop()
    else:
        lines, stop = _Lines(*arguments), threading.Event()
        thread = threading.Thread(target=lines.keep_printing, args=(stop,), daemon=True)
        thread.start()
        try:
            yield lines
        finally:
            stop.set()
            thread.join()
            lines.finish()
