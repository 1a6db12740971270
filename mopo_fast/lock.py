"""One process at a time in a run's folder."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from mopo_fast.errors import InputError


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep every other process and thread out of `folder`, which is made where it is missing.

    The lock ends with its process, however that ends; the file .lock stays. Who holds it may take it again.

    Raises:
        InputError: another process or thread is at work there, or the folder cannot be written or locked.
    """
    folder = Path(folder)
    # One object for all who ask for a folder: the fit inside a training takes what the training holds.
    lock = FileLock(folder / ".lock", is_singleton=True)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(
            f"another process is at work in {folder}; wait until it ends, or choose another folder"
        ) from None
    except OSError as error:
        raise InputError(
            f"cannot work in {folder}: {error.strerror or error}; choose another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()
