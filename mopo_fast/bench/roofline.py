"""Roofline plot of a bench: the rate of each contender, below the limits of the machine.

Source: Williams, Waterman and Patterson, "Roofline: an insightful visual performance model", CACM 2009.
"""

import math
import os
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from mopo_fast.bench.measure import Row
from mopo_fast.errors import InputError
from mopo_fast.utils.atomic import atomic_path, check_writable
from mopo_fast.utils.pictures import BLUE, GREEN, GREY, ORANGE, blank_axes, label_log, look

_FORMATS = (".png", ".svg", ".pdf")
# Distance between two labels, as a share of the axis.
_GAP = 0.055


def check_picture(path: str | os.PathLike[str]) -> None:
    """Raise `InputError` where `write_roofline` would refuse `path`, so that the user learns it early."""
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise InputError(f"cannot write {path}: the file's name must end in .png, .svg or .pdf")
    check_writable(path)


def write_roofline(path: str | os.PathLike[str], rows: list[Row]) -> None:
    """Draw the rows of one bench into a file, atomically. The name's ending decides the format.

    Raises:
        InputError: the ending is unknown, or the file cannot be written.
    """
    path = Path(path)
    check_picture(path)
    with look(), atomic_path(path) as temporary:
        roofline(rows).savefig(temporary, format=path.suffix[1:].lower())


def roofline(rows: list[Row]) -> Figure:
    """Draw the rows of one bench in GFLOP/s over FLOP per byte, on logarithmic axes, with the roofs.

    The roofs are the memory's bandwidth and the peak of each dtype. torch.mm is drawn where it is not the
    peak. Points are placed by the least possible memory traffic. The true point of a contender that moves
    more bytes lies further left.
    """
    first = rows[0]
    rising = sorted(rows, key=lambda row: row.gflops)
    slowest, fastest = rising[0].gflops, rising[-1].gflops
    peaks = {row.peak: row.peak_gflops for row in rows}
    mm, bandwidth = first.mm_gflops, first.bandwidth
    ridges = [peak / bandwidth for peak in peaks.values()]
    x = np.array([min(*ridges, first.intensity) / 8, max(*ridges, first.intensity) * 4])
    y = np.array([slowest / 2, max(fastest, mm, *peaks.values()) * 2])

    figure, axes = blank_axes(9.0, 4.8)
    roofs = peaks if first.peak_gflops == mm else peaks | {"torch.mm, float32": mm}
    for (name, rate), style in zip(roofs.items(), ("-", "--", ":"), strict=False):
        axes.plot(x, np.full(2, rate), style, color=GREY, label=f"{name}: {rate:,.1f} GFLOP/s")
    axes.plot(x, bandwidth * x, color=GREEN, label=f"memory, a large copy: {bandwidth:,.1f} GB/s")
    heights = _spread([math.log(row.gflops) for row in rising], _GAP * math.log(y[1] / y[0]))
    for row, height in zip(rising, heights, strict=True):
        colour = BLUE if row is first else ORANGE
        axes.plot(row.intensity, row.gflops, "o", color=colour, markersize=6)
        axes.annotate(
            f"{row.backend}: {row.gflops:,.1f}",
            (row.intensity, row.gflops),
            (1.02, math.exp(height)),
            textcoords=("axes fraction", "data"),
            arrowprops={"arrowstyle": "-", "relpos": (0, 0.5), "color": colour, "linewidth": 0.6},
            verticalalignment="center",
            fontsize=9.5,
        )
    axes.set(xscale="log", yscale="log", xlim=x, ylim=y, ylabel="GFLOP/s")
    axes.set_xlabel("arithmetic intensity, FLOP per byte (lower bound of memory traffic)")
    axes.set_title(f"{first.kernel}, {first.device}, {first.shape['threads']} threads")
    label_log(axes.xaxis, (1.0,))
    label_log(axes.yaxis)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _spread(rising: list[float], gap: float) -> list[float]:
    """Return the nearest values that are at least `gap` apart, by isotonic regression (min-max formula)."""
    rest = [value - gap * i for i, value in enumerate(rising)]
    n = len(rest)
    return [
        gap * i + max(min(fmean(rest[j:k]) for k in range(i + 1, n + 1)) for j in range(i + 1))
        for i in range(n)
    ]
