"""Progress bars with the time left."""

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
    """A progress bar on the terminal. Its methods do nothing where bars are off."""

    def __init__(self, progress: Progress | None, task: TaskID | None) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: float = 1) -> None:
        """Move the position by `amount` units."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, amount)

    def update(
        self, *, completed: float | None = None, total: float | None = None, note: str | None = None
    ) -> None:
        """Set the position, the length, or the note at the end of the bar."""
        if self._progress is None or self._task is None:
            return
        self._progress.update(self._task, completed=completed, total=total)
        if note is not None:
            self._progress.update(self._task, note=note)


@contextlib.contextmanager
def progress_bar(description: str, total: float | None, *, quiet: bool = False) -> Iterator[Bar]:
    """Show a bar of `total` units during the block, or none with `quiet`. A total of None is unknown."""
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
        # If start() finds no memory for its thread, stop() must still show the cursor and free the outputs.
        progress.start()
        yield Bar(progress, progress.add_task(printable(description), total=total, note=""))
    finally:
        progress.stop()
