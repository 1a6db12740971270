"""Tests of the GPU measurements, small and on the CPU: a GPU may be available only for minutes."""

import json
from pathlib import Path

import pytest

from benchmarks import gpu

SMALL = {"starts": 20, "updates": 1, "steps": 1, "rounds": 1, "device": "cpu"}


def test_every_measurement_leaves_its_file(tmp_path: Path) -> None:
    gpu.gpu(**SMALL, out=tmp_path / "results", logs=tmp_path / "logs")
    results = list((tmp_path / "results").iterdir())
    assert {path.name for path in results} == {f"{name}-cpu.json" for name in gpu.SECONDS}
    for path in results:
        record = json.loads(path.read_text())
        assert record["commit"] and record["date"] and record["device"] == "cpu"
        assert all(row["rate"] > 0 for row in record["rows"])
        assert "triton" in record["absent"] and "cuda" in record["absent"]
        assert f"--only {path.name.removesuffix('-cpu.json')}" in record["command"]


def test_one_that_fails_or_hangs_does_not_cost_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run a measurement that exceeds its time and one with an invalid number of starts."""
    monkeypatch.setitem(gpu.SECONDS, "sac-1", 8)
    monkeypatch.setitem(gpu.SECONDS, "sac-8", 8)
    options = SMALL | {"updates": 10**6, "starts": 0}
    with pytest.raises(SystemExit, match="not measured: sac-1, rollout-float16, sac-8, rollout-bfloat16"):
        gpu.gpu(**options, out=tmp_path / "results", logs=tmp_path / "logs")
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["fit-cpu.json"]
    assert "--starts must be at least 1" in (tmp_path / "logs" / "rollout-float16.log").read_text()
