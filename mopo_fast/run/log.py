"""A run's log: progress.csv and TensorBoard's events, a row an epoch; and its clock."""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mopo_fast.evaluate import Evaluation
from mopo_fast.run.folder import COLUMNS, EVALUATED, Board, append_row, cut_back

# Epochs at most whose evaluations are not there yet.
_PENDING = 20


class Clock:
    """The seconds that a run takes, the time between its sessions left out.

    Attributes:
        started: when it began, by `time.perf_counter`, as if there had been one session.
        seconds: spent so far on rollout, sac and evaluate.
    """

    def __init__(self, started: float) -> None:
        self.started, self.seconds = started, {"rollout": 0.0, "sac": 0.0, "evaluate": 0.0}

    def elapsed(self) -> float:
        """Return the seconds since the run's start."""
        return time.perf_counter() - self.started

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the seconds spent inside to a part's."""
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started


@dataclass(eq=False)
class Pending:
    """A row of progress.csv that waits for its policy's evaluation, or for an earlier row's.

    Attributes:
        row: all of it but the evaluation.
        policy: the actor's parameters to be evaluated; None: it is not evaluated.
        evaluation: the evaluation of these, at work.
    """

    row: dict[str, Any]
    policy: dict[str, torch.Tensor] | None = None
    evaluation: "Future[Evaluation] | None" = None


class Log:
    """The rows of a run's epochs, written in order, each once its evaluation is there.

    Args:
        scored_by: "environment" or "model".

    Attributes:
        pending: rows that are not written yet.
        evaluation: the last one that is there.
        row: the last epoch's, without its evaluation.
    """

    def __init__(self, out: Path, clock: Clock, scored_by: str) -> None:
        self.out, self.clock, self.scored_by = out, clock, scored_by
        self.pending: list[Pending] = []
        self.evaluation: Evaluation | None = None
        self.row: dict[str, Any] | None = None

    def open(self, epoch: int, updates: int) -> None:
        """Go on after so many epochs and updates: what an earlier session wrote beyond them is dropped."""
        cut_back(self.out / "progress.csv", epoch - len(self.pending))
        step = self.pending[0].row["updates"] if self.pending else updates + 1
        self.board = Board(self.out, purge_step=step)

    def add(self, pending: Pending) -> None:
        """Append a row, and write those that are ready."""
        self.row = pending.row
        self.pending.append(pending)
        self.write(waiting=_PENDING)

    def write(self, waiting: int = 0) -> None:
        """Write the rows whose evaluations are there; at most `waiting` are left."""
        while self.pending:
            first, found = self.pending[0], None
            if first.evaluation is not None:
                if len(self.pending) <= waiting and not first.evaluation.done():
                    break
                with self.clock("evaluate"):
                    found = self.evaluation = first.evaluation.result()
            row = first.row | {name: getattr(found, name, None) for name in EVALUATED}
            row["scored_by"] = self.scored_by if found else None
            append_row(self.out / "progress.csv", {name: row[name] for name in COLUMNS})
            self.board.add_row(row)
            del self.pending[0]

    def close(self) -> None:
        """End the session's event file."""
        self.board.close()
