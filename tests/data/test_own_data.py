"""Run the code of docs/own-data.md and check its statements."""

import csv
import dataclasses
import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from garbled import GONE, check_json
from places import HELPERS, ROOT

import mopo_fast
import mopo_fast.report
from mopo_fast import Box, InputError, Task, TrainConfig
from mopo_fast.bulk.plan import run_settings
from mopo_fast.cli import _stopped, main
from mopo_fast.config import DynamicsConfig, EvaluationConfig, RolloutConfig, SACConfig
from mopo_fast.evaluate import Evaluator, evaluate_in_model
from mopo_fast.rollout import RolloutEngine
from mopo_fast.run.folder import check_folder
from mopo_fast.run.resolve import resolve
from mopo_fast.tasks import TASKS, get_task, make_box, register_task
from mopo_fast.train import train

pytestmark = pytest.mark.usefixtures("unrendered")

DOCUMENT = (ROOT / "docs" / "own-data.md").read_text()
SMALL: dict[str, Any] = {
    "steps": 200,
    "dynamics": DynamicsConfig(hidden=(16,), weight_decay=(0.0, 0.0), learning_rate=0.01, max_epochs=30),
    "rollout": RolloutConfig(batch_size=200, interval=100),
    "sac": SACConfig(hidden=(16,)),
    "evaluation": EvaluationConfig(episodes=3),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Enter a folder with the document's data set, made by the document's own code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mopo_fast.tasks.TASKS", dict(TASKS))
    shutil.copyfile(HELPERS / "own_task.py", tmp_path / "cart.py")
    exec(re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)[1], {})
    yield tmp_path
    # Each test registers the environment again from its own file.
    gymnasium.registry.pop("Cart-v0")


def test_the_documents_task_is_tested_here() -> None:
    assert re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)[0] in (HELPERS / "own_task.py").read_text()


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
    # A box and a function with the same rule give nearly the same policy: only rounding may differ.
    box, function = (mopo_fast.Actor.load(folder / name) for name in ("box", "function"))
    for name, value in box.state_dict().items():
        assert torch.allclose(value, function.state_dict()[name], atol=1e-3), name
    # A worker process gives the same result, without the function or the environment of a task's file.
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
    assert "of the policy in the learned model" in (run / "report.html").read_text()
    # There are five rewards, each at most 1 and, while the cart is on the rail, at least 0.
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
    with pytest.raises(InputError, match="cannot make the environment of the task cart"):
        train(TrainConfig("cart.npz", **SMALL), folder / "run", quiet=True)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Make a run's folder of another user, whose task is a Python file that leaves a trace when run."""
    run = tmp_path / "run"
    mopo_fast.EnsembleDynamics(2, 1, hidden=(8,)).save(run)
    mopo_fast.Actor(2, 1, hidden=(8,)).save(run)
    task = tmp_path / "task.py"
    task.write_text(
        f"with open({str(tmp_path / 'trace')!r}, 'a') as trace: trace.write('ran ')\n"
        "from mopo_fast import Task\nfrom mopo_fast.tasks import make_box\n"
        "task = Task('cart', '', 2, 1, make_box(2))\n"
    )
    config = {
        "dataset": "cart.npz",
        "task": str(task),
        "task_sha256": hashlib.sha256(task.read_bytes()).hexdigest(),
        "rollout": {
            "horizon": 2,
            "penalty_coef": 1.0,
            "penalty": "max_aleatoric",
            "penalty_members": "all",
            "termination": None,
        },
    }
    (run / "config.json").write_text(json.dumps(config))
    data = {name: np.zeros((9, size), np.float32) for name, size in (("observations", 2), ("actions", 1))}
    rows = {"rewards": np.zeros(9, np.float32), "terminals": np.zeros(9, bool), "timeouts": np.zeros(9, bool)}
    np.savez(tmp_path / "cart.npz", **data, **rows, next_observations=data["observations"])
    return run


def commands(run: Path) -> dict[str, list[str]]:
    data = ["--dataset", str(run.parent / "cart.npz")]
    return {
        "evaluate": ["evaluate", str(run)],
        "file": ["rollout", str(run), *data, "--out", str(run.parent / "a.npz"), "--count", "9", "--quiet"],
        "shards": [
            "rollout",
            str(run),
            *data,
            "--out",
            str(run.parent / "shards"),
            "--count",
            "9",
            "--quiet",
        ],
    }


