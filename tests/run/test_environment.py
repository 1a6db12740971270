"""Test that a run is evaluated and scored in the version of the environment that its data name."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import pytest

from mopo_fast.cli import main
from mopo_fast.config import TrainConfig
from mopo_fast.data import load_dataset, minari
from mopo_fast.data.origin import Origin, find_origin, origin_of
from mopo_fast.environments import make_environment
from mopo_fast.errors import InputError
from mopo_fast.evaluate import evaluate
from mopo_fast.info import task_of
from mopo_fast.policy import Actor
from mopo_fast.run.folder import read_config
from mopo_fast.run.resolve import resolve
from mopo_fast.tasks import TASKS, evaluated_in, get_task, in_version
from mopo_fast.train import train

pytest.importorskip("minari")

NAME = "minari:mine/hopper-v0"
IN_V4 = "the policy is evaluated in Hopper-v4"


@pytest.fixture
def metadata(hopper_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write hopper's data as a Minari set that does not name its environment; return its metadata.json."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    with h5py.File(hopper_data) as file:
        names = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
        minari.write(NAME, {name: file[name][()] for name in names}, {"algorithm": "uniform"})
    return minari.path(NAME) / "data" / "metadata.json"


def add(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def specification(env_id: str, **options: Any) -> str:
    """Return the specification of an environment as Minari stores it."""
    return json.dumps(json.loads(gymnasium.spec("Hopper-v5").to_json()) | {"id": env_id, "kwargs": options})


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, dataset=NAME, task="hopper", steps=10)


def warnings_of(config: TrainConfig, out: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "mopo_fast"):
        train(config, out, quiet=True)
    return [text for text in caplog.messages if "tuned no" not in text]


def test_scored_in_the_version_of_the_data(
    metadata: Path,
    config: TrainConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    add(metadata, env_spec=specification("Hopper-v5"), ref_min_score=10.0, ref_max_score=1010.0)
    run = tmp_path / "run"
    assert warnings_of(config, run, caplog) == []
    recorded, summary = read_config(run), json.loads((run / "summary.json").read_text())
    assert (recorded.env_id, recorded.reference_returns) == ("Hopper-v5", (10.0, 1010.0))
    assert summary["score_mean"] == pytest.approx((summary["return_mean"] - 10) / 10)
    # Evaluations later on use the same version.
    returns = {}
    for env_id in ("Hopper-v5", None):
        add(run / "config.json", env_id=env_id)
        capsys.readouterr()
        assert main(["evaluate", str(run), "--episodes", "2", "--json"]) == 0
        values = json.loads(capsys.readouterr().out)
        returns[env_id] = values["returns"]
        assert values["score_mean"] == pytest.approx((values["return_mean"] - 10) / 10)
    for env_id, expected in (("Hopper-v5", returns["Hopper-v5"]), ("Hopper-v4", returns[None])):
        task = dataclasses.replace(get_task("hopper"), env_id=env_id)
        assert list(evaluate(Actor.load(run), task, episodes=2, seed=0).returns) == expected
    # So does what `mopo-fast info` calls a score.
    known = task_of(load_dataset(NAME), "hopper")
    assert known is not None and (known.min_return, known.max_return) == (10.0, 1010.0)


def test_a_run_keeps_its_version(metadata: Path, config: TrainConfig, tmp_path: Path) -> None:
    """An earlier version of this package evaluated in the task's own environment."""
    run = tmp_path / "run"
    train(config, run, quiet=True)
    recorded = json.loads((run / "config.json").read_text())
    assert recorded.pop("env_id") is None and recorded.pop("reference_returns") is None
    (run / "config.json").write_text(json.dumps(recorded))
    add(metadata, env_spec=specification("Hopper-v5"))
    longer = dataclasses.replace(config, steps=20)
    assert train(longer, run, resume=True, quiet=True)["epochs"] == 2
    assert read_config(run).env_id is None
    assert resolve(config)[0].env_id == "Hopper-v5"


