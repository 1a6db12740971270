"""Progress with the time left: a bar on a terminal or in a notebook, plain lines in a log file or a pipe."""

import collections
import contextlib
import io
import math
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

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
# Seconds of a unit from which on tenths of it are shown.
_LONG_UNIT_SECONDS = 10.0
# In a notebook: seconds between two updates of the line, and its width in characters.
_NOTEBOOK_SECONDS, _NOTEBOOK_WIDTH = 0.2, 100
# Widths of a bar in characters.
_BAR_WIDTHS = (12, 40)


def in_notebook() -> bool:
    """Tell whether this process is the kernel of a notebook, which shows standard error in red."""
    return Console().is_jupyter


def print_lines(text: str) -> None:
    """Print lines to standard error, or in a notebook to its cell's standard output."""
    if in_notebook():
        print(text)
    else:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


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


def _leading_parts(note: str, width: int) -> str:
    """Return as many of a note's parts as fit into so many columns; a number that is cut would mislead."""
    parts = note.split(", ")
    while parts and cell_len(", ".join(parts)) > width:
        parts.pop()
    return ", ".join(parts)


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
        unit: name of a unit, such as "epoch", or "" where the description says it.
        open_ended: the work may become longer than `total`.
        at_most: most units that open-ended work takes, or None where there is no such bound.
    """

    def __init__(
        self,
        description: str = "",
        total: float | None = None,
        completed: float = 0,
        unit: str = "",
        open_ended: bool = False,
        at_most: float | None = None,
    ) -> None:
        self.description, self.unit, self.open_ended, self.at_most = description, unit, open_ended, at_most
        self.total, self.completed, self.note = total, completed, ""
        self._first, self._started = completed, time.monotonic()
        # Times and positions, from which the speed is measured.
        self._samples = collections.deque([(self._started, completed)])
        self._moved = self._started
        self._estimated = not unit
        self._reported: float | None = None

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
        self._reported = self.completed
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

    def _may_grow(self) -> bool:
        """Tell whether the work may still become longer than `total`."""
        ended = self.completed == self.total and self.completed in (self._reported, self._first)
        return self.open_ended and not ended and self.total != self.at_most

    def length(self) -> float | None:
        """Return the number of units, at most or as it stands, or None where it is unknown."""
        return self.at_most if self._may_grow() and self.at_most is not None else self.total

    def _bound(self) -> str:
        """Return "+" where the work may become longer than `length()`."""
        return "+" if self._may_grow() and self.at_most is None else ""

    def seconds_left(self) -> float | None:
        """Return the expected seconds until the end, or None where they are unknown."""
        each, length = self._unit_seconds(), self.length()
        if each is None or length is None:
            return None
        return max(0.0, each * (length - self.completed) - (time.monotonic() - self._moved))

    def _tell_estimate(self) -> None:
        """Print once what a unit and the whole are expected to take."""
        each, length = self._unit_seconds(), self.length()
        if self._estimated or each is None or length is None:
            return
        self._estimated = True
        whole = length - self._first
        more = " or more" if self._bound() else " at most" if self._may_grow() else ""
        self._say(
            f"{self.description}: about {format_seconds(each)} for each {self.unit},"
            f" {format_seconds(each * whole)}{more} for {whole:g} {self.unit}s{more}"
        )

    def count(self) -> str:
        """Return the position and the length, such as "3/9+ epochs" or "3/20 epochs at most"."""
        each = self._unit_seconds() or time.monotonic() - self._started
        # Short units need no tenths: the bar moves, and the next unit is soon there.
        tenths = bool(self.unit) and each >= _LONG_UNIT_SECONDS and self.completed != int(self.completed)
        position = f"{math.floor(10 * self.completed) / 10:,.1f}" if tenths else f"{int(self.completed):,}"
        unit, length = f" {self.unit}s" * bool(self.unit), self.length()
        if length is None:
            return f"{position}{unit}"
        whole = f"{int(length):,}"
        most = " at most" if self._may_grow() and not self._bound() else ""
        return f"{position.rjust(len(whole))}/{whole}{self._bound()}{unit}{most}"

    def times(self) -> str:
        """Return the time since the start and the time left.

        Nothing is said of the time left where the work has taken longer than expected.
        """
        left, elapsed = self.seconds_left(), format_seconds(time.monotonic() - self._started)
        if not left or self.completed == self.length():
            return elapsed
        less = "<" if self._may_grow() and not self._bound() else ""
        return f"{elapsed}, {less}{format_seconds(left)}{self._bound()} left"


class _TerminalBar(Bar):
    """A line on the terminal that moves."""

    def _say(self, text: str) -> None:
        print_lines(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # A terminal that is one column too narrow would wrap the line and leave its remains behind.
        width, gaps = options.max_width - 1, 4
        counted = f"{self.count()} {self.times()}"
        room = width - cell_len(counted) - _BAR_WIDTHS[0] - gaps
        description = _shorten(self.description, room)
        room = width - cell_len(description) - cell_len(counted) - gaps
        note = _leading_parts(self.note, room - _BAR_WIDTHS[0])
        bar = max(0, min(_BAR_WIDTHS[1], room - cell_len(note)))
        line = Table.grid(padding=(0, 1, 0, 0))
        line.add_row(
            Text(description, style="bold"),
            ProgressBar(self.length(), self.completed, width=bar, pulse=self.length() is None),
            Text(counted),
            Text(note),
        )
        yield line


class _NotebookBar(_TerminalBar):
    """The same line as one output of a notebook's cell, which is replaced."""

    _handle: Any = None
    _shown = -math.inf

    def _say(self, text: str) -> None:
        """Print nothing, because the line shows the time left."""

    def update(
        self, *, completed: float | None = None, total: float | None = None, note: str | None = None
    ) -> None:
        """Set the position, the length, or the note at the end."""
        super().update(completed=completed, total=total, note=note)
        if time.monotonic() - self._shown >= _NOTEBOOK_SECONDS:
            self.show()

    def report(self) -> None:
        """Say that a unit is finished."""
        super().report()
        self.show()

    def show(self) -> None:
        """Replace the line by the present one."""
        self._shown = time.monotonic()
        text = Console(file=io.StringIO(), width=_NOTEBOOK_WIDTH, force_jupyter=False, color_system=None)
        with text.capture() as capture:
            text.print(self, soft_wrap=True)
        # ipywidgets, which not every notebook has, is not needed for a line of text.
        line = {"text/plain": capture.get().rstrip()}
        if self._handle is None:
            from IPython.display import display

            self._handle = display(line, raw=True, display_id=True)
        else:
            self._handle.update(line, raw=True)


