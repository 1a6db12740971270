"""Files that are either whole or not there: write to a temporary file, then rename.

A temporary file is locked while its writer lives. One that nobody has locked belongs to a process that was
killed, and the next writer of the same file removes it.
"""

import contextlib
import ctypes
import errno
import fcntl
import glob
import json
import math
import os
import reprlib
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from mopo_fast.errors import InputError

T = TypeVar("T")

# Bytes of a JSON file that is read; a manifest of a million shards has about half of them.
_LARGEST_JSON = 1 << 30
# A replaced folder's name in a scratch folder, where folders cannot be exchanged.
_OLD = ".old"
# Constants of Linux's fcntl.h and fs.h.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed onto `path`.

    On any error the temporary file is removed and an existing `path` is left as it was.

    Raises:
        InputError: the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary, handle = _make_temporary(path)
    try:
        yield temporary
        # mkstemp, and some writers, make a private file; a finished one is as open() would have made it.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.fsync(handle)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise `InputError` where `atomic_path` would refuse `path`, to be told before the work."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    made = missing_folders(path.parent)
    temporary, handle = _make_temporary(path)
    temporary.unlink()
    os.close(handle)
    remove_empty(made)


def missing_folders(folder: Path) -> list[Path]:
    """Those of `folder` and its parents that are not there, `folder` first."""
    return [each for each in (folder, *folder.parents) if not os.path.lexists(each)]


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, each inside the next, up to the first that holds anything."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def sweep(folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Remove the temporary files of killed writers in `folder`: those of the file `name`, or of every file.

    A file whose writer is alive is left alone, and so is everything where the file system has no locks.
    """
    pattern = f".{glob.escape(name) if name else '*'}.????????.tmp"
    for leftover in Path(folder).glob(pattern):
        with contextlib.suppress(OSError):
            handle = os.open(leftover, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
            finally:
                os.close(handle)


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Make a folder in `parent` for files that are not whole yet; remove it, and those of killed writers."""
    for leftover in parent.glob(".new-*"):
        # A writer that is killed between two renames leaves the only copy here.
        if not os.path.lexists(leftover / _OLD):
            _remove_unlocked(leftover)
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=".new-"))
        handle = os.open(folder, os.O_RDONLY)
        if _lock(handle) and folder.exists():
            break
        os.close(handle)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _remove_unlocked(folder: Path) -> None:
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(handle)


def replace_folder(scratch: Path, name: str, folder: Path) -> None:
    """Put the folder `name` of a `scratch_folder` in the place of `folder`, which stays in scratch.

    One step on Linux: whenever the process is killed, one of the two is there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        os.replace(scratch / name, folder)
    elif not _exchange(scratch / name, folder):
        os.replace(folder, scratch / _OLD)
        os.replace(scratch / name, folder)
    sync_folder(folder.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange what two paths name; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    if ctypes.get_errno() in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), os.fspath(other))


def _make_temporary(path: Path) -> tuple[Path, int]:
    """An empty file beside `path`, whose folder is made where there is none; and its locked descriptor."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, path.name)
        while True:
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
            if _lock(handle):
                return Path(name), handle
            os.close(handle)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _lock(handle: int) -> bool:
    """Lock a new file; False where another process has swept it away first."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # A file system without locks: nobody can sweep there.
        return error.errno != errno.EWOULDBLOCK
    return os.fstat(handle).st_nlink > 0


def _cannot_write(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {path}: {error.strerror or error}; free space or choose another folder")


def refuse_links(*folders: Path) -> None:
    """Raise `InputError` where one of a run's own folders is there and is a link, or no folder.

    What is removed and written in it would be removed and written elsewhere, in another run's folder say.
    """
    for folder in folders:
        if os.path.lexists(folder) and not stat.S_ISDIR(folder.lstat().st_mode):
            raise InputError(f"{folder} is a link or no folder; remove it, or choose another folder")


def regular_file(path: Path) -> os.stat_result:
    """Return the status of a file that lies in its folder itself.

    Raises:
        InputError: there is none, or it is a symbolic link, which may lead anywhere, or no file.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is a symbolic link or no file; remove it")
    return status


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON whose numbers are finite.

    Raises:
        InputError: the file is missing or is not sound; names it.
    """
    return _read_json(Path(path))[0]


def read_json_as(path: str | os.PathLike[str], kind: type[T]) -> T:
    """Read JSON of a declared type: a dataclass, a TypedDict, or a container of these.

    The file's types must agree exactly: no text counts as a number, and no number as a flag.

    Args:
        kind: what pydantic validates; ranges are `Annotated[int, Field(ge=0)]`.

    Raises:
        InputError: the file is missing or not sound, or a value in it has another type or is out of range;
            names the file and the value.
    """
    _, content = _read_json(Path(path))
    return _validate(content, kind, path)


def parse_json_as(text: str, kind: type[T], source: str | os.PathLike[str]) -> T:
    """Do what `read_json_as` does with text that a file holds among other things.

    Args:
        source: the file, for errors.

    Raises:
        InputError: as `read_json_as`.
    """
    try:
        _parse(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} does not hold readable JSON ({error}); get or make it again") from error
    return _validate(text, kind, source)


def check_value(name: str, value: Any, kind: Any) -> Any:
    """Return a value that is of a declared type and in its range.

    As in `read_json_as` the type must agree exactly, but for a whole number in a float's place, which is
    returned as a float.

    Args:
        name: the value's name in the error.
        kind: what pydantic validates, such as `Annotated[int, Field(ge=0)]`.

    Raises:
        InputError: the value is of another type, or out of range.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        must_be = error.errors(include_url=False)[0]["msg"].removeprefix("Input should be")
        raise InputError(f"{name} must be{must_be}, got {reprlib.repr(value)}") from error


def _validate(content: str | bytes, kind: type[T], source: str | os.PathLike[str]) -> T:
    # Takes a tenth of a second, which help texts and errors need not wait for.
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise InputError(f"{source}: {where}: {first['msg']}; get or make the file again") from error


def _parse(text: str) -> Any:
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def _read_json(path: Path) -> tuple[Any, bytes]:
    """The value in a JSON file, and the file's bytes."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is no regular file")
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        content = path.read_bytes()
        return _parse(content.decode()), content
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    # Damage, numbers of too many digits, and lists nested too deeply for the parser.
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a readable JSON file ({error})") from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value
