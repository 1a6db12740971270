"""Test how names and texts of files are printed to the terminal."""

import logging
from pathlib import Path

import pytest

from mopo_fast.cli import main
from mopo_fast.errors import printable
from mopo_fast.utils.progress import progress_bar

ESCAPE = "\x1b]0;pwned\x07\x1b[2J\x7f\x9b31m\r\u202eok"
SPELT_OUT = r"\x1b]0;pwned\x07\x1b[2J\x7f\x9b31m\r\u202eok"


def test_printable() -> None:
    assert printable(ESCAPE + "\nné λ 好") == SPELT_OUT + "\nné λ 好"


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"dataset": "\\u001b[2J", "task": "hopper"}')
    assert main(["evaluate", str(tmp_path / ESCAPE)]) == 2
    assert SPELT_OUT in capsys.readouterr().err


def test_log_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", str(tmp_path)])
    capsys.readouterr()
    logger = logging.getLogger("mopo_fast")
    logger.warning("%s", "\x1b[2J")
    assert (
        logger.handlers[0].format(logging.LogRecord("a", 30, "", 0, "%s", (ESCAPE,), None))
        == f"warning: {SPELT_OUT}"
    )


def test_progress_bars_take_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("write [/x].hdf5 \x1b[2J", 3) as bar:
        bar.update(completed=1, note="[/y]")
