"""A run in hopper that trains in seconds, and what is compared between two runs."""

import csv
from pathlib import Path

import torch
from safetensors.torch import load_file

from mopo_fast.config import DynamicsConfig, EvaluationConfig, RolloutConfig, SACConfig, TrainConfig

CONFIG = TrainConfig(
    dataset="hopper-random-local",
    seed=1,
    steps=25,
    dynamics=DynamicsConfig(
        members=3, elites=2, hidden=(16, 16), weight_decay=(1e-5, 1e-5, 1e-5), max_epochs=3, batch_size=64
    ),
    # Hopper's rollouts end early, so the buffer holds rows of more epochs than retain_epochs.
    rollout=RolloutConfig(batch_size=50, interval=10, retain_epochs=1),
    threads=1,
    sac=SACConfig(hidden=(16, 16), batch_size=32),
    evaluation=EvaluationConfig(episodes=2, interval=2),
)


def progress(out: Path) -> list[dict[str, str]]:
    """Read progress.csv without the columns that depend on a clock."""
    with (out / "progress.csv").open() as file:
        return [
            {name: value for name, value in row.items() if not name.startswith("seconds")}
            for row in csv.DictReader(file)
        ]


def assert_same_results(ours: Path, theirs: Path) -> None:
    """Check that progress, and the tensors of models and checkpoint, are equal to the bit."""
    (checkpoint,) = (theirs / "checkpoint").iterdir()
    kept = [f"policies/{path.name}" for path in theirs.glob("policies/*")]
    for name in ("policy.safetensors", "dynamics.safetensors", *kept, f"checkpoint/{checkpoint.name}"):
        # Policies that await their evaluation are left out, since their number depends on the workers.
        one, other = (
            {key: tensor for key, tensor in load_file(out / name).items() if not key.startswith("evaluated.")}
            for out in (ours, theirs)
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    assert any(key.startswith("sac.adam.critic") for key in one)
    assert progress(ours) == progress(theirs)
