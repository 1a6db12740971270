"""Atomic writing of files and folders: write to a temporary file, then rename it.

A temporary file is locked while its writer runs. An unlocked one belongs to a writer that was killed, and
the next writer of the same file removes it.
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

# Upper limit of the bytes of a JSON file. The manifest of a million shards has about half of them.
_LARGEST_JSON = 1 << 30
# Name of a replaced folder in a scratch folder, on systems that cannot exchange two folders.
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
        # mkstemp and some writers make a private file. This gives it the permissions of open().
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


def absolute_file(name: str) -> str:
    """Return the absolute path of an existing file or folder, and any other name as it is.

    Raises:
        InputError: the path is not valid UTF-8, so that JSON cannot hold it.
    """
    path = Path(name).expanduser()
    if not path.exists():
        return name
    check_utf8(path.absolute())
    return str(path.absolute())


def check_utf8(path: str | os.PathLike[str]) -> None:
    """Raise `InputError` where a path is not valid UTF-8, as JSON and safetensors need it."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"the name {os.fspath(path)!r} is not valid UTF-8; rename the folder") from None


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise `InputError` where `atomic_path` would refuse `path`, so that the user learns it early."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; choose another file")
    made = missing_folders(path.parent)
    temporary, handle = _make_temporary(path)
    temporary.unlink()
    os.close(handle)
    remove_empty(made)


def missing_folders(folder: Path) -> list[Path]:
    """Return those of `folder` and its parents that do not exist, `folder` first."""
    return [each for each in (folder, *folder.parents) if not os.path.lexists(each)]


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, each of which lies in the next, up to the first that is not empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def sweep(folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Remove the temporary files that killed writers left in `folder`.

    Files of running writers stay, and so does everything on a file system without locks.

    Args:
        folder: folder to clean.
        name: file whose temporary files are removed; None removes those of all files.
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
    """Yield a temporary folder in `parent`, and remove it and those of killed writers."""
    for leftover in parent.glob(".new-*"):
        # A writer that was killed between two renames has left the only copy of a folder here.
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
    """Replace `folder` by the folder `name` in a `scratch_folder`. The replaced one stays in `scratch`.

    This is one step on Linux, so that one of the two is in place whenever the process is killed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        os.replace(scratch / name, folder)
    elif not _exchange(scratch / name, folder):
        os.replace(folder, scratch / _OLD)
        os.replace(scratch / name, folder)
    sync_folder(folder.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths; return False where the system or the file system cannot do it."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    if ctypes.get_errno() in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), os.fspath(other))


def _make_temporary(path: Path) -> tuple[Path, int]:
    """Make an empty file beside `path`, and its folder if need be; return it and its locked descriptor."""
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
    """Lock a new file; return False where another process has already removed it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # On a file system without locks nobody removes temporary files.
        return error.errno != errno.EWOULDBLOCK
    return os.fstat(handle).st_nlink > 0


def _cannot_write(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {path}: {error.strerror or error}; free space or choose another folder")


def refuse_links(*folders: Path) -> None:
    """Raise `InputError` where one of a run's own folders exists and is a link, or is not a folder.

    Through a link, files would be written and removed elsewhere, for example in another run's folder.
    """
    for folder in folders:
        if os.path.lexists(folder) and not stat.S_ISDIR(folder.lstat().st_mode):
            raise InputError(f"{folder} is a link or no folder; remove it, or choose another folder")


def regular_file(path: Path) -> os.stat_result:
    """Return the status of a regular file.

    Raises:
        InputError: `path` does not exist, is a symbolic link, which may lead anywhere, or is not a file.
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
    """Write `value` as indented JSON, atomically.

    Raises:
        InputError: the file cannot be written.
        ValueError: `value` holds NaN or infinity.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON in which all numbers are finite.

    Raises:
        InputError: the file is missing, or is not JSON of this kind.
    """
    return _read_json(Path(path))[0]


def read_json_as(path: str | os.PathLike[str], kind: type[T]) -> T:
    """Read JSON of a declared type: a dataclass, a TypedDict, or a container of these.

    Types must agree exactly: text is no number, and a number is no flag.

    Args:
        path: file to read.
        kind: type that pydantic validates. Ranges are written `Annotated[int, Field(ge=0)]`.

    Raises:
        InputError: the file is missing or is not JSON, or a value in it has another type or is out of range.
            The message names the file and the value.
    """
    _, content = _read_json(Path(path))
    return _validate(content, kind, path)


def parse_json_as(text: str, kind: type[T], source: str | os.PathLike[str]) -> T:
    """Parse JSON that is part of a file, as `read_json_as` does.

    Args:
        text: JSON to parse.
        kind: type that pydantic validates.
        source: the file, for error messages.

    Raises:
        InputError: as in `read_json_as`.
    """
    try:
        _parse(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{source} does not hold readable JSON ({error}); download or make it again"
        ) from error
    return _validate(text, kind, source)


def check_value(name: str, value: Any, kind: Any) -> Any:
    """Check that a value has a declared type and is in its range, and return it.

    The type must agree exactly. Only a whole number is accepted in place of a float, and returned as one.

    Args:
        name: name of the value, for error messages.
        value: value to check.
        kind: type that pydantic validates, such as `Annotated[int, Field(ge=0)]`.

    Raises:
        InputError: the value has another type or is out of range.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        must_be = error.errors(include_url=False)[0]["msg"].removeprefix("Input should be")
        raise InputError(f"{name} must be{must_be}, got {reprlib.repr(value)}") from error


def _validate(content: str | bytes, kind: type[T], source: str | os.PathLike[str]) -> T:
    # This import takes a tenth of a second, for which help texts and errors should not wait.
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
    """Return the value in a JSON file and the file's bytes."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is no regular file")
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        content = path.read_bytes()
        return _parse(content.decode()), content
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    # The file may be damaged, or have numbers too long or lists too deep for the parser.
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a readable JSON file ({error})") from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value
