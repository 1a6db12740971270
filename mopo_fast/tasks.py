"""Tasks: an environment with its termination rule, reference returns and tuned hyperparameters.

Termination rules are from the authors' mopo/static/*.py. Reference returns are from d4rl/infos.py, where they
are the same for v0, v1 and v2.
"""

import dataclasses
import functools
import hashlib
import math
import os
import shlex
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mopo_fast.config import UNTUNED
from mopo_fast.errors import InputError
from mopo_fast.utils.atomic import read_json

# The command line looks up tasks before it imports torch, which takes seconds.
if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Box:
    """Termination rule: an episode goes on while low <= s' <= high in every dimension.

    A prediction that is not finite always ends its episode. An open bound is written as the neighbouring
    float32 (`above`, `below`).

    Attributes:
        low: lower bound of each dimension of the next observation s', a float32 value, inclusive.
        high: upper bound of each dimension, likewise.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.low) != len(self.high):
            raise InputError(
                f"a termination box needs as many low bounds as high ones,"
                f" got {len(self.low)} and {len(self.high)}"
            )
        for dim, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            if math.isnan(low) or math.isnan(high) or low > high:
                raise InputError(f"termination box, dimension {dim}: low {low} and high {high} hold no value")

    @property
    def obs_dim(self) -> int:
        """Number of dimensions of an observation."""
        return len(self.low)

    def contains(self, observations: "torch.Tensor") -> "torch.Tensor":
        """Return as bool [batch] which observations [batch, obs] are finite and within all bounds."""
        import torch

        low = torch.tensor(self.low, dtype=observations.dtype, device=observations.device)
        high = torch.tensor(self.high, dtype=observations.dtype, device=observations.device)
        inside = (observations >= low) & (observations <= high) & torch.isfinite(observations)
        return inside.all(dim=-1)


def above(value: float) -> float:
    """Return the least float32 greater than `value`, so that `x > value` becomes a closed bound."""
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))


def below(value: float) -> float:
    """Return the greatest float32 less than `value`."""
    return float(np.nextafter(np.float32(value), np.float32(-np.inf)))


def _closed(value: float) -> float:
    return float(np.float32(value))


def make_box(
    obs_dim: int,
    bounds: dict[int, tuple[float, float]] | None = None,
    rest: tuple[float, float] = (-math.inf, math.inf),
) -> Box:
    """Make a box with `bounds` {dimension: (low, high)}, and `rest` for every other dimension."""
    per_dim = [(bounds or {}).get(dim, rest) for dim in range(obs_dim)]
    return Box(tuple(low for low, _ in per_dim), tuple(high for _, high in per_dim))


TerminationFunction = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class Task:
    """All that MOPO needs to know about an environment.

    Attributes:
        name: key in `TASKS`, made of lower-case letters and digits.
        env_id: id of the gymnasium environment for evaluation, or "" where there is none and the ensemble
            itself scores the policy. The -v4 environments follow the v2 rules of D4RL's reference scores.
        obs_dim: size of an observation.
        act_dim: size of an action.
        box: termination rule, or a function (observations, actions, next_observations) -> bool [batch].
        min_return: return of D4RL's random policy, or None where D4RL has none.
        max_return: return of D4RL's expert, or None where D4RL has none.
        tuned: tuned hyperparameters, {source: {tier: (horizon, penalty_coef)}}.
        online_env_id: id of the environment, with another reward, that trains the agent whose replay is the
            data set. None where the agent is trained on the task's own reward.
        recorded: keys of a step's info that such a data set keeps for relabelling.
        file_sha256: SHA-256 digest of the Python file that defines the task, or None for a built-in or
            registered task.
    """

    name: str
    env_id: str
    obs_dim: int
    act_dim: int
    box: Box | TerminationFunction
    min_return: float | None = None
    max_return: float | None = None
    tuned: dict[str, dict[str, tuple[int, float]]] = field(default_factory=dict)
    online_env_id: str | None = None
    recorded: tuple[str, ...] = ()
    file_sha256: str | None = None

    @property
    def short_name(self) -> str:
        """Name without the folder and the ending of the task's file."""
        return Path(self.name).stem if self.file_sha256 else self.name

    def normalized_score(self, episode_return: float) -> float | None:
        """Return 100 * (return - min) / (max - min), or None where the task has no reference returns."""
        if self.min_return is None or self.max_return is None:
            return None
        return 100.0 * (episode_return - self.min_return) / (self.max_return - self.min_return)

    def normalized_std(self, return_std: float) -> float | None:
        """Return a return's standard deviation on the scale of the score, which has no offset."""
        if self.min_return is None or self.max_return is None:
            return None
        return 100.0 * return_std / (self.max_return - self.min_return)

    def tuned_for(self, tier: str | None, source: str = "authors") -> tuple[int, float]:
        """Return the horizon and penalty_coef that `source` tuned for a data tier, or else `UNTUNED`."""
        return self.tuned.get(source, {}).get(tier or "", UNTUNED)