class _Lines(Bar):
    """Plain lines: one for each finished unit that is reported, and some in between where that takes long."""

    _last_line: tuple[float, float] | None = None

    def _say(self, text: str) -> None:
        print_lines(text)

    def report(self) -> None:
        """Print the position, the time left and the note."""
        super().report()
        self._print_line()

    def _print_line(self) -> None:
        self._last_line = time.monotonic(), self.completed
        parts = [self.count().strip(), self.times(), self.note]
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
    at_most: float | None = None,
    quiet: bool = False,
) -> Iterator[Bar]:
    """Show the progress of the block: by a bar on a terminal or in a notebook, otherwise by lines.

    Args:
        description: name of the work.
        total: number of units of the work, or None where it is unknown.
        completed: units that an earlier session has made.
        unit: name of a unit, such as "epoch", or "" where the description says it. The expected time of units
            that are reported is printed once it is known.
        open_ended: the work may become longer than `total`.
        at_most: most units that open-ended work takes, or None where there is no such bound.
        quiet: show nothing.
    """
    arguments = (printable(description), total, completed, unit, open_ended, at_most)
    if quiet:
        yield Bar(*arguments)
    elif in_notebook():
        replaced = _NotebookBar(*arguments)
        replaced.show()
        try:
            yield replaced
        finally:
            replaced.show()
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
