"""The ensemble of a run, fitted in its folder or copied from another folder."""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mopo_fast.backends import choose_for_run
from mopo_fast.config import DataConfig, DynamicsConfig, RunConfig, TrainConfig
from mopo_fast.data import Transitions
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.fit import fit_and_save, fit_checkpoint, read_fit
from mopo_fast.run.checkpoint import last_checkpoint
from mopo_fast.run.folder import as_json, first_difference, with_defaults
from mopo_fast.utils.atomic import read_json, read_json_as, write_json


def make_dynamics(config: RunConfig, out: Path, data: Transitions, data_digest: str, quiet: bool) -> None:
    """Fit the ensemble of a run, or copy it from `config.dynamics_from`, unless its folder has one.

    Args:
        config: settings of the run.
        out: folder of the run.
        data: transitions to fit.
        data_digest: their `data_sha256`.
        quiet: show no progress bar.

    Raises:
        InputError: the fit in the folder has other data, another seed or another config, or `fit_and_save`
            raised it.
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
    current = {"data_sha256": data_digest, "seed": config.seed, "config": as_json(config.dynamics)}
    recorded = {name: fit.get(name) for name in current}
    if isinstance(recorded["config"], dict):
        recorded["config"] = with_defaults(recorded["config"], DynamicsConfig())
    difference = first_difference(recorded, current)
    if difference:
        raise InputError(f"{out / 'fit.json'} was made with {difference}; choose another --out")
    # A run that was killed right after the fit has left its checkpoint.
    fit_checkpoint(out).unlink(missing_ok=True)


def read_dynamics(source: Path) -> tuple[EnsembleDynamics, Any]:
    """Read an ensemble and its fit.json.

    Returns:
        The ensemble, and the contents of fit.json or None where there is no such file, as for an ensemble
        that other code has fitted.

    Raises:
        InputError: a file is missing, damaged, or a link, which could lead anywhere.
    """
    for name in ("dynamics.safetensors", "dynamics.json", "fit.json"):
        path = source / name
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            raise InputError(
                f"{path} is not a regular file; give a folder that holds the file itself, not a link to it"
            )
    ensemble, fit = EnsembleDynamics.load(source), None
    if (source / "fit.json").exists():
        read_fit(source)
        # `read_fit` checks and picks keys. The copy keeps all of them in their order, to have the same bytes.
        fit = read_json(source / "fit.json")
    return ensemble, fit


@dataclass(frozen=True)
class _Fitted:
    """The fields of the config.json beside an ensemble that are read here. Early versions had no `data`."""

    dataset: str = ""
    data: DataConfig = field(default_factory=DataConfig)


def check_same_data(config: RunConfig) -> None:
    """Check that the ensemble in `config.dynamics_from` saw the same rows of the run's data set.

    An ensemble of another data set, and one without a config.json, are taken as they are.

    Raises:
        InputError: it was fitted to the run's data set with other settings of `data`.
    """
    assert config.dynamics_from is not None
    path = Path(config.dynamics_from) / "config.json"
    if not path.exists():
        return
    fitted = read_json_as(path, _Fitted)
    if Path(fitted.dataset).name != Path(config.dataset).name:
        return
    difference = first_difference(as_json(fitted.data), as_json(config.data), "data")
    if difference:
        raise InputError(
            f"the ensemble in {config.dynamics_from} was fitted to {config.dataset} with {difference}; give"
            " the fit's --data.compat and --data.max-transitions, or fit again with those of the run"
        )


def copy_fit(source: Path, out: Path) -> None:
    """Copy the files of a fit from `source` to `out`.

    fit.json is written last, so that a folder with this file holds the whole fit.
    """
    ensemble, fit = read_dynamics(source)
    ensemble.save(out)
    if fit is not None:
        write_json(out / "fit.json", fit)


def training_backend(config: TrainConfig) -> str:
    """Return the name of the backend that trains the ensemble and SAC of a run."""
    return choose_for_run(config.backend, torch.device(config.device))
