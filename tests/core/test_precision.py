"""Test the precision of the matrix products: its names, the dtypes on a processor, the records of a run."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from kernel_cases import fit_steps, make_ensemble, make_fit, run_sac
from small_runs import CONFIG

from mopo_fast.backends import cpu, precision
from mopo_fast.backends.precision import Dtypes, describe, dtypes_of
from mopo_fast.config import DynamicsConfig, RolloutConfig, SACConfig, TrainConfig
from mopo_fast.doctor import examine
from mopo_fast.errors import InputError
from mopo_fast.rollout import RolloutEngine
from mopo_fast.run.checkpoint import warn_of_other_isa
from mopo_fast.run.resolve import resolve
from mopo_fast.sac import SAC
from mopo_fast.train import train

pytestmark = pytest.mark.usefixtures("unrendered")


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand for a processor with fast products of bfloat16."""
    monkeypatch.setattr(cpu, "WITH_BFLOAT16", cpu.isas())
    monkeypatch.setattr(cpu, "bfloat16_gain", lambda: 2.0)


@pytest.mark.parametrize("isa", cpu.isas())
def test_the_gain_of_bfloat16_is_measured(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPO_FAST_ISA", isa)
    gain = cpu.bfloat16_gain()
    multiplies = isa in cpu.WITH_BFLOAT16_ROLLOUTS
    assert gain > 0.0 if multiplies else gain == 0.0
    # A tile has 16 times as many products as a vector, at a comparable rate.
    assert gain > 3.0 or isa != "avx512_amx"
    dtypes = dtypes_of("medium", "cpu", "cpu")
    trains = isa in cpu.WITH_BFLOAT16 and gain >= 1.3
    assert (dtypes.training == "bfloat16", dtypes.rollout == "bfloat16") == (trains, gain >= 1.3)
    assert (dtypes.why == "") == trains
    if not multiplies:
        assert dtypes.why == f"the instruction set {isa} has no products of bfloat16"


def test_a_precision_that_is_no_faster_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "bfloat16_gain", lambda: 0.5)
    why = f"products in bfloat16 are only 0.5 times as fast as in float32 on {cpu.isa()}"
    assert dtypes_of("medium", "cpu") == Dtypes(why=why)
    assert examine().precision == {"cpu": f"highest: {why}"}


def test_rollouts_alone_are_less_precise_on_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "bfloat16_gain", lambda: 2.0)
    monkeypatch.setattr(cpu, "isa", lambda: "neon_bf16")
    assert dtypes_of("medium", "cpu") == Dtypes(
        "float32", "bfloat16", "the kernels for neon_bf16 train in float32"
    )
    assert dtypes_of("high", "cpu").why == "the instruction set neon_bf16 has no products of bfloat16x3"


@pytest.mark.usefixtures("fast")
def test_names_of_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dtypes_of("highest", "cpu") == Dtypes("float32", "float32")
    why = f"products in bfloat16x3 are only 0.7 times as fast as in float32 on {cpu.isa()}"
    assert dtypes_of("high", "cpu") == Dtypes(why=why)
    assert dtypes_of("medium", "cpu") == Dtypes("bfloat16", "bfloat16")
    assert dtypes_of("medium", "cpu", "reference").why == "the backend reference is no faster in bfloat16"
    monkeypatch.setattr(cpu, "bfloat16_gain", lambda: 4.0)
    assert dtypes_of("high", "cpu") == Dtypes("bfloat16x3", "bfloat16x3")
    assert dtypes_of("high", "cpu", "reference").why == "the backend reference is no faster in bfloat16x3"
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # Triton's kernels then serve the CPU, but not in this dtype
    why = "the backend triton makes no rollouts in bfloat16x3"
    assert dtypes_of("high", "cpu", "triton") == Dtypes("bfloat16x3", "float32", why)
    with pytest.raises(InputError, match="unknown backend 'fastest'"):
        dtypes_of("medium", "cpu", "fastest")


@pytest.mark.parametrize(("name", "dtype"), [("high", "tfloat32"), ("medium", "bfloat16")])
def test_on_a_gpu_rollouts_alone_are_less_precise(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "check_device", lambda device: None)
    monkeypatch.setattr(precision, "choose", lambda name, need: "triton")
    why = "the kernels for cuda train in float32"
    assert dtypes_of(name, "cuda") == Dtypes("float32", dtype, why)
    monkeypatch.setattr(precision, "choose", lambda name, need: "reference")
    assert dtypes_of(name, "cuda") == Dtypes(why=f"no kernel makes rollouts in {dtype} here, and {why}")


def test_parts_in_float32_are_named_with_the_reason() -> None:
    parts = {"the fit": "float32", "rollouts": "bfloat16", "SAC": "float32"}
    assert describe("medium", "slow", parts) == "medium, but float32 for the fit and SAC: slow"
    assert describe("medium", "slow", {"rollouts": "float32"}) == "medium, but float32 for rollouts: slow"
    everything = dict.fromkeys(parts, "float32")
    assert describe("high", "slow", everything) == "high, but float32 for the fit, rollouts and SAC: slow"
    assert describe("high", "slow", {"rollouts": "bfloat16"}) == describe("high", "", everything) == "high"


