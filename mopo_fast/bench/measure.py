"""Comparison of kernels: all contenders run in turn, round after round, and medians are reported.

A machine's speed drifts, so programs that are timed one after the other cannot be compared.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from rich.table import Table

from mopo_fast.backends import cpu, get_backend
from mopo_fast.backends.interface import Need
from mopo_fast.buffer import RingBuffer
from mopo_fast.config import TRAINING_DTYPES, DynamicsConfig, SACConfig, TrainingDtype
from mopo_fast.data.transitions import Transitions
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.fit import Fit
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine
from mopo_fast.run.population import SacPopulation
from mopo_fast.run.resolve import place_data
from mopo_fast.sac import SAC
from mopo_fast.utils.machine import check_device, device_name, resolve_threads, torch_threads
from mopo_fast.utils.progress import print_lines, progress_bar

# Sizes of the square matrices that torch.mm multiplies. The fastest size differs between machines.
_MM_SIZES = {"cpu": (256, 1024, 2048), "cuda": (4096, 8192)}
# Least seconds of one call of the loop that measures the CPU's peak.
_PEAK_SECONDS = 0.02
# Bytes of each of the two arrays whose copy measures the memory's bandwidth, more than any cache holds.
_COPY_BYTES = 2**29

# A function that does the work of one round.
Contender = Callable[[], object]
Learner = TypeVar("Learner", SAC, Fit)


@dataclass(frozen=True)
class Row:
    """One measurement, as `--json` writes it.

    Attributes:
        kernel: name of the kernel.
        backend: name of the contender, which for those of this package is its backend.
        device: name of the device.
        dtype: precision of the contender's matrix products.
        shape: sizes that decide the amount of work.
        rate: units done per second.
        unit: unit of `rate`.
        gflops: arithmetic of the networks alone, in 1e9 operations per second. A multiply-add counts as two.
        peak: the arithmetic that measures the machine's peak. On a CPU these are multiply-adds on registers:
            in float32 or, where that is faster, in the row's dtype. On a GPU, or without the
            extension, it is torch.mm.
        peak_gflops: rate of `peak` between the same rounds, on the same threads.
        share_of_peak: `gflops` divided by `peak_gflops`.
        mm_gflops: rate of torch.mm between the same rounds, in float32 on a CPU and in the first contender's
            dtype on a GPU.
        intensity: arithmetic per byte of memory traffic, in FLOP per byte. It is an upper bound, since
            `Work.bytes` is a lower bound of the traffic.
        bandwidth: rate of a large copy between the same rounds, on the same threads, in GB/s, with the bytes
            read and those written.
        baselines: for the first contender, its rate divided by that of each other one. Others have none.
    """

    kernel: str
    backend: str
    device: str
    dtype: str
    shape: dict[str, Any]
    rate: float
    unit: str
    gflops: float
    peak: str
    peak_gflops: float
    share_of_peak: float
    mm_gflops: float
    intensity: float
    bandwidth: float
    baselines: dict[str, float]


def to_table(rows: list[Row]) -> Table:
    """Format measurements as a table, whose last column says how many times faster the first contender is."""
    first = rows[0]
    table = Table("contender", "dtype", first.unit, "GFLOP/s", "of peak", f"{first.backend} over it")
    table.caption = f"torch.mm: {first.mm_gflops:,.1f} GFLOP/s"
    threads = f", {first.shape['threads']} threads" if first.device == "cpu" else ""
    table.title = f"{first.kernel}, {first.device}{threads}"
    for row in rows:
        ratio = first.baselines.get(row.backend)
        table.add_row(
            row.backend,
            row.dtype,
            f"{row.rate:,.0f}",
            f"{row.gflops:.1f}",
            f"{row.share_of_peak:.0%}",
            "" if ratio is None else f"{ratio:.2f}",
        )
    return table


@dataclass(frozen=True)
class Work:
    """The work that every contender does in a round.

    Attributes:
        kernel: name of the kernel.
        shape: sizes that decide the amount of work.
        unit: unit of the rate, such as "transitions/s".
        amount: number of units in a round.
        flop: arithmetic of the networks for one unit.
        bytes: least memory traffic of one unit, in a kernel whose activations never leave the cores' own
            caches: rows in and out, and the parameters that do not fit into the caches.
        threads: number of threads that every contender may use.
        device: device of all contenders.
        contenders: functions by name. The first is compared with all others.
        dtypes: precision of the matrix products of the contenders that do not use float32.
    """

    kernel: str
    shape: dict[str, Any]
    unit: str
    amount: int
    flop: float
    bytes: float
    threads: int
    device: torch.device
    contenders: dict[str, Contender]
    dtypes: dict[str, str] = field(default_factory=dict)


def rollout_work(
    *,
    backend: str = "auto",
    dtype: str = "float32",
    obs_dim: int = 17,
    act_dim: int = 6,
    starts: int = 50_000,
    horizon: int = 5,
    penalty_coef: float = 1.0,
    members: int = 7,
    elites: int = 5,
    threads: int | None = None,
    device: torch.device | str = "cpu",
    baselines: Mapping[str, Callable[[EnsembleDynamics, Actor, torch.Tensor, int], Contender]] | None = None,
) -> Work:
    """Make the work of penalised rollouts, with members of 4 x 200 and a policy of 2 x 256.

    The networks are random, and nothing ends a rollout early.

    Args:
        backend: backend of the first contender.
        dtype: precision of the first contender. The backend is measured in the higher ones too, where it can.
        obs_dim: size of an observation.
        act_dim: size of an action.
        starts: number of start states.
        horizon: steps of a rollout.
        penalty_coef: weight of the penalty in the reward. With 0 a transition takes one member's arithmetic.
        members: number of members.
        elites: number of members that are drawn from.
        threads: number of threads, or None for all cores.
        device: device of all contenders.
        baselines: functions that make further contenders from the ensemble, the actor, the start states and
            the horizon. A contender with other products than float32 has an attribute `dtype`.

    Raises:
        InputError: a number is out of range, or the backend cannot do this work.
    """
    _check_positive(obs_dim=obs_dim, act_dim=act_dim, starts=starts, horizon=horizon)
    threads, device = resolve_threads(threads), _checked_device(device)
    generator = torch.Generator().manual_seed(0)
    ensemble = EnsembleDynamics(obs_dim, act_dim, members=members, elites=elites, generator=generator)
    ensemble.to(device)
    actor = Actor(obs_dim, act_dim, generator=generator).to(device)
    start = torch.randn(starts, obs_dim, generator=generator).to(device)
    make_engine = partial(RolloutEngine, ensemble, penalty_coef=penalty_coef, threads=threads)
    engine = make_engine(backend=backend, dtype=dtype)
    engines = {
        _name(engine.backend, each): make_engine(backend=engine.backend, dtype=each)
        for each in (dtype, *_higher(engine.backend, dtype))
        if get_backend(engine.backend).refusal(Need(each, device)) is None
    }
    engines["reference"] = make_engine(backend="reference")
    # The row that a rollout stores. float32 makes the traffic a lower bound for float64 too.
    stored = engine.rollout(actor, start[:1], 1, seed=0)
    contenders: dict[str, Contender] = {
        name: partial(engine.rollout, actor, start, horizon, seed=0) for name, engine in engines.items()
    }
    for name, make in (baselines or {}).items():
        contenders[name] = make(ensemble, actor, start, horizon)
    computing = ensemble.members if penalty_coef else 1
    return Work(
        kernel="rollout",
        shape={
            "obs_dim": obs_dim,
            "act_dim": act_dim,
            "starts": starts,
            "horizon": horizon,
            "penalty_coef": penalty_coef,
            "members": ensemble.members,
            "hidden": list(ensemble.hidden),
            "policy_hidden": list(actor.hidden),
        },
        unit="transitions/s",
        amount=starts * horizon,
        flop=2.0
        * (_forward_macs(ensemble.weights) * computing // ensemble.members + _forward_macs(actor.weights)),
        # A row is written and its share of the start state read. The parameters stay in the caches.
        bytes=_row_bytes(stored.arrays().values()) + _row_bytes([start]) / horizon,
        threads=threads,
        device=device,
        contenders=contenders,
        dtypes=_dtypes(contenders) | {name: engine.operands for name, engine in engines.items()},
    )


def sac_work(
    *,
    backend: str = "auto",
    obs_dim: int = 17,
    act_dim: int = 6,
    updates: int = 200,
    config: SACConfig | None = None,
    dtype: TrainingDtype | None = None,
    real_rows: int = 200_000,
    model_rows: int = 1_250_000,
    runs: int = 1,
    threads: int | None = None,
    device: torch.device | str = "cpu",
    baselines: Mapping[str, Callable[[SAC, Transitions, RingBuffer, int], Contender]] | None = None,
) -> Work:
    """Make the work of SAC updates on random data, sampling of batches included.

    Args:
        backend: backend of the first contender.
        obs_dim: size of an observation.
        act_dim: size of an action.
        updates: updates of each run in a round.
        config: settings of SAC. The default has an actor and 2 critics of 2 x 256.
        dtype: precision of the first contender, by default that of `config`. The backend is measured
            in the higher ones too.
        real_rows: transitions in the data set.
        model_rows: transitions in the model buffer, which is full.
        runs: number of runs that the first contender updates at once. Their updates one after the other are
            measured too.
        threads: number of threads, or None for all cores.
        device: device of all contenders.
        baselines: functions that make further contenders from a fresh SAC, the data, the buffer and the
            number of updates in a round.

    Raises:
        InputError: a number is out of range, or the backend cannot do this work.
    """
    _check_positive(obs_dim=obs_dim, act_dim=act_dim, updates=updates, runs=runs)
    threads, config = resolve_threads(threads), config or SACConfig()
    dtype, device = dtype or config.dtype or "float32", _checked_device(device)

    def fresh(backend: str, dtype: TrainingDtype = "float32") -> SAC:
        precise = dataclasses.replace(config, dtype=dtype)
        return SAC(obs_dim, act_dim, precise, device=device, backend=backend, threads=threads)

    # A training lays its data out in this way too.
    data = place_data(_random_transitions(real_rows, obs_dim, act_dim), device)
    buffer = RingBuffer(model_rows, obs_dim, act_dim, device)
    _randomise(buffer.storage)
    buffer.advance(model_rows)

    def updating(*sacs: SAC) -> Contender:
        population, buffers = SacPopulation(sacs), [buffer] * len(sacs)

        def run() -> None:
            first = sacs[0].updates
            population.update_many(data, buffers, updates, [first + i for i in range(len(sacs))])

        return run

    sac = fresh(backend, dtype)
    named, dtypes = _and_higher(sac, dtype, fresh)
    contenders: dict[str, Contender] = {}
    if runs > 1:
        together = f"{_name(sac.backend, dtype)}, at once"
        contenders[together] = updating(*(fresh(backend, dtype) for _ in range(runs)))
        dtypes[together] = dtype
    contenders |= {name: times(runs, updating(one)) for name, one in named.items()}
    for name, make in (baselines or {}).items():
        baseline = make(fresh("reference"), data, buffer, updates)
        dtypes |= _dtypes({name: baseline})
        contenders[name] = times(runs, baseline)
    return Work(
        kernel="sac",
        shape={
            "obs_dim": obs_dim,
            "act_dim": act_dim,
            "critics": sac.config.critics,
            "target_critics": sac.config.target_critics,
            "actor_q": sac.config.actor_q,
            "hidden": list(sac.config.hidden),
            "batch": list(sac.batch_rows),
            "rows": [real_rows, model_rows],
            "updates": updates,
            "runs": runs,
        },
        unit="updates/s",
        amount=updates * runs,
        flop=sac_flop(sac),
        # The rows of a batch are read. Parameters and Adam's moments of this size stay in the caches.
        bytes=sac.config.batch_size * _row_bytes(data.arrays().values()),
        threads=threads,
        device=device,
        contenders=contenders,
        dtypes=dtypes,
    )


def fit_work(
    *,
    backend: str = "auto",
    obs_dim: int = 17,
    act_dim: int = 6,
    steps: int = 128,
    config: DynamicsConfig | None = None,
    dtype: TrainingDtype | None = None,
    rows: int = 200_000,
    threads: int | None = None,
    device: torch.device | str = "cpu",
    baselines: Mapping[str, Callable[[Fit, torch.Tensor], Contender]] | None = None,
) -> Work:
    """Make the work of gradient steps of the fit on random data, gathering of batches included.

    Args:
        backend: backend of the first contender.
        obs_dim: size of an observation.
        act_dim: size of an action.
        steps: gradient steps in a round.
        config: settings of the fit. The default has 7 members of 4 x 200.
        dtype: precision of the first contender, by default that of `config`. The backend is measured
            in the higher ones too.
        rows: transitions in the data set.
        threads: number of threads, or None for all cores.
        device: device of all contenders.
        baselines: functions that make further contenders from a fresh fit and the row numbers [members,
            count] of a round. A contender with other products than float32 has an attribute `dtype`.

    Raises:
        InputError: a number is out of range, or the backend cannot do this work.
    """
    _check_positive(obs_dim=obs_dim, act_dim=act_dim, steps=steps)
    threads, config = resolve_threads(threads), config or DynamicsConfig()
    dtype, device = dtype or config.dtype or "float32", _checked_device(device)
    data = _random_transitions(rows, obs_dim, act_dim)

    def fresh(backend: str, dtype: TrainingDtype = "float32") -> Fit:
        precise = dataclasses.replace(config, dtype=dtype)
        return Fit(data, 0, precise, device, backend, threads)

    fit = fresh(backend, dtype)
    named, dtypes = _and_higher(fit, dtype, fresh)
    size = (config.members, steps * config.batch_size)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(fit.inputs), size, dtype=torch.int32, generator=generator).to(device)
    contenders: dict[str, Contender] = {name: partial(one.steps, drawn) for name, one in named.items()}
    for name, make in (baselines or {}).items():
        contenders[name] = make(fresh("reference"), drawn)
    parameters = sum(array.nbytes for array in (*fit.model.weights, *fit.model.biases))
    return Work(
        kernel="fit",
        shape={
            "obs_dim": obs_dim,
            "act_dim": act_dim,
            "members": config.members,
            "hidden": list(config.hidden),
            "batch": config.batch_size,
            "rows": rows,
            "steps": steps,
        },
        unit="samples*members/s",
        amount=drawn.numel(),
        flop=2.0 * _training_macs(fit.model.weights) / config.members,
        # A row is read, and its share of parameters and Adam's moments read and written: the caches are too
        # small for those of all members.
        bytes=_row_bytes((fit.inputs, fit.targets)) + 6 * parameters / config.members / config.batch_size,
        threads=threads,
        device=device,
        contenders=contenders,
        dtypes=_dtypes(contenders) | dtypes,
    )


WORKS: dict[str, Callable[..., Work]] = {"rollout": rollout_work, "sac": sac_work, "fit": fit_work}


def bench(kernel: str, *, rounds: int = 5, quiet: bool = False, **options: Any) -> list[Row]:
    """Measure a kernel beside the PyTorch reference.

    Args:
        kernel: name of the kernel in `WORKS`.
        rounds: number of rounds.
        quiet: show no progress.
        **options: arguments of the kernel's function in `WORKS`.

    Returns:
        A row for each contender.

    Raises:
        InputError: a number is out of range, or the backend cannot do this work.
    """
    _check_positive(rounds=rounds)
    if not quiet:
        print_lines(f"bench {kernel}: preparing the data, the networks and the kernels")
    return measure(WORKS[kernel](**options), rounds=rounds, quiet=quiet)


def measure(work: Work, *, rounds: int, quiet: bool = False) -> list[Row]:
    """Measure all contenders of `work` in turn and return a row for each.

    Args:
        work: the work and its contenders.
        rounds: number of rounds, of which the median counts. One more round comes first, to warm up.
        quiet: show no progress bar.
    """
    device = work.device
    dtypes = {name: work.dtypes.get(name, "float32") for name in work.contenders}
    first, *others = dtypes
    loops: dict[str, tuple[Contender, float]] = {}
    mm_dtype = dtypes[first]
    if device.type == "cpu":
        mm_dtype = "float32"
        if cpu.is_built():
            loops = {
                f"multiply-adds, {dtype}": _loop(dtype, work.threads)
                for dtype in TRAINING_DTYPES
                if dtype in ("float32", *dtypes.values())
            }
    products = {
        f"torch.mm of {size}, {mm_dtype}": _product(size, device, _product_dtype(mm_dtype))
        for size in _MM_SIZES[device.type]
    }
    arithmetic = loops | products
    copy, moved = _copy(device)
    # The copy empties the caches, so the arithmetic comes between it and the next round.
    contenders = work.contenders | {"copy": copy} | {name: run for name, (run, _) in arithmetic.items()}
    if device.type == "cuda":
        contenders = {name: _awaited(run, device) for name, run in contenders.items()}
    with torch_threads(work.threads):
        seconds = interleave(contenders, rounds, f"bench {work.kernel}", quiet)
    gflops = {name: flop / seconds[name] / 1e9 for name, (_, flop) in arithmetic.items()}
    rates = {name: work.amount / seconds[name] for name in work.contenders}

    def peak(dtype: str) -> str:
        # Some instruction sets multiply bfloat16 more slowly than float32, or not at all.
        usable = [name for name in loops if name.endswith((" float32", f" {dtype}"))]
        return max(usable or products, key=gflops.__getitem__)

    peaks = {name: peak(dtype) for name, dtype in dtypes.items()}
    return [
        Row(
            kernel=work.kernel,
            backend=name,
            device=device_name(device),
            dtype=dtypes[name],
            shape=work.shape | {"threads": work.threads, "rounds": rounds},
            rate=rate,
            unit=work.unit,
            gflops=rate * work.flop / 1e9,
            peak=peaks[name],
            peak_gflops=gflops[peaks[name]],
            share_of_peak=rate * work.flop / 1e9 / gflops[peaks[name]],
            mm_gflops=max(gflops[name] for name in products),
            intensity=work.flop / work.bytes,
            bandwidth=moved / seconds["copy"] / 1e9,
            baselines={other: rate / rates[other] for other in others} if name == first else {},
        )
        for name, rate in rates.items()
    ]


def sac_flop(sac: SAC) -> float:
    """Return the arithmetic of the matrix products that one update needs, in FLOP."""
    actor, critic, actions = sac.actor.weights, sac.critic.weights, sac.actor.act_dim
    critics, inputs, outputs = critic[0].shape
    each, config = _forward_macs(critic) // critics, sac.config
    # The actor's gradient goes through the critic with the least Q of a row, and is zero for the others; in a
    # mean it goes through all. It does not go to their weights, and in the first layer it goes to the actions
    # alone.
    to_actions = (each - (inputs - actions) * outputs) * (critics if config.actor_q == "mean" else 1)
    next_value = _forward_macs(actor) + each * (config.target_critics or critics)
    critics_step = _training_macs(critic)
    actor_step = _training_macs(actor) + _forward_macs(critic) + to_actions
    macs: int = next_value + critics_step + actor_step
    return 2.0 * config.batch_size * macs


def _forward_macs(weights: Iterable[torch.Tensor]) -> int:
    """Return the multiply-adds of one row in a forward pass through these layers."""
    return sum(weight.numel() for weight in weights)


def _training_macs(weights: Iterable[torch.Tensor]) -> int:
    """Return the multiply-adds of one row in a forward and a backward pass.

    The gradient of the network's input is not needed.
    """
    first, *others = weights
    return 2 * first.numel() + 3 * _forward_macs(others)


def _row_bytes(arrays: Iterable[torch.Tensor]) -> int:
    """Return the bytes of one row of all arrays."""
    return sum(array[:1].nbytes for array in arrays)


def _higher(backend: str, dtype: str) -> list[TrainingDtype]:
    """Return the dtypes more precise than `dtype` that a backend is measured in too."""
    if dtype == "float32":
        return []
    between = dtype == "bfloat16" and backend == "cpu" and cpu.isa() in cpu.WITH_BFLOAT16
    return ["bfloat16x3", "float32"] if between else ["float32"]


def _and_higher(
    first: Learner, dtype: TrainingDtype, fresh: Callable[[str, TrainingDtype], Learner]
) -> tuple[dict[str, Learner], dict[str, str]]:
    """Return this package's contenders and their dtypes: `first`, the same in higher ones, the reference."""
    named, dtypes = {_name(first.backend, dtype): first}, {_name(first.backend, dtype): str(dtype)}
    for each in _higher(first.backend, dtype):
        name = _name(first.backend, each)
        named[name], dtypes[name] = fresh(first.backend, each), each
    named.setdefault("reference", fresh("reference", "float32"))
    return named, dtypes


