"""Data that a small ensemble fits in a second."""

import torch

from mopo_fast.config import DynamicsConfig
from mopo_fast.data import Transitions

SMALL = DynamicsConfig(
    members=3, elites=2, hidden=(16, 12), weight_decay=(1e-3, 2e-3, 3e-3), batch_size=32, max_epochs=4
)


def toy_data(n: int = 300, noise: float = 0.1, seed: int = 0) -> Transitions:
    """Make a smooth system with `noise` on each target; 3 observation and 2 action dimensions."""
    generator = torch.Generator().manual_seed(seed)
    observations = torch.randn(n, 3, generator=generator) * torch.tensor([1.0, 0.5, 0.2]) + 2.0
    actions = torch.rand(n, 2, generator=generator) * 2 - 1
    delta = torch.sin(observations) + actions.sum(-1, keepdim=True)
    return Transitions(
        observations,
        actions,
        observations[:, 0] + noise * torch.randn(n, generator=generator),
        observations + delta + noise * torch.randn(n, 3, generator=generator),
        torch.zeros(n, dtype=torch.bool),
        name="toy",
    )
