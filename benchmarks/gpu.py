"""Measure everything on a GPU, within five minutes: `python -m benchmarks.gpu`.

SAC for one run and for eight, the fit, rollouts of the canonical shape in float16 and bfloat16, each beside
PyTorch, torch.compile and torch.compile in CUDA graphs in the same precision. Each measurement is a process
of its own with a time limit, and writes a file in benchmarks/results/ with the device, versions, commit and
date.

`python -m benchmarks.gpu --run DATA` measures a whole training run instead; that takes longer.
"""

import dataclasses
import json as json_format
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from benchmarks.command import run_command
from benchmarks.compare import GPU_BASELINES
from benchmarks.record import RESULTS, write_record
from mopo_fast import Actor, EnsembleDynamics, RolloutEngine
from mopo_fast.backends import get_backend
from mopo_fast.backends.interface import Need
from mopo_fast.bench.measure import Work, fit_work, measure, rollout_work, sac_work, to_table
from mopo_fast.config import EvaluationConfig, RolloutConfig, TrainConfig
from mopo_fast.doctor import examine
from mopo_fast.train import train
from mopo_fast.utils.machine import check_device, device_name
from tests.bounded import Step, run_steps
from tests.gpu import build_step

ROOT = Path(__file__).parents[1]
# Limits; the most important measurements come first, in case time runs out.
SECONDS = {"sac-1": 75, "fit": 60, "rollout-float16": 60, "sac-8": 60, "rollout-bfloat16": 45}


