"""A run's ensemble: fitted in its folder, or copied from another."""

import os
import stat
from pathlib import Path
from typing import Any

import torch

from mopo_fast.backends import choose_for_run
from mopo_fast.config import RunConfig, TrainConfig
from mopo_fast.data import Transitions
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.fit import fit_and_save, fit_checkpoint, read_fit
from mopo_fast.run.checkpoint import last_checkpoint
from mopo_fast.run.folder import as_json, first_difference
from mopo_fast.utils.atomic import read_json, write_json


def make_dynamics(config: RunConfig, out: Path, data: Transitions, data_digest: str, quiet: bool) -> None:
    """Fit the run's ensemble, or copy it from `config.dynamics_from`, where its folder has none yet.

    Raises:
        InputError: the fit in the folder is of other data, another seed or another config, or as
            `fit_and_save`.
    """
    if config.dynamics_from is not None:
        if last_checkpoint(out) is None:
            copy_fit(Path(config.dynamics_from), out)
        return
    if not (out / "fit.json").exists():
        fit_and_save(
            data,
            out,
            seed=config.seed,
            config=config.dynamics,
            device=config.device,
            backend=training_backend(config),
            threads=config.threads,
            quiet=quiet,
        )
    fit = read_fit(out)
    ours = {"data_sha256": data_digest, "seed": config.seed, "config": as_json(config.dynamics)}
    difference = first_difference({name: fit.get(name) for name in ours}, ours)
    if difference:
        raise InputError(f"{out / 'fit.json'} was made with {difference}; choose another --out")
    # Still there where a run was killed between the two.
    fit_checkpoint(out).unlink(missing_ok=True)


def read_dynamics(source: Path) -> tuple[EnsembleDynamics, Any]:
    """Read an ensemble and its fit.json; None for that of an ensemble that was not fitted here.

    Raises:
        InputError: a file is missing or not sound, or it is a link, which could lead to anything.
    """
    for name in ("dynamics.safetensors", "dynamics.json", "fit.json"):
        path = source / name
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            raise InputError(f"{path} is a link or no regular file; give a folder that holds the file itself")
    ensemble, fit = EnsembleDynamics.load(source), None
    if (source / "fit.json").exists():
        read_fit(source)
        # All of it, in its order, so that the copy has the same bytes.
        fit = read_json(source / "fit.json")
    return ensemble, fit


def copy_fit(source: Path, out: Path) -> None:
    """Write what the files of a fit hold into `out`, fit.json last: where it is, the fit is whole."""
    ensemble, fit = read_dynamics(source)
    ensemble.save(out)
    if fit is not None:
        write_json(out / "fit.json", fit)


def training_backend(config: TrainConfig) -> str:
    """Choose the backend of a run's fit and SAC."""
    return choose_for_run(config.backend, torch.device(config.device))
