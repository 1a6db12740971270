"""Ensembles, policies and tolerances that the kernels' tests share."""

import torch

from mopo_fast.config import Activation
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine


def make_ensemble(
    obs_dim: int,
    act_dim: int,
    *,
    members: int = 7,
    elites: int | None = None,
    hidden: tuple[int, ...] = (33, 50),
    activation: Activation = "silu",
    seed: int = 0,
) -> EnsembleDynamics:
    """As different from a fresh ensemble as a trained one: biases, scales of inputs, bounds, elites."""
    generator = torch.Generator().manual_seed(seed)
    elites = elites or max(1, members - 2)
    ensemble = EnsembleDynamics(
        obs_dim,
        act_dim,
        members=members,
        elites=elites,
        hidden=hidden,
        activation=activation,
        generator=generator,
    )
    with torch.no_grad():
        for bias in ensemble.biases:
            bias.normal_(0.0, 0.2, generator=generator)
        for weight in ensemble.weights:
            weight.mul_(1.5)
        ensemble.input_mean.normal_(0.0, 0.5, generator=generator)
        ensemble.input_std.uniform_(0.5, 2.0, generator=generator)
        ensemble.max_logvar.uniform_(-1.0, 0.5, generator=generator)
        ensemble.min_logvar.uniform_(-8.0, -4.0, generator=generator)
        ensemble.elites.copy_(torch.randperm(members, generator=generator)[:elites])
    return ensemble


def make_policy(obs_dim: int, act_dim: int, *, hidden: tuple[int, ...] = (41, 30), seed: int = 1) -> Actor:
    generator = torch.Generator().manual_seed(seed)
    policy = Actor(obs_dim, act_dim, hidden=hidden, generator=generator)
    with torch.no_grad():
        for bias in policy.biases:
            bias.normal_(0.0, 0.2, generator=generator)
    return policy


def inputs(batch: int, obs_dim: int, act_dim: int, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    observations = torch.randn(batch, obs_dim, generator=generator)
    return observations, torch.tanh(torch.randn(batch, act_dim, generator=generator))


def oracle(engine: RolloutEngine, dtype: str) -> RolloutEngine:
    """The reference backend on the same problem."""
    twin = RolloutEngine(
        engine.ensemble,
        penalty=engine.penalty,
        penalty_coef=engine.penalty_coef,
        penalty_members=engine.penalty_members,
        backend="reference",
        dtype=dtype,
    )
    twin._low, twin._high = engine._low.to(twin.dtype), engine._high.to(twin.dtype)
    return twin


def assert_as_accurate(
    kernel: torch.Tensor, same: torch.Tensor, exact: torch.Tensor, what: str, rows: int | None = None
) -> None:
    """The kernel's error against float64 is at most twice that of PyTorch's float32.

    PyTorch's error, `same - exact`, is taken over all its rows, the kernel's over the first `rows` that it
    has; as root mean squares, or as the largest where the kernel's values are too few for these.
    """
    assert torch.isfinite(kernel).all(), f"{what} holds values that are not finite"
    truth = exact if rows is None else exact.narrow(exact.ndim - 2 if exact.ndim > 1 else 0, 0, rows)
    few = kernel.numel() < 1000
    error, usual = (
        float(x.abs().max() if few else x.square().mean().sqrt()) for x in (kernel - truth, same - exact)
    )
    assert error <= 2.0 * usual, f"{what}: error {error:.3g}, PyTorch's {usual:.3g}"
