"""Test the contents of measurements. No test depends on the speed of the machine."""

import io
import platform
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.command import run_command
from mopo_fast.backends import cpu
from mopo_fast.bench.measure import Row, Work, _copy, _loop, bench, measure, sac_flop, sac_work, to_table
from mopo_fast.config import DynamicsConfig, SACConfig
from mopo_fast.errors import InputError
from mopo_fast.sac import SAC

SAC_SIZES = {
    **{"config": SACConfig(hidden=(8, 8), batch_size=40), "obs_dim": 3, "act_dim": 2},
    **{"updates": 2, "real_rows": 30, "model_rows": 50},
}
FIT_SIZES = {
    **{"config": DynamicsConfig(members=3, elites=1, hidden=(8,), weight_decay=(0.0, 0.0), batch_size=16)},
    **{"obs_dim": 3, "act_dim": 2, "steps": 2, "rows": 100},
}


ROLLOUT_SIZES = {"obs_dim": 3, "act_dim": 2, "starts": 20, "horizon": 2}


@pytest.fixture(autouse=True)
def small_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure quickly, since no test depends on the speed."""
    monkeypatch.setattr("mopo_fast.bench.measure._COPY_BYTES", 2**16)
    monkeypatch.setattr("mopo_fast.bench.measure._MM_SIZES", {"cpu": (64, 128)})
    monkeypatch.setattr("mopo_fast.bench.measure._PEAK_SECONDS", 0.0)


def tiny(kernel: str, **options: Any) -> list[Row]:
    sizes = {"rollout": ROLLOUT_SIZES, "sac": SAC_SIZES, "fit": FIT_SIZES}[kernel]
    return bench(kernel, **(sizes | {"rounds": 1, "threads": 1, "quiet": True} | options))


def test_sac_rows() -> None:
    ours, reference = tiny("sac", backend="cpu")
    assert (ours.kernel, ours.backend, reference.backend) == ("sac", "cpu", "reference")
    assert ours.baselines == {"reference": ours.rate / reference.rate} and reference.baselines == {}
    assert ours.unit == "updates/s" and ours.shape["batch"] == [2, 38] and ours.shape["rounds"] == 1
    assert ours.share_of_peak / reference.share_of_peak == pytest.approx(ours.rate / reference.rate)


def test_the_preparation_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    tiny("rollout", backend="cpu", quiet=False)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "bench rollout: preparing the data, the networks and the kernels"
    assert last.startswith("bench rollout: 2/2 rounds, ")


def test_sac_arithmetic() -> None:
    # An actor of 3-8-8-4 and two critics of 5-8-8-1: multiply-adds of all layers, and of the first.
    actor, first_actor, critics, first_critics = 120, 24, 2 * 112, 2 * 40
    next_value = actor + critics
    critics_step = 3 * critics - first_critics
    # The actor's loss goes forward through both critics, and back through one of them to 2 of its 5 inputs,
    # the actions.
    actor_step = 3 * actor - first_actor + critics + (112 - 40 + 40 * 2 // 5)
    ours, _ = tiny("sac", backend="cpu")
    assert ours.gflops * 1e9 / ours.rate == pytest.approx(2 * 40 * (next_value + critics_step + actor_step))


def test_arithmetic_of_the_canonical_update() -> None:
    assert sac_flop(SAC(17, 6)) == pytest.approx(0.543e9, rel=1e-3)


def test_arithmetic_of_redq() -> None:
    """A pair of ten critics saves 8 target networks; their mean takes 9 more gradients of actions."""
    ten, two, mean = (
        sac_flop(SAC(3, 2, SACConfig(critics=10, hidden=(8, 8), batch_size=40, **options)))
        for options in ({}, {"target_critics": 2}, {"actor_q": "mean"})
    )
    # A critic of 5-8-8-1; the gradient goes to 2 of its 5 inputs.
    assert ten - two == pytest.approx(2 * 40 * 8 * 112)
    assert mean - ten == pytest.approx(2 * 40 * 9 * (112 - 40 + 40 * 2 // 5))


def test_fit_rows() -> None:
    ours, reference = tiny("fit", backend="cpu")
    assert (ours.kernel, ours.backend, reference.backend) == ("fit", "cpu", "reference")
    assert ours.shape["members"] == 3 and ours.shape["steps"] == 2
    # 5-8-8: 104 multiply-adds a sample and member, 40 of them in the first layer.
    assert ours.gflops * 1e9 / ours.rate == pytest.approx(2 * (3 * 104 - 40))


# Bytes of rows of 3 + 2 dimensions. A rollout stores both observations, the action, reward, raw reward and
# penalty, member and step, rollout_index and terminal, and reads a start state every other transition; SAC
# reads 40 rows without the extras; a member of the fit has 104 weights and 16 biases, each with two moments.
@pytest.mark.parametrize(
    ("kernel", "least"),
    [
        ("rollout", (3 + 3 + 2 + 3 + 2) * 4 + 8 + 1 + 3 * 4 / 2),
        ("sac", 40 * ((3 + 3 + 2 + 1) * 4 + 1)),
        ("fit", (5 + 4) * 4 + 2 * 3 * 120 * 4 / 16),
    ],
)
def test_the_least_memory_traffic(kernel: str, least: float) -> None:
    for row in tiny(kernel, backend="cpu"):
        assert row.gflops * 1e9 / row.rate / row.intensity == pytest.approx(least)


def test_rows_of_another_dtype_move_at_least_as_much() -> None:
    wide, narrow = tiny("rollout", backend="reference", dtype="float64")
    assert wide.dtype == "float64" and wide.intensity == narrow.intensity


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("kernel", ["rollout", "sac", "fit"])
def test_bfloat16_meets_the_higher_precisions(kernel: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPO_FAST_ISA", isa)
    rows = tiny(kernel, backend="cpu", dtype="bfloat16")
    between = ["bfloat16x3"] if isa in cpu.WITH_BFLOAT16 else []
    names = ["cpu bfloat16", *(f"cpu {dtype}" for dtype in between), "cpu", "reference"]
    dtypes = ["bfloat16", *between, "float32", "float32"]
    assert [(row.backend, row.dtype) for row in rows] == list(zip(names, dtypes, strict=True))
    assert list(rows[0].baselines) == names[1:]


def test_the_fit_has_no_float64() -> None:
    with pytest.raises(InputError, match="unknown dtype 'float64' of the fit"):
        tiny("fit", backend="cpu", dtype="float64")


@pytest.mark.parametrize("kernel", ["sac", "fit"])
def test_the_reference_alone_is_one_row(kernel: str) -> None:
    (row,) = tiny(kernel, backend="reference")
    assert row.backend == "reference" and row.baselines == {}


def test_baselines_compete_from_networks_of_their_own() -> None:
    made: list[tuple[SAC, int]] = []
    ran: list[str] = []

    def make(sac: SAC, data: object, buffer: object, updates: int) -> Callable[[], object]:
        made.append((sac, updates))
        return lambda: ran.append("other")

    rows = tiny("sac", backend="cpu", rounds=2, baselines={"other": make})
    assert [row.backend for row in rows] == ["cpu", "reference", "other"]
    assert rows[0].baselines.keys() == {"reference", "other"} and not rows[2].baselines
    ((sac, updates),) = made
    assert (sac.backend, sac.updates, updates) == ("reference", 0, 2)
    assert ran == ["other"] * 3


def test_contenders_take_turns_and_the_first_round_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, turns = [0.0], []
    monkeypatch.setattr("mopo_fast.bench.measure.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("mopo_fast.bench.measure._MM_SIZES", {"cpu": (1,)})
    monkeypatch.setattr("mopo_fast.bench.measure._product", lambda *_: (lambda: sleep("mm", 2.0), 100.0))
    monkeypatch.setattr("mopo_fast.bench.measure._loop", lambda dtype, _: (lambda: sleep(dtype, 1.0), 100.0))
    monkeypatch.setattr("mopo_fast.bench.measure._copy", lambda _: (lambda: sleep("copy", 4.0), 200.0))

    def sleep(name: str, seconds: float) -> None:
        turns.append(name)
        clock[0] += seconds if len(turns) > 5 else 1000.0

    contenders = {"fast": lambda: sleep("fast", 2.0), "slow": lambda: sleep("slow", 8.0)}
    work = Work(
        "k",
        {"size": 1},
        "things/s",
        amount=4,
        flop=10.0,
        bytes=5.0,
        threads=1,
        device=torch.device("cpu"),
        contenders=contenders,
    )
    fast, slow = measure(work, rounds=3, quiet=True)
    assert turns == ["fast", "slow", "copy", "float32", "mm"] * 4
    assert (fast.rate, slow.rate, fast.baselines) == (2.0, 0.5, {"slow": 4.0})
    assert (fast.gflops, fast.peak_gflops, fast.share_of_peak, fast.mm_gflops) == (2e-8, 1e-7, 0.2, 5e-8)
    assert (fast.intensity, fast.bandwidth) == (2.0, 5e-8) == (slow.intensity, slow.bandwidth)
    lines = shown([fast, slow])
    assert ["fast", "float32", "2", "0.0", "20%"] in lines
    assert ["slow", "float32", "0", "0.0", "5%", "4.00"] in lines
    assert ["torch.mm:", "0.0", "GFLOP/s"] in lines


def shown(rows: list[Row]) -> list[list[str]]:
    """Return the words in each line of the printed table."""
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(to_table(rows))
    return [line.replace("│", " ").split() for line in console.export_text().splitlines()]


class InHalf:
    dtype = torch.float16

    def __call__(self) -> None:
        pass


def test_a_rollout_baseline_says_its_dtype() -> None:
    baselines = {"half": lambda ensemble, actor, start, horizon: InHalf(), "plain": lambda *_: lambda: None}
    rows = tiny("rollout", backend="cpu", baselines=baselines)
    assert [(row.backend, row.dtype) for row in rows[2:]] == [("half", "float16"), ("plain", "float32")]


def measured(
    monkeypatch: pytest.MonkeyPatch, dtypes: dict[str, str], loop_seconds: dict[str, float]
) -> list[Row]:
    """Return rows of contenders at 10 FLOP/s, on a machine whose peak is 100 FLOP in `loop_seconds`."""
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    def loop(dtype: str, threads: int) -> tuple[Callable[[], object], float]:
        return lambda: sleep(loop_seconds[dtype]), 100.0

    monkeypatch.setattr("mopo_fast.bench.measure.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("mopo_fast.bench.measure._loop", loop)
    monkeypatch.setattr("mopo_fast.bench.measure._product", lambda *_: (lambda: sleep(4.0), 100.0))
    monkeypatch.setattr("mopo_fast.bench.measure._copy", lambda _: (lambda: sleep(1.0), 100.0))
    sizes: dict[str, Any] = {
        "kernel": "k",
        "shape": {},
        "unit": "things/s",
        "amount": 1,
        "flop": 10.0,
        "bytes": 5.0,
    }
    contenders = {name: lambda: sleep(1.0) for name in dtypes}
    work = Work(**sizes, threads=1, device=torch.device("cpu"), contenders=contenders, dtypes=dtypes)
    return measure(work, rounds=1, quiet=True)


def test_the_peak_is_of_the_dtype_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = {"ours": "bfloat16", "same": "float32", "half": "float16", "double": "float64"}
    rows = measured(monkeypatch, dtypes, {"float32": 1.0, "bfloat16": 0.25})
    float32 = ("multiply-adds, float32", 1e-7, 0.1)
    assert [(row.peak, row.peak_gflops, row.share_of_peak) for row in rows] == [
        ("multiply-adds, bfloat16", 4e-7, 0.025), float32, float32, float32,
    ]  # fmt: skip
    assert {row.mm_gflops for row in rows} == {2.5e-8}


def test_bfloat16_has_at_least_the_peak_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = measured(monkeypatch, {"ours": "bfloat16"}, {"float32": 1.0, "bfloat16": 2.0})
    assert (row.peak, row.peak_gflops) == ("multiply-adds, float32", 1e-7)


def test_without_the_extension_torch_mm_is_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "is_built", lambda: False)
    (row,) = measured(monkeypatch, {"ours": "float32"}, {})
    assert row.peak.startswith("torch.mm of") and row.peak_gflops == row.mm_gflops == 2.5e-8


@pytest.mark.parametrize("isa", cpu.isas())
def test_the_loops_of_the_peak_count_what_they_do(isa: str) -> None:
    """The loops that measure the peak count two FLOP for each multiply-add of each vector element."""
    width = {"portable": 4, "avx2": 8}.get(isa, 16)
    chains = 24 if width == 16 or platform.machine() == "aarch64" else 12
    float32 = 2.0 * width * chains
    bfloat16 = {"avx512_bf16": 2.0 * float32, "avx512_amx": 4 * 2.0 * 16 * 16 * 32}.get(isa, float32)
    loop = partial(cpu.extension().multiply_adds, isa=isa)
    assert loop(bfloat16=False, rounds=7, threads=1) == 7 * float32
    assert loop(bfloat16=True, rounds=7, threads=2) == 2 * 7 * bfloat16


def test_a_loop_takes_as_long_as_it_takes_to_time_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mopo_fast.bench.measure._PEAK_SECONDS", 0.01)
    run, flop = _loop("float32", 1)
    began = time.perf_counter()
    assert run() == flop > 0
    assert time.perf_counter() - began > 0.001


def test_a_copy_counts_what_it_reads_and_writes() -> None:
    run, moved = _copy(torch.device("cpu"))
    assert moved == 2 * 2**16
    copied = run()
    assert isinstance(copied, torch.Tensor) and copied.nbytes == 2**16 and bool((copied == 1).all())


def test_runs_at_once_make_as_many_updates_each() -> None:
    work = sac_work(runs=3, **SAC_SIZES)
    assert list(work.contenders) == ["cpu, at once", "cpu", "reference"]
    assert (work.amount, work.shape["runs"]) == (6, 3)
    for run in work.contenders.values():
        run()


def test_a_mistake_ends_a_benchmark_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        """Refuse."""
        raise InputError("give the folder of a run")

    monkeypatch.setattr("sys.argv", ["benchmark"])
    with pytest.raises(SystemExit) as ended:
        run_command(refuse)
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "error: give the folder of a run\n")
