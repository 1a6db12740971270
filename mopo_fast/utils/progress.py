"""Progress bars with the time left, for every step that takes longer than a breath."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mopo_fast.errors import printable

console = Console(stderr=True)


class Bar:
    """A bar on the terminal; every method does nothing where bars are off."""

    def __init__(self, progress: Progress | None, task: TaskID | None) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: float = 1) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, amount)

    def update(
        self, *, completed: float | None = None, total: float | None = None, note: str | None = None
    ) -> None:
        """Set the position, the length, or the text at the bar's end."""
        if self._progress is None or self._task is None:
            return
        self._progress.update(self._task, completed=completed, total=total)
        if note is not None:
            self._progress.update(self._task, note=note)


@contextlib.contextmanager
def progress_bar(description: str, total: float | None, *, quiet: bool = False) -> Iterator[Bar]:
    """A bar of `total` units (None: unknown), gone quiet with `quiet=True`."""
    if quiet:
        yield Bar(None, None)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    progress = Progress(*columns, console=console)
    try:
        # Without memory for its thread, it fails half-way: the cursor hidden, the outputs redirected.
        progress.start()
        yield Bar(progress, progress.add_task(printable(description), total=total, note=""))
    finally:
        progress.stop()
