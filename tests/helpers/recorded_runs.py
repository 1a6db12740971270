"""The small files of runs that were never trained."""

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mopo_fast.config import RolloutConfig, RunConfig, SACConfig, to_dict
from mopo_fast.run.log import COLUMNS

SUMMARY = {
    "score_mean": 26.14, "score_std": 0.72, "return_mean": 2965.2, "return_std": 89.0, "updates": 100_000,
    "seconds": {"fit": 700.0, "rollout": 310.0, "sac": 1400.0, "evaluate": 45.0, "total": 2500.0},
    "backend": "cpu", "device": "cpu", "dtype": "float32", "dataset": "toy", "task": "hopper", "seed": 0,
    "horizon": 5, "penalty": "max_aleatoric", "penalty_coef": 0.5,
    "versions": {"mopo_fast": "0.1.0", "torch": "2.13.0"},
}  # fmt: skip
CONFIG = RunConfig(
    "data/hopper-medium-local.hdf5",
    task="hopper",
    steps=12_000,
    rollout=RolloutConfig(horizon=5, penalty_coef=1.0, dtype="float32"),
    sac=SACConfig(dtype="float32"),
)


def record_run(
    folder: Path,
    scores: Sequence[float | None],
    *,
    seed: int = 0,
    coef: float = 1.0,
    finished: bool = True,
    scored_by: str = "environment",
    fit: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Write the files of a run with these evaluations; None stands for one without a score."""
    folder.mkdir(parents=True)
    rollout = dataclasses.replace(CONFIG.rollout, penalty_coef=coef)
    config = dataclasses.replace(CONFIG, **{"seed": seed, "rollout": rollout, **settings})
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    if finished:
        (folder / "summary.json").write_text(json.dumps(SUMMARY))
    with (folder / "progress.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(COLUMNS))
        writer.writeheader()
        for number, score in enumerate(scores, start=1):
            row = {"epoch": number, "updates": 1000 * number, "return_mean": 10.0 * (score or 1.0)}
            writer.writerow(row | {"score_mean": score, "scored_by": scored_by})
    if fit is not None:
        record = {
            "dataset": "data", "data_sha256": "a", "transitions": 10, "holdout": 2, "seed": seed,
            "device": "cpu", "config": {"holdout_fraction": 0.2, "holdout_max": 1000}, "epochs": 1,
            "seconds": 1.0, "elites": [0], "best_mse": [1.0], "train_loss": [1.0], "holdout_mse": [[1.0]],
        }  # fmt: skip
        (folder / "fit.json").write_text(json.dumps(record | fit))
    return folder
