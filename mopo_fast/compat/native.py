"""This package's own format: dynamics.safetensors and policy.safetensors, each with a JSON file."""

from pathlib import Path

import torch

from mopo_fast.compat import Checkpoint
from mopo_fast.config import Hints
from mopo_fast.ensemble import EnsembleDynamics, elites_of
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor

FILES = (
    *("dynamics.safetensors", "dynamics.json", "policy.safetensors", "policy.json"),
    # The rest of a run's folder holds no models, or holds them for going on with the run.
    *("config.json", "summary.json", "progress.csv", "fit.json", "fit.csv", "report.html", "*.png"),
    *("checkpoint", "export", "tensorboard-fit", "events.out.tfevents.*"),
)
"""Names of the files in a run's folder, of which `read` takes the models."""


def read(source: Path, hints: Hints = Hints()) -> Checkpoint:  # noqa: B008
    """Read the models in a run's folder.

    The files store everything but a wish for other elites, so `hints` may give elites alone.

    Raises:
        InputError: a file is damaged, or `hints` gives an activation or absolute dimensions.
    """
    if hints.activation is not None or hints.absolute is not None:
        raise InputError(f"{source / 'dynamics.json'} stores activation and absolute; leave them out")
    dynamics = EnsembleDynamics.load(source) if (source / "dynamics.json").exists() else None
    if dynamics is not None and hints.elites is not None:
        dynamics.elites = torch.tensor(elites_of(hints.elites, dynamics.members))
    policy = Actor.load(source) if (source / "policy.json").exists() else None
    return Checkpoint(dynamics, policy)


def check_dynamics(ensemble: EnsembleDynamics) -> list[str]:
    """Return no sentence: the files store all properties of an `EnsembleDynamics`."""
    return []


def check_policy(policy: Actor) -> list[str]:
    """Return no sentence: the files store all properties of an `Actor`."""
    return []


def write(checkpoint: Checkpoint, target: Path) -> None:
    """Write a folder that `mopo-fast train --dynamics-from` and `evaluate --task TASK` take."""
    for model in (checkpoint.dynamics, checkpoint.policy):
        if model is not None:
            model.save(target)
