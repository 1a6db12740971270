"""Ensembles, policies and tolerances that the kernels' tests share."""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from mopo_fast.config import Activation
from mopo_fast.data import Transitions
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.fit import Fit, _loss_gradient
from mopo_fast.graph import Graph
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine
from mopo_fast.sac import SAC
from mopo_fast.tasks import Box, make_box


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
    kernel: torch.Tensor,
    same: torch.Tensor,
    exact: torch.Tensor,
    what: str,
    rows: int | None = None,
    units: float = 0.0,
) -> None:
    """The kernel's error against float64 is at most twice that of PyTorch's float32.

    And `units` in the last place of the largest value more: where there are few values, PyTorch's happen to
    be exact.

    PyTorch's error, `same - exact`, is taken over all its rows, the kernel's over the first `rows` that it
    has; as root mean squares, or as the largest where the kernel's values are too few for these.
    """
    assert torch.isfinite(kernel).all(), f"{what} holds values that are not finite"
    truth = exact if rows is None else exact.narrow(exact.ndim - 2 if exact.ndim > 1 else 0, 0, rows)
    few = kernel.numel() < 1000
    error, usual = (
        float(x.abs().max() if few else x.square().mean().sqrt()) for x in (kernel - truth, same - exact)
    )
    allowed = 2.0 * usual + units * torch.finfo(torch.float32).eps * float(exact.abs().max())
    assert error <= allowed, f"{what}: error {error:.3g}, PyTorch's {usual:.3g}"


def check_step(engine: RolloutEngine, batch: int, *, deterministic: bool = False) -> None:
    """One step of the kernel against the oracle in float32 and in float64."""
    ensemble, device = engine.ensemble, engine.device
    # The oracles see more rows than a small batch has, for a fair measure of PyTorch's own error.
    observations, actions = (
        array.to(device) for array in inputs(max(batch, 1000), ensemble.obs_dim, ensemble.act_dim)
    )
    rows = torch.arange(len(observations), device=device) * 3 + 2**33
    call = {"seed": 2**63 + 11, "step": 4, "deterministic": deterministic, "distributions": True}
    kernel = engine.step(observations[:batch], actions[:batch], rows=rows[:batch], **call)
    same = oracle(engine, "float32").step(observations, actions, rows=rows, **call)
    exact = oracle(engine, "float64").step(observations.double(), actions.double(), rows=rows, **call)
    assert torch.equal(kernel.members, exact.members[:batch])
    assert torch.equal(kernel.terminals, exact.terminals[:batch])
    for name in ("next_observations", "rewards", "raw_rewards", "penalties", "mean", "std"):
        assert_as_accurate(getattr(kernel, name), getattr(same, name), getattr(exact, name), name, batch)


def narrow_box(obs_dim: int) -> Box:
    """Ends about a tenth of all steps."""
    return make_box(obs_dim, {0: (-1.8, 2.5), 1: (-3.0, 1.6)})


def assert_same(a: Transitions, b: Transitions) -> None:
    """The same arrays, bit for bit."""
    left, right = a.arrays(), b.arrays()
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def assert_trained_alike(
    kernel: dict[str, torch.Tensor],
    same: dict[str, torch.Tensor],
    exact: dict[str, torch.Tensor],
    before: dict[str, torch.Tensor],
    one_step: bool,
) -> None:
    """The kernel's parameters and Adam's moments are as accurate as PyTorch's, `exact` being float64's.

    After one step from moments of zero, these are the gradients and their squares up to a factor, and the
    strict rule holds. Later, and for the parameters, which Adam moves as far for a small gradient as for a
    large one, a rounding may tip a ReLU or the sign of a step: errors are held against what has moved, too.
    """
    assert kernel.keys() == exact.keys()
    for name, truth in exact.items():
        if one_step and ".exp_avg" in name:
            assert_as_accurate(kernel[name], same[name], truth, name, units=8.0)
            continue
        error, usual, moved = (
            float((x.detach() - truth).double().norm()) for x in (kernel[name], same[name], before[name])
        )
        allowed = max(2.0 * usual, 1e-3 * moved)
        assert error <= allowed, f"{name}: error {error:.3g}, PyTorch's {usual:.3g}, movement {moved:.3g}"
        assert moved > 0.0, f"{name} did not move, so nothing was compared"


def to_double(sac: SAC) -> SAC:
    """Its parameters and Adam's moments in float64, for the reference backend."""
    for module in (sac.actor, sac.critic, sac.target):
        module.double()
    sac.log_alpha.data = sac.log_alpha.data.double()
    for optimizer in sac.optimizers.values():
        optimizer.exp_avgs = [moment.double() for moment in optimizer.exp_avgs]
        optimizer.exp_avg_sqs = [moment.double() for moment in optimizer.exp_avg_sqs]
    return sac


def fit_to_double(fit: Fit) -> Fit:
    """Its data, parameters and Adam's moments in float64, for the reference backend."""
    fit.model.double()
    fit.inputs, fit.targets = fit.inputs.double(), fit.targets.double()
    fit.optimizer.exp_avgs = [moment.double() for moment in fit.optimizer.exp_avgs]
    fit.optimizer.exp_avg_sqs = [moment.double() for moment in fit.optimizer.exp_avg_sqs]
    config = dataclasses.replace(fit.config, dtype="float32")
    fit.gradient = _loss_gradient(fit.parameters, config, len(fit.inputs))
    return fit


def random_transitions(
    count: int, obs_dim: int, act_dim: int, seed: int, dtype: torch.dtype = torch.float32
) -> Transitions:
    """Standard normals, actions squashed, three rows in ten terminal."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=dtype)

    return Transitions(
        observations=normal(count, obs_dim),
        actions=normal(count, act_dim).tanh(),
        rewards=normal(count),
        next_observations=normal(count, obs_dim),
        terminals=torch.rand(count, generator=g) < 0.3,
        raw_rewards=normal(count),
        penalties=normal(count),
    )


class EagerGraph(Graph):
    """Records nothing and does on the CPU what a `Graph` does on a GPU, the run that warms up included."""

    def __init__(
        self,
        function: Callable[..., torch.Tensor],
        arguments: Sequence[torch.Tensor],
        state: Sequence[torch.Tensor],
    ) -> None:
        self.function, self.arguments = function, [argument.clone() for argument in arguments]
        before = [tensor.detach().clone() for tensor in state]
        # Once to warm up, once to record: neither may leave anything behind.
        for _ in range(2):
            function(*self.arguments)
            with torch.no_grad():
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)

    def __call__(self, *arguments: torch.Tensor) -> torch.Tensor:
        for mine, argument in zip(self.arguments, arguments, strict=True):
            mine.copy_(argument)
        return self.function(*self.arguments)
