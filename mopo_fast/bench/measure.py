"""Measurements that compare: every contender runs in turn, round after round, and medians are reported.

Programs timed one after the other are not comparable where the machine's speed drifts; interleaved, they are.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from rich.table import Table

from mopo_fast.backends import cpu, get_backend
from mopo_fast.backends.interface import Need
from mopo_fast.buffer import RingBuffer
from mopo_fast.config import DynamicsConfig, FitDtype, SACConfig
from mopo_fast.data.transitions import Transitions
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.fit import Fit
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine
from mopo_fast.run.population import SacPopulation
from mopo_fast.sac import SAC
from mopo_fast.utils.machine import check_device, device_name, resolve_threads
from mopo_fast.utils.progress import progress_bar

# Sizes of the square matrices that torch.mm multiplies: the best differs from machine to machine.
_MM_SIZES = {"cpu": (256, 1024, 2048), "cuda": (4096, 8192)}
# A run of the loop that measures the CPU's peak takes at least so long.
_PEAK_SECONDS = 0.02
# Of each of the two arrays whose copy tells the memory's bandwidth: together more than any last-level cache.
_COPY_BYTES = 2**29

# Does a round's work once.
Contender = Callable[[], object]


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
    peak: str
    """The arithmetic that measures the machine's peak. On a CPU these are multiply-adds on registers: for a
    row in bfloat16 those of the faster dtype, else float32's. On a GPU or without the extension: torch.mm."""
    peak_gflops: float
    """Its rate between the same rounds, on the same threads."""
    share_of_peak: float
    """`gflops` over `peak_gflops`."""
    mm_gflops: float
    """The rate of torch.mm, likewise: in float32, on a GPU in the first contender's dtype."""
    intensity: float
    """The same arithmetic over `Work.bytes`, FLOP per byte: at most this, as the traffic is at least that."""
    bandwidth: float
    """Of a large copy between the same rounds, on the same threads: GB/s, read and written."""
    baselines: dict[str, float]
    """Of the first contender: its rate over that of each other in the same rounds."""


