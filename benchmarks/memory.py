"""Measure a rollout's memory besides its start states and output: `python -m benchmarks.memory`."""

import resource

import torch

from benchmarks.command import run_command
from mopo_fast import Actor, EnsembleDynamics, RolloutEngine

OBS_DIM, ACT_DIM = 17, 6


def memory(*, starts: int = 10_000_000, horizon: int = 5, dtype: str = "bfloat16") -> None:
    """Print the process's peak of memory during a rollout, less its memory before and the output.

    Args:
        starts: Start states.
        horizon: Steps of each rollout.
        dtype: Precision of the networks' products.
    """
    generator = torch.Generator().manual_seed(0)
    engine = RolloutEngine(
        EnsembleDynamics(OBS_DIM, ACT_DIM, generator=generator), backend="cpu", dtype=dtype
    )
    actor = Actor(OBS_DIM, ACT_DIM, generator=generator)
    start = torch.randn(starts, OBS_DIM, generator=generator)
    engine.rollout(actor, start[:1000], horizon, seed=0)  # The first call allocates what all calls share.
    before = _peak()
    rollouts = engine.rollout(actor, start, horizon, seed=0)
    output = sum(array.untyped_storage().nbytes() for array in rollouts.arrays().values())
    print(
        f"{len(rollouts):,} transitions, {output / 1e9:.2f} GB of output;"
        f" {(_peak() - before - output) / 1e6:,.0f} MB beside it"
    )


def _peak() -> int:
    """Return the process's peak of memory in bytes; Linux counts in KiB."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    run_command(memory)
