"""A lock that lets one process at a time work in a folder."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from mopo_fast.errors import InputError
from mopo_fast.utils.atomic import check_utf8, missing_folders, remove_empty


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep all other processes and threads out of `folder` during the block; make the folder if need be.

    The holder of the lock may take it again. The lock ends with its process, however that ends; the file
    .lock stays. A folder that was made for the lock and received no other file is removed.

    Raises:
        InputError: another process or thread is at work there, the folder cannot be written or locked, or its
            name is not valid UTF-8.
    """
    folder = Path(folder)
    check_utf8(folder)
    made = missing_folders(folder)
    # A singleton, so that the fit within a training can take the lock that the training holds.
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
        # The caller may have removed the folder.
        with contextlib.suppress(FileNotFoundError):
            if made and os.listdir(folder) == [".lock"]:
                (folder / ".lock").unlink()
                remove_empty(made)
        lock.release()
