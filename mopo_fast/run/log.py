"""The log of a run, one row per epoch in progress.csv and in TensorBoard's event files; and its clock.

Both are read with suspicion: a run's folder may have come from anywhere.
"""

import contextlib
import csv
import io
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mopo_fast.errors import InputError
from mopo_fast.evaluate import Evaluation
from mopo_fast.sac import MEASURES, METRICS
from mopo_fast.utils.atomic import atomic_path
from mopo_fast.utils.board import Board

# Columns of progress.csv that an evaluation fills.
EVALUATION_COLUMNS = ("score_mean", "score_std", "return_mean", "return_std", "scored_by")

# Columns of progress.csv that describe the penalties of an epoch's rollouts.
PENALTY_COLUMNS = ("penalty_q50", "penalty_q90", "penalty_q99", "penalty_share")
# Columns of progress.csv with the shares of the rollouts that ended in a terminal, by their penalty and
# at the horizon.
END_COLUMNS = ("ended_terminal", "ended_truncated", "ended_horizon")
# Columns that runs of earlier versions lack.
LATER_COLUMNS = (*PENALTY_COLUMNS, *MEASURES, "length", *END_COLUMNS)

# Columns of progress.csv, each with its group of curves in TensorBoard; "" keeps a column out of TensorBoard.
COLUMNS = {
    "epoch": "",
    "updates": "",
    **dict.fromkeys(("seconds_rollout", "seconds_sac", "seconds_evaluate", "seconds_total"), "time"),
    **dict.fromkeys(EVALUATION_COLUMNS, "evaluation"),
    "scored_by": "",
    **dict.fromkeys(METRICS, "sac"),
    **dict.fromkeys(
        ("rows", "penalty", "raw_reward", "terminal_share", "non_finite", "buffer_size"), "rollout"
    ),
    **dict.fromkeys(PENALTY_COLUMNS, "rollout"),
    **dict.fromkeys(MEASURES, "sac"),
    **dict.fromkeys(("length", *END_COLUMNS), "rollout"),
}

# Most rows that wait for an evaluation; the training waits where there would be more.
_PENDING = 20


