"""Our own folders: dynamics.safetensors, policy.safetensors, each with its JSON."""

from pathlib import Path

import torch

from mopo_fast.compat import Checkpoint
from mopo_fast.config import Hints
from mopo_fast.ensemble import EnsembleDynamics, elites_of
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor

WRITES_POLICIES = True


def read(source: Path, hints: Hints = Hints()) -> Checkpoint:  # noqa: B008
    """The models of a run's folder; hints in place of what it says are refused, but for the elites."""
    if hints.activation is not None or hints.absolute is not None:
        raise InputError(f"{source / 'dynamics.json'} says what activation and absolute are; leave them out")
    dynamics = EnsembleDynamics.load(source) if (source / "dynamics.json").exists() else None
    if dynamics is not None and hints.elites is not None:
        dynamics.elites = torch.tensor(elites_of(hints.elites, dynamics.members))
    policy = Actor.load(source) if (source / "policy.json").exists() else None
    return Checkpoint(dynamics, policy)


def write(checkpoint: Checkpoint, target: Path) -> None:
    """The models in a folder that `mopo-fast train --dynamics-from`, `evaluate` and `rollout` take."""
    for model in (checkpoint.dynamics, checkpoint.policy):
        if model is not None:
            model.save(target)