_HUNDRED = (above(-100.0), below(100.0))
_HOPPER = {0: (above(0.7), math.inf), 1: (above(-0.2), below(0.2))}
_WALKER = {0: (above(0.8), below(2.0)), 1: (above(-1.0), below(1.0))}
_ANT = {0: (_closed(0.2), 1.0)}
_HUMANOID = {0: (1.0, 2.0)}
# OfflineRL-Kit's rules (offlinerlkit/utils/termination_fns.py) by the names of its functions, for `make_box`.
# Hopper's has no lower bound: it says np.abs(x < 100) for np.abs(x) < 100. The authors' has the same mistake.
OFFLINERL_KIT_RULES: dict[str, dict[str, Any]] = {
    "halfcheetah": {"rest": _HUNDRED},
    "hopper": {"bounds": _HOPPER, "rest": (-math.inf, below(100.0))},
    "walker2d": {"bounds": _WALKER, "rest": _HUNDRED},
    "ant": {"bounds": _ANT},
    "antangle": {"bounds": _ANT},
    "humanoid": {"bounds": _HUMANOID},
    "pen": {"bounds": {26: (_closed(0.075), math.inf)}},
    **{name: {} for name in ("halfcheetahveljump", "point2denv", "point2dwallenv", "pendulum", "door")},
}

_TUNED_HALFCHEETAH = {
    "authors": {
        "random": (5, 0.5),
        "medium": (1, 1.0),
        "medium-replay": (5, 1.0),
        "medium-expert": (5, 5.0),
    },
    "offlinerl-kit": {"medium": (5, 0.5), "medium-replay": (5, 0.5), "medium-expert": (5, 2.5)},
}
_TUNED_HOPPER = {
    "authors": {
        "random": (5, 1.0),
        "medium": (5, 5.0),
        "medium-replay": (5, 1.0),
        "medium-expert": (5, 1.0),
    },
    "offlinerl-kit": {"medium": (5, 5.0), "medium-replay": (5, 2.5), "medium-expert": (5, 5.0)},
}
_TUNED_WALKER2D = {
    "authors": {
        "random": (1, 1.0),
        "medium": (5, 5.0),
        "medium-replay": (1, 1.0),
        "medium-expert": (1, 2.0),
    },
    "offlinerl-kit": {"medium": (5, 0.5), "medium-replay": (1, 2.5), "medium-expert": (1, 2.5)},
}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("halfcheetah", "HalfCheetah-v4", 17, 6, make_box(17), -280.178953, 12135.0, _TUNED_HALFCHEETAH),
        Task(
            "hopper",
            "Hopper-v4",
            11,
            3,
            make_box(11, _HOPPER, _HUNDRED),
            -20.272305,
            3234.3,
            _TUNED_HOPPER,
        ),
        Task("walker2d", "Walker2d-v4", 17, 6, make_box(17, _WALKER), 1.629008, 4592.3, _TUNED_WALKER2D),
        Task("ant", "Ant-v4", 27, 8, make_box(27, _ANT), -325.6, 3879.7),
        # The paper's two out-of-distribution tasks. Their horizon and lambda were not published.
        Task(
            "halfcheetah-jump",
            "mopo_fast/HalfCheetahJump-v0",
            18,
            6,
            make_box(18),
            online_env_id="mopo_fast/HalfCheetahSpeed3-v0",
        ),
        Task(
            "ant-angle",
            "mopo_fast/AntAngle-v0",
            27,
            8,
            make_box(27, _ANT),
            online_env_id="mopo_fast/AntForward-v0",
            recorded=("x_velocity", "y_velocity"),
        ),
        Task("humanoid", "Humanoid-v4", 376, 17, make_box(376, _HUMANOID)),
        Task("pendulum", "Pendulum-v1", 3, 1, make_box(3)),
    )
}

