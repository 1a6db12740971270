"""Fixtures: a run, its data, and shards written without interruption."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from places import RECORDED
from small_shards import make_run, make_shards

from mopo_fast import Transitions
from mopo_fast.data import load_dataset
from mopo_fast.data.write import write_arrays


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, n = tmp_path_factory.mktemp("data") / "hopper-still.hdf5", 10
    observations = np.zeros((n, 11), np.float32)
    observations[:, 0], observations[:, 5] = 1.25, np.arange(n) / 100
    arrays = {"observations": observations, "next_observations": observations}
    arrays |= {"actions": np.zeros((n, 3), np.float32), "rewards": np.zeros(n, np.float32)}
    write_arrays(path, arrays | {"terminals": np.zeros(n, bool)})
    return path


@pytest.fixture(scope="module")
def data(dataset: Path) -> Transitions:
    return load_dataset(dataset)


@pytest.fixture(scope="module")
def undisturbed(run: Path, data: Transitions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    make_shards(run, data, out)
    return out


@pytest.fixture(params=["hdf5", "parquet"])
def recorded(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a copy of recorded shards, written by the first version of format_version 1."""
    return Path(shutil.copytree(RECORDED / "shards" / request.param, tmp_path / "recorded"))
