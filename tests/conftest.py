"""Fixtures and settings for all tests. Each test process uses one thread, so that several can run at once."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# cuBLAS needs this setting for the deterministic algorithms that `poisoned_outputs` switches on.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from filelock import FileLock
from small_runs import CONFIG

from mopo_fast.backends import BackendStatus
from mopo_fast.backends.gpu import cuda
from mopo_fast.collect import collect
from mopo_fast.config import TrainConfig

torch.set_num_threads(1)

# A command that runs tests/arm/driver.cpp: the kernels of another architecture are tested in place of this
# machine's.
if driver := os.environ.get("MOPO_FAST_TEST_DRIVER"):
    from arm.extension import install

    install(shlex.split(driver))


def _isas() -> list[str]:
    """Return the names of all instruction sets that the sources of the CPU kernels have."""
    files = sorted((Path(__file__).parents[1] / "csrc" / "cpu").glob("*.cpp"))
    return [name for file in files for name in re.findall(r'#define MOPO_NAME "(\w+)"', file.read_text())]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which instruction sets have been tested: a processor that lacks one skips nothing."""
    passed = [re.split(r"[\[\]-]", report.nodeid) for report in terminalreporter.stats.get("passed", [])]
    counts = {isa: sum(isa in words for words in passed) for isa in _isas()}
    ran = ", ".join(f"{isa} ({count} tests)" for isa, count in counts.items() if count)
    lacking = ", ".join(isa for isa, count in counts.items() if not count)
    terminalreporter.write_line(
        f"instruction sets of the CPU kernels that ran: {ran or 'none'}; not: {lacking or 'none'}"
    )


# Triton reads this when it is imported: without a GPU, its kernels are interpreted. The backend "auto" never
# chooses interpreted kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def poisoned_outputs() -> Iterator[None]:
    """Let torch.empty return NaN, True or the largest integer, to find outputs that are never written."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def hopper_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Collect 600 transitions of hopper by random actions. A test that changes the file must restore it."""
    return collect(
        "hopper-random", 600, out=tmp_path_factory.mktemp("data") / "hopper-random-local.hdf5", quiet=True
    )


@pytest.fixture(scope="session")
def config(hopper_data: Path) -> TrainConfig:
    """Return the settings of a small run in hopper."""
    return dataclasses.replace(CONFIG, dataset=str(hopper_data))


@pytest.fixture(scope="module")
def unrendered() -> Iterator[None]:
    """Render no pictures of reports in the tests of a module."""
    # Imported on first use, since most tests draw nothing.
    from unrendered import render_nothing

    with pytest.MonkeyPatch.context() as monkeypatch:
        render_nothing(monkeypatch)
        yield


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> ModuleType:
    """Build the CUDA extension for the emulator, once for all test processes; it takes CPU tensors."""
    # Build on first use, since most tests need no compiler.
    import cuda_emulator

    folder = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        folder = folder.parent
    with FileLock(folder / "cuda_emulator.lock"):
        return cuda_emulator.build_extension(folder / "cuda_emulator")


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run the cuda backend on a GPU or in the emulator; yield the device of its tensors."""
    if request.param == "gpu":
        status = cuda.CudaBackend().status()
        if not status.available:
            pytest.skip(status.reason)
        yield "cuda"
        return
    module = request.getfixturevalue("emulated")
    monkeypatch.setattr(cuda, "_load", lambda: (module, ""))
    monkeypatch.setattr(cuda, "_DEVICE", "cpu")
    monkeypatch.setattr(cuda, "_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(cuda, "_multiprocessors", lambda device: 4)
    monkeypatch.setattr(cuda, "_cuda_stream", lambda device: 0)
    status = BackendStatus("cuda", True, "emulated", by_name_only=True)
    monkeypatch.setattr(cuda.CudaBackend, "status", lambda self: status)
    yield "cpu"