def gpu(
    *,
    only: Literal["sac-1", "fit", "rollout-float16", "sac-8", "rollout-bfloat16"] | None = None,
    starts: int = 2**20,
    updates: int = 300,
    steps: int = 256,
    rounds: int = 3,
    run: str | None = None,
    minutes: float = 5.0,
    out: Path = RESULTS,
    logs: Path = ROOT / "build" / "bench-gpu",
    device: str = "cuda",
) -> None:
    """Build the CUDA kernels and measure them on a GPU, in steps that are bounded in time.

    Args:
        only: Measure only this, in this process, without building and without a time limit.
        starts: Start states of a rollout of 5 steps.
        updates: SAC updates in a round. Each of eight runs makes a fifth of them.
        steps: Steps of the fit in a round.
        rounds: Rounds; the median is reported.
        run: Train on this data set instead, with 1,000,000 updates and no time limit.
        minutes: Time limit for the whole run.
        out: Folder for the results.
        logs: Folder for the steps' logs.
        device: cuda, or cpu to try the script.
    """
    check_device(device)
    on_gpu = torch.device(device).type == "cuda"
    measured: dict[str, Callable[[], dict[str, Any]]] = {
        "sac-1": partial(_sac, 1, updates, device, rounds),
        "fit": partial(_fit, steps, device, rounds),
        "rollout-float16": partial(_rollouts, "float16", starts, device, rounds),
        "sac-8": partial(_sac, 8, max(1, updates // 5), device, rounds),
        "rollout-bfloat16": partial(_rollouts, "bfloat16", starts, device, rounds),
    }
    if run is not None:
        _write("run", _run(run, device), out, device)
    elif only is not None:
        _write(only, measured[only](), out, device)
    else:
        sizes = {"starts": starts, "updates": updates, "steps": steps, "rounds": rounds}
        flags = [f"--{name}={value}" for name, value in (sizes | {"out": out, "device": device}).items()]
        command = [sys.executable, "-m", "benchmarks.gpu", *flags, "--only"]
        environment, needs = {"COLUMNS": "140"}, ("build",)
        chosen = [Step(name, SECONDS[name], [*command, name], environment, needs) for name in measured]
        if on_gpu:
            chosen.insert(0, build_step(watched=False))
        outcomes = run_steps(chosen, logs, 60.0 * minutes)
        if failed := [outcome.step.name for outcome in outcomes if outcome.is_bad]:
            raise SystemExit(f"not measured: {', '.join(failed)}; the logs in {logs} say why")


def _write(name: str, results: dict[str, Any], out: Path, device: str) -> None:
    """Write a measurement's file.

    Raises:
        SystemExit: the CUDA kernels could not be measured on a GPU.
    """
    slug = re.sub(r"\W+", "-", device_name(device)).strip("-").lower()
    versions = {"device": device_name(device), "cuda": torch.version.cuda}
    write_record(out / f"{name}-{slug}.json", "gpu", examine(), versions | results)
    for backend, reason in results["absent"].items():
        print(f"without {backend}: {reason}")
    if torch.device(device).type == "cuda" and "cuda" in results["absent"]:
        raise SystemExit(f"error: {name} was measured, but not with the CUDA kernels")


def _serving(dtype: str, device: str, training: int | None = None) -> tuple[list[str], dict[str, str]]:
    """Name the GPU backends that can serve here, best first, and say why the others cannot.

    They are to make rollouts or, if `training` is given, to train layers of up to that many inputs and
    outputs.
    """
    able, reasons = [], {}
    for name in ("cuda", "triton"):
        backend = get_backend(name)
        status = backend.status()
        if not status.available:
            reasons[name] = status.reason
            continue
        if reason := backend.refusal(Need(dtype, torch.device(device), training=training)):
            reasons[name] = reason
        else:
            able.append(name)
    return [*able, "reference"], reasons


def _rollouts(dtype: str, starts: int, device: str, rounds: int) -> dict[str, Any]:
    (first, *others), reasons = _serving(dtype, device)

    def made_by(backend: str) -> Callable[..., Callable[[], object]]:
        def make(
            ensemble: EnsembleDynamics, actor: Actor, start: torch.Tensor, horizon: int
        ) -> Callable[[], object]:
            engine = RolloutEngine(ensemble, backend=backend, dtype=dtype)
            return partial(engine.rollout, actor, start, horizon, seed=0)

        return make

    kernels = {f"{name} {dtype}": made_by(name) for name in others if name != "reference"}
    work = rollout_work(
        backend=first,
        dtype=dtype,
        starts=starts,
        device=device,
        baselines={**kernels, **GPU_BASELINES[f"rollout {dtype}"]},
    )
    return _measured(work, rounds) | {"absent": reasons}


def _sac(runs: int, updates: int, device: str, rounds: int) -> dict[str, Any]:
    able, reasons = _serving("float32", device, training=256)
    baselines = GPU_BASELINES["sac"]
    work = sac_work(backend=able[0], updates=updates, runs=runs, device=device, baselines=baselines)
    return _measured(work, rounds) | {"absent": reasons}


def _fit(steps: int, device: str, rounds: int) -> dict[str, Any]:
    able, reasons = _serving("float32", device, training=256)
    work = fit_work(backend=able[0], steps=steps, device=device, baselines=GPU_BASELINES["fit"])
    return _measured(work, rounds) | {"absent": reasons}


def _measured(work: Work, rounds: int) -> dict[str, Any]:
    rows = measure(work, rounds=rounds)
    Console().print(to_table(rows))
    return {"rows": [dataclasses.asdict(row) for row in rows]}


def _run(dataset: str, device: str) -> dict[str, Any]:
    """Make the canonical run and print its summary."""
    (backend, *_), reasons = _serving("float16", device)
    config = TrainConfig(
        dataset,
        device=device,
        backend=backend,
        rollout=RolloutConfig(dtype="float16"),
        evaluation=EvaluationConfig(interval=10),
    )
    with tempfile.TemporaryDirectory() as folder:
        summary = train(config, folder)
    print(json_format.dumps(summary, indent=2))
    return {"config": dataclasses.asdict(config), "summary": summary, "absent": reasons}


if __name__ == "__main__":
    run_command(gpu, prog="python -m benchmarks.gpu")
