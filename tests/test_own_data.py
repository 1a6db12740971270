"""What docs/own-data.md says, done."""

import csv
import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch

import mopo_fast
from mopo_fast import Box, InputError, Task, TrainConfig
from mopo_fast.cli import main
from mopo_fast.config import DynamicsConfig, EvaluationConfig, RolloutConfig, SACConfig
from mopo_fast.evaluate import Evaluator, evaluate_in_model
from mopo_fast.rollout import RolloutEngine
from mopo_fast.tasks import TASKS, get_task, make_box, register_task
from mopo_fast.train import train

HERE = Path(__file__).parent
DOCUMENT = (HERE.parent / "docs" / "own-data.md").read_text()
SMALL: dict[str, Any] = {
    "steps": 200,
    "dynamics": DynamicsConfig(hidden=(16,), weight_decay=(0.0, 0.0), learning_rate=0.01, max_epochs=30),
    "rollout": RolloutConfig(batch_size=200, interval=100),
    "sac": SACConfig(hidden=(16,)),
    "evaluation": EvaluationConfig(episodes=3),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the document's data set has been made by its own lines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mopo_fast.tasks.TASKS", dict(TASKS))
    shutil.copyfile(HERE / "own_task.py", tmp_path / "cart.py")
    exec(re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)[1], {})
    yield tmp_path
    # Every test has a file of its own, which registers it again.
    gymnasium.registry.pop("Cart-v0")


def test_the_documents_task_is_tested_here() -> None:
    assert re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)[0] in (HERE / "own_task.py").read_text()


def test_as_the_document_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = re.search(r"mopo-fast (train .*)", DOCUMENT)[1].replace("20000", "200").split()
    small = "--dynamics.max-epochs 3 --rollout.batch-size 200 --rollout.interval 100 --sac.hidden 16 --quiet"
    assert main([*command, *small.split()]) == 0
    summary = json.loads((folder / "runs/cart/summary.json").read_text())
    assert (summary["scored_by"], summary["score_mean"]) == ("environment", None)
    assert summary["task"] == str(folder / "cart.py")
    assert 0 < summary["return_mean"] <= 50
    capsys.readouterr()
    evaluate = DOCUMENT.split("mopo-fast evaluate ")[1].split("\n")[0].split()
    assert main(["evaluate", *evaluate, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["returns"]) == 10
    rollout = ["rollout", "runs/cart", "--task", "cart.py", "--dataset", "cart.npz", "--out", "a.npz"]
    assert main([*rollout, "--count", "300"]) == 0
    rollouts = mopo_fast.load_dataset("a.npz")
    assert torch.equal(rollouts.terminals, rollouts.next_observations[:, 0].abs() > 1)


def test_a_registered_task_and_a_function(folder: Path) -> None:
    cart = dataclasses.replace(get_task("cart.py"), name="cart", min_return=0.0, max_return=50.0)
    seen = []

    def ended(observations: torch.Tensor, actions: torch.Tensor, successors: torch.Tensor) -> torch.Tensor:
        seen.append(len(observations))
        return successors[:, 0].abs() > 1

    train(TrainConfig("cart.npz", task="cart.py", **SMALL), folder / "box", quiet=True)
    register_task(dataclasses.replace(cart, box=ended))
    summary = train(TrainConfig("cart.npz", **SMALL), folder / "function", quiet=True)
    assert sum(seen) > 200
    assert summary["task"] == "cart"
    assert summary["score_mean"] == pytest.approx(2 * summary["return_mean"])
    # The same rule by other means gives the same policy, nearly: fused steps and single ones round alike.
    box, function = (mopo_fast.Actor.load(folder / name) for name in ("box", "function"))
    for name, value in box.state_dict().items():
        assert torch.allclose(value, function.state_dict()[name], atol=1e-3), name
    # In another process too, where neither the function nor, for a file's task, the environment is known.
    with Evaluator(workers=1) as evaluator:
        there = evaluator.submit(box, get_task("cart.py"), episodes=2, seed=0).result()
    with Evaluator() as evaluator:
        assert evaluator.submit(box, get_task("cart.py"), episodes=2, seed=0).result() == there


def test_without_an_environment(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    register_task(Task("cart", "", 2, 1, make_box(2, {0: (-1.0, 1.0)})))
    run = folder / "run"
    summary = train(TrainConfig("cart.npz", **SMALL), run, quiet=True)
    assert (summary["scored_by"], summary["score_mean"]) == ("model", None)
    with open(run / "progress.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["scored_by"] for row in rows] == ["model", "model"]
    assert float(rows[-1]["return_mean"]) == summary["return_mean"]
    assert "of the policy in the model itself" in (run / "report.html").read_text()
    # Rewards are at most 1 and, within the rail, at least 0: five steps of them.
    assert 2.0 < summary["return_mean"] < 5.5
    assert main(["evaluate", str(run)]) == 2
    assert "the task cart has no environment" in capsys.readouterr().err


def test_returns_of_the_model(folder: Path) -> None:
    data = mopo_fast.load_dataset("cart.npz")
    ensemble = mopo_fast.fit_dynamics(data, seed=0, config=SMALL["dynamics"])
    engine = RolloutEngine(ensemble, termination=make_box(2, {0: (-0.3, 0.3)}), penalty_coef=3.0)
    actor, start = mopo_fast.Actor(2, 1), data.observations[:40]
    found = evaluate_in_model(engine, actor, start, 4, seed=1)
    for row in range(40):
        observation, total, steps = start[row : row + 1], 0.0, 0
        for step in range(4):
            action = actor.act(observation, None).detach()
            result = engine.step(observation, action, seed=1, step=step, deterministic=True)
            total, steps = total + result.raw_rewards.item(), steps + 1
            if result.terminals.item():
                break
            observation = result.next_observations
        assert found.lengths[row] == steps
        assert found.returns[row] == pytest.approx(total, rel=1e-4, abs=1e-4)
    assert 1 in found.lengths
    assert 4 in found.lengths


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("1 / 0", "does not run: ZeroDivisionError"),
        ("tusk = 1", "must set `task` to a mopo_fast.Task, got None"),
        (
            "from mopo_fast import *; task = Task('a', '', 3, 1, Box((0,), (1,)))",
            "the termination box has 1 dimensions, observations 3",
        ),
    ],
)
def test_files_without_a_task(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.py").write_text(content)
    with pytest.raises(InputError, match=message):
        get_task(str(tmp_path / "a.py"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Hopper"}, "lower-case letters and digits, got 'Hopper'"),
        ({"name": "my-hopper"}, "lower-case letters and digits"),
        ({"name": "hopper"}, "there is another task 'hopper' already"),
        ({"act_dim": 0}, "must be at least 1"),
        ({"box": Box((0.0,), (1.0,))}, "the termination box has 1 dimensions, observations 11"),
    ],
)
def test_tasks_that_cannot_be_registered(changes: dict[str, Any], message: str) -> None:
    task = dataclasses.replace(TASKS["hopper"], **{"name": "myhopper", "min_return": 5.0, **changes})
    with pytest.raises(InputError, match=message):
        register_task(task)


def test_an_environment_that_is_not_there(folder: Path) -> None:
    register_task(dataclasses.replace(get_task("cart.py"), name="cart", env_id="Nowhere-v0"))
    with pytest.raises(InputError, match="the environment of the task cart cannot be made"):
        train(TrainConfig("cart.npz", **SMALL), folder / "run", quiet=True)
