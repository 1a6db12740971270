"""Test files of rollouts: all formats, damaged and malicious files, and full disks."""

import contextlib
import hashlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from killed import attempt
from small_shards import content, files_of_at_most, make_shards

from mopo_fast import InputError, Transitions, open_rollouts
from mopo_fast.bulk import files
from mopo_fast.bulk.files import save_transitions
from mopo_fast.bulk.generate import generate
from mopo_fast.bulk.read import verify
from mopo_fast.data import load_file, parquet, shards
from mopo_fast.data.manifest import COMPRESSIONS, read_manifest


def test_what_is_saved_is_what_is_loaded(run: Path, data: Transitions, tmp_path: Path) -> None:
    rollouts = generate(run, data, count=20)
    for name in ("a.hdf5", "a.h5", "a.npz"):
        save_transitions(tmp_path / name, rollouts)
        back = load_file(tmp_path / name)
        for key, array in back.arrays().items():
            assert torch.equal(array, rollouts.arrays()[key]), key
    assert back.name == "a"


def test_metadata_tells_how_a_file_was_made(run: Path, data: Transitions, tmp_path: Path) -> None:
    save_transitions(
        tmp_path / "a.hdf5", generate(run, data, count=7, horizon=2, seed=3, backend="reference")
    )
    metadata = load_file(tmp_path / "a.hdf5").info["metadata"]
    assert (metadata["seed"], metadata["count"], metadata["horizon"]) == (3, 7, 2)
    assert (metadata["penalty_coef"], metadata["backend"]) == (2.0, "reference")


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
def test_a_full_disk_leaves_nothing(run: Path, data: Transitions, tmp_path: Path, suffix: str) -> None:
    rollouts = generate(run, data, count=200)
    folder = tmp_path / "full"
    folder.mkdir()
    with files_of_at_most(4096), pytest.raises(InputError, match="cannot write"):
        save_transitions(folder / f"a{suffix}", rollouts)
    assert not list(folder.iterdir())


def test_an_existing_file_needs_overwrite(run: Path, data: Transitions, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(b"precious")
    rollouts = generate(run, data, count=2)
    with pytest.raises(InputError, match=r"a\.npz exists already; .* --overwrite"):
        save_transitions(path, rollouts)
    assert path.read_bytes() == b"precious"
    save_transitions(path, rollouts, overwrite=True)
    assert len(load_file(path)) == len(rollouts)


def test_files_that_cannot_be_written_are_named(run: Path, data: Transitions, tmp_path: Path) -> None:
    rollouts = generate(run, data, count=2)
    with pytest.raises(InputError, match=r"a\.csv; its name must end in"):
        save_transitions(tmp_path / "a.csv", rollouts)
    with pytest.raises(InputError, match=r"cannot write /proc/a\.npz"):
        save_transitions("/proc/a.npz", rollouts)
    with pytest.raises(InputError, match="rollout_index"):
        save_transitions(tmp_path / "a.npz", data)


def test_an_empty_rollout_is_saved(data: Transitions, tmp_path: Path) -> None:
    empty = Transitions(
        *(torch.empty(0, *shape) for shape in ((11,), (3,), (), (11,))),
        torch.empty(0, dtype=torch.bool),
        rollout_index=torch.empty(0, dtype=torch.int64),
    )
    save_transitions(tmp_path / "a.npz", empty)
    assert len(np.load(tmp_path / "a.npz")["timeouts"]) == 0


# --- shards


def test_a_shard_is_a_d4rl_file(undisturbed: Path) -> None:
    back = load_file(undisturbed / "shard-000001.hdf5")
    expected = open_rollouts(undisturbed).shard(1)
    for name in ("observations", "actions", "rewards", "next_observations", "terminals"):
        assert torch.equal(back.arrays()[name], expected.arrays()[name])
    assert back.info["metadata"]["shard"] == 1 and back.info["metadata"]["penalty_coef"] == 2.0
    arrays, _ = shards.read_file(undisturbed / "shard-000001.hdf5")
    assert isinstance(arrays["observations"], np.memmap)
    # Each rollout has one end, except that the last one may be cut.
    ends = arrays["terminals"] | arrays["timeouts"]
    assert np.array_equal(np.flatnonzero(ends)[:-1] + 1, np.flatnonzero(np.diff(arrays["rollout_index"])) + 1)


@pytest.mark.parametrize(
    ("format", "compression"),
    [(format, compression) for format, some in COMPRESSIONS.items() for compression in some],
)
def test_every_format(
    run: Path, data: Transitions, undisturbed: Path, tmp_path: Path, format: str, compression: str
) -> None:
    out = tmp_path / "out"
    make_shards(run, data, out, format=format, compression=compression)
    again = content(out)
    assert make_shards(run, data, out, format=format, compression=compression).shards
    assert content(out) == again
    verify(out, quiet=True)
    for one, other in zip(open_rollouts(undisturbed), open_rollouts(out), strict=True):
        assert one.arrays().keys() == other.arrays().keys()
        for name, array in one.arrays().items():
            assert torch.equal(array, other.arrays()[name]), name
    path = out / f"shard-000003.{format}"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match=r"shard-000003\.\w+ is not a whole"):
        shards.read_file(path)


