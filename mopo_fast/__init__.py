"""MOPO, model-based offline policy optimization, with compiled model rollouts.

The training loop is `mopo_fast.train.train`, the evaluation in MuJoCo `mopo_fast.evaluate.evaluate`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mopo_fast._version import __version__

__all__ = [
    "Actor",
    "Box",
    "EnsembleDynamics",
    "InputError",
    "RolloutEngine",
    "StepResult",
    "Task",
    "TrainConfig",
    "Transitions",
    "__version__",
    "fit_dynamics",
    "load_dataset",
    "open_rollouts",
    "register_task",
]

if TYPE_CHECKING:
    from mopo_fast.backends import StepResult
    from mopo_fast.bulk.read import open_rollouts
    from mopo_fast.config import TrainConfig
    from mopo_fast.data import Transitions, load_dataset
    from mopo_fast.ensemble import EnsembleDynamics
    from mopo_fast.errors import InputError
    from mopo_fast.fit import fit_dynamics
    from mopo_fast.policy import Actor
    from mopo_fast.rollout import RolloutEngine
    from mopo_fast.tasks import Box, Task, register_task

# These modules are imported on first use: torch takes seconds, and `mopo-fast --help` does not need it.
_HOMES = {
    "Actor": "policy",
    "Box": "tasks",
    "EnsembleDynamics": "ensemble",
    "InputError": "errors",
    "RolloutEngine": "rollout",
    "StepResult": "backends",
    "Task": "tasks",
    "TrainConfig": "config",
    "Transitions": "data",
    "fit_dynamics": "fit",
    "load_dataset": "data",
    "open_rollouts": "bulk.read",
    "register_task": "tasks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
