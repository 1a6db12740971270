"""The common style of all figures."""

from contextlib import AbstractContextManager

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

BLUE, ORANGE, GREEN, GREY = "#2f6db3", "#d9772b", "#3a8f5c", "#7a828c"
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "savefig.dpi": 130,
}


def look() -> AbstractContextManager[None]:
    """Apply the common style to figures that are drawn and saved within the block."""
    return matplotlib.rc_context(_STYLE)  # type: ignore[arg-type]


def blank(width: float, height: float) -> Figure:
    """Make a figure without axes, of a size in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def blank_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Make a figure with one pair of axes, of a size in inches."""
    figure = blank(width, height)
    return figure, figure.subplots()


def label_log(axis: Axis, subs: tuple[float, ...] = (1.0, 2.0, 5.0)) -> None:
    """Label a logarithmic axis with plain numbers.

    Args:
        axis: axis to label.
        subs: multiples of each power of ten that get a label. The default gives more than one label to a
            range of less than a decade.
    """
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(lambda value, position: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def thousands(value: float, position: float) -> str:
    """Format a number on an axis, in thousands from 1000 on; `position` is matplotlib's."""
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"