# Environments to evaluate in, by a task's environment and by that of the data. MuJoCo's v2 and v3 have the
# rules of v4, and are in another package now. Ant-v5 and Humanoid-v5 have other observations.
_EVALUATED_IN: dict[str, dict[str, str]] = {
    **{
        f"{name}-v4": {f"{name}-v{version}": f"{name}-v{max(version, 4)}" for version in range(2, newest + 1)}
        for name, newest in (("HalfCheetah", 5), ("Hopper", 5), ("Walker2d", 5), ("Ant", 4), ("Humanoid", 4))
    },
    "mopo_fast/HalfCheetahJump-v0": {
        env_id: env_id for env_id in ("mopo_fast/HalfCheetahJump-v0", "mopo_fast/HalfCheetahJumpMeasured-v0")
    },
}


def evaluated_in(task: Task, env_id: str | None) -> str | None:
    """Return the environment that evaluates a policy for data of another version of the task's environment.

    Args:
        task: task of the data, with its own environment.
        env_id: id of the environment that the data were made in.

    Returns:
        The id, or None where `env_id` is no known version of the task's environment.
    """
    return _EVALUATED_IN.get(task.env_id, {}).get(env_id or "")


def in_version(
    task: Task, env_id: str | None, reference_returns: tuple[float, float] | None, source: object
) -> Task:
    """Return the task with another version of its environment, and with other reference returns.

    Args:
        task: the task.
        env_id: id of the version, one that `evaluated_in` returns; None for the task's own.
        reference_returns: returns that score 0 and 100; None for the task's own.
        source: file that names them, for errors.

    Raises:
        InputError: `env_id` is no known version, or the returns are not in ascending order.
    """
    if env_id is not None:
        # Gymnasium would import any module that an id names.
        if evaluated_in(task, env_id) != env_id:
            raise InputError(f"{source}: {env_id!r} is no known version of {task.env_id}; restore the file")
        task = dataclasses.replace(task, env_id=env_id)
    if reference_returns is not None:
        low, high = reference_returns
        if not -math.inf < low < high < math.inf:
            raise InputError(f"{source}: reference_returns must ascend, got {low} and {high}")
        task = dataclasses.replace(task, min_return=low, max_return=high)
    return task


RELABELLED = tuple(name for name, task in TASKS.items() if task.online_env_id is not None)
"""Tasks whose data come from an agent that was trained on another reward."""

# Rules by name, for `RolloutEngine(termination=...)`. TASK is the task's own, TASK-CODE that of another code.
BOXES: dict[str, Box] = {
    **{name: task.box for name, task in TASKS.items() if isinstance(task.box, Box)},
    "hopper-authors": make_box(11, **OFFLINERL_KIT_RULES["hopper"]),
    **{
        f"{name}-offlinerl-kit": make_box(TASKS[name].obs_dim, **OFFLINERL_KIT_RULES[name])
        for name in ("hopper", "halfcheetah", "walker2d")
    },
}


def termination_of(task: Task, name: str | None) -> str | Box | TerminationFunction:
    """Return the termination rule of a run.

    Args:
        task: task of the run, whose own rule is the default.
        name: "authors" or "offlinerl-kit" for the task's rule in that code, the name of a rule in `BOXES`,
            which is returned as it is, or None.
    """
    if name in ("authors", "offlinerl-kit"):
        return BOXES.get(f"{task.name}-{name}", task.box)
    return task.box if name is None else name


def register_task(task: Task) -> Task:
    """Register `task` under its name in this process, for `train`, `evaluate` and names of data sets.

    Raises:
        InputError: the name is taken or has other characters than lower-case letters and digits, or a size
            is not positive.
    """
    if not (task.name.isalnum() and task.name.islower()):
        raise InputError(f"a task's name must be of lower-case letters and digits, got {task.name!r}")
    if TASKS.get(task.name, task) != task:
        raise InputError(f"there is another task {task.name!r} already; choose another name")
    _check_sizes(task)
    TASKS[task.name] = task
    return task


def _check_sizes(task: Task) -> None:
    if min(task.obs_dim, task.act_dim) < 1:
        raise InputError(f"{task.name}: obs_dim and act_dim must be at least 1")
    if isinstance(task.box, Box) and task.box.obs_dim != task.obs_dim:
        raise InputError(
            f"{task.name}: the termination box has {task.box.obs_dim} dimensions, observations {task.obs_dim}"
        )


