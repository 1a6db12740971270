"""Test the roofline plot: positions of its points and labels, and its file."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from mopo_fast.bench.measure import Row
from mopo_fast.bench.roofline import _spread, roofline, write_roofline
from mopo_fast.errors import InputError

# The points are unordered; one lies above the peak, and two are so close that their labels would overlap.
RATES = {"ours": 50.0, "fast": 400.0, "close": 50.1, "slow": 2.0}


def drawn_rows(intensity: float = 10.0) -> list[Row]:
    row = Row(
        **{"kernel": "fit", "backend": "", "device": "cpu", "dtype": "float32", "shape": {"threads": 2}},
        **{"rate": 1.0, "unit": "things/s", "gflops": 0.0, "peak": "multiply-adds, float32"},
        **{"peak_gflops": 200.0, "share_of_peak": 0.0, "mm_gflops": 150.0},
        **{"intensity": intensity, "bandwidth": 8.0, "baselines": {}},
    )
    return [dataclasses.replace(row, backend=name, gflops=rate) for name, rate in RATES.items()]


# These intensities lie left of the ridge, which is at 25 FLOP per byte, and far to its right.
@pytest.mark.parametrize("intensity", [10.0, 5000.0])
def test_a_roofline_shows_the_roofs_and_the_rates(intensity: float) -> None:
    (axes,) = roofline(drawn_rows(intensity)).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert "lower bound of memory traffic" in axes.get_xlabel() and axes.get_ylabel() == "GFLOP/s"
    peak, mm, memory, *points = axes.lines
    assert set(peak.get_ydata()) == {200.0} and peak.get_label() == "multiply-adds, float32: 200.0 GFLOP/s"
    assert set(mm.get_ydata()) == {150.0} and mm.get_label() == "torch.mm, float32: 150.0 GFLOP/s"
    assert memory.get_ydata() == pytest.approx(8.0 * memory.get_xdata())
    assert "8.0 GB/s" in memory.get_label()
    assert sorted(point.get_xydata()[0].tolist() for point in points) == [
        [intensity, rate] for rate in sorted(RATES.values())
    ]
    # All points and the ridge lie within the picture.
    shown = axes.viewLim
    for x, y in [(25.0, 200.0), *((intensity, rate) for rate in RATES.values())]:
        assert shown.x0 < x < shown.x1 and shown.y0 < y < shown.y1


def test_a_roofline_has_the_peak_of_each_dtype() -> None:
    first, *others = drawn_rows()
    first = dataclasses.replace(first, dtype="bfloat16", peak="multiply-adds, bfloat16", peak_gflops=3000.0)
    (axes,) = roofline([first, *others]).axes
    roofs = {line.get_label().partition(":")[0]: set(line.get_ydata()) for line in axes.lines[:3]}
    assert roofs == {
        **{"multiply-adds, bfloat16": {3000.0}, "multiply-adds, float32": {200.0}},
        "torch.mm, float32": {150.0},
    }
    assert axes.viewLim.y1 > 3000.0 and axes.viewLim.x1 > 3000.0 / 8.0


def test_where_torch_mm_is_the_peak_it_is_drawn_once() -> None:
    rows = [
        dataclasses.replace(row, peak="torch.mm of 8192, float16", mm_gflops=row.peak_gflops)
        for row in drawn_rows()
    ]
    (axes,) = roofline(rows).axes
    peak, memory, *_ = axes.lines
    assert peak.get_label() == "torch.mm of 8192, float16: 200.0 GFLOP/s" and "memory" in memory.get_label()


def test_labels_are_their_points_and_do_not_overlap() -> None:
    figure = roofline(drawn_rows())
    (axes,) = figure.axes
    labels = {text.get_text(): text for text in axes.texts}
    assert labels.keys() == {f"{name}: {rate:,.1f}" for name, rate in RATES.items()}
    assert [labels[f"{name}: {rate:,.1f}"].xy for name, rate in RATES.items()] == [
        (10.0, rate) for rate in RATES.values()
    ]
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(boxes))
    assert all(figure.bbox.containsx(box.x1) for box in boxes)


@pytest.mark.parametrize(
    ("rising", "nearest"),
    [
        ([1.0, 5.0], [1.0, 5.0]),
        ([1.0, 1.0], [0.0, 2.0]),
        ([1.0, 2.0, 3.0], [0.0, 2.0, 4.0]),
        ([0.0, 2.0, 2.0, 9.0], [-2 / 3, 4 / 3, 10 / 3, 9.0]),
    ],
)
def test_labels_move_as_little_as_they_can(rising: list[float], nearest: list[float]) -> None:
    assert np.allclose(_spread(rising, 2.0), nearest)


@pytest.mark.parametrize(("name", "begins"), [("a.png", b"\x89PNG"), ("b.SVG", b"<?xml"), ("c.pdf", b"%PDF")])
def test_a_roofline_is_in_the_format_of_its_name(name: str, begins: bytes, tmp_path: Path) -> None:
    write_roofline(tmp_path / "new" / name, drawn_rows())
    assert (tmp_path / "new" / name).read_bytes().startswith(begins)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.jpeg", "png", "a.png.txt"])
def test_no_roofline_in_another_format(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{name}.*must end in \.png, \.svg or \.pdf"):
        write_roofline(tmp_path / name, drawn_rows())
    assert not list(tmp_path.iterdir())
