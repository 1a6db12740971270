"""One thread per test process: several run at once, and results must not hang on the core count."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mopo_fast.data import collect

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
