"""Test the results page: its tables, its pictures, and how a study's trainings are made."""

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from recorded_runs import record_run

from benchmarks.pictures import PICTURES
from benchmarks.study import train
from benchmarks.study.experiments import EXPERIMENTS, HOPPER
from benchmarks.study.page import BLOCK, PAGE, VIEWS, draw, read_view, update
from benchmarks.study.train import STUDY
from mopo_fast.collect import collect
from mopo_fast.errors import InputError

TINY = (
    *("--steps", "20", "--rollout.interval", "10", "--rollout.batch-size", "50", "--threads", "1"),
    *(
        "--dynamics.members",
        "2",
        "--dynamics.elites",
        "2",
        "--dynamics.hidden",
        "16",
        "--dynamics.weight-decay",
    ),
    *("1e-5", "1e-5", "--dynamics.max-epochs", "2", "--sac.hidden", "16", "--evaluation.episodes", "1"),
)


def test_the_tables_are_of_the_committed_runs() -> None:
    text = PAGE.read_text()
    assert BLOCK.search(text)
    assert update(text) == text, "python -m benchmarks.study.page"


def test_the_pictures_are_of_the_committed_runs(tmp_path: Path) -> None:
    draw(STUDY, tmp_path)
    drawn = sorted(tmp_path.iterdir())
    assert drawn
    for path in drawn:
        assert (PICTURES / path.name).read_bytes() == path.read_bytes(), "python -m benchmarks.study.page"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Return the folder of a study of three seeds, in which lambda 1 scores 2, 3 and 4 more than lambda 0."""
    for seed in range(3):
        for coef in (0, 1):
            record_run(
                tmp_path / "penalty" / HOPPER / f"seed{seed}" / f"seed{seed}-coef{coef}",
                [0.0, *[10.0 + seed + coef * (2 + seed)] * 10],
                seed=seed,
                coef=float(coef),
                dataset=HOPPER,
                fit={"epochs": 1, "best_mse": [0.5 + seed], "transitions": 1234},
            )
    return tmp_path


def test_tables_by_hand(study: Path) -> None:
    made = update("before\n<!-- study: penalty -->\nearlier\n<!-- /study -->\nafter", study)
    assert "earlier" not in made and made.startswith("before\n") and made.endswith("\nafter")
    assert f"| {HOPPER} | 1,234 | 3 | 1 | 0.5 to 2.5 |" in made
    # Student's interval of 10, 11 and 12: s is 1, t is 4.302653, and half is t / sqrt(3).
    assert f"| {HOPPER} | lambda 0 | 11.0 | 8.5 to 13.5 | 10.0, 11.0, 12.0 | 11.0 |" in made
    assert (
        f"| {HOPPER} | lambda 1 minus lambda 0 | +3.0 | +0.5 to +5.5 | +3.0 ± 2.5 | +2.0, +3.0, +4.0 |"
        in made
    )
    assert "say little" in made


def test_a_setting_that_no_table_names_is_refused(study: Path) -> None:
    path = study / "penalty" / HOPPER / "seed0" / "seed0-coef1" / "config.json"
    config = json.loads(path.read_text())
    config["sac"]["discount"] = 0.9
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"runs on {HOPPER} differ in sac.discount"):
        read_view("penalty", study)


def test_an_experiment_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no runs in penalty/"):
        read_view("penalty", tmp_path)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_has_each_training_once_and_a_view(name: str) -> None:
    trainings = EXPERIMENTS[name]
    assert len({training.folder for training in trainings}) == len(trainings) > 0
    assert all("100000" in training.arguments for training in trainings)
    for training in trainings:
        for run in training.runs:
            assert any(Path(run).match(pattern) for pattern in VIEWS[name].folders), run


def test_trainings_are_made_resumed_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A real training of two tiny runs; then one that was stopped, and a failed one."""
    out, kept = tmp_path / "out", tmp_path / "kept"
    collect("hopper-random", 600, out=tmp_path / "hopper_medium_replay-local.hdf5", quiet=True)
    monkeypatch.setenv("MOPO_FAST_DATA_DIR", str(tmp_path))
    made = EXPERIMENTS["penalty"][0]
    tiny = dataclasses.replace(made, arguments=(HOPPER, "--seeds", "0", "--penalty-coefs", "0", "1", *TINY))
    monkeypatch.setitem(train.EXPERIMENTS, "penalty", [tiny])
    train.main("penalty", out=out, kept=kept, quiet=True)
    for run in tiny.runs:
        assert {path.name for path in (kept / run).iterdir()} == {
            *("config.json", "fit.json", "progress.csv", "summary.json")
        }
        config = json.loads((kept / run / "config.json").read_text())
        assert config["dataset"] == HOPPER and str(tmp_path) not in json.dumps(config)
    calls: list[Any] = []

    def call(command: list[str], **options: Any) -> Any:
        calls.append(command[3:])
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", call)
    train.main("penalty", out=out, kept=kept)
    assert calls == [], "finished runs are left as they are"
    (out / tiny.runs[0] / "summary.json").unlink()
    with pytest.raises(SystemExit) as stopped:
        train.main("penalty", out=out, kept=kept)
    assert stopped.value.code == 3 and calls[0][-1] == "--resume"
    with pytest.raises(InputError, match="no training of penalty has these seeds"):
        train.main("penalty", out=out, kept=kept, seeds=(7,))
