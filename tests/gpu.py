"""Test all that runs on a GPU, simplest first, within five minutes: `python -m tests.gpu`.

It builds the CUDA extension where that is not built, once as it is and once with the watchdog, which ends a
kernel that waits for two seconds. It takes no virtual environment and no package index: only what can be
imported.
"""

import importlib.util
import os
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
    arguments = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    command, environment = _python(*arguments, *options, FOLDER / file, watched=watched)
    # What there is no GPU for is skipped, not interpreted.
    environment |= {"TRITON_INTERPRET": "0"}
    if sanitizer:
        command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", *command]
    return Step(name, seconds, command, environment, gates=not sanitizer)


def _build(name: str, *arguments: str | Path, watchdog: str) -> Step:
    command, environment = _python("setup.py", "-q", *arguments)
    return Step(name, 150, command, environment | {"MOPO_FAST_CUDA": "1", "MOPO_FAST_WATCHDOG": watchdog})


def steps() -> list[Step]:
    """All steps in their order; the builds first."""
    is_watched = "from mopo_fast import _cuda; assert _cuda.watchdog, f'{_cuda.__file__} has no watchdog'"
    found = importlib.util.find_spec("mopo_fast._cuda")
    return [
        _build("build with the watchdog", "build", "--build-lib", WATCHED, watchdog="1"),
        *([] if found else [_build("build", "build_ext", "--inplace", watchdog="0")]),
        Step("doctor", 30, *_python("-m", "mopo_fast", "doctor")),
        Step("the watchdog is there", 30, *_python("-c", is_watched, watched=True)),
        _pytest("exact integers", 60, KERNELS),
        _pytest("training, watched", 45, TRAINING, watched=True),
        _pytest("rollout, watched", 45, ROLLOUT, watched=True),
        _pytest("training", 45, TRAINING),
        _pytest("rollout", 45, ROLLOUT),
        _pytest("triton", 60, TRITON),
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
