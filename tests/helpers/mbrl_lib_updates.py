"""Comparison of mbrl-lib's SAC updates, or those of its stand-ins, with the same updates on the kernels."""

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from kernel_noise import drawn_by_torch, noise_of, seen_draws

from mopo_fast.compat.mbrl_lib import fuse_sac

OBS, ACT, HIDDEN, BATCH, ROWS = 3, 2, 16, 40, 500
# Options of SAC and of the comparison.
CASES: dict[str, dict[str, Any]] = {
    "automatic temperature": {},
    "fixed temperature": {"automatic_entropy_tuning": False},
    "targets every third update": {"target_update_interval": 3},
    "fixed, targets every third update": {"automatic_entropy_tuning": False, "target_update_interval": 3},
    "masks as they are": {"reverse_mask": False},
    "buffer in float64": {"float64": True},
    "reference": {"backend": "reference", "target_update_interval": 3},
}


def make_sac(kind: Any, **options: Any) -> Any:
    """Make a SAC some of whose actions are so close to the bounds that the epsilon of 1e-6 counts."""
    torch.manual_seed(0)
    arguments = {
        "gamma": 0.9,
        "tau": 0.1,
        "alpha": 0.2,
        "policy": "Gaussian",
        "target_update_interval": 1,
        "automatic_entropy_tuning": True,
        "target_entropy": 2.0,
        "hidden_size": HIDDEN,
        "device": torch.device("cpu"),
        "lr": 3e-3,
    }
    bound = np.ones(ACT, np.float32)
    space = SimpleNamespace(shape=(ACT,), low=-bound, high=bound)
    arguments |= options
    sac = kind(OBS, space, SimpleNamespace(**arguments))
    if arguments["policy"] != "Gaussian":
        return sac
    with torch.no_grad():
        sac.policy.mean_linear.bias.copy_(torch.tensor([3.0, -1.0]))
        sac.policy.log_std_linear.bias.fill_(-1.0)
    return sac


def make_arrays(*, float64: bool = False) -> list[Any]:
    """Return the arrays of a buffer in mbrl-lib's order."""
    random = np.random.default_rng(0)
    sizes = ((ROWS, OBS), (ROWS, ACT), (ROWS, OBS), (ROWS,))
    floats = [random.normal(size=size).astype(np.float64 if float64 else np.float32) for size in sizes]
    floats[1] = np.tanh(floats[1])
    return [*floats, random.random(ROWS) < 0.2, np.zeros(ROWS, bool)]


class Log:
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, int]] = []

    def log(self, key: str, value: Any, step: int) -> None:
        self.rows.append((key, torch.as_tensor(value).item(), step))


def numbers_of(sac: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every number that an update changes, by name."""
    for network in ("policy", "critic", "critic_target"):
        optimizer = getattr(sac, f"{network}_optim", None)
        for name, parameter in getattr(sac, network).named_parameters():
            yield f"{network}.{name}", parameter.detach()
            if optimizer is not None:
                state = optimizer.state[parameter]
                for moment in ("exp_avg", "exp_avg_sq", "step"):
                    yield f"{moment} of {network}.{name}", state[moment]
    yield "alpha", torch.as_tensor(sac.alpha).detach().reshape(1)
    if sac.automatic_entropy_tuning:
        yield "log_alpha", sac.log_alpha.detach()
        for name, value in sorted(sac.alpha_optim.state[sac.log_alpha].items()):
            yield f"{name} of log_alpha", value


def assert_equal(ours: Any, theirs: Any, tolerance: float) -> float:
    """Compare all numbers of two SACs; return the largest difference relative to its tensor's largest."""
    largest = 0.0
    for (name, mine), (other_name, other) in zip(numbers_of(ours), numbers_of(theirs), strict=True):
        assert name == other_name and mine.shape == other.shape
        difference = float((mine - other).abs().max() / other.abs().max().clamp_min(1e-30))
        assert difference <= tolerance, (name, difference)
        largest = max(largest, difference)
    return largest


def compare(
    kind: Any,
    memory_of: Callable[[list[Any], np.random.Generator], Any],
    *,
    updates: int = 8,
    at_once: int = 1,
    reverse_mask: bool = True,
    float64: bool = False,
    backend: str = "auto",
    tolerance: float = 3e-5,
    **options: Any,
) -> float:
    """Make the same updates with equal batches and noise in mbrl-lib and on the kernels.

    Args:
        kind: class of the SAC.
        memory_of: function that makes a buffer of arrays and a generator.
        updates: number of updates.
        at_once: updates of one call of `update_many`; with 1, `update_parameters` is called.
        reverse_mask: argument of the updates.
        float64: whether the buffer's floats are float64.
        backend: backend of the kernels.
        tolerance: largest difference of a number, relative to the largest of its tensor.
        options: arguments of the SAC.

    Returns:
        The largest difference.
    """
    theirs = make_sac(kind, **options)
    ours = fuse_sac(copy.deepcopy(theirs), backend=backend)
    memories = [memory_of(make_arrays(float64=float64), np.random.default_rng(3)) for _ in range(2)]
    logs, arguments = (Log(), Log()), {"reverse_mask": reverse_mask}
    for number in range(5, 5 + updates, at_once):
        torch.manual_seed(number)
        with seen_draws() as calls:
            if at_once == 1:
                made = ours.update_parameters(memories[0], BATCH, number, logs[0], **arguments)
            else:
                made = ours.update_many(memories[0], BATCH, number, at_once, logs[0], **arguments)
        noise = [one for draws in calls for one in noise_of(draws.seed, draws.updates, BATCH, ACT)]
        with drawn_by_torch(noise):
            results = [
                theirs.update_parameters(memories[1], BATCH, number + update, logs[1], **arguments)
                for update in range(at_once)
            ]
        expected = np.array(results).mean(0)
        expected[-1] = results[-1][-1]
        np.testing.assert_allclose(made, expected, rtol=tolerance, atol=tolerance)
    if at_once == 1:
        for mine, other in zip(logs[0].rows, logs[1].rows, strict=True):
            assert mine[::2] == other[::2]
            np.testing.assert_allclose(mine[1], other[1], rtol=tolerance, atol=tolerance)
    return assert_equal(ours, theirs, tolerance)
