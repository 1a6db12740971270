"""MOPO, model-based offline policy optimization, with compiled model rollouts.

The training loop is `mopo_fast.train.train`, the evaluation in MuJoCo `mopo_fast.evaluate.evaluate`. The
names below and all submodules are imported on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mopo_fast._version import __version__
from mopo_fast.utils.lazy import lazy_submodules

__all__ = [
    "Actor",
    "Box",
    "EnsembleDynamics",
    "InputError",
    "ModelVectorEnv",
    "RolloutEngine",
    "StepResult",
    "Task",
    "TrainConfig",
    "Transitions",
    "__version__",
    "clone_policy",
    "fit_dynamics",
    "load_dataset",
    "open_rollouts",
    "register_task",
]

if TYPE_CHECKING:
    # Editors complete the submodules from this list.
    from mopo_fast import backends as backends
    from mopo_fast import buffer as buffer
    from mopo_fast import bulk as bulk
    from mopo_fast import clone as clone
    from mopo_fast import collect as collect
    from mopo_fast import compat as compat
    from mopo_fast import config as config
    from mopo_fast import data as data
    from mopo_fast import ensemble as ensemble
    from mopo_fast import errors as errors
    from mopo_fast import estimates as estimates
    from mopo_fast import evaluate as evaluate
    from mopo_fast import export as export
    from mopo_fast import fit as fit
    from mopo_fast import hub as hub
    from mopo_fast import model_env as model_env
    from mopo_fast import policy as policy
    from mopo_fast import presets as presets
    from mopo_fast import report as report
    from mopo_fast import rollout as rollout
    from mopo_fast import run as run
    from mopo_fast import sac as sac
    from mopo_fast import select as select
    from mopo_fast import sweep as sweep
    from mopo_fast import tasks as tasks
    from mopo_fast import train as train
    from mopo_fast.backends import StepResult
    from mopo_fast.clone import clone_policy
    from mopo_fast.config import TrainConfig
    from mopo_fast.data import Transitions, load_dataset
    from mopo_fast.data.shards import open_rollouts
    from mopo_fast.ensemble import EnsembleDynamics
    from mopo_fast.errors import InputError
    from mopo_fast.fit import fit_dynamics
    from mopo_fast.model_env import ModelVectorEnv
    from mopo_fast.policy import Actor
    from mopo_fast.rollout import RolloutEngine
    from mopo_fast.tasks import Box, Task, register_task

# These modules are imported on first use: torch takes seconds, and `mopo-fast --help` does not need it.
_HOMES = {
    "Actor": "policy",
    "Box": "tasks",
    "EnsembleDynamics": "ensemble",
    "InputError": "errors",
    "ModelVectorEnv": "model_env",
    "RolloutEngine": "rollout",
    "StepResult": "backends",
    "Task": "tasks",
    "TrainConfig": "config",
    "Transitions": "data",
    "clone_policy": "clone",
    "fit_dynamics": "fit",
    "load_dataset": "data",
    "open_rollouts": "data.shards",
    "register_task": "tasks",
}


_get_submodule, __dir__ = lazy_submodules(__name__)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return _get_submodule(name)
