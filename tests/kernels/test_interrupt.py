"""Test that a signal ends a kernel's call soon, and that results of completed work are kept."""

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernel_cases import inputs, make_ensemble, make_policy, make_sac, sac_sources

from mopo_fast import RolloutEngine
from mopo_fast.backends import cpu
from mopo_fast.buffer import RingBuffer
from mopo_fast.config import TRAINING_DTYPES, DynamicsConfig, SACConfig
from mopo_fast.fit import Fit
from mopo_fast.run.population import FitPopulation as Fits
from mopo_fast.run.population import SacPopulation as Population


class Rung(Exception):
    """Raised by the handler of a signal, as KeyboardInterrupt is by Ctrl-C."""


@pytest.fixture
def alarm() -> Iterator[Callable[..., None]]:
    """Return a function that calls a handler after some seconds; the default handler raises `Rung`."""

    def ring(*_: Any) -> None:
        raise Rung

    before = signal.signal(signal.SIGALRM, ring)
    # SIGINT is ignored if the tests run in the background.
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)

    def set_alarm(seconds: float, handler: Callable[..., None] = ring) -> None:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    yield set_alarm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    signal.signal(signal.SIGINT, ctrl_c)


def assert_ends_soon(call: Callable[[], Any], alarm: Callable[..., None]) -> None:
    """Check that a call of minutes ends with the handler's error within 10 seconds."""
    alarm(0.2)
    started = time.perf_counter()
    with pytest.raises(Rung):
        call()
    assert time.perf_counter() - started < 10.0


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("dtype", TRAINING_DTYPES)
@pytest.mark.parametrize(("batch", "horizon"), [(1, 1_000_000), (20_000, 50)])
def test_a_rollout(
    batch: int,
    horizon: int,
    dtype: str,
    isa: str,
    alarm: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MOPO_FAST_ISA", isa)
    ensemble = make_ensemble(5, 2, members=32, hidden=(200,) * 4)
    engine = RolloutEngine(ensemble, dtype=dtype, threads=2)
    policy, ring = make_policy(5, 2), RingBuffer(batch * horizon, 5, 2)
    start = inputs(batch, 5, 2)[0]
    assert_ends_soon(lambda: engine.rollout(policy, start, horizon, seed=0, out=ring), alarm)
    assert (len(ring), ring.head) == (0, 0)
    # The interrupted call has added no rows, and later calls are not affected.
    few = start[:64]
    whole = engine.rollout(policy, few, 3, seed=0)
    engine.rollout(policy, few, 3, seed=0, out=ring)
    assert torch.equal(ring.storage.observations[: len(whole)], whole.observations)


def test_a_step(alarm: Callable[..., None]) -> None:
    engine = RolloutEngine(make_ensemble(5, 2, members=32, hidden=(200,) * 4), threads=1)
    observations, actions = inputs(400_000, 5, 2)
    assert_ends_soon(lambda: engine.step(observations, actions, seed=0), alarm)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("runs", [1, 3])
def test_sac(runs: int, threads: int, alarm: Callable[..., None]) -> None:
    """All runs have made the same number of complete updates."""
    config = SACConfig(hidden=(64, 64), batch_size=32)
    data, buffer = sac_sources(5, 2)
    sacs = [make_sac(5, 2, config, "cpu", threads) for _ in range(runs)]
    seeds = list(range(runs))
    population = Population(sacs)
    population.update_many(data, [buffer] * runs, 3, seeds)
    assert_ends_soon(lambda: population.update_many(data, [buffer] * runs, 10**7, seeds), alarm)
    # The number of completed calls of 100 updates depends on the machine.
    updates = sacs[0].updates - 3
    for sac, seed in zip(sacs, seeds, strict=True):
        same = make_sac(5, 2, config, "cpu", threads)
        for count in (3, updates):
            if count:
                same.update_many(data, buffer, count, seed)
        assert all(torch.equal(tensor, sac.state()[name]) for name, tensor in same.state().items())


@pytest.mark.parametrize("dtype", TRAINING_DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("runs", [1, 2])
def test_the_fit(runs: int, threads: int, dtype: Any, alarm: Callable[..., None]) -> None:
    """An interrupted call leaves everything unchanged."""
    data, _ = sac_sources(5, 2)
    config = DynamicsConfig(
        members=3, elites=2, hidden=(64,), batch_size=8, weight_decay=(0.0,) * 2, dtype=dtype
    )
    fits = [Fit(data, seed, config, backend="cpu", threads=threads) for seed in range(runs)]
    few, many = torch.zeros(3, 64, dtype=torch.int32), torch.zeros(3, 10**7, dtype=torch.int32)
    for fit in fits:
        fit.steps(few)
    before = [{name: tensor.clone() for name, tensor in fit.live_state().items()} for fit in fits]
    assert_ends_soon(lambda: Fits(fits).steps([many] * runs), alarm)
    for fit, state in zip(fits, before, strict=True):
        assert fit.steps_made == 8
        assert all(torch.equal(tensor, state[name]) for name, tensor in fit.live_state().items())
        same = Fit(data, fit.seed, config, backend="cpu", threads=threads)
        assert same.steps(few) and same.steps(few) == fit.steps(few)


@pytest.mark.parametrize("dtype", TRAINING_DTYPES)
def test_a_handler_that_raises_nothing(dtype: str, alarm: Callable[..., None]) -> None:
    """The call continues with correct results, even if the handler uses the processor's AMX tiles."""
    engine = RolloutEngine(make_ensemble(5, 2, hidden=(200,) * 4), dtype=dtype, threads=1)
    policy, start = make_policy(5, 2), inputs(10_000, 5, 2)[0]
    expected = engine.rollout(policy, start, 5, seed=0)
    factor, calls = torch.ones(64, 64, dtype=torch.bfloat16), []

    def multiply(*_: Any) -> None:
        calls.append(factor @ factor)
        signal.setitimer(signal.ITIMER_REAL, 0.06)

    alarm(0.01, multiply)
    for _ in range(3):
        made = engine.rollout(policy, start, 5, seed=0)
        for name, array in made.arrays().items():
            assert torch.equal(array, expected.arrays()[name]), name
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert calls


@pytest.mark.parametrize(("members", "threads"), [(1, 2), (2, 5), (3, 2)])
def test_the_fit_of_a_batch_that_takes_long(members: int, threads: int, alarm: Callable[..., None]) -> None:
    """Within a step, all threads of a team skip the same parts of the work."""
    data, _ = sac_sources(5, 2)
    config = DynamicsConfig(
        members=members, elites=1, hidden=(200, 200), batch_size=30_000, weight_decay=(0.0,) * 3
    )
    fit = Fit(data, 0, config, backend="cpu", threads=threads)
    before = {name: tensor.clone() for name, tensor in fit.live_state().items()}
    rows = torch.zeros(members, 300_000, dtype=torch.int32)
    assert_ends_soon(lambda: fit.steps(rows), alarm)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fit.live_state().items())


@pytest.mark.parametrize("runs", [1, 2])
def test_sac_in_pytorch(runs: int, alarm: Callable[..., None]) -> None:
    """Ctrl-C waits for the end of an update, so that parameters and counts agree."""
    data, buffer = sac_sources(5, 2)
    sacs = [make_sac(5, 2, SACConfig(hidden=(8,), batch_size=8), "reference") for _ in range(runs)]
    handler, seeds = signal.getsignal(signal.SIGINT), list(range(runs))
    for moment in (0.05, 0.0513, 0.0527, 0.0541):
        alarm(moment, lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            Population(sacs).update_many(data, [buffer] * runs, 10**7, seeds)
        for sac in sacs:
            assert {float(step) for each in sac.optimizers.values() for step in each.steps} == {sac.updates}
            assert sac.updates == sacs[0].updates
    assert signal.getsignal(signal.SIGINT) is handler
    for sac, seed in zip(sacs, seeds, strict=True):
        assert sac.updates > 0, seed


def test_the_fit_in_pytorch(alarm: Callable[..., None]) -> None:
    data, _ = sac_sources(5, 2)
    config = DynamicsConfig(members=2, elites=1, hidden=(8,), batch_size=4, weight_decay=(0.0,) * 2)
    fits = [Fit(data, seed, config, backend="reference") for seed in range(2)]
    rows = torch.zeros(2, 300_000, dtype=torch.int32)
    Fits(fits).steps([rows[:, :12]] * 2)
    alarm(0.5, lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        Fits(fits).steps([rows] * 2)
    assert fits[0].steps_made == fits[1].steps_made >= 3
    assert all({float(step) for step in fit.optimizer.steps} == {fit.steps_made} for fit in fits)


def test_a_handlers_own_error_is_passed_on(alarm: Callable[..., None]) -> None:
    engine = RolloutEngine(make_ensemble(5, 2, members=32, hidden=(200,) * 4))

    def fail(*_: Any) -> None:
        raise RuntimeError("my own")

    alarm(0.2, fail)
    with pytest.raises(RuntimeError, match="my own"):
        engine.rollout(make_policy(5, 2), inputs(20_000, 5, 2)[0], 50, seed=0)
