"""Test that a run takes the transitions that its settings of the data ask for, wherever it reads them."""

import dataclasses
import json
import logging
import re
from pathlib import Path

import h5py
import pytest
import torch

from mopo_fast.cli import main
from mopo_fast.config import DataConfig, TrainConfig
from mopo_fast.data import Transitions, load_dataset
from mopo_fast.data.d4rl import without_contact_forces
from mopo_fast.errors import InputError
from mopo_fast.presets import preset
from mopo_fast.report import write_report
from mopo_fast.run.folder import read_config
from mopo_fast.run.resolve import resolve
from mopo_fast.train import train

D4RL = DataConfig("d4rl", max_transitions=400)
FIT = ["--dynamics.hidden", "8", "--dynamics.weight-decay", "0", "0", "--dynamics.max-epochs", "1"]


@pytest.fixture(scope="module")
def config(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, steps=10, data=D4RL)


@pytest.fixture(scope="module")
def run(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert train(config, out, quiet=True)["transitions"] == 400
    return out


def test_the_run_records_them(run: Path, hopper_data: Path) -> None:
    recorded = json.loads((run / "config.json").read_text())["data"]
    assert recorded == {"compat": "d4rl", "max_transitions": 400}
    assert read_config(run).data == D4RL
    expected = load_dataset(hopper_data, compat="d4rl", max_transitions=400)
    crossing = expected.terminals.nonzero()[:, 0]
    assert torch.equal(expected.next_observations[crossing[:-1]], expected.observations[crossing[:-1] + 1])


def test_every_reader_of_a_run_takes_them(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Both compare the digest of the data with that of the run's.
    assert main(["rollout", str(run), "--out", str(tmp_path / "a.npz"), "--count", "20", "--quiet"]) == 0
    assert "the data set that the ensemble was fitted to" not in write_report(run).read_text()
    command = " ".join((run / "report.html").read_text().split())
    assert "--data.compat d4rl" in command and "--data.max-transitions 400" in command


def test_resuming(run: Path, config: TrainConfig) -> None:
    longer = dataclasses.replace(config, steps=20)
    assert train(longer, run, resume=True, quiet=True)["epochs"] == 2
    for data, difference in (
        (DataConfig(max_transitions=400), "data.compat = 'd4rl', not None"),
        (DataConfig("d4rl"), "data.max_transitions = 400, not None"),
    ):
        with pytest.raises(InputError, match=difference):
            train(dataclasses.replace(longer, data=data), run, resume=True, quiet=True)
    assert main(["train", "--resume", str(run), "--data.compat", "None"]) == 2


def test_an_older_run_took_all(config: TrainConfig, tmp_path: Path) -> None:
    whole = dataclasses.replace(config, data=DataConfig())
    train(whole, tmp_path / "run", quiet=True)
    path = tmp_path / "run" / "config.json"
    recorded = json.loads(path.read_text())
    del recorded["data"]
    path.write_text(json.dumps(recorded))
    assert read_config(path.parent).data == DataConfig()
    assert train(dataclasses.replace(whole, steps=20), path.parent, resume=True, quiet=True)["epochs"] == 2
    with pytest.raises(InputError, match=r"data\.compat = None, not 'd4rl'"):
        train(dataclasses.replace(config, steps=30), path.parent, resume=True, quiet=True)


def test_an_ensemble_of_other_rows_is_refused(hopper_data: Path, config: TrainConfig, tmp_path: Path) -> None:
    fit = tmp_path / "fit"
    flags = ["--data.compat", "d4rl", "--data.max-transitions", "4e2"]
    assert main(["fit", str(hopper_data), "--out", str(fit), *FIT, *flags, "--quiet"]) == 0
    recorded = json.loads((fit / "config.json").read_text())
    assert recorded["data"] == {"compat": "d4rl", "max_transitions": 400}
    assert json.loads((fit / "fit.json").read_text())["transitions"] == 400
    config = dataclasses.replace(config, dynamics_from=str(fit))
    resolve(config)
    other = dataclasses.replace(config, data=DataConfig())
    with pytest.raises(InputError, match=r"fitted to .* with data\.compat = 'd4rl', not None; give the"):
        resolve(other)
    # A fit of an earlier version took all rows, and one of another data set is the user's choice.
    del recorded["data"]
    (fit / "config.json").write_text(json.dumps(recorded))
    resolve(other)
    with pytest.raises(InputError, match=r"data\.compat = None, not 'd4rl'"):
        resolve(config)
    (fit / "config.json").write_text(json.dumps(recorded | {"dataset": "hopper-medium-v2"}))
    resolve(config)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mopo-tf", DataConfig("d4rl", 1_000_000)),
        ("unifloral", DataConfig("d4rl")),
        ("offlinerl-kit", DataConfig("offlinerl-kit")),
        ("polixir", DataConfig()),
    ],
)
def test_presets(name: str, expected: DataConfig) -> None:
    assert preset(name, "hopper-medium-v2").data == expected
    # The library's own default is not the authors'.
    assert TrainConfig("hopper-medium-v2").data == DataConfig()


