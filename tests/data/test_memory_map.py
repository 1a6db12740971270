"""Test data that are memory-mapped from their file."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from mopo_fast import InputError, load_dataset
from mopo_fast.config import DynamicsConfig
from mopo_fast.data.hdf5 import open_hdf5
from mopo_fast.fit import Fit, dynamics_inputs_targets
from mopo_fast.utils import machine

# Humanoid's dimensions, with which a few rows make a large file.
OBS, ACT = 376, 17


def write(path: Path, n: int, **options: object) -> Path:
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for key, columns in ("observations", OBS), ("next_observations", OBS), ("actions", ACT):
            stored = file.create_dataset(key, (n, columns), np.float32, **options)
            for first in range(0, n, 10_000):
                rows = min(10_000, n - first)
                stored[first : first + rows] = random.uniform(-1, 1, (rows, columns))
        file["rewards"] = random.normal(size=n).astype(np.float32)
        file["terminals"] = random.random(n) < 0.1
        file["metadata/name"] = "humanoid-mine-local"
    return path


def test_same_transitions(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5", 300)
    mapped, loaded = load_dataset(path, memory_map=True), load_dataset(path)
    for name, array in loaded.arrays().items():
        assert torch.equal(array, mapped.arrays()[name]), name
    assert (mapped.name, mapped.info["metadata"]) == (loaded.name, loaded.info["metadata"])
    assert (mapped.info["memory_mapped"], loaded.info["memory_mapped"]) == (True, False)
    # The arrays show changes of the file, so they are no copies.
    with h5py.File(path, "r+") as file:
        file["observations"][7, 5] = 0.125
    assert (mapped.observations[7, 5], mapped.to("cpu").observations[7, 5]) == (0.125, 0.125)


def test_writing_to_mapped_data_leaves_the_file_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5", 300)
    before = path.read_bytes()
    with open_hdf5(path) as file:
        mapped = file["observations"].map(path)
    # The mapping is private and writable: writing to a read-only mapping would end the process.
    assert mapped.flags.writeable
    mapped[0] = 5.0
    load_dataset(path, memory_map=True).observations.fill_(7.0)
    assert (mapped[0] == 5.0).all() and path.read_bytes() == before


# Run in a new process, because threads and garbage of earlier tests would add megabytes.
ANONYMOUS = """
import sys
from pathlib import Path
import torch
from mopo_fast import load_dataset

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

