"""Test that files written by version 0.1.0 can still be read, and its runs resumed."""

import dataclasses
import json
import shutil
from pathlib import Path

import places
import pytest
import torch
from recorded.version_0_1_0 import COUNT, DATA, DYNAMICS, RUN, SHARD_ROWS
from safetensors.torch import load_file

from mopo_fast import Actor, EnsembleDynamics, InputError, RolloutEngine, load_dataset, open_rollouts
from mopo_fast.cli import main
from mopo_fast.config import UpdateOrder
from mopo_fast.run.command import train_command
from mopo_fast.run.folder import check_folder, read_config, read_recorded

RECORDED = places.RECORDED / "version_0_1_0"


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the files and enter the copy, because the run names its data by a relative path."""
    folder = Path(shutil.copytree(RECORDED, tmp_path / "recorded"))
    monkeypatch.chdir(folder)
    return folder


def assert_close(ours: Path, theirs: Path) -> None:
    """Compare up to the rounding of another processor's kernels, which grows over the updates."""
    one, other = load_file(ours), load_file(theirs)
    assert one.keys() == other.keys()
    for name, value in other.items():
        torch.testing.assert_close(one[name], value, rtol=1e-2, atol=1e-3)


def test_a_stopped_run_ends_as_it_would_have(recorded: Path) -> None:
    assert not (recorded / "run" / "summary.json").exists()
    assert main(["train", *RUN, "--out=run", "--resume"]) == 0
    for name in ("policy.safetensors", "dynamics.safetensors"):
        assert_close(recorded / "run" / name, recorded / "finished" / name)
    ours, theirs = (
        json.loads((recorded / name / "summary.json").read_text()) for name in ("run", "finished")
    )
    assert ours["updates"] == theirs["updates"] == 75
    rows = [(recorded / name / "progress.csv").read_text().splitlines() for name in ("run", "finished")]
    # Columns that came later have no values in the rows before.
    assert rows[0][0].startswith(f"{rows[1][0]},penalty_q50,") and len(rows[0]) == len(rows[1])
    assert rows[0][1].endswith("," * 9) and not rows[0][-1].endswith(",")


def test_a_finished_run_is_as_it_was(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in (recorded / "finished").rglob("*") if path.is_file()}
    assert main(["train", *RUN, "--out=finished", "--resume"]) == 0
    assert main(["evaluate", "finished"]) == 0
    assert main(["report", "finished"]) == 0
    assert (recorded / "finished" / "report.html").exists()
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize(("simultaneous", "order"), [(True, "simultaneous"), (False, "critic_first")])
def test_the_order_of_an_update_is_read(recorded: Path, simultaneous: bool, order: UpdateOrder) -> None:
    """Test that `sac.simultaneous` is understood by resuming, by the report and by `read_config`."""
    path = recorded / "run" / "config.json"
    config = json.loads(path.read_text())
    config["sac"]["simultaneous"] = simultaneous
    path.write_text(json.dumps(config))
    now = read_config(path.parent)
    now = dataclasses.replace(now, sac=dataclasses.replace(now.sac, dtype="float32"))
    assert now.sac.order == order
    check_folder(path.parent, now, resume=True)
    others = {"simultaneous": "critic_first", "critic_first": "actor_first"}
    other = dataclasses.replace(now, sac=dataclasses.replace(now.sac, order=others[order]))
    with pytest.raises(InputError, match=f"made with sac.order = '{order}', not '{others[order]}'"):
        check_folder(path.parent, other, resume=True)
    command = train_command(read_recorded(path))
    assert ("--sac.order critic_first" in command) == (order == "critic_first")
    config["sac"]["simultaneous"] = 3
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config.json: sac.order: Input should be 'simultaneous',"):
        read_config(path.parent)


def test_a_stopped_fit_ends_as_it_would_have(recorded: Path) -> None:
    assert not (recorded / "fit" / "dynamics.safetensors").exists()
    assert main(["fit", DATA, *DYNAMICS, "--seed=3", "--threads=1", "--out=fit"]) == 0
    # The fit of the run used the same seed.
    assert_close(recorded / "fit" / "dynamics.safetensors", recorded / "finished" / "dynamics.safetensors")


@pytest.mark.parametrize("form", ["hdf5", "parquet"])
def test_shards_are_read_and_completed(recorded: Path, form: str) -> None:
    folder = recorded / f"shards-{form}"
    before = open_rollouts(folder)[:].arrays()
    assert len(before["rewards"]) == COUNT
    assert main(["rollout", "--verify", str(folder)]) == 0
    (lost,) = folder.glob("shard-000001.*")
    lost.unlink()
    shards = [f"--count={COUNT}", f"--shard-rows={SHARD_ROWS}", f"--format={form}", f"--out={folder}"]
    assert main(["rollout", "finished", f"--dataset={DATA}", *shards]) == 0
    for name, array in open_rollouts(folder)[:].arrays().items():
        torch.testing.assert_close(array, before[name], rtol=1e-2, atol=1e-3)


def test_models_and_data_are_read(recorded: Path) -> None:
    data = load_dataset(DATA)
    assert len(data) == 600
    assert len(load_dataset("rollouts.hdf5")) == 100
    engine = RolloutEngine(EnsembleDynamics.load("finished"), termination="hopper")
    policy = Actor.load("finished")
    assert len(engine.rollout(policy, data.observations[:50], 2, seed=0)) > 50
