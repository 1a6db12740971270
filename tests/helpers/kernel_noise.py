"""The noise of the kernels' SAC updates, put in the place of PyTorch's."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from mopo_fast.backends.philox import ACTION_STREAM, NEXT_ACTION_STREAM, random_normals
from mopo_fast.compat.torch_sac import Losses, SharedSAC
from mopo_fast.sac import Draws


def noise_of(seed: int, updates: int, rows: int, act_dim: int) -> list[torch.Tensor]:
    """Return the noise of some updates: for each the next actions' [rows, act_dim], then the actions'."""
    numbers = torch.arange(rows)
    return [
        random_normals(numbers, torch.full_like(numbers, update), stream, act_dim, seed, torch.float32)
        for update in range(updates)
        for stream in (NEXT_ACTION_STREAM, ACTION_STREAM)
    ]


@contextlib.contextmanager
def drawn_by_torch(noise: list[torch.Tensor]) -> Iterator[None]:
    """Let `Normal.rsample` return this noise, scaled and shifted; all of it must be used."""
    left, original = list(noise), torch.distributions.Normal.rsample

    def rsample(self: torch.distributions.Normal, sample_shape: object = None) -> torch.Tensor:
        return self.loc + left.pop(0) * self.scale

    torch.distributions.Normal.rsample = rsample  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.distributions.Normal.rsample = original  # type: ignore[method-assign]
    assert not left


@contextlib.contextmanager
def seen_draws() -> Iterator[list[Draws]]:
    """Yield a list that gets the draws of every kernel call which updates another code base's SAC."""
    seen: list[Draws] = []
    original = SharedSAC.update

    def update(self: SharedSAC, draws: Draws, *arguments: Any, **options: Any) -> Losses:
        seen.append(draws)
        return original(self, draws, *arguments, **options)

    SharedSAC.update = update  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        SharedSAC.update = original  # type: ignore[method-assign]
