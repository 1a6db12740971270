"""Test everything that runs on a GPU, simplest first, within five minutes: `python -m tests.gpu`.

It first builds the CUDA extension twice, without and with the watchdog, which ends a kernel that waits for
two seconds. It needs no virtual environment and no package index, only an interpreter that can import the
dependencies.
"""

import importlib.util
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tyro.conf import UseAppendAction

from tests.bounded import Step, run_steps

ROOT = Path(__file__).parents[1]
WATCHED = ROOT / "build" / "watchdog"
FOLDER = ROOT / "tests" / "kernels"
KERNELS, TRAINING, ROLLOUT = "test_cuda_kernels.py", "test_kernel_cuda_training.py", "test_kernel_cuda.py"
TRITON, GRAPHS = "test_kernel_triton.py", "test_gpu.py"


def _python(*arguments: str | Path, watched: bool = False) -> tuple[list[str | Path], dict[str, str]]:
    """Return a command and its environment; `watched` takes the package with the watchdog."""
    paths = [*([str(WATCHED)] if watched else []), os.environ.get("PYTHONPATH", "")]
    # Without -P, Python would import the package in the working directory and not the watched one.
    return [sys.executable, *(["-P"] if watched else []), *arguments], {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "120",
    }


def _pytest(
    name: str, seconds: float, file: str, *options: str, watched: bool = False, sanitizer: bool = False
) -> Step:
    # Slow tests compile for a GPU and do not need one.
    arguments = ["-m", "pytest", "-q", "-rs", "--tb=short", "-m", "gpu and not slow"]
    arguments += ["-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    command, environment = _python(*arguments, *options, FOLDER / file, watched=watched)
    # Without a GPU, skip Triton's tests and do not interpret its kernels.
    environment |= {"TRITON_INTERPRET": "0"}
    if sanitizer:
        command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", *command]
    needs = ("watchdog",) if watched else ("build",)
    return Step(name, seconds, command, environment, needs=needs, gates=not sanitizer)


def build_step(*, watched: bool) -> Step:
    """Return the step that builds the extension in place, and if `watched` also the one with the watchdog."""
    script = 'MOPO_FAST_WATCHDOG=0 "$PYTHON" setup.py -q build_ext --inplace'
    if watched:
        library = shlex.quote(str(WATCHED))
        script += f' & MOPO_FAST_WATCHDOG=1 "$PYTHON" setup.py -q build --build-lib {library} && wait $!'
    return Step("build", 150, ["sh", "-c", script], {"PYTHON": sys.executable, "MOPO_FAST_CUDA": "1"})


def steps() -> list[Step]:
    """Return all steps in order."""
    has_watchdog = "from mopo_fast import _cuda; assert _cuda.watchdog, f'{_cuda.__file__} has no watchdog'"
    has_watchdog, environment = _python("-c", has_watchdog, watched=True)
    # More processes than cores would spend their time on imports.
    jobs = ("-n", str(min(8, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    return [
        build_step(watched=True),
        Step("doctor", 30, *_python("-m", "mopo_fast", "doctor")),
        Step("watchdog", 30, has_watchdog, environment, needs=("build",)),
        _pytest("exact-integers", 100, KERNELS),
        _pytest("training-watched", 45, TRAINING, watched=True),
        _pytest("rollout-watched", 45, ROLLOUT, watched=True),
        _pytest("training", 45, TRAINING),
        _pytest("rollout", 45, ROLLOUT),
        # Slow: nearly every test compiles a kernel of its own.
        _pytest("triton", 120, TRITON, *jobs),
        _pytest("graphs", 60, GRAPHS),
        # compute-sanitizer takes a hundred times as long, and may not support the rollout's instructions.
        _pytest("memcheck-training", 45, TRAINING, "-k", "not canonical", sanitizer=True),
        _pytest("memcheck-rollout", 45, ROLLOUT, "-k", "not canonical", sanitizer=True),
    ]


def gpu(
    *,
    only: Annotated[tuple[str, ...], UseAppendAction] = (),
    minutes: float = 5.0,
    logs: Path = ROOT / "build" / "gpu",
    without_gpu: bool = False,
) -> None:
    """Build the CUDA kernels and test all that runs on a GPU, in steps that are bounded in time.

    Steps: build, doctor, watchdog, exact-integers, training-watched, rollout-watched, training, rollout,
    triton, graphs, memcheck-training, memcheck-rollout.

    Args:
        only: Run only this step. Can be given several times.
        minutes: Time limit for the whole run.
        logs: Folder for the steps' logs.
        without_gpu: Try the steps on a machine without a GPU. The tests are skipped.
    """
    if not without_gpu and not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU; to try the steps without one, add --without-gpu")
    there = {step.name: step for step in steps()}
    if unknown := [name for name in only if name not in there]:
        raise SystemExit(f"unknown step {', '.join(unknown)}; there are: {', '.join(there)}")
    os.chdir(ROOT)
    chosen = [step for step in there.values() if not only or step.name in only]
    outcomes = run_steps(chosen, logs, 60.0 * minutes)
    print(f"The steps' logs are in {logs}")
    skipped = [outcome.step.name for outcome in outcomes if outcome.state == "skipped" and outcome.step.gates]
    if skipped and not without_gpu:
        raise SystemExit(f"all tests were skipped on this GPU in: {', '.join(skipped)}")
    raise SystemExit(any(outcome.is_bad for outcome in outcomes))


if __name__ == "__main__":
    tyro.cli(gpu, prog="python -m tests.gpu")
