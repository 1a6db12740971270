"""The files in a run's folder: config.json, summary.json, progress.csv and TensorBoard's events.

All of these are read with suspicion: a run's folder may have come from anywhere.
"""

import contextlib
import csv
import importlib.metadata
import io
import json
import os
import platform
import re
import reprlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict, with_config
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary as EventSummary
from tensorboard.summary.writer.record_writer import RecordWriter
from typing_extensions import TypedDict

from mopo_fast import __version__
from mopo_fast.config import Penalty, PenaltyMembers, RunConfig, to_dict
from mopo_fast.errors import InputError
from mopo_fast.evaluate import Evaluation
from mopo_fast.fit import read_fit
from mopo_fast.sac import METRICS
from mopo_fast.utils.atomic import (
    atomic_path,
    read_json_as,
    refuse_links,
    sweep,
    write_json,
)
from mopo_fast.utils.kinds import Count, Number, Seconds

# Columns that an evaluation adds to a row of progress.csv.
EVALUATED = ("score_mean", "score_std", "return_mean", "return_std", "scored_by")

# Values in an error, of files that may hold anything.
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200
shorten = _short.repr

# progress.csv's columns and the group of each in TensorBoard.
COLUMNS = {
    "epoch": "",
    "updates": "",
    **dict.fromkeys(("seconds_rollout", "seconds_sac", "seconds_evaluate", "seconds_total"), "time"),
    **dict.fromkeys(EVALUATED, "evaluation"),
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


class SpentSeconds(TypedDict):
    """Seconds that a run's training has spent on each part."""

    rollout: Seconds
    sac: Seconds
    evaluate: Seconds
    total: Seconds


class RecordedSeconds(SpentSeconds):
    """Seconds that a run spent on each part."""

    fit: Seconds


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


def write_summary(out: Path, config: RunConfig, evaluation: Evaluation, **of_run: Any) -> None:
    """Write a finished run's summary.json: its last evaluation, what is `of_run`, and its settings."""
    names = ("score_mean", "score_std", "return_mean", "return_std")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "gymnasium", "mujoco")}
    summary = {
        **{name: getattr(evaluation, name) for name in names},
        **of_run,
        **{name: getattr(config, name) for name in ("device", "dataset", "task", "seed")},
        **{name: getattr(config.rollout, name) for name in ("dtype", "horizon", "penalty", "penalty_coef")},
        "versions": {"mopo_fast": __version__, "python": platform.python_version(), **versions},
    }
    write_json(out / "summary.json", summary)


def check_folder(out: Path, config: RunConfig, resume: bool) -> None:
    """Refuse a folder that holds another run, or whose parts are elsewhere."""
    refuse_links(out / "checkpoint", out / "tensorboard-fit")
    if resume:
        # Remove the temporary files of a killed session, but not below: a folder there may be a live run's.
        for folder in (out, out / "checkpoint"):
            sweep(folder)
    # config.json is the first file of a run.
    if not (out / "config.json").exists():
        return
    if not resume:
        raise InputError(f"{out} holds a run already; go on with it by --resume, or choose another --out")
    theirs, ours = read_json_as(out / "config.json", dict[str, Any]), as_json(config)
    if theirs.get("task_sha256") is None and theirs.get("task") == ours["task"]:
        # The run is older than the record.
        del ours["task_sha256"]
    difference = first_difference(theirs, ours)
    if difference and difference.startswith("task_sha256"):
        raise InputError(
            f"the file {config.task} has changed since {out} was made; bring it back, or choose another --out"
        )
    if difference:
        raise InputError(
            f"{out} was made with {difference}; resume with the same settings or choose another --out"
        )


def as_json(config: Any) -> Any:
    """Return a config as it reads after a trip through a file."""
    return json.loads(json.dumps(to_dict(config)))


def first_difference(theirs: Any, ours: Any, name: str = "") -> str | None:
    """Tell where two configs, as JSON has them, differ so that results may; None where they do not."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in {**theirs, **ours}:
            # These may change when a run goes on, since no result depends on them.
            if key in ("threads", "workers"):
                continue
            difference = first_difference(theirs.get(key), ours.get(key), f"{name}.{key}".lstrip("."))
            if difference:
                return difference
        return None
    return None if theirs == ours else f"{name} = {shorten(theirs)}, not {shorten(ours)}"


@contextlib.contextmanager
def mendable(*outs: Path) -> Iterator[None]:
    """Turn an error of the system, such as a full disk, into one that says how to go on."""
    try:
        yield
    except OSError as error:
        folders = ", ".join(map(str, outs))
        raise InputError(f"cannot go on with {folders} ({error}); mend that, then --resume") from error


def write_config(out: Path, config: RunConfig) -> None:
    """Write config.json, the first file of a run, where it is not there yet."""
    if not (out / "config.json").exists():
        write_json(out / "config.json", to_dict(config))


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

    def add_row(self, row: dict[str, Any]) -> None:
        """Log the numbers of a row of progress.csv."""
        for name, group in COLUMNS.items():
            if row[name] is not None and group:
                self.add_scalar(f"{group}/{name}", row[name], row["updates"])
        self.flush()

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


def log_fit(out: Path) -> None:
    """Write the fit's curves to TensorBoard, as a run of their own: their steps are epochs of the fit."""
    fit, folder = read_fit(out), out / "tensorboard-fit"
    # Those of a session that was killed before its first checkpoint.
    for events in event_files(folder):
        events.unlink()
    with contextlib.closing(Board(folder)) as board:
        for epoch, errors in enumerate(fit["holdout_mse"]):
            for member, error in enumerate(errors):
                board.add_scalar(f"holdout_mse/member_{member}", error, epoch)
            board.add_scalar("train_loss", fit["train_loss"][epoch], epoch)
