"""One thread per test process: several run at once, and results must not hang on the core count."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch

from mopo_fast.data import collect

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def hopper_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 transitions of hopper by random actions; a test that changes the file puts it back."""
    return collect(
        "hopper-random", 600, out=tmp_path_factory.mktemp("data") / "hopper-random-local.hdf5", quiet=True
    )
