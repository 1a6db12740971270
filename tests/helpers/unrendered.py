"""Reports whose pictures are built but not rendered, for tests that train runs and look at no picture.

Rendering takes most of the time of a small training. test_report.py, test_compare.py and the tests of the
command line render.
"""

import functools

import pytest
from matplotlib.figure import Figure

from mopo_fast import compare, report
from mopo_fast.utils.pages import to_png


@functools.cache
def _tiny() -> bytes:
    return to_png(Figure((0.1, 0.1)))


def _unrendered(figure: Figure) -> bytes:
    assert figure.axes
    return _tiny()


def render_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let reports hold a tiny picture in place of each figure."""
    for module in (report, compare):
        monkeypatch.setattr(module, "to_png", _unrendered)