def test_arrays_in_place(tmp_path: Path) -> None:
    """Arrays are aligned for any row size, and arrays without rows can be read."""
    random = np.random.default_rng(0)
    for rows in (0, 1, 7, 1000):
        arrays = {
            "terminals": random.random(rows) < 0.5,
            "rollout_index": random.integers(2**60, size=rows),
            "observations": random.normal(size=(rows, 3)).astype(np.float32),
        }
        path = tmp_path / f"{rows}.hdf5"
        for name, algorithm in (("xxh3_128", xxhash.xxh3_128), ("sha256", hashlib.sha256)):
            size, found = files.write_file(path, arrays, {"seed": 3, "task": "hopper"}, "none", name)
            assert size == path.stat().st_size
            assert found == f"{name}:{algorithm(path.read_bytes()).hexdigest()}"
            assert found == files.file_checksum(path, name)
        back, metadata = shards.read_file(path)
        assert metadata == {"seed": 3, "task": "hopper"}
        for name, array in arrays.items():
            assert back[name].dtype == array.dtype and np.array_equal(back[name], array)
            assert back[name].flags.aligned


# --- hostile shards


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("step", lambda a: a.astype(np.int64), "step must be int32"),
        ("rewards", lambda a: a.astype(np.float16), "rewards must be float32"),
        ("actions", lambda a: a[:, 0], "actions must be float32 of 2 dimensions"),
        ("penalties", lambda a: a[:-1], "penalties must be float32 of 1 dimensions and 200 rows"),
        ("observations", lambda a: a[:, :4], "have different shapes"),
        ("extra", None, "missing or unknown: 'extra'"),
    ],
)
def test_other_arrays_are_refused_as_they_are_read(
    undisturbed: Path, tmp_path: Path, name: str, change: Callable[[Any], Any] | None, message: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    path = out / "shard-000001.hdf5"
    arrays, metadata = shards.read_file(path)
    changed = {**arrays, name: change(arrays[name]) if change else arrays["step"]}
    files.write_file(tmp_path / "x.hdf5", changed, metadata, "none")
    (tmp_path / "x.hdf5").replace(path)
    with pytest.raises(InputError, match=message):
        open_rollouts(out).shard(1)


def test_parquet_that_announces_more_than_the_memory_is_not_read(tmp_path: Path) -> None:
    """A column of one repeated value takes a few bytes in the file, whatever its length."""
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "bomb.parquet"
    schema = pyarrow.schema([(f"a{i}", pyarrow.bool_()) for i in range(60)], {"mopo_fast": "{}"})
    column = pyarrow.array(np.zeros(10**6, bool))
    block = pyarrow.table([column] * 60, schema)
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        writer.write_table(block)
    asked = []
    with pytest.MonkeyPatch.context() as patch:

        def refuse(what: object, size: int, *_: Any) -> None:
            asked.append(size)
            if size >= 60 * 10**6:
                raise InputError("too much")

        patch.setattr(parquet, "check_fits", refuse)
        with pytest.raises(InputError, match="too much"):
            shards.read_file(path)
    assert path.stat().st_size < 10**6 < 60 * 10**6 <= asked[-1]


def read_damaged(folder: Path, count: int) -> None:
    """Change random bytes of a shard repeatedly; each time it is read or raises `InputError`."""
    plan = read_manifest(folder).plan
    path, rng = folder / plan.file(0), random.Random(0)
    whole = path.read_bytes()
    for _ in range(count):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 2, 8, 64))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.choice((None, rng.randrange(len(damaged))))])
        with contextlib.suppress(InputError):
            arrays, _ = shards.read_shard(path, plan, 0)
            shards.check_values(path, arrays, plan, 0)


def test_damaged_shards_end_in_one_error(recorded: Path) -> None:
    """The reads run in a separate process, because a library may crash on a damaged file."""
    assert attempt(read_damaged, recorded, 300, kill_after=120) == 0
