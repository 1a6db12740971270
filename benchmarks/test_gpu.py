"""What measures a GPU is tried on the CPU, small: on the day it has a GPU for minutes."""

import json
from pathlib import Path

import pytest

from benchmarks import gpu


def test_every_measurement_leaves_its_file(tmp_path: Path) -> None:
    gpu.gpu(starts=20, updates=1, steps=1, rounds=1, out=tmp_path, device="cpu")
    names = ("rollout-float16", "rollout-bfloat16", "sac-1", "sac-8", "fit")
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}-cpu.json" for name in names}
    for path in tmp_path.iterdir():
        record = json.loads(path.read_text())
        assert record["commit"] and record["date"] and record["device"] == "cpu"
        assert all(row["rate"] > 0 for row in record["rows"])
        assert "triton" in record["absent"] and "cuda" in record["absent"]


def test_one_that_fails_does_not_cost_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    for name in ("_rollouts", "_sac"):
        monkeypatch.setattr(gpu, name, broken)
    with pytest.raises(SystemExit, match="not measured: rollout-float16, rollout-bfloat16, sac-1, sac-8"):
        gpu.gpu(steps=1, rounds=1, out=tmp_path, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["fit-cpu.json"]
