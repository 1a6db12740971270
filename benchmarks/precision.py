"""Measure the errors of a trained ensemble in each precision: `python -m benchmarks.precision RUN DATASET`.

Errors are root mean squares over rows of the data, against float64, beside the root mean square of the
quantity.
"""

import copy
from pathlib import Path
from typing import Annotated

import torch
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from benchmarks.command import run_command
from benchmarks.record import RESULTS, write_record
from mopo_fast import EnsembleDynamics, RolloutEngine, load_dataset
from mopo_fast.config import TRAINING_DTYPES
from mopo_fast.doctor import examine

THINGS = {
    "mean": "mean of (delta observation, reward)",
    "std": "sigma",
    "penalties": "penalty (max_aleatoric)",
}


def precision(
    run: Annotated[Path, Positional],
    dataset: Annotated[str, Positional],
    *,
    rows: int = 20_000,
    json: Path | None = None,
) -> None:
    """Print the errors of each precision.

    Args:
        run: Folder with dynamics.safetensors.
        dataset: Name or file of its data set.
        rows: Rows that are drawn from the data.
        json: File of the results (default: benchmarks/results/precision-NAME-cpu-ISA.json, where NAME is the
            name of the data set).
    """
    ensemble, data = EnsembleDynamics.load(run), load_dataset(dataset, quiet=True)
    drawn = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:rows]
    observations, actions = data.observations[drawn], data.actions[drawn]

    def predict(dtype: str, backend: str) -> dict[str, torch.Tensor]:
        exact = dtype == "float64"
        model = copy.deepcopy(ensemble).double() if exact else ensemble
        inputs = [x.double() if exact else x for x in (observations, actions)]
        result = RolloutEngine(model, backend=backend, dtype=dtype).step(*inputs, seed=0, distributions=True)
        return {name: getattr(result, name).double() for name in THINGS}

    truth = predict("float64", "reference")
    others = {dtype: predict(dtype, "cpu") for dtype in TRAINING_DTYPES}
    results: dict[str, dict[str, float]] = {}
    table = Table("prediction", "size", *(f"error in {dtype}" for dtype in others))
    for name, what in THINGS.items():
        errors = {dtype: _rms(other[name] - truth[name]) for dtype, other in others.items()}
        size = _rms(truth[name])
        table.add_row(
            what, f"{size:.3g}", *(f"{error:.2g} ({error / size:.2g})" for error in errors.values())
        )
        results[what] = {"size": size, **errors}
    Console().print(table)
    findings = examine()
    path = json or RESULTS / f"precision-{data.name}-cpu-{findings.machine.isa}.json"
    write_record(path, "precision", findings, {"rows": rows, "root_mean_squares": results})
    print(path)


def _rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


if __name__ == "__main__":
    run_command(precision)