def to_table(rows: list[Row]) -> Table:
    """For people: a line for each contender, the last column how many times faster the first one is."""
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
    """What every contender does in a round.

    Attributes:
        kernel, shape, unit: as in `Row`.
        amount: how many of the unit's things a round does.
        flop: arithmetic of the networks for one of them.
        bytes: memory traffic that one of them cannot do without, even in one kernel whose activations never
            leave the cores' own caches: rows in and out, and the parameters that do not fit there.
        threads: that every contender may use.
        device: where it is done.
        contenders: by name, the one that the others are baselines of first.
        dtypes: of a contender's products, where they are not float32.
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
    threads: int | None = None,
    device: torch.device | str = "cpu",
    baselines: Mapping[str, Callable[[EnsembleDynamics, Actor, torch.Tensor, int], Contender]] | None = None,
) -> Work:
    """Penalised rollouts, the canonical shape by default: 7 members of 4 x 200, policy of 2 x 256.

    Networks are drawn at random, nothing ends an episode.

    Args:
        dtype: of the first contender; with another than float32 it meets itself in float32 too, if it can.
        baselines: more contenders, each made of the ensemble, the actor, the start states and the horizon;
            where products are not in float32, an attribute `dtype` says so.

    Raises:
        InputError: a number out of range, or a backend that cannot serve.
    """
    _check_positive(obs_dim=obs_dim, act_dim=act_dim, starts=starts, horizon=horizon)
    threads, device = resolve_threads(threads), _checked_device(device)
    generator = torch.Generator().manual_seed(0)
    ensemble = EnsembleDynamics(obs_dim, act_dim, generator=generator).to(device)
    actor = Actor(obs_dim, act_dim, generator=generator).to(device)
    start = torch.randn(starts, obs_dim, generator=generator).to(device)
    engine = RolloutEngine(ensemble, backend=backend, dtype=dtype, threads=threads)
    engines = {engine.backend if dtype == "float32" else f"{engine.backend} {dtype}": engine}
    for name in (engine.backend, "reference"):
        if get_backend(name).refusal(Need("float32", device)) is None:
            engines[name] = RolloutEngine(ensemble, backend=name, threads=threads)
    # What a rollout stores, in float32: wider rows only move more.
    stored = engine.rollout(actor, start[:1], 1, seed=0)
    contenders: dict[str, Contender] = {
        name: partial(engine.rollout, actor, start, horizon, seed=0) for name, engine in engines.items()
    }
    for name, make in (baselines or {}).items():
        contenders[name] = make(ensemble, actor, start, horizon)
    return Work(
        kernel="rollout",
        shape={
            "obs_dim": obs_dim,
            "act_dim": act_dim,
            "starts": starts,
            "horizon": horizon,
            "members": ensemble.members,
            "hidden": list(ensemble.hidden),
            "policy_hidden": list(actor.hidden),
        },
        unit="transitions/s",
        amount=starts * horizon,
        flop=2.0 * (_forward_macs(ensemble.weights) + _forward_macs(actor.weights)),
        # The row written, its share of the start state read; parameters, which every row needs, stay.
        bytes=_row_bytes(stored.arrays().values()) + _row_bytes([start]) / horizon,
        threads=threads,
        device=device,
        contenders=contenders,
        dtypes=_dtypes(contenders, dtype),
    )


def sac_work(
    *,
    backend: str = "auto",
    obs_dim: int = 17,
    act_dim: int = 6,
    updates: int = 100,
    config: SACConfig | None = None,
    real_rows: int = 200_000,
    model_rows: int = 1_250_000,
    runs: int = 1,
    threads: int | None = None,
    device: torch.device | str = "cpu",
    baselines: Mapping[str, Callable[[SAC, Transitions, RingBuffer, int], Contender]] | None = None,
) -> Work:
    """SAC updates, sampling included, the canonical shape by default: actor and 2 critics of 2 x 256.

    Data are drawn at random: `real_rows` transitions, and a full buffer of `model_rows`.

    Args:
        runs: made at once, `updates` of each in a round; they meet one after the other, too.
        baselines: more contenders, each made of a fresh SAC, the data, the buffer and the updates of a round.

    Raises:
        InputError: a number out of range, or a backend that cannot serve.
    """
    _check_positive(obs_dim=obs_dim, act_dim=act_dim, updates=updates, runs=runs)
    threads, device = resolve_threads(threads), _checked_device(device)

    def fresh(backend: str) -> SAC:
        return SAC(obs_dim, act_dim, config, device=device, backend=backend, threads=threads)

    data = _random_transitions(real_rows, obs_dim, act_dim).to(device)
    buffer = RingBuffer(model_rows, obs_dim, act_dim, device)
    _randomise(buffer.storage)
    buffer.advance(model_rows)

    def updating(*sacs: SAC) -> Contender:
        population, buffers = SacPopulation(sacs), [buffer] * len(sacs)

        def run() -> None:
            first = sacs[0].updates
            population.update_many(data, buffers, updates, [first + i for i in range(len(sacs))])

        return run

    learners = [fresh(name) for name in (backend, "reference")]
    contenders: dict[str, Contender] = {}
    if runs > 1:
        contenders[f"{learners[0].backend}, at once"] = updating(*(fresh(backend) for _ in range(runs)))
    contenders |= {sac.backend: _times(runs, updating(sac)) for sac in learners}
    for name, make in (baselines or {}).items():
        contenders[name] = _times(runs, make(fresh("reference"), data, buffer, updates))
    sac = learners[0]
    return Work(
        kernel="sac",
        shape={
            "obs_dim": obs_dim,
            "act_dim": act_dim,
            "critics": sac.config.critics,
            "hidden": list(sac.config.hidden),
            "batch": list(sac.batch_rows),
            "rows": [real_rows, model_rows],
            "updates": updates,
            "runs": runs,
        },
        unit="updates/s",
        amount=updates * runs,
        flop=sac_flop(sac),
        # The batch's rows, drawn from far more than fits; at this size parameters and Adam's moments stay.
        bytes=sac.config.batch_size * _row_bytes(data.arrays().values()),
        threads=threads,
        device=device,
        contenders=contenders,
    )


def fit_work(
    *,
    backend: str = "auto",
    obs_dim: int = 17,
    act_dim: int = 6,
    steps: int = 64,
    config: DynamicsConfig | None = None,
    dtype: FitDtype | None = None,
    rows: int = 200_000,
    threads: int | None = None,
    device: torch.device | str = "cpu",
    baselines: Mapping[str, Callable[[Fit, torch.Tensor], Contender]] | None = None,
) -> Work:
    """Steps of the ensemble's fit, gathering included, the canonical shape by default: 7 members of 4 x 200.

    Data are drawn at random, `rows` transitions.

    Args:
        dtype: of the first contender, by default config's; with bfloat16 it meets itself in float32 too.
        baselines: more contenders, each made of a fresh fit and the rows [members, count] of a round; where
            products are not in float32, an attribute `dtype` says so.

    Raises:
        InputError: a number out of range, or a backend that cannot serve.
    """
    _check_positive(obs_dim=obs_dim, act_dim=act_dim, steps=steps)
    threads, config = resolve_threads(threads), config or DynamicsConfig()
    dtype, device = dtype or config.dtype, _checked_device(device)
    data = _random_transitions(rows, obs_dim, act_dim)

    def fresh(backend: str, dtype: FitDtype = "float32") -> Fit:
        precise = dataclasses.replace(config, dtype=dtype)
        return Fit(data, 0, precise, device, backend, threads)

    fits = [fresh(backend, dtype), *([fresh(backend)] if dtype != "float32" else []), fresh("reference")]
    size = (config.members, steps * config.batch_size)
    drawn = torch.randint(len(fits[0].inputs), size, generator=torch.Generator().manual_seed(0)).to(device)
    contenders: dict[str, Contender] = {
        fit.backend if fit.config.dtype == "float32" else f"{fit.backend} {fit.config.dtype}": partial(
            fit.steps, drawn
        )
        for fit in fits
    }
    for name, make in (baselines or {}).items():
        contenders[name] = make(fresh("reference"), drawn)
    fit = fits[0]
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
        # The row, its share of its member's parameters and Adam's moments in and out: all members' don't fit.
        bytes=_row_bytes((fit.inputs, fit.targets)) + 6 * parameters / config.members / config.batch_size,
        threads=threads,
        device=device,
        contenders=contenders,
        dtypes=_dtypes(contenders, dtype),
    )


WORKS: dict[str, Callable[..., Work]] = {"rollout": rollout_work, "sac": sac_work, "fit": fit_work}


def bench(kernel: str, *, rounds: int = 5, quiet: bool = False, **options: Any) -> list[Row]:
    """Measure a kernel of `WORKS`, its function's `options` given, against the PyTorch reference.

    Returns:
        A row for each contender, as `measure`.

    Raises:
        InputError: a number out of range, or a backend that cannot serve.
    """
    _check_positive(rounds=rounds)
    return measure(WORKS[kernel](**options), rounds=rounds, quiet=quiet)


def measure(work: Work, *, rounds: int, quiet: bool = False) -> list[Row]:
    """A row for each contender of `work`, from medians over `rounds` in turn; one more round warms up."""
    device = work.device
    dtypes = {name: work.dtypes.get(name, "float32") for name in work.contenders}
    first, *others = dtypes
    loops: dict[str, tuple[Contender, float]] = {}
    mm_dtype = dtypes[first]
    if device.type == "cpu":
        mm_dtype = "float32"
        if cpu.is_built():
            loops = {
                f"multiply-adds, {dtype}": _loop(dtype, work.threads) for dtype in ("float32", "bfloat16")
            }
    products = {
        f"torch.mm of {size}, {mm_dtype}": _product(size, device, _product_dtype(mm_dtype))
        for size in _MM_SIZES[device.type]
    }
    arithmetic = loops | products
    copy, moved = _copy(device)
    # The copy empties the caches, so arithmetic comes between it and the next round.
    contenders = work.contenders | {"copy": copy} | {name: run for name, (run, _) in arithmetic.items()}
    if device.type == "cuda":
        contenders = {name: _awaited(run, device) for name, run in contenders.items()}
    with torch_threads(work.threads):
        seconds = interleave(contenders, rounds, f"bench {work.kernel}: rounds", quiet)
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
    """Arithmetic of the matrix products of one update, those that its gradients need."""
    actor, critic, actions = sac.actor.weights, sac.critic.weights, sac.actor.act_dim
    critics, inputs, outputs = critic[0].shape
    # Through a critic, but not to its weights, and in the first layer to the actions alone. The policy's loss
    # takes the least Q of a row, so the gradient of one critic is enough: the other critics' is zero.
    to_actions = _forward_macs(critic) // critics - (inputs - actions) * outputs
    next_value = _forward_macs(actor) + _forward_macs(critic)
    critics_step = _training_macs(critic)
    actor_step = _training_macs(actor) + _forward_macs(critic) + to_actions
    macs: int = next_value + critics_step + actor_step
    return 2.0 * sac.config.batch_size * macs


def _forward_macs(weights: Iterable[torch.Tensor]) -> int:
    """Multiply-adds of a row through these layers."""
    return sum(weight.numel() for weight in weights)


def _training_macs(weights: Iterable[torch.Tensor]) -> int:
    """Forwards, and backwards to weights and to inputs; the gradient of the first input nobody needs."""
    first, *others = weights
    return 2 * first.numel() + 3 * _forward_macs(others)


def _row_bytes(arrays: Iterable[torch.Tensor]) -> int:
    """Of one row of each."""
    return sum(array[:1].nbytes for array in arrays)


def _dtypes(contenders: Mapping[str, Contender], first: str) -> dict[str, str]:
    """`Work.dtypes`: what the first contender's is, and what others say of themselves."""
    given = {name: getattr(run, "dtype", torch.float32) for name, run in contenders.items()}
    others = {
        name: str(dtype).removeprefix("torch.") for name, dtype in given.items() if dtype != torch.float32
    }
    return {next(iter(contenders)): first} | others


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
    """Standard normals, actions squashed, one row in a hundred terminal."""
    generator = torch.Generator(data.device).manual_seed(0)
    for array in data.arrays().values():
        if array.dtype == torch.bool:
            array.bernoulli_(0.01, generator=generator)
        else:
            array.normal_(generator=generator)
    data.actions.tanh_()


