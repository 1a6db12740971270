"""Memory of a rollout beside its start states and its output: `python -m benchmarks.memory`."""

import resource

import torch
import tyro

from mopo_fast import Actor, EnsembleDynamics, RolloutEngine

OBS_DIM, ACT_DIM = 17, 6


def memory(*, starts: int = 10_000_000, horizon: int = 5, dtype: str = "bfloat16") -> None:
    """The peak of the process while it rolls out, less what it held before and what it returns.

    Args:
        starts: Start states.
        horizon: Steps from each.
        dtype: Of the networks' products.
    """
    generator = torch.Generator().manual_seed(0)
    engine = RolloutEngine(
        EnsembleDynamics(OBS_DIM, ACT_DIM, generator=generator), backend="cpu", dtype=dtype
    )
    actor = Actor(OBS_DIM, ACT_DIM, generator=generator)
    start = torch.randn(starts, OBS_DIM, generator=generator)
    engine.rollout(actor, start[:1000], horizon, seed=0)  # what every call needs once
    before = _peak()
    rollouts = engine.rollout(actor, start, horizon, seed=0)
    output = sum(array.untyped_storage().nbytes() for array in rollouts.arrays().values())
    print(
        f"{len(rollouts):,} transitions, {output / 1e9:.2f} GB of output;"
        f" {(_peak() - before - output) / 1e6:,.0f} MB beside it"
    )


def _peak() -> int:
    """Bytes of memory that the process has held at most; Linux counts in KiB."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    tyro.cli(memory)
