"""Test the paper's table on tiny local data sets."""

import csv
import json
from pathlib import Path

import pytest

from benchmarks import paper_table
from benchmarks.paper_table import data_names, main, preset_of, result_of, t_interval
from mopo_fast.collect import collect
from mopo_fast.errors import InputError
from mopo_fast.run.folder import read_config

TINY = [
    *("--steps", "30", "--rollout.interval", "10", "--rollout.batch-size", "50", "--sac.hidden", "8", "8"),
    *("--dynamics.hidden", "8", "--dynamics.weight-decay", "0", "0", "--dynamics.max-epochs", "1"),
    *("--evaluation.episodes", "1", "--threads", "1", "--quiet"),
]
NAMES = ["--data", "hopper-random", "walker2d-medium-local", "--suffix", "-local"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    for name, task in (("hopper_random", "hopper-random"), ("walker2d_medium", "walker2d-random")):
        collect(task, 400, out=path / f"{name}-local.hdf5", quiet=True)
    return path


@pytest.fixture(autouse=True)
def local_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPO_FAST_DATA_DIR", str(folder))


@pytest.fixture(scope="module")
def runs(folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOPO_FAST_DATA_DIR", str(folder))
        assert main(["--runs", str(folder / "runs"), *NAMES, "--seeds", "0:2", "--", *TINY]) == 0
    return folder / "runs"


def test_it_trains_every_seed_with_the_authors_settings(runs: Path) -> None:
    found = {str(path.parent.relative_to(runs)) for path in runs.glob("*/*/summary.json")}
    names = ("hopper-random-local", "walker2d-medium-local")
    assert found == {f"{name}/seed{seed}" for name in names for seed in range(2)}
    config = read_config(runs / "walker2d-medium-local" / "seed1")
    assert (config.preset, config.data.compat, config.data.max_transitions) == ("mopo-tf", "d4rl", 1_000_000)
    assert (config.rollout.horizon, config.rollout.penalty_coef) == (5, 5.0)
    assert config.dynamics_from is None


def test_finished_runs_are_taken_and_missing_ones_made(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/*/policy.safetensors")}
    words = ["--runs", str(runs), *NAMES, "--json", str(tmp_path / "table.json")]
    assert main([*words, "--seeds", "0:3", "--", *TINY]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    out, err = capsys.readouterr()
    # The lines of the trainings are no part of the table.
    assert "normalised score" in err and "normalised score" not in out
    hopper, walker2d = (line for line in out.splitlines() if "-local " in line)
    assert [cell.strip() for cell in hopper.split("│")][1:6] == ["hopper-random-local", "30", "5", "1", "3"]
    assert "│ 11.7 ± 0.4 " in hopper and "17.8 ± 19.3 * │ 84.1 ± 3.2" in walker2d
    assert "* quoted from memory" in out and "Local sets are other data than D4RL's" in out
    first, second = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert (first["n"], first["seeds"], first["unfinished"]) == (3, [0, 1, 2], 0)
    assert first["interval"][0] < first["mean"] < first["interval"][1]
    assert first["mean"] == pytest.approx(sum(first["scores"]) / 3)
    assert second["paper"] == {"mean": 17.8, "std": 19.3, "checked": False}


def test_a_table_of_what_is_there(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--runs", str(runs), "--no-train", *NAMES[:3], "hopper-expert", *NAMES[3:]]
    assert main([*words, "--seeds", "0,7", "--json", str(tmp_path / "table.csv")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "-local " in line]
    assert "1 of 2" in lines[0] and "few seeds" in lines[0]
    assert "0 of 2" in lines[2] and "no run" in lines[2]
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["n"] for row in rows] == ["1", "1", "0"]
    assert json.loads(rows[0]["paper"])["mean"] == 11.7 and rows[2]["mean"] == ""


def test_the_score_is_of_the_last_evaluations(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs / "hopper-random-local"
    with (run / "seed0" / "progress.csv").open() as file:
        found = [float(row["score_mean"]) for row in csv.DictReader(file)]
    assert len(found) == 3
    for count in (1, 2, 3, 10):
        monkeypatch.setattr(paper_table, "LAST_EVALUATIONS", count)
        (score,) = result_of("hopper-random-local", run, [0]).scores
        assert score == pytest.approx(sum(found[-count:]) / len(found[-count:]))
    assert result_of("hopper-random-local", run, [0]).last == (found[-1],)


def test_names() -> None:
    every = data_names([], None)
    assert len(every) == 12 + 9 and "hopper-random-v2" not in every and "hopper-random-v0" in every
    assert [preset_of(name) for name in ("hopper-medium-v0", "hopper-medium-v2")] == [
        "mopo-tf",
        "offlinerl-kit",
    ]
    assert len(data_names([], "-local")) == 12
    assert data_names(["hopper-medium", "hopper-medium-v2"], None) == ["hopper-medium-v0", "hopper-medium-v2"]
    with pytest.raises(InputError, match="ant-medium is not in the paper's table"):
        data_names(["ant-medium"], "-v2")
    with pytest.raises(InputError, match="halfcheetah-jump-local is not in the paper's table"):
        data_names(["halfcheetah-jump-local"], None)
    with pytest.raises(InputError, match="no scores are published for hopper-expert; name a version"):
        data_names(["hopper-expert"], None)


def test_intervals() -> None:
    assert t_interval([1.0, 2.0]) is None
    # From a table of Student's t: 4.303 standard errors for two degrees of freedom.
    low, high = t_interval([1.0, 2.0, 3.0]) or (0.0, 0.0)
    assert (low, high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3)


def test_mistakes(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--runs", str(runs), *NAMES, "--seeds", "2:1"]) == 2
    assert "error: --seeds takes FIRST:END" in capsys.readouterr().err
    # A training that is refused ends the command with its error.
    with pytest.raises(SystemExit, match="2"):
        main(["--runs", str(runs), *NAMES, "--seeds", "0:2", "--", *TINY, "--horizon", "3"])
    assert "was made with rollout.horizon = 5, not 3" in capsys.readouterr().err
    (tmp_path / "hopper-random-v0").symlink_to(runs / "hopper-random-local")
    assert main(["--runs", str(tmp_path), "--no-train", "--data", "hopper-random", "--seeds", "0:1"]) == 2
    assert "is a run on hopper-random-local, not on hopper-random-v0" in capsys.readouterr().err
    (tmp_path / "file").touch()
    for name, error in (("file", "file is a file; choose"), ("gone", "gone is not there; choose")):
        assert main(["--runs", str(tmp_path / name), "--no-train", *NAMES, "--seeds", "0:1"]) == 2
        assert f"{error} a folder for --runs" in capsys.readouterr().err
    assert main(["--runs", str(runs), "--data", "walrus", "--seeds", "0:1"]) == 2
    assert "walrus is not in the paper's table; its tasks are halfcheetah" in capsys.readouterr().err
