"""Test the README's chart of speed."""

import json
from pathlib import Path

import pytest

from benchmarks.pictures import PANELS, PICTURES, Bar, draw, draw_epochs, result_path, speed
from benchmarks.record import RESULTS

ISA = "avx512_amx"


def test_the_charts_are_of_the_committed_results(tmp_path: Path) -> None:
    draw(RESULTS, ISA, tmp_path / "speed.svg")
    draw_epochs(RESULTS, tmp_path / "epochs.svg")
    for name in ("speed.svg", "epochs.svg"):
        committed = (PICTURES / name).read_bytes()
        assert (tmp_path / name).read_bytes() == committed, "python -m benchmarks.pictures"


@pytest.mark.parametrize(("title", "bars"), PANELS.items(), ids=list(PANELS))
def test_bars_are_ratios_of_one_run(title: str, bars: tuple[Bar, ...]) -> None:
    files = {result_path(RESULTS, name, ISA) for _, name, _ in bars}
    assert len(files) == 1 or title.startswith("OfflineRL-Kit itself"), (
        "each of these is beside the same, as shipped"
    )
    assert speed(result_path(RESULTS, *bars[-1][1:2], ISA), bars[-1][2]) > 0
    for _, name, way in bars:
        result = json.loads(result_path(RESULTS, name, ISA).read_text())
        if "rows" in result and "baselines" in result["rows"][0]:
            # The run's own ratios, of its first contender over the others.
            first, *_ = result["rows"]
            if way in first["baselines"]:
                ratio = first["rate"] / speed(result_path(RESULTS, name, ISA), way)
                assert ratio == pytest.approx(first["baselines"][way], rel=0.05)
