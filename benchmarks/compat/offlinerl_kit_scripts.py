"""OfflineRL-Kit's run scripts on data in memory, with stand-ins for gym and D4RL."""

import contextlib
import functools
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal
from unittest import mock

import numpy as np

from examples.offlinerl_kit import make_importable
from mopo_fast import Transitions

Algorithm = Literal["mopo", "combo", "rambo", "mobile"]

# Open to the end: the logger keeps it.
_NOWHERE = open(os.devnull, "w")  # noqa: SIM115
_COLUMNS = ("observations", "actions", "next_observations", "rewards", "terminals")


class _Environment:
    """Environment with gym's old interface. Its episodes have one step, so that an evaluation takes no time.

    Args:
        data: the data set.
    """

    def __init__(self, data: Transitions) -> None:
        self.observation_space = SimpleNamespace(shape=(data.obs_dim,))
        bounds = np.ones(data.act_dim, np.float32)
        self.action_space = SimpleNamespace(shape=bounds.shape, low=-bounds, high=bounds)

    def seed(self, seed: int) -> None:
        """Do nothing."""

    def reset(self) -> Any:
        return np.zeros(self.observation_space.shape, np.float32)

    def step(self, action: Any) -> Any:
        return self.reset(), 0.0, True, {}

    def get_normalized_score(self, value: float) -> float:
        return value


def make_trainer(
    checkout: Path,
    algorithm: Algorithm,
    data: Transitions,
    arguments: Sequence[str],
    folder: str,
    *,
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
    script.gym = SimpleNamespace(make=lambda task: _Environment(data))
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
    stack.enter_context(contextlib.redirect_stdout(_NOWHERE))
    stack.enter_context(contextlib.redirect_stderr(_NOWHERE))
    return stack
