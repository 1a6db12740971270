"""Test bars on a terminal, and lines where there is none."""

import io
import sys
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from mopo_fast.utils import progress
from mopo_fast.utils.progress import format_seconds, print_lines, progress_bar


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
        "train: 2/3 epochs, 0.0s, score 2",
        "train: 3/3 epochs, 0.0s, score 3",
    ]


def test_long_units_have_lines_in_between(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", time.perf_counter)
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.05)
    with progress_bar("fit", 4, unit="epoch", open_ended=True) as bar:
        for step in range(1, 10):
            time.sleep(0.06)
            bar.update(completed=step / 10)
        before_the_end = log.getvalue().splitlines()
    assert 2 <= len(before_the_end) <= 9
    assert all(line.startswith("fit: 0/4+ epochs, ") for line in before_the_end)
    assert before_the_end[-1].endswith("+ left")


class Moved:
    """A clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def update(self, bar: progress.Bar, seconds: float, completed: float) -> str:
        """Move the bar after so many seconds, and return its texts."""
        self.now += seconds
        bar.update(completed=completed)
        return f"{bar.count()}, {bar.times()}"


def test_open_ended_work_with_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Moved(monkeypatch)
    bar = progress.Bar("fit", 6, unit="epoch", open_ended=True, at_most=20)
    assert clock.update(bar, 2, 1) == " 1/20 epochs at most, 2.0s, <38s left"
    bar.report()
    bar.update(total=11)
    assert clock.update(bar, 20, 11) == "11/20 epochs at most, 22s, <18s left"
    # It ends early, where the last unit was no reason to go on.
    bar.report()
    assert f"{bar.count()}, {bar.times()}" == "11/11 epochs, 22s"
    # A certain end is not "at most".
    bar.update(total=20)
    assert clock.update(bar, 2, 12) == "12/20 epochs, 24s, 16s left"


def test_open_ended_work_without_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Moved(monkeypatch)
    bar = progress.Bar("fit", 10, unit="epoch", open_ended=True)
    assert clock.update(bar, 2, 1) == " 1/10+ epochs, 2.0s, 18s+ left"
    clock.update(bar, 18, 10)
    # The last unit may still make the work longer.
    assert bar.count() == "10/10+ epochs"
    bar.report()
    assert bar.count() == "10/10 epochs"
    # Resumed work that had ended.
    assert progress.Bar("fit", 10, 10, "epoch", open_ended=True).count() == "10/10 epochs"


def test_tenths_of_long_units_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Moved(monkeypatch)
    assert clock.update(progress.Bar("fit", 4, unit="epoch"), 1, 0.5).startswith("0/4 epochs")
    assert clock.update(progress.Bar("fit", 4, unit="epoch"), 10, 0.5).startswith("0.5/4 epochs")
    assert clock.update(progress.Bar("fit", 4, unit="epoch"), 10, 1).startswith("1/4 epochs")
    assert clock.update(progress.Bar("collect", 60_000), 10, 1000).startswith(" 1,000/60,000, ")


def test_no_time_left_is_shown_once_it_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Moved(monkeypatch)
    bar = progress.Bar("train", 2, unit="epoch")
    assert clock.update(bar, 10, 1.5) == "1/2 epochs, 10s, 3.3s left"
    clock.now += 5
    assert bar.times() == "15s"


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
    parts = ["return -1234.5", "penalty 0.0123", "q -1.234e+04"]
    note = ", ".join(parts)
    with progress_bar("write halfcheetah-medium-replay-local.hdf5", 1000, unit="epoch") as bar:
        bar.update(completed=612.34, note=note)
        # The time left counts down from the first movement on.
        assert "left" in bar.times()
        console = Console(width=width, file=io.StringIO())
        lines = console.render_lines(bar, pad=False)
    assert len(lines) == 1
    text = "".join(segment.text for segment in lines[0])
    assert len(text) < width and "612/1,000 epochs" in text
    assert (note in text) == (width == 200)
    # A wide line has a bar that can be read; a part of the note is whole or left out.
    assert (text.count("━") >= 6) == (width > 40)
    assert width == 40 or not text.split("left")[1].strip() or text.rstrip().endswith(tuple(parts))


def test_a_notebook_has_one_output_that_is_replaced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, shown = Moved(monkeypatch), []

    class Handle:
        def update(self, data: dict[str, str], raw: bool) -> None:
            shown[-1] = data["text/plain"]

    def display(data: dict[str, str], raw: bool, display_id: bool) -> Handle:
        shown.append(data["text/plain"])
        return Handle()

    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=None))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    print_lines("seed  0\nfolder  run")
    with progress_bar("fit", 4, unit="epoch") as bar:
        clock.update(bar, 2, 1)
        assert len(shown) == 1 and shown[0].endswith(" 1/4 epochs 2.0s, 6.0s left")
        # A kernel call may report a thousand times in a second.
        clock.update(bar, 0.1, 2)
        assert "1/4 epochs" in shown[0]
        bar.update(note="holdout MSE 0.5")
        bar.report()
        assert shown[0].endswith("2/4 epochs 2.1s, 2.1s left holdout MSE 0.5")
    # The lines do not go to standard error, which notebooks show in red.
    assert capsys.readouterr() == ("seed  0\nfolder  run\n", "")


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
