"""Reports whose pictures are built but not rendered, for tests that train many runs and look at no picture.

Most of the time of a small training is that of rendering. test_report.py, test_compare.py and the tests of
the command line render.
"""

import functools
from collections.abc import Iterator

import pytest
from matplotlib.figure import Figure

from mopo_fast import compare, report
from mopo_fast.utils.pages import to_png


@functools.cache
def _tiny() -> bytes:
    return to_png(Figure((0.1, 0.1)))


def unrendered_png(figure: Figure) -> bytes:
    """Return a tiny picture in place of the figure."""
    assert figure.axes
    return _tiny()


def render_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (report, compare):
        monkeypatch.setattr(module, "to_png", unrendered_png)


@pytest.fixture(scope="module")
def unrendered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        render_nothing(monkeypatch)
        yield
