"""Fit an ensemble by OfflineRL-Kit's code and by ours: `python -m benchmarks.study.fits CHECKOUT`.

Both fit the same rows of a data set, with OfflineRL-Kit's hyperparameters and in float32. Rows that neither
has seen say how good the ensembles are.
"""

import csv
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from benchmarks.command import run_command
from benchmarks.compat.offlinerl_kit_scripts import make_trainer
from benchmarks.record import write_record
from benchmarks.study.calibration import true_outputs
from benchmarks.study.experiments import HALFCHEETAH
from benchmarks.study.train import STUDY
from mopo_fast import EnsembleDynamics, RolloutEngine, Transitions, load_dataset
from mopo_fast.compat import convert_checkpoint
from mopo_fast.doctor import examine
from mopo_fast.fit import fit_and_save
from mopo_fast.presets import preset
from mopo_fast.utils.progress import progress_bar
from mopo_fast.utils.seeds import derive_seed

WAYS = {"kit": "OfflineRL-Kit", "mopo_fast": "mopo-fast, preset offlinerl-kit"}
"""Ways to fit, with their names in the tables."""
QUANTILES = (0.1, 0.5, 0.9, 0.99)
# Number that keeps this study's seeds apart from others.
_FITS = 2216


def main(
    checkout: tyro.conf.Positional[Path],
    *,
    dataset: str = HALFCHEETAH,
    seeds: tuple[int, ...] = (0, 1, 2),
    test_rows: int = 5000,
    json: Path | None = None,
    quiet: bool = False,
) -> None:
    """Fit with each seed by both codes, and compare the ensembles on rows that neither has seen.

    Args:
        checkout: Folder of OfflineRL-Kit.
        dataset: Name of the data set.
        seeds: Seeds of the fits.
        test_rows: Rows that are left out of the fits.
        json: File of the results (default: benchmarks/results/study/fits-DATASET.json).
        quiet: Show no progress bar.
    """
    data = load_dataset(dataset, compat="offlinerl-kit")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(derive_seed(0, _FITS)))
    test, fitted = data[order[:test_rows]], data[order[test_rows:]]
    fits = []
    with progress_bar("fits", 2 * len(seeds), quiet=quiet) as bar:
        for seed in seeds:
            for way in WAYS:
                with tempfile.TemporaryDirectory() as folder:
                    started = time.perf_counter()
                    if way == "kit":
                        epochs, ensemble = _fit_by_kit(checkout.resolve(), fitted, seed, Path(folder))
                    else:
                        epochs, ensemble = _fit_here(fitted, seed, Path(folder))
                    seconds = time.perf_counter() - started
                fits.append(
                    {"way": way, "seed": seed, "epochs": epochs, "seconds": seconds} | judge(ensemble, test)
                )
                bar.advance()
    path = json or STUDY / f"fits-{dataset}.json"
    settings = {"dataset": dataset, "test_rows": test_rows, "fitted_rows": len(fitted)}
    write_record(path, "study.fits", examine(), {"settings": settings, "fits": fits})
    print(path)


def _fit_by_kit(checkout: Path, data: Transitions, seed: int, folder: Path) -> tuple[int, EnsembleDynamics]:
    """Fit by OfflineRL-Kit's script; return the number of epochs and the ensemble."""
    # The task chooses the rule for ends of episodes, which a fit does not use.
    task = "halfcheetah-medium-replay-v2"
    arguments = ["--task", task, "--seed", str(seed), "--device", "cpu"]
    trainer = make_trainer(checkout, "mopo", data, arguments, str(folder), fit_epochs=10**9)
    trainer.policy.dynamics.save(folder)
    convert_checkpoint(folder, folder / "converted", "offlinerl-kit", "mopo-fast")
    with open(Path(trainer.logger.record_dir, "dynamics_training_progress.csv"), encoding="utf-8") as file:
        epochs = len(list(csv.DictReader(file)))
    return epochs, EnsembleDynamics.load(folder / "converted")


def _fit_here(data: Transitions, seed: int, folder: Path) -> tuple[int, EnsembleDynamics]:
    """Fit by `mopo-fast fit`'s function; return the number of epochs and the ensemble."""
    config = preset("offlinerl-kit").dynamics
    ensemble, record = fit_and_save(data, folder, seed=seed, config=config, quiet=True)
    return record["epochs"], ensemble


@torch.no_grad()
def judge(ensemble: EnsembleDynamics, test: Transitions) -> dict[str, Any]:
    """Compare an ensemble's predictions with the truth of some rows.

    Returns:
        Means over the elites of the mean squared error, in raw units, and of the log-likelihood of a row, in
        nats; and quantiles of the penalty of MOPO.
    """
    engine = RolloutEngine(ensemble, penalty="max_aleatoric", penalties=True)
    step = engine.step(test.observations, test.actions, seed=0, distributions=True)
    assert step.mean is not None and step.std is not None and step.penalties is not None
    rows = (array.double().numpy() for array in (test.observations, test.next_observations, test.rewards))
    target = torch.from_numpy(true_outputs(ensemble, *rows))
    elites = ensemble.elites
    mean, std = step.mean[elites].double(), step.std[elites].double()
    likelihood = torch.distributions.Normal(mean, std).log_prob(target).sum(dim=-1)
    quantiles = np.quantile(step.penalties.double().numpy(), QUANTILES)
    return {
        "mse": float((mean - target).square().mean()),
        "log_likelihood": float(likelihood.mean()),
        "penalty": {f"{q:g}": float(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
    }


if __name__ == "__main__":
    run_command(main)