@functools.cache
def _run_task_file(path: Path, content: bytes) -> Task:
    """Execute a Python file and return the `task` that it defines, named by the file's path."""
    # `runpy` would read the file again, so that other content than that of the digest might be executed.
    # A task file may load another one, so each has a module of its own.
    module = types.ModuleType(f"<task {path}>")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        exec(compile(content, path, "exec"), module.__dict__)
    except SystemExit as error:
        raise InputError(f"{path} ends the program (exit {error.code}); it may only define `task`") from error
    except Exception as error:
        raise InputError(f"{path} does not run: {type(error).__name__}: {error}") from error
    finally:
        sys.modules.pop(module.__name__, None)
    task = getattr(module, "task", None)
    if not isinstance(task, Task):
        raise InputError(f"{path} must set `task` to a mopo_fast.Task, got {task!r}")
    _check_sizes(task)
    return dataclasses.replace(task, name=str(path), file_sha256=hashlib.sha256(content).hexdigest())


def _read_task_file(name: str) -> tuple[Path, bytes]:
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        return path, path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def get_task(name: str) -> Task:
    """Return the task called `name`, or the one that a Python file FILE.py defines, which is executed.

    Raises:
        InputError: there is no such task, or the file defines none. The message lists the tasks.
    """
    if name.endswith(".py"):
        return _run_task_file(*_read_task_file(name))
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}; there are: {', '.join(TASKS)}; or a Python file, FILE.py")
    return TASKS[name]


def task_of_run(
    config: str | os.PathLike[str], recorded: str, sha256: str | None, given: str | Task | None
) -> Task:
    """Return the task of a run.

    A Python file that config.json names is executed only if the user names it too.

    Args:
        config: path of the run's config.json, for error messages.
        recorded: name of the task in config.json.
        sha256: digest of the task's file in config.json, or None where the task has no file or the run was
            made by an earlier version, which kept none.
        given: task that the user named: a name, a file or a registered task. None where the user named none.

    Raises:
        InputError: the run's task is a Python file and the user did not name it, the user named another task,
            or the file has changed since the run was made.
    """
    if isinstance(given, Task):
        given = given.name
    if given is None:
        if recorded.endswith(".py"):
            raise InputError(
                f"{config}: the run's task is the Python file {recorded}; reading it would execute it, allow"
                f" that with --task {recorded}"
            )
        return get_task(recorded)
    if given.endswith(".py") != recorded.endswith(".py") or not (given.endswith(".py") or given == recorded):
        say = f"name it with --task {recorded}" if recorded.endswith(".py") else "leave out --task"
        raise InputError(f"{config}: the run's task is {recorded}, not {given}; {say}")
    if sha256 is not None:
        path, content = _read_task_file(given)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise InputError(
                f"{path} is not the file that {config} records: it has changed since the run was made, or is"
                " another; name the file as it was with --task"
            )
    return get_task(given)


def resume_command(run: str | os.PathLike[str]) -> str:
    """Return the command that continues a run. It names the run's task where that is a Python file."""
    words = ["mopo-fast", "train", "--resume", os.fspath(run)]
    try:
        recorded = read_json(Path(run) / "config.json")
    except InputError:
        recorded = None
    task = recorded.get("task") if isinstance(recorded, dict) else None
    if isinstance(task, str) and task.endswith(".py"):
        words += ["--task", task]
    return shlex.join(words)


def parse_dataset_name(name: str) -> tuple[str, str | None]:
    """Split the name of a data set, such as `halfcheetah-medium-replay-v2`, into task and tier.

    The authors' tier "mixed" is D4RL's later "medium-replay". The tier is None where the name has none.

    Raises:
        InputError: the name does not begin with a task.
    """
    parts = name.lower().replace("_", "-").split("-")
    if parts[0] == "walker":
        parts[0] = "walker2d"
    # halfcheetah-jump is a task, halfcheetah-medium is not.
    known = ["-".join(parts[:count]) for count in (2, 1)]
    task = next((task for task in known if task in TASKS), None)
    if task is None:
        raise InputError(
            f"the data set name {name!r} does not begin with a task; name one with --task: {', '.join(TASKS)}"
        )
    tail = parts[1 + task.count("-") :]
    if tail and (tail[-1] == "local" or (tail[-1][:1] == "v" and tail[-1][1:].isdigit())):
        tail = tail[:-1]
    tier = "-".join(tail)
    return task, {"mixed": "medium-replay", "": None}.get(tier, tier)
