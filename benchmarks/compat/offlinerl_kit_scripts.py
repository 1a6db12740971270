"""OfflineRL-Kit's run scripts on data in memory, with stand-ins for gym and D4RL."""

import contextlib
import functools
import importlib.util
import io
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal
from unittest import mock

import numpy as np

from examples.offlinerl_kit import OldGym, make_importable
from mopo_fast import Transitions
from mopo_fast.tasks import Task

Algorithm = Literal["mopo", "combo", "rambo", "mobile"]

_COLUMNS = ("observations", "actions", "next_observations", "rewards", "terminals")


class _Nowhere(io.TextIOBase):
    """A text file that keeps nothing. It needs no closing, since the logger keeps it to the end."""

    def write(self, text: str) -> int:
        return len(text)


class _Environment:
    """Environment with gym's old interface. Its episodes have one step, so that an evaluation takes no time.

    Args:
        data: the data set.
    """

    def __init__(self, data: Transitions) -> None:
        self.observation_space, self.action_space = _spaces(data)

    def seed(self, seed: int) -> None:
        """Do nothing."""

    def reset(self) -> Any:
        return np.zeros(self.observation_space.shape, np.float32)

    def step(self, action: Any) -> Any:
        return self.reset(), 0.0, True, {}

    def get_normalized_score(self, value: float) -> float:
        return value


class TaskEnvironment(OldGym):
    """The environment of a task, with gym's old interface and the spaces of a data set.

    Args:
        task: the task.
        data: the data set.
    """

    def __init__(self, task: Task, data: Transitions) -> None:
        super().__init__(task)
        self.observation_space, self.action_space = _spaces(data)


def _spaces(data: Transitions) -> tuple[Any, Any]:
    """Return stand-ins of gym's spaces for the observations and the actions."""
    bounds = np.ones(data.act_dim, np.float32)
    return SimpleNamespace(shape=(data.obs_dim,)), SimpleNamespace(
        shape=bounds.shape, low=-bounds, high=bounds
    )


def make_trainer(
    checkout: Path,
    algorithm: Algorithm,
    data: Transitions,
    arguments: Sequence[str],
    folder: str,
    *,
    environment: TaskEnvironment | None = None,
    dynamics: Callable[..., Any] | None = None,
    take_over: Callable[[Any], object] | None = None,
    fit_epochs: int = 0,
) -> Any:
    """Run a script up to its trainer's `train`; return the trainer.

    Args:
        checkout: folder of OfflineRL-Kit.
        algorithm: the script is run_example/run_ALGORITHM.py.
        data: the data set.
        arguments: arguments of the script.
        folder: existing folder, in which the logger makes one of its own.
        environment: environment of the evaluations; by default one whose episodes take no time.
        dynamics: replacement of OfflineRL-Kit's EnsembleDynamics; by default there is none.
        take_over: called with the trainer as soon as it is made.
        fit_epochs: maximal number of epochs of the dynamics' fit. With 0, only the scaler is fitted.
    """
    make_importable(checkout)
    sys.modules["d4rl"] = ModuleType("d4rl")
    script = _load(checkout / "run_example" / f"run_{algorithm}.py", arguments)
    trainers: list[Any] = []

    def make(**settings: Any) -> Any:
        trainers.append(original(**settings))
        if take_over is not None:
            take_over(trainers[0])
        return SimpleNamespace(train=lambda: None)

    original, script.MBPolicyTrainer = script.MBPolicyTrainer, make
    script.EnsembleDynamics = functools.partial(
        _make_dynamics, dynamics or script.EnsembleDynamics, fit_epochs
    )
    evaluated = environment or _Environment(data)
    script.gym = SimpleNamespace(make=lambda task: evaluated)
    script.qlearning_dataset = lambda env: {name: getattr(data, name).numpy() for name in _COLUMNS}
    script.make_log_dirs = lambda *_, **__: tempfile.mkdtemp(dir=folder)
    with without_output():
        script.train()
    return trainers[0]


def _load(path: Path, arguments: Sequence[str]) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    # A script parses its arguments when it is imported.
    with mock.patch.object(sys, "argv", [str(path), *arguments]):
        spec.loader.exec_module(script)
    return script


def _make_dynamics(kind: Callable[..., Any], fit_epochs: int, *arguments: Any, **options: Any) -> Any:
    made = kind(*arguments, **options)
    fit = made.train

    def train(data: dict[str, Any], logger: Any, **options: Any) -> None:
        if fit_epochs:
            fit(data, logger, **{**options, "max_epochs": fit_epochs})
        else:
            made.scaler.fit(np.concatenate([data["observations"], data["actions"]], 1))

    made.train = train
    return made


def without_output() -> contextlib.ExitStack:
    """Return a context in which nothing is printed."""
    stack = contextlib.ExitStack()
    stack.enter_context(contextlib.redirect_stdout(_Nowhere()))
    stack.enter_context(contextlib.redirect_stderr(_Nowhere()))
    return stack
