"""Test the lock that lets one process at a time work in a folder."""

import threading
from pathlib import Path

import pytest
from held_folders import held_elsewhere

from mopo_fast.errors import InputError
from mopo_fast.utils.lock import locked


def test_another_process_is_refused_until_the_holder_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with held_elsewhere(folder):
        for _ in range(2):
            with pytest.raises(InputError, match=rf"another process is at work in {folder}"), locked(folder):
                pass
        with locked(folder.parent):
            pass
    with locked(folder):
        pass


def test_who_holds_it_may_take_it_again_and_others_not(tmp_path: Path) -> None:
    refused: list[str] = []

    def enter() -> None:
        try:
            with locked(tmp_path):
                pass
        except InputError as error:
            refused.append(str(error))

    def enter_in_a_thread() -> None:
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()

    with locked(tmp_path):
        with locked(str(tmp_path)):
            pass
        # The outer lock is still held after the end of the inner one.
        enter_in_a_thread()
        assert len(refused) == 1 and str(tmp_path) in refused[0]
    enter_in_a_thread()
    assert len(refused) == 1


def test_an_error_inside_lets_go(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="mine"), locked(tmp_path):
        raise OSError("mine")
    with held_elsewhere(tmp_path):
        pass


def test_a_folder_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "odd" / ".lock").mkdir(parents=True)
    for folder in (tmp_path / "file", tmp_path / "odd", Path("/proc/nowhere")):
        with pytest.raises(InputError, match=rf"cannot work in {folder}: .*; choose another"), locked(folder):
            pass


def test_a_folder_made_for_its_lock_alone_is_removed(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="mine"), locked(tmp_path / "a" / "b"):
        with locked(tmp_path / "a" / "b"):
            pass
        assert (tmp_path / "a" / "b" / ".lock").exists()
        raise OSError("mine")
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]
