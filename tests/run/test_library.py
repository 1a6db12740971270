"""Test `train` as a library calls it: data in memory, and a function that is called after every epoch."""

import csv
import dataclasses
import gc
import json
import math
import runpy
import shutil
import sys
import types
import weakref
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import small_runs
import torch
from places import ROOT

from mopo_fast.cli import main
from mopo_fast.config import TrainConfig
from mopo_fast.data import Transitions, load_configured, load_dataset
from mopo_fast.errors import InputError
from mopo_fast.run.log import COLUMNS
from mopo_fast.run.population import train_many
from mopo_fast.sac import SAC
from mopo_fast.train import train

CONFIG = dataclasses.replace(small_runs.CONFIG, task="hopper")


@pytest.fixture(scope="module")
def data(hopper_data: Path) -> Transitions:
    return load_dataset(hopper_data)


@pytest.fixture(scope="module")
def from_file(hopper_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "file"
    train(dataclasses.replace(CONFIG, dataset=hopper_data), out, quiet=True)
    return out


@pytest.fixture(scope="module")
def in_memory(data: Transitions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "memory"
    train(dataclasses.replace(CONFIG, dataset=data), out, quiet=True)
    return out


def columns(data: Transitions) -> list[torch.Tensor]:
    return [array for array in data.arrays().values() if array.is_floating_point()]


def policy(run: Path) -> bytes:
    return (run / "policy.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_epoch": 5}, "on_epoch must be a function of a row of progress.csv, got 5"),
        ({"out": ""}, 'out is "", which would be the current folder'),
    ],
)
def test_arguments_are_checked_before_the_fit(
    arguments: dict[str, Any], message: str, data: Transitions, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train(dataclasses.replace(CONFIG, dataset=data), **{"out": tmp_path / "run", **arguments}, quiet=True)
    assert not (tmp_path / "run").exists()


class TestDataInMemory:
    def test_trains_as_from_the_file(self, from_file: Path, in_memory: Path) -> None:
        assert policy(in_memory) == policy(from_file)
        assert (in_memory / "report.html").exists()

    @pytest.mark.parametrize("runs", [1, 2])
    def test_sac_reads_a_row_in_one_place(
        self, runs: int, data: Transitions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read = []
        begin = SAC.begin

        def recorded(sac: SAC, some: Transitions, *others: Any) -> Any:
            read.append(some)
            return begin(sac, some, *others)

        monkeypatch.setattr(SAC, "begin", recorded)
        config = dataclasses.replace(CONFIG, dataset=data)
        if runs == 1:
            train(config, tmp_path / "run", quiet=True)
        else:
            configs = [dataclasses.replace(config, seed=seed) for seed in range(runs)]
            train_many(configs, [tmp_path / str(seed) for seed in range(runs)], quiet=True)
        (table,) = {array.untyped_storage().data_ptr() for some in read for array in columns(some)}
        assert len(read) == runs * 3 and table != data.observations.data_ptr()

    @pytest.mark.parametrize("runs", [1, 2])
    def test_sac_begins_after_the_loaded_data_are_freed(
        self, runs: int, hopper_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loaded, freed = [], []
        begin = SAC.begin

        def load(*arguments: Any, **options: Any) -> Transitions:
            data = load_configured(*arguments, **options)
            loaded.append(weakref.ref(data))
            return data

        def recorded(*arguments: Any) -> Any:
            gc.collect()
            freed.append(all(data() is None for data in loaded))
            return begin(*arguments)

        monkeypatch.setattr("mopo_fast.run.resolve.load_configured", load)
        monkeypatch.setattr(SAC, "begin", recorded)
        configs = [dataclasses.replace(CONFIG, dataset=hopper_data, seed=seed) for seed in range(runs)]
        if runs == 1:
            train(configs[0], tmp_path / "run", quiet=True)
        else:
            train_many(configs, [tmp_path / str(seed) for seed in range(runs)], quiet=True)
        assert loaded and freed == [True] * runs * 3

    def test_no_memory_for_the_copy_ends_a_run_before_its_fit(
        self, data: Transitions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("mopo_fast.run.resolve.table_bytes", lambda *_: 2**50)
        with pytest.raises(InputError, match=r"SAC's layout would take .* GiB"):
            train(dataclasses.replace(CONFIG, dataset=data), tmp_path / "run", quiet=True)
        assert not (tmp_path / "run" / "fit.json").exists()

    def test_config_records_the_name_and_a_digest(
        self, from_file: Path, in_memory: Path, data: Transitions
    ) -> None:
        config = json.loads((in_memory / "config.json").read_text())
        assert config["dataset"] == "memory:hopper-random-local"
        assert len(config["data_sha256"]) == 64
        assert json.loads((in_memory / "summary.json").read_text())["dataset"] == config["dataset"]
        assert json.loads((from_file / "config.json").read_text())["data_sha256"] is None

    def test_no_command_continues_it(self, data: Transitions, in_memory: Path) -> None:
        with pytest.raises(InputError, match=r"were in memory; continue it with `train\(config, out, res"):
            train(dataclasses.replace(CONFIG, dataset=data), in_memory, quiet=True)

    def test_a_dictionary_and_several_runs(self, data: Transitions, in_memory: Path, tmp_path: Path) -> None:
        arrays = {name: array.numpy() for name, array in data.arrays().items()}
        configs = [dataclasses.replace(CONFIG, dataset=arrays, seed=seed) for seed in (1, 2)]
        train_many(configs, [tmp_path / "a", tmp_path / "b"], quiet=True)
        assert policy(tmp_path / "a") == policy(in_memory)
        assert json.loads((tmp_path / "b" / "config.json").read_text())["dataset"] == "memory:unnamed"
        configs[1] = dataclasses.replace(CONFIG, dataset=dict(arrays))
        with pytest.raises(InputError, match="share their data; give every config the same object"):
            train_many(configs, [tmp_path / "c", tmp_path / "d"], quiet=True)

    def test_no_name_decides_its_task_and_penalty(self, data: Transitions, tmp_path: Path) -> None:
        named = dataclasses.replace(data, name="hopper-medium-v2")
        with pytest.raises(InputError, match=r"data in memory need a task; give TrainConfig\(..., task="):
            train(dataclasses.replace(CONFIG, dataset=named, task=None), tmp_path / "a", quiet=True)
        assert list(tmp_path.iterdir()) == []

    def test_resuming_asks_for_the_same_data(
        self, data: Transitions, in_memory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = tmp_path / "run"
        shutil.copytree(in_memory, run)
        (run / "summary.json").unlink()
        for changes in ({"rewards": data.rewards + 1}, {"terminals": ~data.terminals}):
            other = dataclasses.replace(data, **changes)
            with pytest.raises(
                InputError, match="with other data, or with data in memory; resume it in Pyth"
            ):
                train(dataclasses.replace(CONFIG, dataset=other), run, resume=True, quiet=True)
        train(dataclasses.replace(CONFIG, dataset=data), run, resume=True, quiet=True)
        assert (run / "summary.json").exists()
        assert policy(run) == policy(in_memory)

    def test_a_sweep_refuses_them(self, data: Transitions, tmp_path: Path) -> None:
        pytest.importorskip("ray")
        from mopo_fast.sweep import sweep

        with pytest.raises(InputError, match=r"save them with `Transitions.save` first"):
            sweep(dataclasses.replace(CONFIG, dataset=data), tmp_path / "a", seeds=[1])

    def test_commands_say_that_the_data_were_in_memory(
        self, in_memory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["train", "memory:mine", "--task", "hopper", "--out", str(tmp_path / "a")]) == 2
        assert "memory:mine were data in the memory of a Python program" in capsys.readouterr().err

    def test_bad_data(self, tmp_path: Path) -> None:
        bad = dataclasses.replace(CONFIG, dataset={"observations": np.zeros((3, 11))})
        with pytest.raises(InputError, match="the data set lacks 'actions'"):
            train(bad, tmp_path / "a", quiet=True)
        with pytest.raises(InputError, match=r"must be a name, a path, a dictionary .* got int"):
            train(dataclasses.replace(CONFIG, dataset=5), tmp_path / "a", quiet=True)
        with pytest.raises(InputError, match="only a file can be mapped into memory, got dict"):
            train(bad, tmp_path / "a", quiet=True, memory_map=True)


class TestOnEpoch:
    def test_gets_the_rows_of_progress(self, data: Transitions, tmp_path: Path) -> None:
        rows: list[dict[str, Any]] = []
        train(dataclasses.replace(CONFIG, dataset=data), tmp_path / "a", quiet=True, on_epoch=rows.append)
        with (tmp_path / "a" / "progress.csv").open() as file:
            written = list(csv.DictReader(file))
        assert [row["epoch"] for row in rows] == [1, 2, 3]
        assert all(list(row) == list(COLUMNS) for row in rows)
        for row, texts in zip(rows, written, strict=True):
            assert {name: "" if value is None else str(value) for name, value in row.items()} == texts
        assert rows[0]["return_mean"] is None and math.isfinite(rows[1]["return_mean"])

    def test_its_exception_ends_the_training_which_can_be_resumed(
        self, data: Transitions, in_memory: Path, tmp_path: Path
    ) -> None:
        def stop(row: dict[str, Any]) -> None:
            if row["epoch"] == 2:
                raise KeyError("enough")

        config, epochs = dataclasses.replace(CONFIG, dataset=data), []
        with pytest.raises(KeyError, match="enough"):
            train(config, tmp_path / "a", quiet=True, on_epoch=stop)
        train(
            config, tmp_path / "a", resume=True, quiet=True, on_epoch=lambda row: epochs.append(row["epoch"])
        )
        assert epochs == [2, 3]
        assert policy(tmp_path / "a") == policy(in_memory)


class StandIn:
    """The part of a run of Weights & Biases that the example uses."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.summary: dict[str, Any] = {}

    def init(self, **settings: Any) -> Self:
        self.settings = settings
        return self

    def log(self, row: dict[str, Any], step: int) -> None:
        self.rows.append((step, row))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_the_example_logs_to_wandb(
    hopper_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, module = StandIn(), types.ModuleType("wandb")
    module.init = run.init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    # The example trains with the default sizes, so the test hands it a small run.
    monkeypatch.setattr("mopo_fast.TrainConfig", small, raising=False)
    example = runpy.run_path(str(ROOT / "examples" / "wandb_logging.py"))
    example["main"]([str(hopper_data), "--steps", "20", "--out", str(tmp_path / "run")])
    assert [step for step, _ in run.rows] == [10, 20]
    assert "return_mean" not in run.rows[0][1] and "return_mean" in run.rows[1][1]
    assert all(isinstance(value, int | float) for _, row in run.rows for value in row.values())
    assert run.settings["config"]["steps"] == 20 and run.settings["project"] == "mopo"
    assert run.summary["return_mean"] == run.rows[1][1]["return_mean"]


def small(dataset: str, **options: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, dataset=dataset, **options)
