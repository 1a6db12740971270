"""Test bars on a terminal, and lines where there is none."""

import io
import time

import pytest
from rich.console import Console

from mopo_fast.utils import progress
from mopo_fast.utils.progress import format_seconds, progress_bar


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Let progress go to a file that is no terminal, and let no time pass."""
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    file = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=file))
    return file


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0s"),
        (9.96, "10s"),
        (59.7, "1m 00s"),
        (125, "2m 05s"),
        (11_100, "3h 05m"),
        (183_600, "2d 03h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_finished_unit_is_one_line(log: io.StringIO) -> None:
    with progress_bar("train", 3, completed=1, unit="epoch") as bar:
        for epoch in (2, 3):
            bar.update(completed=epoch - 0.5)
            bar.update(completed=epoch, note=f"score {epoch}")
            bar.report()
    first, *lines = log.getvalue().splitlines()
    assert first.startswith("train: about 0.0s for each epoch, ") and first.endswith(" for 2 epochs")
    assert lines == [
        "train: 2/3 epochs, 0.0s, 0.0s left, score 2",
        "train: 3/3 epochs, 0.0s, score 3",
    ]


def test_long_units_have_lines_in_between(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", time.perf_counter)
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.05)
    with progress_bar("fit", 4, unit="epoch", open_ended=True) as bar:
        for step in range(1, 10):
            bar.update(completed=step / 10)
            time.sleep(0.06)
        before_the_end = log.getvalue().splitlines()
    assert 2 <= len(before_the_end) <= 9
    assert all(line.startswith("fit: 0.") and line.endswith("+ left") for line in before_the_end)


def test_a_position_that_stands_still_is_told_less_often(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic", time.perf_counter)
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.01)
    monkeypatch.setattr(progress, "_STILL_SECONDS", 0.2)
    with progress_bar("shards", 4):
        time.sleep(0.5)
        assert 1 <= log.getvalue().count("shards: 0/4") <= 2


def test_short_work_is_one_line(log: io.StringIO) -> None:
    with progress_bar("shards", 4) as bar:
        for _ in range(4):
            bar.advance()
    assert log.getvalue() == "shards: 4/4, 0.0s\n"


def test_quiet(log: io.StringIO) -> None:
    with progress_bar("shards", 4, unit="epoch", quiet=True) as bar:
        bar.update(completed=4, note="done")
        bar.report()
    assert log.getvalue() == ""


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_bar_is_one_line_of_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(
        progress, "console", Console(file=file, force_terminal=True, width=width, color_system=None)
    )
    note = "return -1234.5, penalty 0.0123, q -1.234e+04"
    with progress_bar("write halfcheetah-medium-replay-local.hdf5", 1000, unit="epoch") as bar:
        bar.update(completed=12.34, note=note)
        # The time left counts down from the first movement on.
        assert "left" in bar._times()
        console = Console(width=width, file=io.StringIO())
        lines = console.render_lines(bar, pad=False)
    assert len(lines) == 1
    text = "".join(segment.text for segment in lines[0])
    assert len(text) < width and "12.3/1000" in text
    assert (note in text) == (width == 200)


def test_time_left_is_that_of_this_session(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    bar = progress.Bar("train", 100, completed=90, unit="epoch")
    assert bar.seconds_left() is None
    now[0] += 10
    bar.update(completed=91)
    assert bar.seconds_left() == pytest.approx(90)
    now[0] += 4
    assert bar.seconds_left() == pytest.approx(86)


def test_speed_is_that_of_the_last_half(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    bar = progress.Bar("collect", 1000)
    for step in range(1, 601):
        now[0] += 1 if step <= 100 else 10
        bar.update(completed=step)
    assert bar.seconds_left() == pytest.approx(4000, rel=0.02)
    assert len(bar._samples) < 120
