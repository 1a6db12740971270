"""Test that `train`, killed repeatedly with SIGKILL, ends with the bits of an uninterrupted run.

A fork server imports the package once and forks a fresh process for every attempt, which saves the time for
imports. It runs no computation itself.
"""

import dataclasses
import os
import random
import signal
import time
from pathlib import Path

import pytest
from killed import CONTEXT, attempt, start
from small_runs import assert_same_results, progress
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mopo_fast.config import TrainConfig
from mopo_fast.data import load_dataset
from mopo_fast.errors import InputError
from mopo_fast.fit import fit_and_save
from mopo_fast.train import train

CONTEXT.set_forkserver_preload(
    ["mopo_fast.train", "torch._dynamo", "pytest", EventAccumulator.__module__, "matplotlib.pyplot"]
)


def go_on(config: TrainConfig, out: Path) -> None:
    train(config, out, resume=True, quiet=True)


@pytest.fixture(scope="module")
def config(config: TrainConfig) -> TrainConfig:
    """Return settings with a longer fit and training, so that kills hit all parts of it."""
    dynamics = dataclasses.replace(config.dynamics, max_epochs=6)
    # The critics of the targets are drawn anew for each update.
    sac = dataclasses.replace(config.sac, critics=3, target_critics=2)
    return dataclasses.replace(config, steps=75, dynamics=dynamics, sac=sac, keep_policies=3)


@pytest.fixture(scope="module")
def undisturbed(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert attempt(go_on, config, out) == 0
    return out


def has_checkpoint(out: Path) -> bool:
    """Return whether an attempt has completed the fit and the first epoch."""
    return any((out / "checkpoint").glob("epoch-*.safetensors"))


def assert_same(ours: Path, theirs: Path) -> None:
    """Check that parameters, optimiser states and logs are equal, and that no other files are left."""
    assert_same_results(ours, theirs)
    assert [row["epoch"] for row in progress(ours)] == [str(epoch) for epoch in range(1, 9)]

    def files(folder: Path) -> set[str]:
        paths = (path for path in folder.rglob("*") if "tfevents" not in path.name)
        return {str(path.relative_to(folder)) for path in paths}

    assert files(ours) == files(theirs)
    assert {"policies/policy-0000030.safetensors", "policies/policy-0000060.safetensors"} <= files(ours)
    board = EventAccumulator(str(ours))
    board.Reload()
    for tag in ("sac/critic_loss", "rollout/penalty"):
        assert [event.step for event in board.Scalars(tag)] == [10, 20, 30, 40, 50, 60, 70, 75]


def test_a_second_process_is_refused(config: TrainConfig, undisturbed: Path, tmp_path: Path) -> None:
    """While one process works on a run, others are refused; once it is killed, the run can be resumed."""
    out = tmp_path / "run"
    first = start(go_on, config, out)
    try:
        while not has_checkpoint(out):
            assert first.is_alive()
            time.sleep(0.005)
        os.kill(first.pid, signal.SIGSTOP)
        # The stopped process could be about to rename this file.
        (out / ".a.12345678.tmp").touch()
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        for resume in (True, False):
            with pytest.raises(InputError, match=f"another process is at work in {out}"):
                train(config, out, resume=resume, quiet=True)
        with pytest.raises(InputError, match=f"another process is at work in {out}"):
            fit_and_save(load_dataset(config.dataset, quiet=True), out, config=config.dynamics)
        assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    finally:
        first.kill()
        first.join()
    assert attempt(go_on, config, out) == 0
    assert_same(out, undisturbed)


def test_killed_twenty_times(config: TrainConfig, undisturbed: Path, tmp_path: Path) -> None:
    """Kills come at random moments of the fit, the rollouts, the updates or the evaluation."""
    rng, kills, late, runs = random.Random(0), 0, 0, 0
    started = time.perf_counter()
    attempt(go_on, config, tmp_path / "timed")
    whole = time.perf_counter() - started
    while kills < 20:
        out, finished = tmp_path / f"run-{runs}", False
        while not finished:
            kill_after = rng.uniform(0.02, whole) if kills < 20 else None
            # Results must not depend on these.
            threads, workers = rng.choice([1, 2]), rng.choice([0, 1])
            evaluation = dataclasses.replace(config.evaluation, workers=workers)
            varied = dataclasses.replace(config, threads=threads, evaluation=evaluation)
            finished = attempt(go_on, varied, out, kill_after=kill_after) == 0
            kills += not finished
            late += not finished and has_checkpoint(out)
        assert_same(out, undisturbed)
        runs += 1
    assert late >= 3


def test_killed_at_its_own_writes(config: TrainConfig, undisturbed: Path, tmp_path: Path) -> None:
    """Each attempt is killed a little later, just before it renames or removes a file of the run."""
    out, changes, late = tmp_path / "run", 1, 0
    while attempt(go_on, config, out, die_at=(out, changes)) != 0:
        changes += 2
        late += has_checkpoint(out)
    assert changes > 10 and late >= 3
    assert_same(out, undisturbed)
