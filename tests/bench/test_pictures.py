"""Test the README's chart."""

import json
from pathlib import Path

import pytest

from benchmarks.pictures import PANELS, PICTURE, draw, speeds
from benchmarks.record import RESULTS


def test_the_chart_is_of_the_committed_results(tmp_path: Path) -> None:
    draw(RESULTS, "cpu-avx512_amx", tmp_path / "speed.svg")
    assert (tmp_path / "speed.svg").read_bytes() == PICTURE.read_bytes(), "python -m benchmarks.pictures"


@pytest.mark.parametrize(("title", "name", "bars"), PANELS, ids=[title for title, _, _ in PANELS])
def test_bars_are_ratios_of_one_run(title: str, name: str, bars: tuple[tuple[str, str], ...]) -> None:
    result = json.loads((RESULTS / f"{name}-cpu-avx512_amx.json").read_text())
    rates = speeds(result)
    assert all(rates[contender] > 0 for _, contender in bars)
    if "rows" in result:
        # Ratios of the run's first contender to the others, as the run reports them.
        first, *_ = result["rows"]
        for contender, ratio in first["baselines"].items():
            assert first["rate"] / rates[contender] == pytest.approx(ratio, rel=0.05)