@pytest.mark.parametrize("command", ["evaluate", "file", "shards"])
def test_a_runs_python_file_is_run_only_where_it_is_named(
    command: str, foreign: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, task, trace = commands(foreign)[command], foreign.parent / "task.py", foreign.parent / "trace"

    def refused(*more: str) -> str:
        assert main([*words, *more]) == 2
        assert not trace.exists()
        return capsys.readouterr().err

    assert f"the run's task is the Python file {task}" in (error := refused()) and f"--task {task}" in error
    assert "name it with --task" in refused("--task", "hopper")
    (foreign.parent / "other.py").write_text(task.read_text() + "\n")
    assert "is not the file that" in refused("--task", str(foreign.parent / "other.py"))
    text = task.read_text()
    task.write_text(text + "\n")
    assert "it has changed since the run was made" in refused("--task", str(task))
    # The file may have moved.
    task.write_text(text)
    moved = task.rename(foreign.parent / "moved.py")
    code = main([*words, "--task", str(moved)])
    assert trace.read_text() == "ran "
    if command == "evaluate":
        assert code == 2 and "has no environment" in capsys.readouterr().err
    else:
        assert code == 0


def test_a_report_runs_no_task(foreign: Path) -> None:
    mopo_fast.report.write_report(foreign)
    assert not (foreign.parent / "trace").exists()


def test_a_run_without_the_files_digest_is_older(foreign: Path) -> None:
    config = json.loads((foreign / "config.json").read_text())
    del config["task_sha256"]
    (foreign / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="allow that with --task"):
        run_settings(foreign)
    assert run_settings(foreign, config["task"])[0].obs_dim == 2


def test_a_run_of_a_known_task_takes_no_file(foreign: Path) -> None:
    config = json.loads((foreign / "config.json").read_text()) | {"task": "hopper", "task_sha256": None}
    (foreign / "config.json").write_text(json.dumps(config))
    assert run_settings(foreign)[0] == run_settings(foreign, "hopper")[0] == TASKS["hopper"]
    for other in ("ant", str(foreign.parent / "task.py")):
        with pytest.raises(InputError, match="the run's task is hopper, not"):
            run_settings(foreign, other)
    assert not (foreign.parent / "trace").exists()


def test_a_task_that_has_changed_is_not_trained_on(folder: Path) -> None:
    config = TrainConfig("cart.npz", task="cart.py", **SMALL)
    resolved, _ = resolve(config)
    assert resolved.task_sha256 == hashlib.sha256((folder / "cart.py").read_bytes()).hexdigest()
    run = folder / "run"
    run.mkdir()
    written = dataclasses.asdict(resolved)
    (run / "config.json").write_text(json.dumps(written))
    check_folder(run, resolved, resume=True)
    changed = dataclasses.replace(resolved, task_sha256="0" * 64)
    with pytest.raises(InputError, match=r"cart\.py has changed since the run in .* began"):
        check_folder(run, changed, resume=True)
    # Runs of older versions do not record the digest.
    del written["task_sha256"]
    (run / "config.json").write_text(json.dumps(written))
    check_folder(run, resolved, resume=True)
    # The task follows from the data set's name; it is never taken from the run's folder.
    np.savez(folder / "hopper-x.npz", **np.load(folder / "cart.npz"))
    other, _ = resolve(TrainConfig("hopper-x.npz", **SMALL))
    assert other.task == "hopper"


def test_the_way_to_go_on_names_the_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The printed command is the one that `train --resume` takes, whoever prints it."""
    resolved, _ = resolve(TrainConfig("cart.npz", task="cart.py", **SMALL))
    run = folder / "a run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(resolved)))
    command = f"`mopo-fast train --resume '{run}' --task {folder / 'cart.py'}`"
    assert _stopped(run) == f"stopped; {command} goes on"
    for words in (["train", "cart.npz", "--task", "cart.py", "--out", str(run)], ["train", str(run)]):
        assert main([*words, "--quiet"]) == 2
        assert command in capsys.readouterr().err
    assert _stopped(folder) == "stopped before anything was written; the same command begins anew"
    words = shlex.split(command.strip("`"))[1:]
    assert main([*words, "--backend", "none", "--quiet"]) == 2
    assert "unknown backend" in capsys.readouterr().err


def test_what_runs_is_what_was_read(tmp_path: Path) -> None:
    path = tmp_path / "task.py"
    lines = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom mopo_fast import Task\n"
    )
    lines += "from mopo_fast.tasks import make_box\n@dataclass\nclass A:\n    b: int\n"
    for size in (2, 3):
        path.write_text(lines + f"task = Task('a', '', {size}, 1, make_box({size}))\n")
        task = get_task(str(path))
        assert (task.obs_dim, task.file_sha256) == (size, hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_garbled_config_is_refused(foreign: Path) -> None:
    config = json.loads((foreign / "config.json").read_text()) | {"task": "hopper", "task_sha256": None}
    (foreign / "config.json").write_text(json.dumps(config))

    def may_pass(where: tuple[Any, ...], other: Any) -> bool:
        number = isinstance(other, (int, float)) and not isinstance(other, bool)
        # The engine checks `termination`; this reader does not use the other values.
        engine = where[-1] == "termination"
        text = where[0] == "task_sha256" and other in ("x", "\x00", GONE)
        return where[0] == "dataset" or text or engine or (number and where[-1] == "penalty_coef")

    check_json(foreign / "config.json", lambda: run_settings(foreign), may_pass)


def test_a_task_file_may_use_another(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        "import mopo_fast\nfrom mopo_fast.tasks import make_box\n"
        'task = mopo_fast.Task("one", "", 3, 1, make_box(3))\n'
    )
    (tmp_path / "other.py").write_text(
        f"from mopo_fast.tasks import get_task\ntask = get_task({str(tmp_path / 'one.py')!r})\n"
    )
    assert get_task(str(tmp_path / "other.py")).obs_dim == 3


def test_a_task_file_that_ends_the_program(tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(InputError, match=r"ends\.py ends the program \(exit 0\); it may only define `task`"):
        get_task(str(tmp_path / "ends.py"))
