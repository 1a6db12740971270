"""One look for every picture."""

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
    """Within it figures are drawn and saved in the look of the house."""
    return matplotlib.rc_context(_STYLE)  # type: ignore[arg-type]


def blank(width: float, height: float) -> Figure:
    """A figure without axes, inches."""
    return Figure(figsize=(width, height), layout="constrained")


def blank_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, inches."""
    figure = blank(width, height)
    return figure, figure.subplots()


def label_log(axis: Axis, subs: tuple[float, ...] = (1.0, 2.0, 5.0)) -> None:
    """Plain numbers at 1, 2, 5, 10, ...: a range of less than a decade gets more than one."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(lambda value, position: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())