path, memory_map = sys.argv[1], sys.argv[2] == "mapped"
# The first call imports modules and starts threads, which take memory too.
torch.isfinite(load_dataset(sys.argv[3], memory_map=memory_map).observations.sum())
before = anonymous()
data = load_dataset(path, memory_map=memory_map)
assert bool(torch.isfinite(data.observations.sum() + data.next_observations.sum()))
print(anonymous() - before)
"""


def test_mapped_data_take_no_memory(tmp_path: Path) -> None:
    path, small = write(tmp_path / "a.hdf5", 40_000), write(tmp_path / "b.hdf5", 30)
    assert path.stat().st_size > 120_000_000

    def taken(how: str) -> int:
        command = [sys.executable, "-c", ANONYMOUS, str(path), how, str(small)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    # The checks' blocks of rows may stay with the allocator of each thread.
    assert taken("mapped") < 40_000_000
    assert taken("loaded") > 120_000_000


@pytest.mark.parametrize("system", ["a limit", "strict", "too large"])
def test_a_system_that_counts_copies_maps_read_only(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.hdf5", 300)
    assert machine.map_mode() == "c"
    if system == "a limit":
        monkeypatch.setattr("resource.getrlimit", lambda _: (1 << 40, -1))
    elif system == "strict":
        (tmp_path / "proc/sys/vm").mkdir(parents=True)
        (tmp_path / "proc/sys/vm/overcommit_memory").write_text("2\n")
        monkeypatch.setattr(machine, "_ROOT", tmp_path)
    else:
        memmap = np.memmap

        def refuse(path: Path, dtype: object, mode: str, *rest: object) -> object:
            if mode == "c":
                raise OSError(errno.ENOMEM, "Cannot allocate memory")
            return memmap(path, dtype, mode, *rest)

        monkeypatch.setattr(np, "memmap", refuse)
    with open_hdf5(path) as file:
        assert not file["observations"].map(path).flags.writeable


def test_mapped_arrays_in_a_dictionary(tmp_path: Path) -> None:
    loaded = load_dataset(write(tmp_path / "a.hdf5", 300))
    for name, array in loaded.arrays().items():
        np.save(tmp_path / f"{name}.npy", array.numpy())
    data = load_dataset({name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in loaded.arrays()})
    assert data.info["memory_mapped"]
    for name, array in loaded.arrays().items():
        assert torch.equal(array, data.arrays()[name]), name


@pytest.mark.parametrize(
    ("options", "removed", "message"),
    [
        ({"compression": "gzip"}, None, "observations must be uncompressed float32"),
        ({"chunks": True}, None, "convert the file with `mopo-fast convert`"),
        ({}, "next_observations", "needs HDF5 with next_observations"),
        ({}, "rewards", "lacks 'rewards'"),
    ],
)
def test_files_that_cannot_be_mapped(
    options: dict[str, object], removed: str | None, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.hdf5", 30, **options)
    if removed:
        with h5py.File(path, "r+") as file:
            del file[removed]
    with pytest.raises(InputError, match=message):
        load_dataset(path, memory_map=True)


def test_bad_values_and_other_sources(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5", 6000)
    with pytest.raises(InputError, match="no compat"):
        load_dataset(path, memory_map=True, compat="d4rl")
    with pytest.raises(InputError, match="only a file can be mapped"):
        load_dataset({}, memory_map=True)
    with h5py.File(path, "r+") as file:
        file["actions"][5000, 3] = np.inf
    for memory_map in (False, True):
        with pytest.raises(InputError, match="actions is not a finite float32 number at row 5000"):
            load_dataset(path, memory_map=memory_map)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is not a whole HDF5 file"):
        load_dataset(path, memory_map=True)


def test_moments_by_blocks(tmp_path: Path) -> None:
    data = load_dataset(write(tmp_path / "a.hdf5", 7000))
    fit = Fit(data, 0, DynamicsConfig(hidden=(4,), weight_decay=(0.0, 0.0), members=1, elites=1))
    inputs = dynamics_inputs_targets(data)[0].double()
    rows = torch.from_numpy(np.sort(fit.bootstrap()[0]))
    assert rows[0] >= 0
    assert rows[-1] < len(fit.table) == 6000
    # The statistics leave out the 1000 held-out uniform rows, which move a mean by at most this much.
    assert torch.allclose(fit.model.input_mean.double(), inputs.mean(0), atol=0.03)
    assert torch.allclose(fit.inputs.double().mean(0), torch.zeros(OBS + ACT, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(fit.inputs.double().std(0, correction=0), torch.ones(()).double(), atol=1e-6)


TRAIN = """
import resource, sys
from pathlib import Path
import mopo_fast.cli
import mopo_fast.train

path, out, headroom, memory_map = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "True"
if headroom:
    lines = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) for line in lines if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * used + headroom, -1))
options = [
    "--task", "humanoid", "--steps", "30", "--rollout.interval", "15", "--rollout.batch-size", "100",
    "--horizon", "1", "--penalty-coef", "1", "--dynamics.hidden", "8", "--dynamics.weight-decay", "0", "0",
    "--dynamics.members", "1", "--dynamics.elites", "1", "--dynamics.max-epochs", "1",
    "--dynamics.batch-size", "4096", "--sac.hidden", "16", "--evaluation.episodes", "1", "--threads", "1",
]
options += ["--memory-map"] * memory_map
sys.exit(mopo_fast.cli.main(["train", path, "--out", out, "--quiet", *options]))
"""


@pytest.mark.slow
def test_training_from_a_file_larger_than_the_memory(tmp_path: Path) -> None:
    path, limit = write(tmp_path / "humanoid.hdf5", 130_000), 240 * 2**20
    assert path.stat().st_size > 1.5 * limit

    def train(name: str, headroom: int, memory_map: bool) -> subprocess.CompletedProcess[str]:
        arguments = [str(path), str(tmp_path / name), str(headroom), str(memory_map)]
        return subprocess.run([sys.executable, "-c", TRAIN, *arguments], capture_output=True, text=True)

    refused = train("refused", limit, False)
    assert refused.returncode != 0
    assert "--memory-map" in refused.stderr
    for done in train("mapped", limit, True), train("loaded", 0, False):
        assert done.returncode == 0, done.stderr
    for name in ("dynamics.safetensors", "policy.safetensors", "config.json"):
        assert (tmp_path / "mapped" / name).read_bytes() == (tmp_path / "loaded" / name).read_bytes(), name
    ours, theirs = (json.loads((tmp_path / run / "summary.json").read_text()) for run in ("mapped", "loaded"))
    assert ours["return_mean"] == theirs["return_mean"]