@pytest.mark.parametrize(
    ("values", "messages"),
    [
        (
            {},
            ["does not say which version of the environment it is of; " + IN_V4],
        ),
        (
            {"env_spec": specification("Walker2d-v5")},
            ["is of 'Walker2d-v5', which is no known version of Hopper-v4; " + IN_V4],
        ),
        ({"env_spec": specification("Hopper-v2")}, []),
        (
            {"env_spec": specification("Hopper-v5", ctrl_cost_weight=0.5, render_mode="rgb_array")},
            [
                "is of Hopper-v5 with the options {'ctrl_cost_weight': 0.5}, without which the policy is"
                " evaluated in Hopper-v5",
                "has no reference returns for Hopper-v5; the score is by those of D4RL, which are of"
                " Hopper-v4",
            ],
        ),
    ],
)
def test_what_is_said(
    values: dict[str, Any],
    messages: list[str],
    metadata: Path,
    config: TrainConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    add(metadata, **values)
    found = warnings_of(config, tmp_path / "run", caplog)
    assert found == [f"{NAME} {message}" for message in messages]


def test_what_is_announced(
    metadata: Path, config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(metadata, env_spec=specification("Hopper-v5"), ref_min_score=10, ref_max_score=1010)
    train(config, tmp_path / "run")
    block = capsys.readouterr().err
    assert "\ntask         hopper, evaluated in Hopper-v5\n" in block
    assert "\nscore        0 for a return of 10, 100 for 1010, as the data set says\n" in block


def test_data_in_memory_and_files(hopper_data: Path, metadata: Path, config: TrainConfig) -> None:
    import minari as package

    add(metadata, env_spec=specification("Hopper-v5"))
    loaded = load_dataset(package.load_dataset("mine/hopper-v0"))
    held = dataclasses.replace(config, dataset="memory:mine")
    assert resolve(held, data=loaded)[0].env_id == "Hopper-v5"
    # A file that `collect` has made names the task's own version.
    assert find_origin(str(hopper_data)) == Origin("Hopper-v4")
    assert resolve(dataclasses.replace(config, dataset=str(hopper_data)))[0].env_id is None


def test_no_other_environment_is_made(
    metadata: Path, config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gymnasium would import the module that an id names. The returns of such a set are not taken either."""
    task = get_task("hopper")
    assert evaluated_in(task, "os:Hopper-v5") is None
    add(metadata, env_spec=specification("os:Hopper-v5"), ref_min_score=0, ref_max_score=1)
    run = tmp_path / "run"
    train(config, run, quiet=True)
    assert (read_config(run).env_id, read_config(run).reference_returns) == (None, None)
    add(run / "config.json", env_id="os:Hopper-v5")
    assert main(["evaluate", str(run)]) == 2
    assert "'os:Hopper-v5' is no known version of Hopper-v4" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"reference_returns must ascend, got 5\.0 and 1\.0"):
        in_version(task, None, (5.0, 1.0), "config.json")


@pytest.mark.parametrize(
    "metadata",
    [
        {"env_spec": "{"},
        {"env_spec": "[" * 100_000},
        {"env_spec": "[1]"},
        {"env_spec": json.dumps({"id": 5, "kwargs": 3})},
        {"env_id": 7},
        {"ref_min_score": 0.0},
        {"ref_min_score": 5.0, "ref_max_score": 1.0},
        {"ref_min_score": 0, "ref_max_score": 10**400},
        {"ref_min_score": "a", "ref_max_score": float("nan")},
    ],
)
def test_metadata_that_tell_nothing(metadata: dict[str, Any]) -> None:
    assert origin_of(metadata) == Origin()


def test_every_version_fits_its_task() -> None:
    """The environment of an evaluation has the sizes of the task."""
    checked = set()
    for task in TASKS.values():
        for name in (*gymnasium.registry, ""):
            env_id = evaluated_in(task, name)
            if env_id is not None:
                environment = make_environment(env_id)
                assert environment.observation_space.shape == (task.obs_dim,)
                assert environment.action_space.shape == (task.act_dim,)
                checked.add(env_id)
    assert len(checked) == 10
