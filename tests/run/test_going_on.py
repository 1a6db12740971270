"""Test going on with a run from its folder alone, and training a finished run on."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from small_runs import CONFIG, assert_same_results

from mopo_fast import train as train_module
from mopo_fast.cli import main
from mopo_fast.config import TrainConfig
from mopo_fast.errors import InputError
from mopo_fast.run import folder
from mopo_fast.run.population import train_many
from mopo_fast.train import train


@pytest.fixture(scope="module")
def config(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, steps=20, rollout=dataclasses.replace(config.rollout, horizon=5))


@pytest.fixture(scope="module")
def finished(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    train(config, out, quiet=True)
    return out


@pytest.fixture(scope="module")
def longer(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was asked for 40 steps from the start."""
    out = tmp_path_factory.mktemp("runs") / "longer"
    train(dataclasses.replace(config, steps=40), out, quiet=True)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def assert_same(ours: Path, theirs: Path) -> None:
    """Compare everything that does not depend on a clock, to the bit."""
    assert_same_results(ours, theirs)
    assert (ours / "config.json").read_bytes() == (theirs / "config.json").read_bytes()
    for name in ("return_mean", "updates", "epochs"):
        assert summary(ours)[name] == summary(theirs)[name]


def summary(out: Path) -> Any:
    return json.loads((out / "summary.json").read_text())


def test_a_finished_run_trains_on_to_the_bits_of_a_longer_one(run: Path, longer: Path) -> None:
    before = (run / "report.html").read_bytes()
    assert main(["train", "--resume", str(run), "--steps", "40", "--quiet"]) == 0
    assert_same(run, longer)
    assert (run / "report.html").read_bytes() != before


def test_a_kill_while_it_begins_to_train_on_loses_nothing(
    run: Path, config: TrainConfig, longer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        train(dataclasses.replace(config, steps=40), run, resume=True, quiet=True)
    monkeypatch.undo()
    assert not (run / "summary.json").exists()
    train(dataclasses.replace(config, steps=40), run, resume=True, quiet=True)
    assert_same(run, longer)


def test_several_runs_train_on_together(run: Path, config: TrainConfig, longer: Path, tmp_path: Path) -> None:
    """One of them was finished, and the other begins."""
    configs = [dataclasses.replace(config, steps=40, seed=seed) for seed in (1, 2)]
    results = train_many(configs, [run, tmp_path / "other"], resume=True, quiet=True)
    assert [result["updates"] for result in results] == [40, 40]
    assert_same(run, longer)


def test_an_unfinished_run_goes_on_from_its_folder(
    finished: Path, run: Path, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, update = tmp_path / "stopped", train_module.Training.update

    def stop(training: train_module.Training, *arguments: Any) -> Any:
        if training.epoch == 2:
            raise KeyboardInterrupt
        return update(training, *arguments)

    monkeypatch.setattr(train_module.Training, "update", stop)
    with pytest.raises(KeyboardInterrupt):
        train(config, out, quiet=True)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert (
        main(["train", "stopped", "--resume", "--threads", "2", "--evaluation.workers", "1", "--quiet"]) == 0
    )
    assert_same(out, finished)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        # The value is the default of the command, and not that of the run.
        (["--seed", "0"], "made with seed = 1, not 0"),
        (["--horizon", "1"], "made with rollout.horizon = 5, not 1"),
        (["--steps", "10"], "made with steps = 20, not 10"),
        (["--sac.hidden", "8"], "made with sac.hidden = [16, 16], not [8]"),
        (["--out", "elsewhere"], "leave out --preset, --seeds, --penalty-coefs and --out"),
        (["--seeds", "0:2"], "leave out --preset, --seeds, --penalty-coefs and --out"),
        (["--preset", "unifloral"], "leave out --preset, --seeds, --penalty-coefs and --out"),
    ],
)
def test_settings_beside_the_folder_must_agree(
    finished: Path, given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert main(["train", "--resume", str(finished), *given]) == 2
    assert message in capsys.readouterr().err
    assert main(["train", str(finished), "--resume", "--seed", "1", "--steps", "20"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"sac": dataclasses.replace(CONFIG.sac, actor_schedule="cosine")}, "sac.actor_schedule is cosine"),
        ({"steps": 15}, "the last epoch had 5 of the 10 steps of rollout.interval"),
    ],
)
def test_a_run_that_a_longer_one_does_not_begin_with_is_refused(
    run: Path, config: TrainConfig, change: dict[str, Any], why: str
) -> None:
    recorded = folder.read_config(run)
    (run / "config.json").write_text(json.dumps(folder.to_dict(dataclasses.replace(recorded, **change))))
    before = {path: path.read_bytes() for path in run.rglob("*.json")}
    asked = dataclasses.replace(config, **{**change, "steps": 40})
    with pytest.raises(InputError, match=f"not 40, and cannot go on beyond them: {why}"):
        train(asked, run, resume=True, quiet=True)
    assert before == {path: path.read_bytes() for path in run.rglob("*.json")}


def test_the_settings_are_read_back(finished: Path, config: TrainConfig) -> None:
    recorded = folder.read_config(finished)
    rollout = dataclasses.replace(config.rollout, penalty_coef=1.0)
    expected = dataclasses.replace(config, task="hopper", rollout=rollout)
    parts = ("dynamics", "rollout", "sac")
    expected = dataclasses.replace(
        expected, **{name: dataclasses.replace(getattr(expected, name), dtype="float32") for name in parts}
    )
    assert {name: getattr(recorded, name) for name in vars(expected)} == vars(expected)


def test_a_task_file_is_not_run_unless_it_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = shutil.copy(ROOT / "tests" / "helpers" / "own_task.py", tmp_path / "mine.py")
    written = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(written | {"task": str(task)}))
    assert main(["train", "--resume", str(run)]) == 2
    assert f"allow that with --task {task}" in " ".join(capsys.readouterr().err.split())


def test_a_run_is_no_data_set(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(finished)]) == 2
    assert f"mopo-fast train --resume {finished}" in " ".join(capsys.readouterr().err.split())
