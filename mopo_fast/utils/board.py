"""TensorBoard's event files."""

import contextlib
import os
import re
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class Board:
    """Writes TensorBoard's event file of one session, in the caller's thread.

    torch's `SummaryWriter` writes in a thread of its own. On a full disk that thread prints a traceback, and
    the run goes on without its log.

    Args:
        folder: folder of the event file; created if it is missing.
        purge_step: first step whose values from earlier sessions TensorBoard is to discard.

    Raises:
        OSError: the file cannot be written. Every method may raise it too.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _wait_for_new_second(folder)
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
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        self._write(Event(step=step, summary=summary))

    def flush(self) -> None:
        """Hand all logged values to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


def event_files(folder: Path) -> dict[Path, int]:
    """Return TensorBoard's event files in `folder`, each with the Unix time in its name."""
    names = {path: re.match(r"events\.out\.tfevents\.(\d+)\.", path.name) for path in folder.glob("events.*")}
    return {path: int(match[1]) for path, match in names.items() if match}


def _wait_for_new_second(folder: Path) -> None:
    """Wait until a new file's name sorts behind those in `folder`.

    TensorBoard reads event files in the order of their names, which begin with a time in whole seconds.
    """
    latest = max(event_files(folder).values(), default=0)
    time.sleep(min(1.0, max(0.0, latest + 1 - time.time())))