def _name(backend: str, dtype: str) -> str:
    """Return the name of one of this package's contenders."""
    return backend if dtype == "float32" else f"{backend} {dtype}"


def _dtypes(contenders: Mapping[str, Contender]) -> dict[str, str]:
    """Return `Work.dtypes` from the attributes `dtype` of the contenders, float32 without it."""
    return {
        name: str(getattr(run, "dtype", "float32")).removeprefix("torch.") for name, run in contenders.items()
    }


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def _random_transitions(count: int, obs_dim: int, act_dim: int) -> Transitions:
    data = Transitions(
        observations=torch.empty(count, obs_dim),
        actions=torch.empty(count, act_dim),
        rewards=torch.empty(count),
        next_observations=torch.empty(count, obs_dim),
        terminals=torch.empty(count, dtype=torch.bool),
    )
    _randomise(data)
    return data


def _checked_device(device: torch.device | str) -> torch.device:
    check_device(device)
    return torch.device(device)


def _randomise(data: Transitions) -> None:
    """Fill `data` with standard normals, squashed actions, and one terminal row in a hundred."""
    generator = torch.Generator(data.device).manual_seed(0)
    for array in data.arrays().values():
        if array.dtype == torch.bool:
            array.bernoulli_(0.01, generator=generator)
        else:
            array.normal_(generator=generator)
    data.actions.tanh_()


