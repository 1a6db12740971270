"""The log of a fit, one row per epoch in fit.csv and in TensorBoard's event files."""

import contextlib
import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from mopo_fast.utils.atomic import refuse_links
from mopo_fast.utils.board import Board, event_files


class FitLog:
    """Writes a row for each epoch of a fit.

    The curves in TensorBoard are a run of their own, in the subfolder tensorboard-fit, because their steps
    are epochs of the fit.

    Args:
        file: fit.csv, open for writing.
        board: event file of the fit.
    """

    def __init__(self, file: IO[str], board: Board) -> None:
        self._file, self._board = file, board
        self._writer = csv.writer(file)

    def add(
        self, epoch: int, train_loss: float, holdout_mse: Sequence[float], seconds: float | None = None
    ) -> None:
        """Add the results of an epoch, see `FitEpoch`; `seconds` is None where the time is unknown."""
        if self._file.tell() == 0:
            names = [f"holdout_mse_{member}" for member in range(len(holdout_mse))]
            self._writer.writerow(["epoch", "train_loss", *names, "seconds"])
        self._writer.writerow([epoch, train_loss, *holdout_mse, seconds])
        self._file.flush()
        for member, error in enumerate(holdout_mse):
            self._board.add_scalar(f"holdout_mse/member_{member}", error, epoch)
        self._board.add_scalar("train_loss", train_loss, epoch)
        self._board.flush()


@contextlib.contextmanager
def open_fit_log(folder: Path) -> Iterator[FitLog]:
    """Begin the log of a fit in `folder` anew. A resumed fit adds its earlier epochs again.

    Raises:
        InputError: tensorboard-fit is a link or no folder.
        OSError: a file cannot be written.
    """
    events, path = folder / "tensorboard-fit", folder / "fit.csv"
    refuse_links(events)
    for old in event_files(events):
        old.unlink()
    # A folder from elsewhere may hold a link, which must not be followed.
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with os.fdopen(handle, "w", newline="") as file, contextlib.closing(Board(events)) as board:
        yield FitLog(file, board)
