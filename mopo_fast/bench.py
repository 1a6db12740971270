"""Measurements that compare: every contender runs in turn, round after round, and medians are reported.

Programs timed one after the other are not comparable where the machine's speed drifts; interleaved, they are.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.machine import resolve_threads
from mopo_fast.policy import Actor
from mopo_fast.progress import progress_bar
from mopo_fast.rollout import RolloutEngine


@dataclass(frozen=True)
class Row:
    """One measurement, as `--json` writes it."""

    kernel: str
    backend: str
    device: str
    dtype: str
    shape: dict[str, Any]
    rate: float
    unit: str
    gflops: float
    """Arithmetic of the networks alone, two per multiply-add, / 1e9 per second."""
    share_of_peak: float
    """Of what torch's own matrix product reached between the same rounds, on the same threads."""
    baselines: dict[str, float]
    """rate over that of each baseline in the same rounds."""

    def text(self) -> str:
        """For people, one line."""
        against = "".join(f", {ratio:.2f} x {name}" for name, ratio in self.baselines.items())
        return (
            f"{self.kernel} {self.backend} {self.device} {self.dtype}: {self.rate:,.0f} {self.unit},"
            f" {self.gflops:.1f} GFLOP/s, {self.share_of_peak:.0%} of torch.mm{against}"
        )


def bench_rollout(
    *,
    backend: str = "auto",
    obs_dim: int = 17,
    act_dim: int = 6,
    starts: int = 50_000,
    horizon: int = 5,
    rounds: int = 5,
    threads: int | None = None,
    quiet: bool = False,
) -> list[Row]:
    """Penalised rollouts, the canonical shape by default: 7 members of 4 x 200, policy of 2 x 256.

    Networks are drawn at random, nothing ends an episode. The reference backend is the baseline.

    Returns:
        A row for `backend` and one for the reference.

    Raises:
        InputError: a number out of range, or a backend that cannot serve.
    """
    for name, value in {"starts": starts, "horizon": horizon, "rounds": rounds}.items():
        if value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    threads = resolve_threads(threads)
    generator = torch.Generator().manual_seed(0)
    ensemble = EnsembleDynamics(obs_dim, act_dim, generator=generator)
    actor = Actor(obs_dim, act_dim, generator=generator)
    start = torch.randn(starts, obs_dim, generator=generator)
    matrix = torch.randn(2048, 2048, generator=generator)
    engines = [RolloutEngine(ensemble, backend=name, threads=threads) for name in (backend, "reference")]

    def runs(engine: RolloutEngine, start: torch.Tensor) -> Callable[[], object]:
        return lambda: engine.rollout(actor, start, horizon, seed=0)

    contenders = {engine.backend: runs(engine, start) for engine in engines}
    contenders["torch.mm"] = lambda: torch.mm(matrix, matrix)
    with _torch_threads(threads):
        for engine in engines:
            runs(engine, start[:256])()
        seconds = _interleave(contenders, rounds, "bench rollout: rounds", quiet)

    peak = 2.0 * len(matrix) ** 3 / seconds.pop("torch.mm")
    flop = 2.0 * sum(weight.numel() for weight in (*ensemble.weights, *actor.weights))
    rates = {name: starts * horizon / median for name, median in seconds.items()}
    shape = {
        "obs_dim": obs_dim,
        "act_dim": act_dim,
        "starts": starts,
        "horizon": horizon,
        "members": ensemble.members,
        "hidden": list(ensemble.hidden),
        "policy_hidden": list(actor.hidden),
        "threads": threads,
        "rounds": rounds,
    }
    return [
        Row(
            kernel="rollout",
            backend=name,
            device="cpu",
            dtype="float32",
            shape=shape,
            rate=rate,
            unit="transitions/s",
            gflops=rate * flop / 1e9,
            share_of_peak=rate * flop / peak,
            baselines={} if name == "reference" else {"reference": rate / rates["reference"]},
        )
        for name, rate in rates.items()
    ]


def _interleave(
    contenders: dict[str, Callable[[], object]], rounds: int, description: str, quiet: bool
) -> dict[str, float]:
    """The median seconds of each contender over `rounds` in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with progress_bar(description, rounds, quiet=quiet) as bar:
        for _ in range(rounds):
            for name, run in contenders.items():
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
            bar.advance()
    return {name: statistics.median(values) for name, values in seconds.items()}


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