def times(count: int, run: Contender) -> Contender:
    """Return a contender that does the work of `run` `count` times."""

    def again() -> None:
        for _ in range(count):
            run()

    return again


def _awaited(run: Contender, device: torch.device) -> Contender:
    """Return a contender that also waits until the GPU has finished."""

    def to_the_end() -> None:
        run()
        torch.cuda.synchronize(device)

    return to_the_end


def _product_dtype(name: str) -> torch.dtype:
    """Return the dtype of tensors for one of `config.ROLLOUT_DTYPES`."""
    return torch.float32 if name == "tfloat32" else getattr(torch, name)


def _product(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Contender, float]:
    """Return a contender that calls torch.mm often enough to be timed, and its arithmetic in FLOP."""
    left, right = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    out, times = torch.empty_like(left), max(1, (1024 // size) ** 3)

    def run() -> None:
        for _ in range(times):
            torch.mm(left, right, out=out)

    return run, times * 2.0 * size**3


def _loop(dtype: str, threads: int) -> tuple[Contender, float]:
    """Return a contender that makes enough multiply-adds to be timed, and its arithmetic in FLOP.

    For bfloat16x3 the arithmetic is that of the products that each take three of bfloat16.
    """
    bfloat16, each = dtype != "float32", 3.0 if dtype == "bfloat16x3" else 1.0
    run = partial(cpu.extension().multiply_adds, isa=cpu.isa(), bfloat16=bfloat16, threads=threads)
    rounds = 1000
    while True:
        began = time.perf_counter()
        flop: float = run(rounds=rounds)
        if time.perf_counter() - began >= _PEAK_SECONDS:
            return partial(run, rounds=rounds), flop / each
        rounds *= 2


def _copy(device: torch.device) -> tuple[Contender, float]:
    """Return a contender that copies a large array, and the bytes that it reads and writes."""
    # The array is written, because all pages of one that never was are the same page of zeros.
    source = torch.ones(_COPY_BYTES // 4, device=device)
    return partial(torch.empty_like(source).copy_, source), 2.0 * source.nbytes


def interleave(
    contenders: dict[str, Contender], rounds: int, description: str, quiet: bool
) -> dict[str, float]:
    """Run all contenders in turn and return the median seconds of each; the first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with progress_bar(description, rounds + 1, unit="round", quiet=quiet) as bar:
        for _ in range(rounds + 1):
            for name, run in contenders.items():
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
            bar.advance()
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}