def _times(count: int, run: Contender) -> Contender:
    """A contender's work, `count` times over."""

    def again() -> None:
        for _ in range(count):
            run()

    return again


def _awaited(run: Contender, device: torch.device) -> Contender:
    """A contender until the GPU has done what it asked for."""

    def to_the_end() -> None:
        run()
        torch.cuda.synchronize(device)

    return to_the_end


def _product_dtype(name: str) -> torch.dtype:
    """Of the tensors that stand for one of `config.ROLLOUT_DTYPES`."""
    return torch.float32 if name == "tfloat32" else getattr(torch, name)


def _product(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Contender, float]:
    """torch.mm of square matrices, often enough to be timed, and its arithmetic."""
    left, right = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    out, times = torch.empty_like(left), max(1, (1024 // size) ** 3)

    def run() -> None:
        for _ in range(times):
            torch.mm(left, right, out=out)

    return run, times * 2.0 * size**3


def _loop(dtype: str, threads: int) -> tuple[Contender, float]:
    """Multiply-adds by the instruction set in use, often enough to be timed, and their arithmetic."""
    run = partial(cpu.extension().multiply_adds, isa=cpu.isa(), bfloat16=dtype == "bfloat16", threads=threads)
    rounds = 1000
    while True:
        began = time.perf_counter()
        flop: float = run(rounds=rounds)
        if time.perf_counter() - began >= _PEAK_SECONDS:
            return partial(run, rounds=rounds), flop
        rounds *= 2


def _copy(device: torch.device) -> tuple[Contender, float]:
    """A copy of an array far larger than the caches, and the bytes that it reads and writes."""
    # Ones, not zeros: an array never written to is one page of zeros many times over.
    source = torch.ones(_COPY_BYTES // 4, device=device)
    return partial(torch.empty_like(source).copy_, source), 2.0 * source.nbytes


def interleave(
    contenders: dict[str, Contender], rounds: int, description: str, quiet: bool
) -> dict[str, float]:
    """The median seconds of each contender over `rounds` in turn, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with progress_bar(description, rounds + 1, quiet=quiet) as bar:
        for _ in range(rounds + 1):
            for name, run in contenders.items():
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
            bar.advance()
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
