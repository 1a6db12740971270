"""The records in a run's folder: config.json, summary.json, progress.csv and TensorBoard's events.

All of these are read with suspicion: a run's folder may have come from anywhere.
"""

import contextlib
import csv
import io
import os
import re
import socket
import time
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, with_config
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary as EventSummary
from tensorboard.summary.writer.record_writer import RecordWriter
from typing_extensions import TypedDict

from mopo_fast.config import Penalty, PenaltyMembers
from mopo_fast.errors import InputError
from mopo_fast.sac import METRICS
from mopo_fast.utils.atomic import atomic_path, read_json_as

Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]

# progress.csv's columns and the group of each in TensorBoard.
COLUMNS = {
    "epoch": "",
    "updates": "",
    **dict.fromkeys(("seconds_rollout", "seconds_sac", "seconds_evaluate", "seconds_total"), "time"),
    **dict.fromkeys(("score_mean", "score_std", "return_mean", "return_std"), "evaluation"),
    "scored_by": "",
    **dict.fromkeys(METRICS, "sac"),
    **dict.fromkeys(
        ("rows", "penalty", "raw_reward", "terminal_share", "non_finite", "buffer_size"), "rollout"
    ),
}


class RecordedRollout(TypedDict, total=False):
    """The part of config.json's `rollout` that a report shows."""

    horizon: Count | None
    penalty_coef: Number | None
    penalty: Penalty
    penalty_members: PenaltyMembers


class RecordedConfig(TypedDict, total=False):
    """The part of config.json that a report shows."""

    dataset: str
    task: str | None
    seed: int
    device: str
    rollout: RecordedRollout


class RecordedSeconds(TypedDict):
    """Seconds that a run spent on each part."""

    fit: Seconds
    rollout: Seconds
    sac: Seconds
    evaluate: Seconds
    total: Seconds


@with_config(ConfigDict(extra="allow"))
class Summary(TypedDict):
    """The checked part of summary.json; the rest is passed on as it is."""

    score_mean: Number | None
    score_std: Number | None
    return_mean: Number
    return_std: Number
    updates: Count
    seconds: RecordedSeconds
    seed: int
    penalty_coef: Number
    scored_by: NotRequired[str]
    dataset: NotRequired[str]
    task: NotRequired[str]
    horizon: NotRequired[Count]
    penalty: NotRequired[str]
    backend: NotRequired[str]
    device: NotRequired[str]
    dtype: NotRequired[str]
    versions: NotRequired[dict[str, str]]


def read_summary(run: Path) -> dict[str, Any]:
    """A finished run's summary.json.

    Raises:
        InputError: it is missing or is not a run's.
    """
    return dict(read_json_as(run / "summary.json", Summary))


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add one line to progress.csv; the header first, where the file is new."""
    # A link in a folder from elsewhere must not lead the writing out of it.
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with os.fdopen(handle, "a", newline="") as file:
        writer = csv.DictWriter(file, list(COLUMNS))
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, str]]:
    """The lines of a progress.csv by its header; one that is still being written is left out.

    Raises:
        InputError: it is missing, or its lines do not have the header's columns.
    """
    header, *rows = _parse(path, _whole_lines(path)) or [[]]
    if any(len(row) != len(header) for row in rows):
        raise InputError(f"{path}: a line has more or fewer than the {len(header)} columns of the header")
    return [dict(zip(header, row, strict=True)) for row in rows]


def cut_back(path: Path, epochs: int) -> None:
    """Leave only the rows of the first `epochs` epochs in progress.csv.

    Raises:
        InputError: they are not there.
    """
    if not epochs:
        path.unlink(missing_ok=True)
        return
    kept = _whole_lines(path)[: 1 + epochs]
    header, *rows = _parse(path, kept) or [[]]
    found = [row[0] for row in rows if len(row) == len(COLUMNS)]
    if header != list(COLUMNS) or found != [str(1 + epoch) for epoch in range(epochs)]:
        raise InputError(
            f"{path} does not hold epochs 1 to {epochs}, which its checkpoint comes after; bring the file"
            " back, or delete the folder to train from the start"
        )
    with atomic_path(path) as temporary:
        temporary.write_text("".join(kept), newline="")


def _whole_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise InputError(f"{path} does not exist" if not path.exists() else f"{path} is no regular file")
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


class Board:
    """TensorBoard's event file of one session, written by the caller's thread.

    torch's `SummaryWriter` writes from a thread of its own, where a full disk ends in a traceback and the
    run goes on without its log.

    Args:
        folder: where TensorBoard looks; made where it is missing.
        purge_step: TensorBoard forgets what earlier sessions logged from this step on.

    Raises:
        OSError: the file cannot be written; so do the methods.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _await_a_later_second(folder)
        name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("xb")
        self._records = RecordWriter(self._file)
        try:
            self._write(Event(file_version="brain.Event:2"))
            if purge_step is not None:
                self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
            self.flush()
        except OSError:
            with contextlib.suppress(OSError):
                self.close()
            raise

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Log one value."""
        summary = EventSummary(value=[EventSummary.Value(tag=tag, simple_value=value)])
        self._write(Event(step=step, summary=summary))

    def flush(self) -> None:
        """Hand what was logged to the system."""
        self._file.flush()

    def close(self) -> None:
        """End the file."""
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


def event_files(folder: Path) -> dict[Path, int]:
    """TensorBoard's files in `folder`, and the second that each was begun in."""
    names = {path: re.match(r"events\.out\.tfevents\.(\d+)\.", path.name) for path in folder.glob("events.*")}
    return {path: int(match[1]) for path, match in names.items() if match}


def _await_a_later_second(folder: Path) -> None:
    """TensorBoard reads event files by their names, which begin with the second that each was begun in."""
    latest = max(event_files(folder).values(), default=0)
    time.sleep(min(1.0, max(0.0, latest + 1 - time.time())))
