"""Test progress.csv and TensorBoard's event files: any content is read or gives one error."""

import os
import re
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mopo_fast.errors import InputError
from mopo_fast.run.log import COLUMNS, LATER_COLUMNS, append_row, cut_back, read_rows
from mopo_fast.utils.board import Board, event_files


def row(epoch: int) -> dict[str, Any]:
    return {name: epoch for name in COLUMNS}


@pytest.fixture
def progress(tmp_path: Path) -> Path:
    path = tmp_path / "progress.csv"
    for epoch in (1, 2, 3):
        append_row(path, row(epoch))
    return path


def test_rows_are_cut_back(progress: Path) -> None:
    cut_back(progress, 2)
    assert [line["epoch"] for line in read_rows(progress)] == ["1", "2"]
    append_row(progress, row(3))
    assert [line["buffer_size"] for line in read_rows(progress)] == ["1", "2", "3"]
    cut_back(progress, 0)
    cut_back(progress, 0)
    assert not progress.exists()


def test_rows_of_an_earlier_version_get_the_later_columns(
    progress: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = [name for name in COLUMNS if name not in LATER_COLUMNS]
    lines = [line.split(",")[: len(earlier)] for line in progress.read_text().splitlines()]
    progress.write_text("".join(",".join(line) + "\n" for line in lines))
    assert list(read_rows(progress)[0]) == earlier
    cut_back(progress, 2)
    append_row(progress, row(3))
    first, second, third = read_rows(progress)
    assert list(first) == list(COLUMNS)
    assert {first[name] for name in earlier} == {"1"} and {second[name] for name in earlier} == {"2"}
    assert {second[name] for name in LATER_COLUMNS} == {""}
    assert {third[name] for name in LATER_COLUMNS} == {"3"}


def test_a_line_cut_short_by_a_full_disk_is_left_out(progress: Path) -> None:
    progress.write_bytes(progress.read_bytes()[:-9])
    assert [line["epoch"] for line in read_rows(progress)] == ["1", "2"]
    cut_back(progress, 2)
    with pytest.raises(InputError, match=r"progress\.csv does not hold epochs 1 to 3"):
        cut_back(progress, 3)


HEADER = ",".join(COLUMNS)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"\xff\xfe\n",
        b"epoch,updates\n1,10\n2,20\n",
        f"{HEADER}\n1,2\n2,3\n".encode(),
        (HEADER + "\n" + ("1" + "," * (len(COLUMNS) - 1) + "\n") * 2).encode(),
        (HEADER + "\n" + "x" * 200_000 + "\n").encode(),
        (HEADER + '\n1,"' + "\n2,\n" * 4).encode(),
        (HEADER + "\n1" + "\x00," * (len(COLUMNS) - 1) + "\n").encode(),
        (HEADER + "\r" + "1,\r" * 3 + "\n").encode(),
    ],
)
def test_other_contents_are_refused(content: bytes, progress: Path) -> None:
    progress.write_bytes(content)
    with pytest.raises(InputError, match=r"progress\.csv"):
        cut_back(progress, 2)
    try:
        read_rows(progress)
    except InputError as error:
        assert str(progress) in str(error)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "absent"):
        for read in (read_rows, lambda path: cut_back(path, 1)):
            with pytest.raises(InputError, match=re.escape(str(path))):
                read(path)


def test_a_link_does_not_lead_the_writing_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "progress.csv").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        append_row(tmp_path / "progress.csv", row(1))
    assert not (tmp_path / "elsewhere").exists()


def test_the_board_is_what_tensorboard_reads(tmp_path: Path) -> None:
    for first, purge in ((1, None), (3, 3)):
        board = Board(tmp_path, purge)
        for step in range(first, 5):
            board.add_scalar("a/b", step + first / 10, step)
        board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = [(event.step, pytest.approx(event.value)) for event in events.Scalars("a/b")]
    assert found == [(1, 1.1), (2, 2.1), (3, 3.3), (4, 4.3)]


def test_odd_names_beside_the_board(tmp_path: Path) -> None:
    for name in ("events.out.tfevents.", "events.out.tfevents.x.y", "events.out.tfevents", "events.7"):
        (tmp_path / name).touch()
    (tmp_path / f"events.out.tfevents.{'9' * 200}.far").touch()
    started = time.perf_counter()
    Board(tmp_path).close()
    assert time.perf_counter() - started < 5
    assert len(event_files(tmp_path)) == 2


def test_a_full_disk_is_the_callers_to_hear(tmp_path: Path) -> None:
    board = Board(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            for step in range(100):
                board.add_scalar("a/b", 1.0, step)
            board.flush()
        with pytest.raises(OSError, match="File too large"):
            board.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
