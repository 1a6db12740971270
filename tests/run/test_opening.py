"""Test what a run prints before and while it works, on a terminal and without one."""

import csv
import dataclasses
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
from pseudo_terminal import run_on_terminal

from mopo_fast.config import DynamicsConfig, RolloutConfig, RunConfig, SACConfig, TrainConfig
from mopo_fast.data import load_dataset
from mopo_fast.data.summary import summarise
from mopo_fast.info import to_text
from mopo_fast.presets import preset
from mopo_fast.run.opening import (
    _describe_critics,
    _describe_data,
    _describe_ends,
    _describe_fit,
    _describe_runs,
    open_runs,
    warn_of_faults,
    warn_of_origins,
)
from mopo_fast.run.resolve import resolve
from mopo_fast.tasks import get_task
from mopo_fast.train import progress_note

TINY = [
    *("--dynamics.hidden", "16", "16", "--dynamics.weight-decay", "1e-5", "1e-5", "1e-5"),
    *("--dynamics.max-epochs", "2", "--sac.hidden", "16", "16", "--threads", "1"),
    *("--rollout.batch-size", "50", "--rollout.interval", "10", "--evaluation.episodes", "2"),
    *("--steps", "20"),
]


@pytest.fixture(scope="module")
def files(hopper_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with the same data under several names."""
    folder = tmp_path_factory.mktemp("files")
    for tier in ("random-local", "medium", "mine"):
        shutil.copy(hopper_data, folder / f"hopper-{tier}.hdf5")
    return folder


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mopo_fast", *map(str, arguments)]


def test_a_run_without_a_terminal(files: Path, tmp_path: Path) -> None:
    """Every epoch has a plain line, the run begins with what it will do, and its files say it too."""
    data, run = files / "hopper-medium.hdf5", tmp_path / "run"
    found = subprocess.run(
        command("train", data, "--penalty-coef", 2, "--out", run, *TINY),
        capture_output=True,
        text=True,
        check=True,
    )
    lines = found.stderr.splitlines()
    assert "\x1b" not in found.stderr and "\r" not in found.stderr
    begin = next(number for number, line in enumerate(lines) if line.startswith("data set"))
    block = {line[:13].strip(): line[13:] for line in lines[begin : begin + 13]}
    assert re.fullmatch(r"\d+, return \d+\.\d on average, \d+\.\d at best", block.pop("episodes"))
    assert re.fullmatch(r"cpu, 1 thread(, instruction set \w+)?", block.pop("device"))
    backend = block["SAC"].rsplit(maxsplit=1)[-1]
    assert block == {
        "data set": str(data),
        "transitions": "600",
        "task": "hopper, evaluated in Hopper-v4",
        "horizon": "5 (tuned by the authors for hopper medium)",
        "lambda": "2 (given)",
        "penalty": "max_aleatoric",
        "fit": f"7 networks of 16 x 16, float32 by the backend {backend}",
        "rollouts": f"50 an epoch, float32 by the backend {backend}",
        "SAC": f"20 updates in 2 epochs, float32 by the backend {backend}",
        "seed": "0",
        "folder": str(run),
    }
    assert lines[begin + 13] == (
        f"warning: the name of the file {data} alone decides horizon 5 (tuned by the authors for hopper"
        " medium); if it holds other data, set --horizon"
    )
    duration = r"[\d.msh ]+"
    for line, expected in zip(
        lines[begin + 14 :],
        [
            rf"fit: about {duration} for each epoch, {duration} for 2 epochs",
            rf"fit: 1/2 epochs, {duration}, {duration} left, holdout MSE [\d.]+",
            rf"fit: 2/2 epochs, {duration}, holdout MSE [\d.]+",
            rf"train: about {duration} for each epoch, {duration} for 2 epochs",
            rf"train: 1/2 epochs, {duration}, {duration} left, score [-\d.]+, penalty .*, q .*",
            rf"train: 2/2 epochs, {duration}, score [-\d.]+, penalty .*, q .*",
        ],
        strict=True,
    ):
        assert re.fullmatch(expected, line), line
    config = json.loads((run / "config.json").read_text())
    assert config["horizon_from"] == "tuned by the authors for hopper medium"
    assert config["penalty_coef_from"] == "given"
    fit = json.loads((run / "fit.json").read_text())
    with (run / "fit.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["train_loss"]) for row in rows] == fit["train_loss"]
    assert [float(row["holdout_mse_6"]) for row in rows] == [errors[6] for errors in fit["holdout_mse"]]


def test_a_run_on_a_terminal(files: Path, tmp_path: Path) -> None:
    code, lines = run_on_terminal(
        command("train", files / "hopper-random-local.hdf5", "--out", tmp_path / "run", *TINY)
    )
    assert code == 0, lines
    bars = [line for line in lines if "━" in line]
    assert max(map(len, bars)) < 80
    last = {line.split()[0]: line for line in bars}
    assert re.match(r"fit ━+ 2/2 epochs .*s +holdout MSE [\d.]+", last["fit"])
    assert re.match(r"train ━+ 2/2 epochs .*s +score [-\d.]+, penalty [\d.]+, q ", last["train"])
    assert any(line.startswith("horizon") for line in lines)
    assert not any("warning" in line for line in lines)


def test_a_fit_without_a_terminal(files: Path, tmp_path: Path) -> None:
    found = subprocess.run(
        command("fit", files / "hopper-mine.hdf5", "--out", tmp_path, *TINY[:9]),
        capture_output=True,
        text=True,
        check=True,
    )
    for begin in ("data set     ", "episodes     ", "fit          7 networks of 16 x 16, seed 0, float32"):
        assert f"\n{begin}" in f"\n{found.stderr}"
    assert [line[:7] for line in found.stderr.splitlines()[-2:]] == ["fit: 1/", "fit: 2/"]
    assert "warning" not in found.stderr
    assert len((tmp_path / "fit.csv").read_text().splitlines()) == 3
    assert list((tmp_path / "tensorboard-fit").iterdir())


def test_quiet_runs_print_the_warning_alone(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mopo_fast.cli import main

    arguments = ["train", str(files / "hopper-mine.hdf5"), "--out", str(tmp_path / "run"), "--quiet", *TINY]
    assert main([*arguments, "--seeds", "0:2"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("backend: ")]
    assert lines == [
        f"warning: the authors tuned no horizon and lambda for hopper mine, so {files / 'hopper-mine.hdf5'}"
        " gets horizon 5 and lambda 1, which is tuned most often elsewhere; other values may score far"
        " higher: set --horizon and --penalty-coef, or try some with `mopo-fast sweep`"
    ]


MEDIUM = "hopper-medium-v2"
TUNED = "tuned by the authors for hopper medium"
OWN = RolloutConfig(horizon=5, penalty_coef=1.0)


@pytest.mark.parametrize(
    ("config", "origins"),
    [
        (TrainConfig("hopper-medium-v2"), (TUNED, TUNED)),
        (TrainConfig("hopper-medium-v2", rollout=RolloutConfig(horizon=1)), ("given", TUNED)),
        (TrainConfig("hopper-medium-v2", rollout=OWN), ("given", "given")),
        (TrainConfig("ant-medium-v2"), ("fallback, none is tuned for ant medium",) * 2),
        (preset("polixir", "hopper-medium-v2"), ("preset polixir", "preset polixir")),
        (preset("offlinerl-kit", "hopper-medium-v2"), ("tuned by offlinerl-kit for hopper medium",) * 2),
        (
            dataclasses.replace(preset("polixir", "hopper-medium-v2"), rollout=OWN),
            ("preset polixir", "given"),
        ),
    ],
)
def test_origins(config: TrainConfig, origins: tuple[str, str]) -> None:
    resolved, _ = resolve(config)
    assert (resolved.horizon_from, resolved.penalty_coef_from) == origins
    again, _ = resolve(resolved)
    assert again == resolved


def test_a_task_of_a_file_is_called_by_its_name(
    hopper_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The opening has no path but those of the data set and the folder, and says once what a fallback is."""
    folder = tmp_path / ("far" * 20)
    folder.mkdir()
    task = folder / "walkbot.py"
    task.write_text(
        "from mopo_fast.tasks import Task, make_box\ntask = Task('any', '', 11, 3, make_box(11))\n"
    )
    config, own = resolve(TrainConfig(hopper_data, task=str(task)))
    open_runs([config], {Path("run"): config}, own, load_dataset(hopper_data), quiet=False)
    block = capsys.readouterr().err
    assert "\ntask         walkbot, evaluated in the ensemble\n" in block
    assert "\nhorizon      5 (fallback)\nlambda       1 (fallback)\npenalty      max_aleatoric\n" in block
    # No line but those of the paths is wider than a terminal.
    begin, end = block.index("\ntransitions "), block.index("\nfolder ")
    assert max(map(len, block[begin:end].splitlines())) <= 80
    assert config.horizon_from == "fallback, none is tuned for walkbot random"


@pytest.mark.parametrize(
    ("name", "rollout", "warned"),
    [
        (
            "hopper-medium.hdf5",
            {},
            "alone decides horizon 5 and lambda 5 .* set --horizon and --penalty-coef",
        ),
        ("hopper-medium.hdf5", {"horizon": 5}, "alone decides lambda 5 .*; if .* set --penalty-coef"),
        ("hopper-medium.hdf5", {"horizon": 5, "penalty_coef": 5.0}, None),
        # `collect` records the name in the file.
        ("hopper-random-local.hdf5", {}, None),
        (
            "hopper-mine.hdf5",
            {},
            "the authors tuned no horizon and lambda for hopper mine, so .* gets horizon",
        ),
        (
            "hopper-mine.hdf5",
            {"horizon": 1},
            "tuned no lambda for hopper mine, so .* gets lambda 1, .*coef, or",
        ),
        (
            "hopper-random-local.hdf5",
            {"tuned": "offlinerl-kit"},
            "offlinerl-kit tuned no horizon and lambda for hopper random, so .* gets horizon 5 and lambda 1",
        ),
    ],
)
def test_warnings(
    name: str, rollout: dict[str, Any], warned: str | None, files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = TrainConfig(str(files / name), rollout=RolloutConfig(**rollout))
    resolved, _ = resolve(config)
    assert isinstance(resolved, RunConfig)
    with caplog.at_level(logging.WARNING, "mopo_fast"):
        warn_of_origins(config, resolved)
        # A resolved config has been warned about already.
        warn_of_origins(resolved, resolved)
    if warned is None:
        assert not caplog.messages
    else:
        (message,) = caplog.messages
        assert re.search(warned, message), message


@pytest.mark.parametrize(
    "drop", [(), ("timeouts",), ("next_observations",), ("timeouts", "next_observations")]
)
def test_all_count_the_same_episodes(hopper_data: Path, drop: tuple[str, ...]) -> None:
    """The opening, `info` and `describe` agree, whatever the data have."""
    with h5py.File(hopper_data) as file:
        names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
        arrays = {name: file[name][:] for name in names if name not in drop}
    data = load_dataset(arrays)
    summary, description = summarise(data, get_task("hopper")), data.describe()
    assert summary.returns is not None
    returns, ours = data.episode_returns(), description.spreads["episode return"]
    assert summary.episodes == description.episodes == len(returns)
    assert (summary.returns.mean, summary.returns.max) == pytest.approx((ours.mean, ours.max))
    text = _describe_data("mine", data)["episodes"]
    assert text == f"{len(returns)}, return {ours.mean:.1f} on average, {ours.max:.1f} at best"


def faulty(fault: str, hopper_data: Path) -> dict[str, Any]:
    with h5py.File(hopper_data) as file:
        names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
        arrays = {name: file[name][:] for name in names}
    if fault == "noterm":
        arrays["terminals"][:] = False
    elif fault == "minimum":
        del arrays["next_observations"], arrays["timeouts"]
    elif fault == "shuffled":
        order = np.random.default_rng(0).permutation(len(arrays["rewards"]))
        return {name: array[order] for name, array in arrays.items()}
    elif fault != "none":
        shift = 1 if fault == "late" else -1
        arrays["next_observations"] = np.roll(arrays["next_observations"], shift, axis=0)
    return arrays


@pytest.mark.parametrize(
    ("fault", "episodes", "told"),
    [
        ("none", r"\d+, return", None),
        ("late", "none, the rows do not follow", "next observation is its own .* shifted by one row. Store"),
        ("early", "none, the rows do not follow", "is the observation two rows later: .* shifted by one row"),
        ("shuffled", "none, the rows do not follow", "shuffled or hold single .* check that all arrays have"),
        ("noterm", r"\d+, return", r"\d+ rows are not terminal, but the rule .* hopper ends .* Correct the"),
        ("minimum", r"\d+, return", r"\d+ terminal rows were left out, because .* add next_observations to"),
    ],
)
def test_faults_of_the_data(
    fault: str, episodes: str, told: str | None, hopper_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Training says once what `info` finds, if it changes the training."""
    data, task = load_dataset(faulty(fault, hopper_data)), get_task("hopper")
    assert re.match(episodes, _describe_data("mine", data)["episodes"])
    with caplog.at_level(logging.WARNING, "mopo_fast"):
        warn_of_faults(data, task)
    oddities = summarise(data, task).oddities
    assert set(caplog.messages) <= set(oddities)
    if told is None:
        assert not caplog.messages
    else:
        (message,) = caplog.messages
        assert re.search(told, message), message


def test_terminals_that_are_left_out_are_counted(hopper_data: Path) -> None:
    data = load_dataset(faulty("minimum", hopper_data))
    with h5py.File(hopper_data) as file:
        ended = int(file["terminals"][:].sum())
    lost = f"{ended} of those left out are terminal, since the data have no next_observations"
    assert _describe_data("mine", data)["transitions"].endswith(f" of 600 rows; {lost}")
    assert f"terminals     none; {ended} more were left out" in to_text(summarise(data))


@pytest.mark.parametrize("command", ["fit", "train"])
def test_commands_warn_of_faults(
    command: str, hopper_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mopo_fast.cli import main

    np.savez(tmp_path / "hopper-mine.npz", **faulty("late", hopper_data))
    words = [command, str(tmp_path / "hopper-mine.npz"), "--out", str(tmp_path / "run"), "--quiet"]
    more = TINY[:9] if command == "fit" else [*TINY, "--horizon", "1", "--penalty-coef", "1"]
    assert main([*words, *more]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "shifted by one row" in warnings[0]


@pytest.mark.parametrize(
    ("task", "sac", "told"),
    [
        ("ant", SACConfig(), "target -3, the authors' for their tasks; act_dim would be -8"),
        ("ant", SACConfig(target_entropy="act_dim"), None),
        ("hopper", SACConfig(), None),
    ],
)
def test_the_target_entropy_of_other_tasks(
    task: str, sac: SACConfig, told: str | None, hopper_data: Path, tmp_path: Path
) -> None:
    config, found = resolve(TrainConfig(f"{task}-medium-v2", sac=sac))
    block = _describe_runs([config], [tmp_path], found, load_dataset(hopper_data))
    assert block.get("entropy") == told


def test_the_return_stands_where_there_is_no_score() -> None:
    def run(score: float | None, evaluated: int | None = 3, truncates: bool = False) -> Any:
        evaluation = SimpleNamespace(score_mean=score, return_mean=12.34)
        row = {"epoch": 3, "penalty": 0.5, "q": 1.0, "length": 87.25}
        log = SimpleNamespace(evaluation=evaluation, evaluated=evaluated, row=row)
        config = SimpleNamespace(rollout=SimpleNamespace(truncates=truncates))
        return SimpleNamespace(log=log, config=config)

    assert progress_note([run(None)]) == "return 12.3, penalty 0.5, q 1"
    assert progress_note([run(50.0), run(60.0)]) == "score 55.0, penalty 0.5, q 1"
    # An older evaluation names its epoch; an earlier session's evaluation is not shown.
    assert progress_note([run(50.0, evaluated=2)]) == "score 50.0 at epoch 2, penalty 0.5, q 1"
    assert progress_note([run(50.0, 1), run(60.0, 2)]) == "score 55.0 at epoch 1 to 2, penalty 0.5, q 1"
    assert progress_note([run(50.0, evaluated=None)]) == "penalty 0.5, q 1"
    # Rollouts that a penalty can end differ in length.
    assert progress_note([run(50.0, truncates=True)]) == "score 50.0, penalty 0.5, length 87.2, q 1"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (RolloutConfig(), {}),
        (RolloutConfig(truncate_at=2.5), {"truncation": "where a penalty is above 2.5"}),
        (
            RolloutConfig(truncate_quantile=1.0),
            {"truncation": "where a penalty is above the highest one in the data"},
        ),
        (
            RolloutConfig(truncate_quantile=0.99, halt_reward=-3.0),
            {
                "truncation": "where a penalty is above the data's 0.99 quantile, with the reward -3 and a"
                " terminal"
            },
        ),
    ],
)
def test_the_end_of_rollouts_is_announced(config: RolloutConfig, expected: dict[str, str]) -> None:
    assert _describe_ends(config) == expected


def test_layer_norms_are_announced() -> None:
    config = DynamicsConfig(members=128, hidden=(16,), layer_norm=True)
    assert _describe_fit(config) == "128 networks of 16 with layer norms"


def test_critics_are_announced() -> None:
    assert _describe_critics(SACConfig()) == {}
    redq = SACConfig(critics=10, target_critics=2, actor_q="mean")
    assert _describe_critics(redq) == {
        "critics": "10, 2 drawn for each target, the actor raises their mean Q"
    }
