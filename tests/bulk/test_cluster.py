"""Test shards and sweeps on a Ray cluster that the tests of this file share."""

import csv
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, cluster_of_two
from small_shards import content

from mopo_fast import InputError, sweep
from mopo_fast.bulk import cluster
from mopo_fast.bulk.cluster import connected
from mopo_fast.cli import main
from mopo_fast.config import RunConfig


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Cluster]:
    with cluster_of_two() as connection:
        yield connection


@pytest.mark.slow
def test_a_lost_worker(run: Path, dataset: Path, tmp_path: Path, ray_cluster: Cluster) -> None:
    """Two workers, one of which is killed, write the same bytes as one process."""
    outs = [tmp_path / name for name in ("killed", "whole")]
    for out, kill in zip(outs, (True, False), strict=True):
        killed = ray_cluster.shards(run, dataset, out, kill=kill, count=60_000, shard_rows=3000, seed=7)
        assert killed == kill
    command = ["rollout", run, "--dataset", dataset, "--out", tmp_path / "alone", "--count", 60_000]
    command += ["--shard-rows", 3000, "--seed", 7, "--threads", 1, "--quiet"]
    assert main([str(word) for word in command]) == 0
    assert content(outs[0]) == content(outs[1]) == content(tmp_path / "alone")


@pytest.mark.slow
def test_mistakes_cross_the_cluster(
    run: Path, dataset: Path, tmp_path: Path, ray_cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["rollout", run, "--dataset", dataset, "--out", tmp_path / "out", "--quiet", "--count", 100]
    assert main([str(word) for word in (*command, "--ray", "127.0.0.1:1")]) == 2
    assert "cannot reach a Ray cluster at '127.0.0.1:1'" in capsys.readouterr().err
    greedy = ray_cluster.command(*command, "--ray", "auto", "--threads", 128)
    assert greedy.returncode == 2, greedy.stderr
    assert "the cluster at 'auto' has 2 CPUs and 0 GPUs; a worker takes 128 and 0" in greedy.stderr


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
def test_a_sweep(hopper_data: Path, tmp_path: Path, ray_cluster: Cluster) -> None:
    """A sweep makes a run for each seed and coefficient, and leaves an existing run unchanged."""
    out = tmp_path / "sweep"
    command = ["sweep", hopper_data, "--seeds", "0:2", "--penalty-coefs", 0, 1]
    command += ["--horizons", 1, "--out", out, "--steps", 20, "--rollout.interval", 10, "--quiet"]
    command += ["--rollout.batch-size", 30, "--dynamics.members", 2, "--dynamics.elites", 1]
    command += ["--dynamics.hidden", 8, "--dynamics.weight-decay", 1e-5, 1e-5, "--dynamics.max-epochs", 2]
    command += ["--sac.hidden", 8, 8, "--evaluation.episodes", 1]
    done = ray_cluster.command(*command)
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
    folder = out / "seed0-h1-coef0"
    policies = {path: path.stat().st_mtime_ns for path in out.glob("*/policy.safetensors")}
    assert len(policies) == 4 and folder / "policy.safetensors" in policies
    (folder / "summary.json").unlink()
    again = ray_cluster.command(*command)
    assert again.returncode == 0, again.stderr[-3000:]
    assert (folder / "summary.json").exists()
    for path, time in policies.items():
        assert path.parent == folder or path.stat().st_mtime_ns == time
    broken = ray_cluster.command(*command[:-2], "--evaluation.episodes", 1, "--sac.discount", 0.5)
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