def test_data_in_memory(hopper_data: Path, config: TrainConfig, tmp_path: Path) -> None:
    with h5py.File(hopper_data) as file:
        names = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
        arrays = {name: file[name][()] for name in names}
    config = dataclasses.replace(config, task="hopper", dataset=arrays)
    assert train(config, tmp_path / "run", quiet=True)["transitions"] == 400
    loaded = dataclasses.replace(config, dataset=load_dataset(arrays))
    with pytest.raises(InputError, match=r"compat must be None, got 'd4rl'; give .*data=DataConfig\(\)"):
        train(loaded, tmp_path / "other", quiet=True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataConfig("D4RL"), "unknown data.compat 'D4RL'; there are: d4rl, offlinerl-kit"),  # type: ignore[arg-type]
        (DataConfig(max_transitions=0), "data.max_transitions must be at least 1, got 0"),
    ],
)
def test_bad_values(data: DataConfig, message: str, config: TrainConfig) -> None:
    with pytest.raises(InputError, match=message):
        resolve(dataclasses.replace(config, data=data))


def test_other_data_layouts(config: TrainConfig, run: Path, tmp_path: Path) -> None:
    """A file that is mapped into memory and a folder of shards have no other rows than their own."""
    with pytest.raises(InputError, match=r"cannot be mapped into memory.*compat None"):
        train(config, tmp_path / "run", memory_map=True, quiet=True)
    shards = tmp_path / "shards"
    assert main(["rollout", str(run), "--out", str(shards), "--count", "50", "--quiet"]) == 0
    with pytest.raises(InputError, match=r"a folder, which takes neither compat .*compat None"):
        train(dataclasses.replace(config, dataset=str(shards), task="hopper"), tmp_path / "run", quiet=True)


def test_contact_forces_are_left_out(monkeypatch: pytest.MonkeyPatch, hopper_data: Path) -> None:
    """D4RL's ant sets fit the task with compat d4rl too."""
    from mopo_fast.data import load_configured

    zeros = torch.zeros(5, 111)
    zeros[:, :27] = torch.rand(5, 27)
    rows = torch.zeros(5)
    ant = Transitions(zeros, torch.zeros(5, 8), rows, zeros, rows.bool())
    monkeypatch.setattr("mopo_fast.data._load", lambda *_: ant)
    assert load_configured("ant-medium-v2", D4RL).obs_dim == without_contact_forces(ant).obs_dim == 27


def test_what_is_announced(config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("mopo_fast").handlers.clear()
    train(config, tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    (rows,) = (line for line in lines if line.startswith("transitions "))
    assert rows.startswith("transitions  400 of 600 rows, the last of 5")
    (successors,) = (line for line in lines if line.startswith("successors "))
    assert re.fullmatch(
        r"successors   those of d4rl\.qlearning_dataset, wrong for [1-9]\d* terminal rows", successors
    )
    # The rule of the task says nothing about states of other episodes.
    assert not any("Time limits must not be stored" in line for line in lines)