class Clock:
    """Measures the seconds that a run takes. The time between two sessions does not count.

    Attributes:
        started: value of `time.perf_counter` at which the run would have begun without any interruption.
        seconds: seconds spent so far on each of "rollout", "sac" and "evaluate".
    """

    def __init__(self, started: float) -> None:
        self.started, self.seconds = started, {"rollout": 0.0, "sac": 0.0, "evaluate": 0.0}

    def elapsed(self) -> float:
        """Return the seconds that the run has taken so far."""
        return time.perf_counter() - self.started

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the seconds spent in the `with` block to `part`."""
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one row to progress.csv; a new file begins with the header."""
    # A folder from elsewhere may hold a link, which must not be followed.
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with os.fdopen(handle, "a", newline="") as file:
        writer = csv.DictWriter(file, list(COLUMNS))
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a progress.csv, each as a dictionary with the header's keys.

    A last line without an end is still being written and is left out.

    Raises:
        InputError: the file is missing, is not CSV, or has a row of another length than the header.
    """
    header, *rows = _parse(path, _whole_lines(path)) or [[]]
    if any(len(row) != len(header) for row in rows):
        raise InputError(
            f"{path} has a row that does not fit the {len(header)} columns of its header; restore the file"
        )
    return [dict(zip(header, row, strict=True)) for row in rows]


def cut_back(path: Path, epochs: int) -> None:
    """Remove all rows of progress.csv after the first `epochs` ones.

    Rows of an earlier version, which had no `LATER_COLUMNS`, get them without values.

    Raises:
        InputError: the file does not hold the rows of these epochs.
    """
    if not epochs:
        path.unlink(missing_ok=True)
        return
    kept = _whole_lines(path)[: 1 + epochs]
    header, *rows = _parse(path, kept) or [[]]
    found = [row[0] for row in rows if len(row) == len(header)]
    earlier = [name for name in COLUMNS if name not in LATER_COLUMNS]
    if header not in (list(COLUMNS), earlier) or found != [str(1 + epoch) for epoch in range(epochs)]:
        raise InputError(
            f"{path} does not hold epochs 1 to {epochs}, which came before the checkpoint; restore the file,"
            " or delete the run's folder to train from the start"
        )
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(row + [""] * (len(COLUMNS) - len(row)) for row in rows)


def _whole_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise InputError(f"{path} is not a regular file" if path.exists() else f"{path} does not exist")
    try:
        lines = list(io.StringIO(path.read_bytes().decode(), newline="\n"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a readable CSV file ({error})") from error
    return lines if not lines or lines[-1].endswith("\n") else lines[:-1]


def _parse(path: Path, lines: list[str]) -> list[list[str]]:
    try:
        return list(csv.reader(lines, strict=True))
    except csv.Error as error:
        raise InputError(f"{path} is not a readable CSV file ({error})") from error


def log_row(board: Board, row: dict[str, Any]) -> None:
    """Log the numbers of a row of progress.csv to TensorBoard."""
    for name, group in COLUMNS.items():
        if row[name] is not None and group:
            board.add_scalar(f"{group}/{name}", row[name], row["updates"])
    board.flush()


@dataclass(eq=False)
class Pending:
    """A row of progress.csv that waits for its own evaluation or for an earlier row.

    Attributes:
        row: values of all columns except `EVALUATION_COLUMNS`.
        policy: parameters of the actor to evaluate, or None where the epoch has no evaluation.
        evaluation: future result of that evaluation.
    """

    row: dict[str, Any]
    policy: dict[str, torch.Tensor] | None = None
    evaluation: "Future[Evaluation] | None" = None


class Log:
    """Writes the rows of a run's epochs, in order, each as soon as its evaluation is finished.

    Args:
        out: the run's folder.
        clock: the run's clock, which counts the time spent on waiting for evaluations.
        scored_by: "environment" or "model", which evaluates the policies.
        on_row: called with each row of progress.csv after it is written.

    Attributes:
        pending: rows that are not written yet, in order.
        evaluation: latest finished evaluation.
        evaluated: epoch of `evaluation`, or None where an earlier session made it.
        row: row of the latest epoch, without its evaluation.
    """

    def __init__(
        self,
        out: Path,
        clock: Clock,
        scored_by: str,
        on_row: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.out, self.clock, self.scored_by, self.on_row = out, clock, scored_by, on_row
        self.pending: list[Pending] = []
        self.evaluation: Evaluation | None = None
        self.evaluated: int | None = None
        self.row: dict[str, Any] | None = None

    def open(self, epoch: int, updates: int) -> None:
        """Open the files for a run that has made so many epochs and updates.

        Rows that an earlier session wrote after that point are removed.
        """
        cut_back(self.out / "progress.csv", epoch - len(self.pending))
        step = self.pending[0].row["updates"] if self.pending else updates + 1
        self.board = Board(self.out, purge_step=step)

    def add(self, pending: Pending) -> None:
        """Add a row, and write all rows that are ready."""
        self.row = pending.row
        self.pending.append(pending)
        self.write(waiting=_PENDING)

    def write(self, waiting: int = 0) -> None:
        """Write the rows that are ready, and wait for more until at most `waiting` are left."""
        while self.pending:
            first, found = self.pending[0], None
            if first.evaluation is not None:
                if len(self.pending) <= waiting and not first.evaluation.done():
                    break
                with self.clock("evaluate"):
                    found = self.evaluation = first.evaluation.result()
                self.evaluated = first.row["epoch"]
            row = first.row | {name: getattr(found, name, None) for name in EVALUATION_COLUMNS}
            row["scored_by"] = self.scored_by if found else None
            # A row that an earlier version left waiting has no `LATER_COLUMNS`.
            row = {name: row.get(name) for name in COLUMNS}
            append_row(self.out / "progress.csv", row)
            log_row(self.board, row)
            del self.pending[0]
            if self.on_row is not None:
                self.on_row(row)

    def close(self) -> None:
        """Close the session's event file."""
        self.board.close()
