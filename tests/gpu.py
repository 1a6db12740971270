"""Test all that runs on a GPU, simplest first, within five minutes: `python -m tests.gpu`.

It builds the CUDA extension where that is not built, once as it is and once with the watchdog, which ends a
kernel that waits for two seconds. It takes no virtual environment and no package index: only what can be
imported.
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
    """A command and its environment; `watched` takes the package with the watchdog."""
    paths = (
        [str(WATCHED), os.environ.get("PYTHONPATH", "")] if watched else [os.environ.get("PYTHONPATH", "")]
    )
    # -P: or the package in the working directory comes before the watched one.
    return [sys.executable, *(["-P"] if watched else []), *arguments], {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
    }


def _pytest(
    name: str, seconds: float, file: str, *options: str, watched: bool = False, sanitizer: bool = False
) -> Step:
    # What is slow compiles for a GPU that need not be there.
    arguments = ["-m", "pytest", "-q", "--tb=short", "-m", "gpu and not slow", "-p", "no:cacheprovider"]
    arguments += ["-o", "filterwarnings=default"]
    command, environment = _python(*arguments, *options, FOLDER / file, watched=watched)
    # What there is no GPU for is skipped, not interpreted.
    environment |= {"TRITON_INTERPRET": "0"}
    if sanitizer:
        command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", *command]
    return Step(name, seconds, command, environment, gates=not sanitizer)


def _build() -> Step:
    """Both extensions side by side; the usual one where it is not there."""
    builds = [f'MOPO_FAST_WATCHDOG=1 "$PYTHON" setup.py -q build --build-lib {shlex.quote(str(WATCHED))}']
    if importlib.util.find_spec("mopo_fast._cuda") is None:
        builds.append('MOPO_FAST_WATCHDOG=0 "$PYTHON" setup.py -q build_ext --inplace')
    script = " & ".join([*builds[1:], builds[0]])
    waits = " && wait $!" if len(builds) > 1 else ""
    environment = {"PYTHON": sys.executable, "MOPO_FAST_CUDA": "1"}
    return Step("build", 150, ["sh", "-c", f"{script}{waits}"], environment)


def steps() -> list[Step]:
    """All steps in their order."""
    is_watched = "from mopo_fast import _cuda; assert _cuda.watchdog, f'{_cuda.__file__} has no watchdog'"
    jobs = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    return [
        _build(),
        Step("doctor", 30, *_python("-m", "mopo_fast", "doctor")),
        Step("the watchdog is there", 30, *_python("-c", is_watched, watched=True)),
        _pytest("exact integers", 100, KERNELS),
        _pytest("training, watched", 45, TRAINING, watched=True),
        _pytest("rollout, watched", 45, ROLLOUT, watched=True),
        _pytest("training", 45, TRAINING),
        _pytest("rollout", 45, ROLLOUT),
        # Nearly every test compiles a kernel of its own.
        _pytest("triton", 120, TRITON, *jobs),
        _pytest("graphs and whole runs", 60, GRAPHS),
        # It may not cope with asynchronous products and changing register counts, and it takes a hundredfold.
        _pytest("memcheck of training", 45, TRAINING, "-k", "not canonical", sanitizer=True),
        _pytest("memcheck of the rollout", 45, ROLLOUT, "-k", "not canonical", sanitizer=True),
    ]


def gpu(
    *,
    only: Annotated[tuple[str, ...], UseAppendAction] = (),
    minutes: float = 5.0,
    logs: Path = ROOT / "build" / "gpu",
    without_gpu: bool = False,
) -> None:
    """Run the tests that need a GPU, in steps that are bounded in time.

    Args:
        only: Names of steps; all by default. Can be given several times.
        minutes: For all steps together.
        logs: The folder of what each step writes.
        without_gpu: Go through the steps where there is no GPU, to try them: the tests are skipped.
    """
    if not without_gpu and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU; --without-gpu goes through the steps all the same")
    chosen = [step for step in steps() if not only or step.name in only]
    if unknown := set(only) - {step.name for step in chosen}:
        names = ", ".join(step.name for step in steps())
        raise SystemExit(f"no step {', '.join(sorted(unknown))}; there are: {names}")
    os.chdir(ROOT)
    outcomes = run_steps(chosen, logs, 60.0 * minutes)
    print(f"Everything that the steps wrote is in {logs}")
    raise SystemExit(any(outcome.is_bad for outcome in outcomes))


if __name__ == "__main__":
    tyro.cli(gpu)
