"""Measure the errors of a trained ensemble in each precision: `python -m benchmarks.precision RUN DATASET`.

Errors are root mean squares over rows of the data, against float64, beside the root mean square of the
quantity.
"""

import copy
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from mopo_fast import EnsembleDynamics, RolloutEngine, load_dataset

THINGS = {
    "mean": "mean of (delta observation, reward)",
    "std": "sigma",
    "penalties": "penalty (max_aleatoric)",
}


def precision(
    run: Annotated[Path, Positional], dataset: Annotated[str, Positional], *, rows: int = 20_000
) -> None:
    """Print the errors of each precision.

    Args:
        run: Folder with dynamics.safetensors.
        dataset: Name or file of its data set.
        rows: Rows that are drawn from the data.
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
    others = {dtype: predict(dtype, "cpu") for dtype in ("float32", "bfloat16")}
    table = Table("prediction", "size", *(f"error in {dtype}" for dtype in others))
    for name, what in THINGS.items():
        errors = [_rms(other[name] - truth[name]) for other in others.values()]
        size = _rms(truth[name])
        table.add_row(what, f"{size:.3g}", *(f"{error:.2g} ({error / size:.2g})" for error in errors))
    Console().print(table)


def _rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


if __name__ == "__main__":
    tyro.cli(precision)
