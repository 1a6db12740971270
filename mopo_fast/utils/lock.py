"""One process at a time in a run's folder."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from mopo_fast.errors import InputError
from mopo_fast.utils.atomic import missing_folders, remove_empty


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep every other process and thread out of `folder`, which is made where it is missing.

    The lock ends with its process, however that ends; the file .lock stays. Who holds it may take it again.
    A folder that was made for the lock, and got no other file, is removed again.

    Raises:
        InputError: another process or thread is at work there, or the folder cannot be written or locked.
    """
    folder = Path(folder)
    made = missing_folders(folder)
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
        # The folder may be gone: its user removed what was made in vain.
        with contextlib.suppress(FileNotFoundError):
            if made and os.listdir(folder) == [".lock"]:
                (folder / ".lock").unlink()
                remove_empty(made)
        lock.release()
