"""Test shards and sweeps on Ray, in separate processes, because Ray connects a whole process to a cluster."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import HELPERS, ROOT
from small_shards import content

from mopo_fast import InputError, sweep
from mopo_fast.bulk import cluster
from mopo_fast.bulk.cluster import connected
from mopo_fast.config import RunConfig


def start(*command: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(HELPERS), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": paths, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", **environment},
    )


@pytest.mark.slow
def test_a_lost_worker(run: Path, dataset: Path, tmp_path: Path) -> None:
    """Two workers, one of which is killed, write the same bytes as one process."""
    outs = [tmp_path / name for name in ("killed", "whole")]
    for out, kill in zip(outs, ("kill", "no"), strict=True):
        done = start(HELPERS / "cluster.py", run, dataset, out, 60_000, 3000, kill)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.split()[-1] == ("1" if kill == "kill" else "0")
    command = ["-m", "mopo_fast", "rollout", run, "--dataset", dataset, "--out", tmp_path / "alone"]
    alone = start(*command, "--count", 60_000, "--shard-rows", 3000, "--seed", 7, "--threads", 1, "--quiet")
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert content(outs[0]) == content(outs[1]) == content(tmp_path / "alone")


@pytest.mark.slow
def test_mistakes_cross_the_cluster(run: Path, dataset: Path, tmp_path: Path) -> None:
    command = ["-m", "mopo_fast", "rollout", run, "--dataset", dataset, "--out", tmp_path / "out", "--quiet"]
    nowhere = start(*command, "--count", 100, "--ray", "127.0.0.1:1")
    assert nowhere.returncode == 2 and "cannot reach a Ray cluster at '127.0.0.1:1'" in nowhere.stderr
    greedy = start(*command, "--count", 100, "--ray", "local", "--threads", 4096)
    assert (
        greedy.returncode == 2 and "threads must be" in greedy.stderr
    ) or "a worker takes" in greedy.stderr


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"--ray needs Ray; .* '\.\[ray\]'"), connected("local"):
        pass


def test_an_interrupt_waits_for_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Ray:
        def is_initialized(self) -> bool:
            return False

        def init(self, **options: Any) -> None:
            signal.raise_signal(signal.SIGINT)
            calls.append("connected")

        def shutdown(self) -> None:
            calls.append("shut down")

    monkeypatch.setattr(cluster, "_import_ray", Ray)
    # SIGINT is ignored if the tests run in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), connected("local"):
            calls.append("at work")
        assert calls == ["connected", "shut down"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_a_sweep(hopper_data: Path, tmp_path: Path) -> None:
    """A sweep makes a run for each seed and coefficient, and leaves an existing run unchanged."""
    out = tmp_path / "sweep"
    command = ["-m", "mopo_fast", "sweep", hopper_data, "--seeds", "0:2", "--penalty-coefs", 0, 1]
    command += ["--horizons", 1, "--out", out, "--steps", 20, "--rollout.interval", 10, "--quiet"]
    command += ["--rollout.batch-size", 30, "--dynamics.members", 2, "--dynamics.elites", 1]
    command += ["--dynamics.hidden", 8, "--dynamics.weight-decay", 1e-5, 1e-5, "--dynamics.max-epochs", 2]
    command += ["--sac.hidden", 8, 8, "--evaluation.episodes", 1]
    done = start(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    with (out / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["seed"], row["horizon"], float(row["penalty_coef"])) for row in rows} == {
        (seed, "1", coef) for seed in "01" for coef in (0.0, 1.0)
    }
    assert (out / "comparison_means.png").read_bytes().startswith(b"\x89PNG")
    assert "penalty_coef 1 minus penalty_coef 0  " in done.stdout
    assert done.stdout.endswith(f"{out / 'comparison.html'}\n")
    # Ray's own output, which names temporary folders.
    for words in ("View detailed results", "tensorboard", "Configuration for", "completed"):
        assert words not in done.stdout
    assert "Token authentication is enabled" not in done.stderr
    folder = out / "seed0-h1-coef0"
    policies = {path: path.stat().st_mtime_ns for path in out.glob("*/policy.safetensors")}
    assert len(policies) == 4 and folder / "policy.safetensors" in policies
    (folder / "summary.json").unlink()
    again = start(*command)
    assert again.returncode == 0, again.stderr[-3000:]
    assert (folder / "summary.json").exists()
    for path, time in policies.items():
        assert path.parent == folder or path.stat().st_mtime_ns == time
    broken = start(*command[:-2], "--evaluation.episodes", 1, "--sac.discount", 0.5)
    assert broken.returncode == 2 and "was made with sac.discount = 0.99, not 0.5" in broken.stderr


def test_each_epoch_is_reported_to_tune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tune = pytest.importorskip("ray.tune")
    told: list[dict[str, Any]] = []

    def train(config: Any, out: Path, *, on_epoch: Any, **options: Any) -> None:
        on_epoch({"epoch": 1, "q_std": 0.5, "score_mean": None})

    monkeypatch.setattr(tune, "report", told.append)
    monkeypatch.setattr(sweep, "train", train)
    sweep._train((RunConfig("data"), tmp_path, False))
    assert told == [{"epoch": 1, "q_std": 0.5}]
