"""What the algorithm must know of an environment: when an episode ends, what a score means, which
hyperparameters were tuned for it.

Termination rules: authors' mopo/static/*.py. Reference returns: d4rl/infos.py, the same for v0, v1, v2.
"""

import dataclasses
import functools
import hashlib
import math
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mopo_fast.config import UNTUNED
from mopo_fast.errors import InputError


@dataclass(frozen=True)
class Box:
    """The next observations that do not end an episode: low <= s' <= high in every dimension.

    A prediction that is not finite always ends its episode. Bounds are inclusive float32 values; an
    open bound is its neighbouring float32 (`above`, `below`).
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
        return len(self.low)

    def contains(self, observations: torch.Tensor) -> torch.Tensor:
        """bool [batch]: True where no bound is crossed and all of observations [batch, obs] is finite."""
        low = torch.tensor(self.low, dtype=observations.dtype, device=observations.device)
        high = torch.tensor(self.high, dtype=observations.dtype, device=observations.device)
        inside = (observations >= low) & (observations <= high) & torch.isfinite(observations)
        return inside.all(dim=-1)


def above(value: float) -> float:
    """The least float32 greater than `value`: makes `x > value` a closed bound."""
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))


def below(value: float) -> float:
    """The greatest float32 less than `value`."""
    return float(np.nextafter(np.float32(value), np.float32(-np.inf)))


def _closed(value: float) -> float:
    return float(np.float32(value))


def make_box(
    obs_dim: int,
    bounds: dict[int, tuple[float, float]] | None = None,
    rest: tuple[float, float] = (-math.inf, math.inf),
) -> Box:
    """A box with `bounds` {dimension: (low, high)} and `rest` for every other dimension."""
    per_dim = [(bounds or {}).get(dim, rest) for dim in range(obs_dim)]
    return Box(tuple(low for low, _ in per_dim), tuple(high for _, high in per_dim))


TerminationFunction = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class Task:
    """An environment as MOPO sees it.

    Attributes:
        name: the key in `TASKS`, of lower-case letters and digits.
        env_id: the gymnasium environment for evaluation; "" where there is none and the ensemble scores the
            policy; -v4 follows the v2 rules that D4RL's reference scores belong to.
        obs_dim, act_dim: sizes of its observation and action.
        box: the termination rule; or a function (observations, actions, next_observations) -> bool [batch].
        min_return, max_return: D4RL's random and expert reference returns; None where D4RL has none.
        tuned: {source: {tier: (horizon, penalty_coef)}}.
        online_env_id: where the agent whose replay is the data is trained, by another reward than the task's;
            None: the data have the environment's own.
        recorded: what of a step's info such data keep, to be relabelled by.
        file_sha256: digest of the Python file that the task was read from; None: it was not.
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

    def normalized_score(self, episode_return: float) -> float | None:
        """100 * (return - min) / (max - min); None where no references are known."""
        if self.min_return is None or self.max_return is None:
            return None
        return 100.0 * (episode_return - self.min_return) / (self.max_return - self.min_return)

    def normalized_std(self, return_std: float) -> float | None:
        """A standard deviation on the score's scale: no offset."""
        if self.min_return is None or self.max_return is None:
            return None
        return 100.0 * return_std / (self.max_return - self.min_return)

    def tuned_for(self, tier: str | None, source: str = "authors") -> tuple[int, float]:
        """(horizon, penalty_coef) tuned for a data tier, else `UNTUNED`."""
        return self.tuned.get(source, {}).get(tier or "", UNTUNED)


_HUNDRED = (above(-100.0), below(100.0))
_HOPPER = {0: (above(0.7), math.inf), 1: (above(-0.2), below(0.2))}
_WALKER = {0: (above(0.8), below(2.0)), 1: (above(-1.0), below(1.0))}
_ANT = {0: (_closed(0.2), 1.0)}
_HUMANOID = {0: (1.0, 2.0)}
# OfflineRL-Kit's rules (offlinerlkit/utils/termination_fns.py) by the names of its functions, for `make_box`.
# The authors' hopper has the same slip, np.abs(x < 100) for abs(x) < 100, which leaves no lower bound.
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
        # The paper's two out-of-distribution tasks; horizon and lambda were not published.
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

# Rules by name, for `RolloutEngine(termination=...)`: a task's, and TASK-CODE as another code has it.
BOXES: dict[str, Box] = {
    **{name: task.box for name, task in TASKS.items() if isinstance(task.box, Box)},
    "hopper-authors": make_box(11, **OFFLINERL_KIT_RULES["hopper"]),
    **{
        f"{name}-offlinerl-kit": make_box(TASKS[name].obs_dim, **OFFLINERL_KIT_RULES[name])
        for name in ("hopper", "halfcheetah", "walker2d")
    },
}


def termination_of(task: Task, name: str | None) -> str | Box | TerminationFunction:
    """What ends an episode of `task`: its own rule, or as a code called `name` has it; else a rule's name."""
    if name in ("authors", "offlinerl-kit"):
        return BOXES.get(f"{task.name}-{name}", task.box)
    return task.box if name is None else name


def register_task(task: Task) -> Task:
    """Make `task` known by its name in this process, to `train`, `evaluate` and data sets named after it.

    Raises:
        InputError: the name is taken, or is not of lower-case letters and digits; sizes are not positive.
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
    """The `task` that the Python file makes when it is run; its name is the path, to find it again by."""
    # Not by `runpy`, which would read the file again: what is run is what was looked at.
    # A task file may use another one, so each has a module of its own.
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
    """The task called `name`, or that of a Python file of one's own, which is run.

    Raises:
        InputError: no such task; the message lists those that exist. Or the file has none.
    """
    if name.endswith(".py"):
        return _run_task_file(*_read_task_file(name))
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}; there are: {', '.join(TASKS)}; or a Python file, FILE.py")
    return TASKS[name]


def task_of_run(
    config: str | os.PathLike[str], recorded: str, sha256: str | None, given: str | Task | None
) -> Task:
    """The task of a run; a Python file that its config.json names is run only where the user names it too.

    Args:
        config: the run's config.json, for errors.
        recorded: the task's name there.
        sha256: digest of the task's file there; None: it has no file, or the run is older than the record.
        given: the task by the user's word, a name, a file, or a registered task; None: nothing was said.

    Raises:
        InputError: the run's task is a Python file and is not given, what is given is another task, or the
            file's content is not what it was when the run was made.
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


def parse_dataset_name(name: str) -> tuple[str, str | None]:
    """(task, tier) of a data set's name: `halfcheetah-medium-replay-v2`, `hopper-random-local`.

    authors' "mixed" is D4RL's later "medium-replay". The tier is None where the name has none.

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