@pytest.mark.usefixtures("fast")
def test_a_part_may_have_a_dtype_of_its_own() -> None:
    config = dataclasses.replace(CONFIG, matmul_precision="medium")
    run, _ = resolve(config)
    assert (run.dynamics.dtype, run.rollout.dtype, run.sac.dtype) == ("bfloat16",) * 3
    run, _ = resolve(dataclasses.replace(config, sac=dataclasses.replace(CONFIG.sac, dtype="float32")))
    assert (run.dynamics.dtype, run.rollout.dtype, run.sac.dtype) == ("bfloat16", "bfloat16", "float32")
    run, _ = resolve(
        dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, dtype="bfloat16"))
    )
    assert (run.dynamics.dtype, run.rollout.dtype, run.sac.dtype) == ("float32", "bfloat16", "float32")


@pytest.mark.parametrize("isa", [isa for isa in cpu.isas() if isa not in cpu.WITH_BFLOAT16])
def test_without_products_of_bfloat16_a_sum_of_two_is_float32(
    isa: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MOPO_FAST_ISA", isa)
    cpu._say_float32.cache_clear()
    caplog.set_level(logging.INFO, logger="mopo_fast")
    results = [
        RolloutEngine(make_ensemble(3, 1), dtype=dtype, backend="cpu").step(
            torch.ones(5, 3), torch.ones(5, 1), seed=0
        )
        for dtype in ("float32", "bfloat16x3")
    ]
    assert torch.equal(results[0].next_observations, results[1].next_observations)
    fits = [make_fit("canonical", "cpu", dtype=dtype) for dtype in ("float32", "bfloat16x3")]
    assert fit_steps(fits[0], fits[0].rows) == fit_steps(fits[1], fits[1].rows)
    agents = [run_sac("canonical", "cpu", 2, dtype=dtype)[0] for dtype in ("float32", "bfloat16x3")]
    assert all(torch.equal(agents[0][name], agents[1][name]) for name in agents[0])
    said = f"bfloat16x3 is computed in float32: the instruction set {isa} has no products of it"
    assert caplog.text.count(said) == 1


def test_unknown_precisions_are_refused() -> None:
    with pytest.raises(InputError, match="unknown matmul_precision 'low'"):
        resolve(dataclasses.replace(CONFIG, matmul_precision="low"))
    for part in (DynamicsConfig(dtype="float16"), SACConfig(dtype="tfloat32")):
        with pytest.raises(InputError, match="unknown dtype"):
            part.validate()


def test_parts_are_float32_by_themselves() -> None:
    assert SAC(3, 1, SACConfig(hidden=(4,))).config.dtype == "float32"
    assert RolloutConfig().dtype is None


@pytest.mark.usefixtures("fast")
def test_a_run_in_bfloat16_records_it_and_resumes(
    config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, matmul_precision="medium", steps=20)
    summary = train(config, tmp_path, quiet=True)
    assert summary["dtypes"] == {"fit": "bfloat16", "rollout": "bfloat16", "sac": "bfloat16"}
    assert summary["isa"] == cpu.isa() == json.loads((tmp_path / "fit.json").read_text())["isa"]
    recorded = json.loads((tmp_path / "config.json").read_text())
    assert recorded["matmul_precision"] == "medium"
    # It goes on with the dtypes of its beginning, and says that another instruction set is in use.
    caplog.set_level(logging.WARNING, logger="mopo_fast")
    train(dataclasses.replace(config, steps=30), tmp_path, resume=True, quiet=True)
    assert not [record for record in caplog.records if "instruction set" in record.message]
    with pytest.raises(InputError, match=r"matmul_precision = 'medium', not 'high'; .*train --resume"):
        parts = {
            name: dataclasses.replace(getattr(config, name), dtype="bfloat16")
            for name in ("dynamics", "rollout", "sac")
        }
        train(dataclasses.replace(config, matmul_precision="high", steps=30, **parts), tmp_path, resume=True)
    monkeypatch.setenv("MOPO_FAST_ISA", "portable")
    train(dataclasses.replace(config, steps=40), tmp_path, resume=True, quiet=True)
    said = [record.message for record in caplog.records if "instruction set" in record.message]
    assert len(said) == (cpu.isas()[0] != "portable")
    monkeypatch.setattr(cpu, "bfloat16_gain", lambda: 0.0)
    with pytest.raises(InputError, match=r"dtype = bfloat16, not float32|dtype = 'bfloat16', not 'float32'"):
        train(dataclasses.replace(config, steps=50), tmp_path, resume=True, quiet=True)


def test_checkpoints_without_an_instruction_set_are_read(caplog: pytest.LogCaptureFixture) -> None:
    for backends in ({}, {"isa": None}, {"isa": cpu.isa()}):
        warn_of_other_isa(Path("epoch"), {"rollout": "cpu", "sac": "cpu", **backends})
    assert not caplog.records
    warn_of_other_isa(Path("epoch"), {"rollout": "cpu", "sac": "cpu", "isa": "mmx"})
    assert "was made on the instruction set mmx" in caplog.text
    assert "resume on a processor with mmx for the same results to the bit" in caplog.text
