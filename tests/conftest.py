"""One thread per test process: several run at once, and results must not hang on the core count."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# With the deterministic algorithms of `poisoned_outputs`, some versions of torch multiply on a GPU only so.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from filelock import FileLock

from mopo_fast.backends import BackendStatus
from mopo_fast.backends.gpu import cuda
from mopo_fast.collect import collect

torch.set_num_threads(1)

# Read when Triton is imported: without a GPU its kernels are interpreted. A backend "auto" is none of them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def poisoned_outputs() -> Iterator[None]:
    """torch.empty gives NaN, True and the largest integer: what a kernel leaves out, shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def hopper_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 transitions of hopper by random actions; a test that changes the file puts it back."""
    return collect(
        "hopper-random", 600, out=tmp_path_factory.mktemp("data") / "hopper-random-local.hdf5", quiet=True
    )


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> ModuleType:
    """The CUDA extension, to run on CPU tensors; built once for all test processes."""
    # With the first who needs it: not every test has a compiler.
    import cuda_emulator

    folder = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        folder = folder.parent
    with FileLock(folder / "cuda_emulator.lock"):
        return cuda_emulator.build_extension(folder / "cuda_emulator")


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the cuda backend runs: on a GPU, or in the emulator."""
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
