import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from mopo_fast.errors import InputError
from mopo_fast.utils.atomic import (
    _exchange,
    atomic_path,
    check_value,
    check_writable,
    parse_json_as,
    read_json,
    read_json_as,
    regular_file,
    sweep,
    write_json,
)


def test_a_finished_file_is_there_whole_and_alone(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "file.txt"
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_those_of_an_ordinary_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_json(tmp_path / "file.json", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.json").stat().st_mode) == 0o666 & ~umask


def test_a_full_disk_is_one_sentence_and_the_old_file_stays(tmp_path: Path) -> None:
    target = tmp_path / "file.json"
    target.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*file\.json: .*free space"):
            write_json(target, "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("path", ["/proc/nowhere/file.json", "/dev/null/file.json"])
def test_a_folder_that_cannot_be_written_is_named(path: str) -> None:
    for write in (partial(write_json, value={}), check_writable):
        with pytest.raises(InputError, match=path):
            write(path)


def test_a_folder_in_the_files_place_is_named(tmp_path: Path) -> None:
    for write in (partial(write_json, value={}), check_writable):
        with pytest.raises(InputError, match=str(tmp_path)):
            write(tmp_path)


def test_a_check_leaves_everything_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "file.json"
    check_writable(target)
    assert not list(tmp_path.iterdir())
    target.write_text("old")
    check_writable(target)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_json_comes_back(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, "µ"], "b": {"c": True}}
    write_json(tmp_path / "file.json", value)
    assert read_json(tmp_path / "file.json") == value
    assert json.loads((tmp_path / "file.json").read_text()) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_has_no_nan(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file.json", {"a": value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"a": ',
        b"\xff\xfe\x00",
        b"not json",
        b"[" * 100_000,
        b"1" * 5_000,
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b"[1e999]",
    ],
)
def test_broken_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(InputError, match=r"file\.json is not a readable JSON file"):
        read_json(tmp_path / "file.json")


def test_missing_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.json does not exist"):
        read_json(tmp_path / "nothing.json")
    with pytest.raises(InputError, match="not a readable JSON file"):
        read_json(tmp_path)


def test_a_pipe_is_no_json_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file.json")
    with pytest.raises(InputError, match="no regular file"):
        read_json(tmp_path / "file.json")


@dataclass(frozen=True)
class Declared:
    name: str
    count: Annotated[int, Field(ge=1)]
    scale: float
    sizes: tuple[int, ...] = ()
    kind: Literal["a", "b"] = "a"


def test_json_of_a_declared_type(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"name": "x", "count": 2, "scale": 3, "sizes": [4, 5], "kind": "b"})
    assert read_json_as(path, Declared) == Declared("x", 2, 3.0, (4, 5), "b")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"name": 1}, "name"),
        ({"count": "2"}, "count"),
        ({"count": True}, "count"),
        ({"count": 0}, "count"),
        ({"count": 1.5}, "count"),
        ({"scale": None}, "scale"),
        ({"sizes": [1, "2"]}, r"sizes\.1"),
        ({"kind": "c"}, "kind"),
    ],
)
def test_a_value_of_another_type_is_named(change: dict[str, Any], where: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"name": "x", "count": 2, "scale": 3.0} | change)
    with pytest.raises(InputError, match=rf"file\.json: {where}: "):
        read_json_as(path, Declared)
    for whole in ([], "text", {"name": "x"}):
        write_json(path, whole)
        with pytest.raises(InputError, match=r"file\.json: "):
            read_json_as(path, Declared)


KILLED_HALF_WAY = """
import os, signal, sys
from mopo_fast.utils.atomic import (
    _exchange,
    atomic_path,
    check_writable,
    parse_json_as,
    read_json,
    read_json_as,
    sweep,
    write_json,
)
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    killed = subprocess.run([sys.executable, "-c", KILLED_HALF_WAY, target], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert target.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    check_writable(target)
    assert list(tmp_path.iterdir()) == [target]


def test_exchanging_two_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"of {name}").touch()
    assert _exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "of b").exists() and (tmp_path / "b" / "of a").exists()
    with pytest.raises(FileNotFoundError, match="none"):
        _exchange(tmp_path / "a", tmp_path / "none")


def test_a_sweep_spares_what_a_living_process_writes(tmp_path: Path) -> None:
    dead = [tmp_path / f".{name}.12345678.tmp" for name in ("one", "other", "ab*c")]
    others = [tmp_path / name for name in ("one.tmp", ".one.tmp", ".one.123456789.tmp")]
    for path in (*dead, *others):
        path.touch()
    (tmp_path / ".link.12345678.tmp").symlink_to(others[0])
    with atomic_path(tmp_path / "one") as temporary:
        assert not dead[0].exists() and dead[1].exists()
        sweep(tmp_path, "ab*c")
        assert not dead[2].exists() and dead[1].exists()
        sweep(tmp_path)
        assert not dead[1].exists() and temporary.exists()
        temporary.write_text("whole")
    assert (tmp_path / "one").read_text() == "whole"
    assert all(path.exists() for path in others)


def test_writers_and_sweepers_side_by_side(tmp_path: Path) -> None:
    """No thread mistakes another thread's new file for one left by a killed process."""
    errors: list[Exception] = []

    def work(number: int) -> None:
        try:
            for value in range(100):
                write_json(tmp_path / "file.json", [number, value])
                sweep(tmp_path)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]
    assert read_json(tmp_path / "file.json")[1] == 99


def test_a_check_leaves_no_folder_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b" / "file.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "NaN", "[1e999]", "[" * 100_000, '{"a": 1}'])
def test_text_is_read_by_its_declared_type(text: str) -> None:
    assert parse_json_as("[1]", list[int], "here") == [1]
    with pytest.raises(InputError, match=r"^here"):
        parse_json_as(text, list[int], "here")


def test_values_of_a_declared_type() -> None:
    share = Annotated[float, Field(ge=0, le=1)]
    whole = check_value("share", 1, share)
    assert whole == 1.0 and type(whole) is float
    for value, message in (
        (1.5, r"share must be less than or equal to 1, got 1\.5"),
        ("1", "share must be a valid number, got '1'"),
        (None, "share must be a valid number, got None"),
        ("x" * 1000, r"share must be a valid number, got 'x{1,20}\.\.\.x{1,20}'$"),
    ):
        with pytest.raises(InputError, match=message):
            check_value("share", value, share)


def test_a_regular_file_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("abc")
    assert regular_file(tmp_path / "a").st_size == 3
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("link", "is a symbolic link or no file"),
        ("folder", "is a symbolic link or no file"),
        ("none", "does not exist"),
        ("a/b", "cannot read .*Not a directory"),
    ):
        with pytest.raises(InputError, match=message):
            regular_file(tmp_path / name)
