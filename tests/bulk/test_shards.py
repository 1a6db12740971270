"""Rollouts in bulk: what shards hold, exactly once, formats, mistakes."""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed import CONTEXT, attempt, start
from places import RECORDED
from test_generate import CONFIG

from mopo_fast import Actor, EnsembleDynamics, InputError, RolloutEngine, Transitions, open_rollouts
from mopo_fast.backends.philox import BATCH_STREAM, random_choice
from mopo_fast.bulk import files as shard_files
from mopo_fast.bulk import shards
from mopo_fast.cli import main
from mopo_fast.data import load_dataset, load_file
from mopo_fast.data.files import write_arrays
from mopo_fast.utils.seeds import ROLLOUT, START, derive_seed

CONTEXT.set_forkserver_preload(["mopo_fast.bulk.shards", "pytest"])
COUNT, SHARD = 1100, 200


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    generator = torch.Generator().manual_seed(0)
    EnsembleDynamics(11, 3, hidden=(8,), generator=generator).save(folder)
    Actor(11, 3, hidden=(8,), generator=generator).save(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


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


def generate(run: Path, data: Transitions, out: Path, **options: Any) -> shards.Manifest:
    settings = {"count": COUNT, "shard_rows": SHARD, "seed": 7, "threads": 1, "quiet": True}
    return shards.generate_shards(run, data, out, **settings | options)


@pytest.fixture(scope="module")
def undisturbed(run: Path, data: Transitions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    generate(run, data, out)
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_what_a_shard_holds(run: Path, data: Transitions, undisturbed: Path) -> None:
    """Rollouts k * 2^32, ... of one endless sequence, as the engine makes them, cut to size."""
    rollouts = open_rollouts(undisturbed)
    assert len(rollouts) == COUNT and [len(shard) for shard in rollouts] == [SHARD] * 5 + [100]
    engine = RolloutEngine(
        EnsembleDynamics.load(run),
        penalty="ensemble_std",
        penalty_coef=2.0,
        penalty_members="elites",
        termination="hopper",
    )
    for number, found in enumerate(rollouts):
        rows = torch.arange(300) + (number << 32)
        start = data.observations[random_choice(rows, 0, BATCH_STREAM, len(data), derive_seed(7, START))]
        made = engine.rollout(Actor.load(run), start, 3, seed=derive_seed(7, ROLLOUT), rows=rows)
        for name, array in found.arrays().items():
            assert torch.equal(array, made.arrays()[name][: len(found)]), (number, name)
        record = rollouts.manifest.shards[number]
        assert found.rollout_index is not None
        used = int(found.rollout_index[-1]) - (number << 32) + 1
        assert used <= record.starts < used + 4


def test_a_shard_is_a_d4rl_file(undisturbed: Path) -> None:
    back = load_file(undisturbed / "shard-000001.hdf5")
    expected = open_rollouts(undisturbed).shard(1)
    for name in ("observations", "actions", "rewards", "next_observations", "terminals"):
        assert torch.equal(back.arrays()[name], expected.arrays()[name])
    assert back.info["metadata"]["shard"] == 1 and back.info["metadata"]["penalty_coef"] == 2.0
    arrays, _ = shard_files.read_file(undisturbed / "shard-000001.hdf5")
    assert isinstance(arrays["observations"], np.memmap)
    # Every rollout ends once, or is the last.
    ends = arrays["terminals"] | arrays["timeouts"]
    assert np.array_equal(np.flatnonzero(ends)[:-1] + 1, np.flatnonzero(np.diff(arrays["rollout_index"])) + 1)


def test_more_shards_leave_the_first_as_they_are(
    run: Path, data: Transitions, undisturbed: Path, tmp_path: Path
) -> None:
    generate(run, data, tmp_path / "more", count=COUNT + 500)
    one, other = open_rollouts(undisturbed), open_rollouts(tmp_path / "more")
    for number in range(5):
        for name, array in one.shard(number).arrays().items():
            assert torch.equal(array, other.shard(number).arrays()[name])


def test_threads_do_not_matter(run: Path, data: Transitions, undisturbed: Path, tmp_path: Path) -> None:
    generate(run, data, tmp_path / "out", threads=2)
    assert content(tmp_path / "out") == content(undisturbed)


def go_on(run: Path, dataset: Path, out: Path) -> None:
    generate(run, load_dataset(dataset), out)


def test_killed_at_its_own_writes(run: Path, dataset: Path, undisturbed: Path, tmp_path: Path) -> None:
    out, changes = tmp_path / "out", 1
    while attempt(go_on, run, dataset, out, die_at=(out, changes)) != 0:
        # Nothing that was finished is lost, nothing half done is left in a shard's place.
        for name, value in content(out).items():
            assert name == shards.MANIFEST or name.startswith(".") or value == content(undisturbed)[name]
        changes += 1
    assert changes > 4
    assert content(out) == content(undisturbed)


def test_killed_at_random_moments(run: Path, dataset: Path, undisturbed: Path, tmp_path: Path) -> None:
    rng, longest = random.Random(0), 0.6
    for number in range(4):
        out = tmp_path / f"out-{number}"
        while attempt(go_on, run, dataset, out, kill_after=rng.uniform(0, longest)) == 0:
            # The machine was faster than the kill.
            shutil.rmtree(out)
            longest /= 2
        for _ in range(3):
            attempt(go_on, run, dataset, out, kill_after=rng.uniform(0, longest))
        assert attempt(go_on, run, dataset, out) == 0
        assert content(out) == content(undisturbed)


def test_a_second_process_is_refused(run: Path, dataset: Path, data: Transitions, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start(go_on, run, dataset, out)
    try:
        while not (out / shards.MANIFEST).exists():
            assert first.is_alive()
            time.sleep(0.001)
        os.kill(first.pid, signal.SIGSTOP)
        with contextlib.suppress(FileNotFoundError):
            before = content(out)
            with pytest.raises(InputError, match="another process is at work"):
                generate(run, data, out)
            assert content(out) == before
    finally:
        first.kill()
        first.join()


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk(run: Path, data: Transitions, undisturbed: Path, tmp_path: Path) -> None:
    """All shards that were there stay, and the same call goes on once there is room."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    for number in (1, 4):
        (out / f"shard-00000{number}.hdf5").unlink()
    with files_of_at_most(16_384), pytest.raises(InputError, match=r"cannot write .*shard-000001"):
        generate(run, data, out)
    assert {name for name in content(out) if name.startswith("shard")} == {
        f"shard-00000{number}.hdf5" for number in (0, 2, 3, 5)
    }
    generate(run, data, out)
    assert content(out) == content(undisturbed)


def test_too_little_room_is_told_before(
    run: Path, data: Transitions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1000))
    with pytest.raises(InputError, match=r"takes another 0\.0 GiB, the disk has 0\.0 free"):
        generate(run, data, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_corrupt_shard(
    run: Path, data: Transitions, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    assert main(["rollout", "--verify", str(out), "--quiet"]) == 0
    assert "6 shards, all sound" in capsys.readouterr().out
    path = out / "shard-000002.hdf5"
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 1
    path.write_bytes(damaged)
    (out / "shard-000004.hdf5").unlink()
    assert main(["rollout", "--verify", str(out), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert "2 of 6 shards are not sound" in error
    assert "shard-000002.hdf5 has other bytes" in error and "shard-000004.hdf5 does not exist" in error
    path.unlink()
    generate(run, data, out)
    assert content(out) == content(undisturbed)
    path.write_bytes(damaged[:-10])
    with pytest.raises(
        InputError, match=r"shard-000002\.hdf5 has [\d,]+ bytes, manifest\.json says .*delete it"
    ):
        generate(run, data, out)


def test_other_rollouts_and_other_things(
    run: Path, data: Transitions, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    for change, message in (
        ({"seed": 8}, "there seed is 7, here 8"),
        ({"count": 5}, "there count is 1100, here 5"),
        ({"format": "parquet"}, "there format is 'hdf5', here 'parquet'"),
    ):
        with pytest.raises(InputError, match=f"holds other rollouts: {message}"):
            generate(run, data, out, **change)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").touch()
    with pytest.raises(InputError, match="holds other things"):
        generate(run, data, tmp_path / "full")
    (out / shards.MANIFEST).unlink()
    with pytest.raises(InputError, match="holds other things"):
        generate(run, data, out)
    assert content(out).keys() == content(undisturbed).keys() - {shards.MANIFEST}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 10**30}, r"count must be less than \d+, got 10000"),
        (
            {"count": 10**15},
            "5,000,000,000,000 shards are more than 1,000,000; raise shard_rows or lower count",
        ),
        ({"shard_rows": 2**32}, "shard_rows must be less than 4294967296"),
        ({"shard_rows": 2.0}, "shard_rows must be a valid integer"),
        ({"seed": 2**64}, "seed must be less than 18446744073709551616"),
        ({"horizon": 2**31}, "horizon must be less than 2147483648"),
        ({"ray": "127.0.0.1:1"}, "cannot reach a Ray cluster|takes the extra"),
        ({"count": 0}, "count must be greater than or equal to 1, got 0"),
        ({"shard_rows": 0}, "shard_rows must be greater than or equal to 1"),
        ({"format": "csv"}, "no format 'csv'.*there are hdf5: none, lzf, gzip; parquet: none, snappy, zstd"),
        ({"compression": "zstd"}, "no format 'hdf5' with compression 'zstd'"),
        ({"horizon": 2**31 - 1}, "lower count, shard_rows or horizon"),
        ({"backend": "abacus"}, "unknown backend 'abacus'"),
    ],
)
def test_bad_numbers(
    run: Path, data: Transitions, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        generate(run, data, tmp_path / "new" / "out", **change)
    assert not list(tmp_path.iterdir())


def test_models_without_a_finite_prediction(run: Path, data: Transitions, tmp_path: Path) -> None:
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    ensemble = EnsembleDynamics.load(run)
    with torch.no_grad():
        ensemble.biases[-1].fill_(3e38)
        ensemble.weights[-1].fill_(3e38)
    ensemble.save(broken)
    with pytest.raises(InputError, match="had no finite transition; the ensemble or the policy is broken"):
        generate(broken, data, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


# --- interruptions


@pytest.mark.parametrize(("format", "compression"), [("hdf5", "none"), ("hdf5", "gzip"), ("parquet", "zstd")])
def test_an_interruption_abandons_the_shard_that_is_written(
    run: Path,
    data: Transitions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    format: str,
    compression: str,
) -> None:
    """The second shard is being written when the third is interrupted."""
    writing = threading.Event()
    write_file, make_shard = shards.write_file, shards.make_shard

    def slowly(path: Path, arrays: Any, metadata: Any, compression: Any, check: Callable[[], None]) -> Any:
        def slow_check() -> None:
            if metadata["shard"] == 1:
                writing.set()
                time.sleep(0.05)
            check()

        return write_file(path, arrays, metadata, compression, slow_check)

    def interrupted(generator: Any, ring: Any, plan: Any, shard: int, advance: Any) -> Any:
        if shard == 2:
            assert writing.wait(10)
            raise KeyboardInterrupt
        return make_shard(generator, ring, plan, shard, advance)

    monkeypatch.setattr(shards, "write_file", slowly)
    monkeypatch.setattr(shards, "make_shard", interrupted)
    monkeypatch.setattr(shard_files, "_BLOCK", 64)
    monkeypatch.setattr(shard_files, "_ROW_GROUP", 2)
    options: dict[str, Any] = {"format": format, "compression": compression}
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        generate(run, data, tmp_path / "out", **options)
    assert time.monotonic() - started < 5
    assert content(tmp_path / "out").keys() == {f"shard-000000.{format}", shards.MANIFEST}
    assert len(shards.read_manifest(tmp_path / "out").shards) == 1
    monkeypatch.undo()
    generate(run, data, tmp_path / "out", **options)
    shards.verify(tmp_path / "out", quiet=True)


def test_an_interruption_before_the_first_shard_leaves_nothing(
    run: Path, data: Transitions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "make_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(run, data, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- what others have made of a folder


@pytest.fixture(params=["hdf5", "parquet"])
def recorded(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of shards as format_version 1 was first written."""
    return Path(shutil.copytree(RECORDED / "shards" / request.param, tmp_path / "recorded"))


def test_recorded_shards_are_read(recorded: Path) -> None:
    manifest = shards.verify(recorded, quiet=True)
    assert len(open_rollouts(recorded)[:]) == manifest.plan.count
    # What the shards' own metadata call the plan.
    assert open_rollouts(recorded).shard(0).info["plan"] == manifest.plan.sha256()
    assert json.loads((recorded / shards.MANIFEST).read_text()) == dataclasses.asdict(manifest)


def edit(folder: Path, change: Callable[[Any], None]) -> None:
    manifest = json.loads((folder / shards.MANIFEST).read_text())
    change(manifest)
    (folder / shards.MANIFEST).write_text(json.dumps(manifest))


def places(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a manifest; the first and last elements stand for a list."""
    yield where
    some = value if isinstance(value, dict) else {0, len(value) - 1} if isinstance(value, list) else ()
    for key in some:
        yield from places(value[key], (*where, key))


@pytest.mark.parametrize("recorded", ["hdf5"], indirect=True)
def test_every_change_of_a_manifest_is_refused_or_harmless(
    recorded: Path, run: Path, data: Transitions
) -> None:
    original = (recorded / shards.MANIFEST).read_text()
    before = content(recorded).keys()
    huge = (-1, 2**63, 10**400, 1.5, float("nan"), None, True, "x", "../x", [], [[]], {}, {"a": {"a": 1}})
    refused = 0
    for where in places(json.loads(original)):
        for value in (*huge, "missing"):
            manifest = json.loads(original)
            holder = manifest
            for key in where[:-1]:
                holder = holder[key]
            if not where:
                manifest = value
            elif value == "missing":
                del holder[where[-1]]
            else:
                holder[where[-1]] = value
            (recorded / shards.MANIFEST).write_text(json.dumps(manifest))
            try:
                shards.as_text(shards.summarise(shards.read_manifest(recorded)))
                shards._listed_files(recorded)
            except InputError as error:
                refused += 1
                assert "manifest.json" in str(error) and "\n" not in str(error)
            else:
                # Names, sums and settings that a manifest may have.
                assert where[-1] in (
                    "reward_sum",
                    "penalty_sum",
                    "dataset",
                    "mopo_fast",
                    "task",
                    "backend",
                    "seed",
                    "termination",
                    "penalty_coef",
                    "shards",
                    0,
                    1,
                    "starts",
                ), (where, value)
    assert refused > 500
    assert content(recorded).keys() == before


@pytest.mark.parametrize(
    "name", ["../precious.txt", "/precious.txt", "shard-000000.txt", "shard-000009.hdf5"]
)
def test_files_of_other_names_are_neither_read_nor_deleted(
    run: Path, data: Transitions, undisturbed: Path, tmp_path: Path, name: str
) -> None:
    out, precious = tmp_path / "out", tmp_path / "precious.txt"
    shutil.copytree(undisturbed, out)
    precious.write_text("precious")
    name = str(precious) if name.startswith("/") else name
    edit(out, lambda manifest: manifest["shards"][0].update(file=name))
    before = content(out)
    for call in (
        lambda: open_rollouts(out),
        lambda: shards.verify(out, quiet=True),
        lambda: generate(run, data, out),
        lambda: generate(run, data, out, overwrite=True),
    ):
        with pytest.raises(InputError, match=r"manifest\.json: .* is none of the plan's 6 shards"):
            call()
    assert content(out) == before and precious.read_text() == "precious"


def test_a_shard_listed_twice_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    edit(out, lambda manifest: manifest["shards"].__setitem__(1, manifest["shards"][0]))
    with pytest.raises(InputError, match=r"shard-000000\.hdf5 is listed twice"):
        shards.verify(out, quiet=True)


@pytest.mark.parametrize("name", [shards.MANIFEST, "shard-000002.hdf5"])
def test_symbolic_links_are_refused(
    run: Path, data: Transitions, undisturbed: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    (out / name).rename(tmp_path / name)
    (out / name).symlink_to(tmp_path / name)
    for call in (
        lambda: open_rollouts(out)[:],
        lambda: shards.verify(out, quiet=True),
        lambda: generate(run, data, out),
        lambda: generate(run, data, out, overwrite=True),
    ):
        with pytest.raises(InputError, match="is a symbolic link or no file"):
            call()
    assert content(out) == content(undisturbed)


def test_a_refused_overwrite_deletes_nothing(
    run: Path, data: Transitions, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    for change in ({"count": 0}, {"seed": -1}, {"backend": "abacus"}):
        with pytest.raises(InputError):
            generate(run, data, out, overwrite=True, **change)
        assert content(out) == content(undisturbed)


def test_other_files_in_the_folder_are_ignored(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    for name in (".lock", ".shard-000001.hdf5.abcdefgh.tmp", "notes.txt", "shard-000009.hdf5"):
        (out / name).write_text("x")
    assert len(open_rollouts(out)[:]) == COUNT
    shards.verify(out, quiet=True)


def test_a_summary_of_nothing(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copy(undisturbed / shards.MANIFEST, tmp_path)
    edit(tmp_path, lambda manifest: manifest.update(shards=[]))
    assert "0 transitions of 0 rollouts" in shards.as_text(shards.summarise(shards.read_manifest(tmp_path)))


# --- hostile shards


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("step", lambda a: a.astype(np.int64), "step must be int32"),
        ("rewards", lambda a: a.astype(np.float16), "rewards must be float32"),
        ("actions", lambda a: a[:, 0], "actions must be float32 of 2 dimensions"),
        ("penalties", lambda a: a[:-1], "penalties must be float32 of 1 dimensions and 200 rows"),
        ("observations", lambda a: a[:, :4], "have different shapes"),
        ("extra", None, "beside a rollout's arrays: 'extra'"),
    ],
)
def test_other_arrays_are_refused_as_they_are_read(
    undisturbed: Path, tmp_path: Path, name: str, change: Callable[[Any], Any] | None, message: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    path = out / "shard-000001.hdf5"
    arrays, metadata = shard_files.read_file(path)
    changed = {**arrays, name: change(arrays[name]) if change else arrays["step"]}
    shard_files.write_file(tmp_path / "x.hdf5", changed, metadata, "none")
    (tmp_path / "x.hdf5").replace(path)
    with pytest.raises(InputError, match=message):
        open_rollouts(out).shard(1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("step", 3, "step must be from 0 to below 3"),
        ("rollout_index", 0, "rollout_index must be from 4294967296"),
        ("members", 32, "members must be from -1 to below 32"),
        ("penalties", -1.0, "penalties must be from 0"),
        ("rewards", 7e4, "rewards are not raw_rewards"),
        ("rewards", np.nan, "rewards is not finite at row 5"),
        ("timeouts", None, "timeouts are not where"),
        ("step", 1, "manifest.json has another rows_of_step"),
    ],
)
def test_values_out_of_range_are_no_sound_shard(
    undisturbed: Path, tmp_path: Path, name: str, value: float | None, message: str
) -> None:
    """Even where the manifest has the damaged file's bytes."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    path = out / "shard-000001.hdf5"
    found, metadata = shard_files.read_file(path)
    arrays = {key: np.array(array) for key, array in found.items()}
    other = 5 if value != 1 else int(np.flatnonzero(arrays["step"] == 0)[0])
    arrays[name][other] = ~arrays[name][other] if value is None else value
    size, digest = shard_files.write_file(tmp_path / "x.hdf5", arrays, metadata, "none")
    (tmp_path / "x.hdf5").replace(path)
    edit(out, lambda manifest: manifest["shards"][1].update(sha256=digest, bytes=size))
    with pytest.raises(InputError, match=message):
        shards.verify(out, quiet=True)


def test_parquet_of_other_types_is_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    floats = pyarrow.array([1.0, 2.0], pyarrow.float32())
    wide = pyarrow.array([0.0] * 8, pyarrow.float32())
    path = tmp_path / "a.parquet"
    for table, message in (
        ({"a": pyarrow.array([{"b": 1}])}, "a is of type struct"),
        ({"a": pyarrow.array([[1], [2]])}, "a is of type list"),
        ({"a": pyarrow.array(["x"])}, "a is of type string"),
        ({"a": pyarrow.array([b"x"])}, "a is of type binary"),
        ({"a": pyarrow.array([1.0, None])}, "a has empty places"),
        ({f"a{i}": floats for i in range(65)}, "it has 65 columns"),
        ({"a": pyarrow.FixedSizeListArray.from_arrays(wide, 4)}, "KeyError|mopo_fast|subscriptable"),
    ):
        whole = pyarrow.table(table)
        if "a0" in table or not isinstance(table.get("a"), pyarrow.FixedSizeListArray):
            whole = whole.replace_schema_metadata({"mopo_fast": "{}"})
        pyarrow.parquet.write_table(whole, path)
        with pytest.raises(InputError, match=message):
            shard_files.read_file(path)


def test_parquet_that_announces_more_than_the_memory_is_not_read(tmp_path: Path) -> None:
    """A run of one value is a few bytes, whatever its length."""
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

        def refuse(what: str, size: int, *_: Any) -> None:
            asked.append(size)
            raise InputError("too much")

        patch.setattr(shard_files, "check_memory", refuse)
        with pytest.raises(InputError, match="too much"):
            shard_files.read_file(path)
    assert path.stat().st_size < 10**6 < 60 * 10**6 <= asked[0]


def read_damaged(folder: Path, count: int) -> None:
    """Read a shard with other bytes, again and again: it is sound, or an `InputError`."""
    plan = shards.read_manifest(folder).plan
    path, rng = folder / plan.file(0), random.Random(0)
    whole = path.read_bytes()
    for _ in range(count):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 2, 8, 64))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.choice((None, rng.randrange(len(damaged))))])
        with contextlib.suppress(InputError):
            shards._read_record(path, plan, 0)


def test_damaged_shards_end_in_one_error(recorded: Path) -> None:
    """In a process of its own, for what a library might do with it."""
    assert attempt(read_damaged, recorded, 300, kill_after=120) == 0


# --- formats


@pytest.mark.parametrize(
    ("format", "compression"),
    [(format, compression) for format, some in shard_files.COMPRESSIONS.items() for compression in some],
)
def test_every_format(
    run: Path, data: Transitions, undisturbed: Path, tmp_path: Path, format: str, compression: str
) -> None:
    out = tmp_path / "out"
    generate(run, data, out, format=format, compression=compression)
    again = content(out)
    assert generate(run, data, out, format=format, compression=compression).shards
    assert content(out) == again
    shards.verify(out, quiet=True)
    for one, other in zip(open_rollouts(undisturbed), open_rollouts(out), strict=True):
        assert one.arrays().keys() == other.arrays().keys()
        for name, array in one.arrays().items():
            assert torch.equal(array, other.arrays()[name]), name
    path = out / f"shard-000003.{format}"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match=r"shard-000003\.\w+ is not a whole"):
        shard_files.read_file(path)


def test_parquet_is_read_by_others(run: Path, data: Transitions, undisturbed: Path, tmp_path: Path) -> None:
    import pyarrow.dataset

    generate(run, data, tmp_path / "out", format="parquet")
    table = pyarrow.dataset.dataset(sorted((tmp_path / "out").glob("*.parquet"))).to_table()
    whole = open_rollouts(undisturbed)[:]
    assert np.array_equal(np.stack(table["observations"].to_numpy()), whole.observations)
    assert np.array_equal(table["penalties"].to_numpy(), whole.penalties)


def test_arrays_in_place(tmp_path: Path) -> None:
    """Of sizes that nothing divides, aligned all the same; and none at all."""
    random = np.random.default_rng(0)
    for rows in (0, 1, 7, 1000):
        arrays = {
            "terminals": random.random(rows) < 0.5,
            "rollout_index": random.integers(2**60, size=rows),
            "observations": random.normal(size=(rows, 3)).astype(np.float32),
        }
        path = tmp_path / f"{rows}.hdf5"
        size, digest = shard_files.write_file(path, arrays, {"seed": 3, "task": "hopper"}, "none")
        assert (size, digest) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        back, metadata = shard_files.read_file(path)
        assert metadata == {"seed": 3, "task": "hopper"}
        for name, array in arrays.items():
            assert back[name].dtype == array.dtype and np.array_equal(back[name], array)
            assert back[name].flags.aligned


def test_parquet_without_pyarrow(
    run: Path, data: Transitions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"takes the extra mopo_fast\[parquet\]"):
        generate(run, data, tmp_path / "out", format="parquet")


# --- reading


@pytest.mark.parametrize("format", ["hdf5", "parquet"])
def test_rows_across_shards(run: Path, data: Transitions, tmp_path: Path, format: str) -> None:
    generate(run, data, tmp_path, format=format)
    rollouts = open_rollouts(tmp_path)
    parts = list(rollouts)
    whole = {name: torch.cat([part.arrays()[name] for part in parts]) for name in parts[0].arrays()}
    mask = np.zeros(COUNT, bool)
    mask[[3, 199, 200, 1099]] = True
    for index in (slice(150, 450), slice(None, None, 97), mask, np.array([1099, 0, 500, 0]), slice(0, 0)):
        found = rollouts[index]
        for name, array in whole.items():
            assert torch.equal(found.arrays()[name], torch.from_numpy(array.numpy()[index].copy()))
    with pytest.raises(TypeError, match="for one row use"):
        rollouts[3]
    with pytest.raises(IndexError):
        rollouts[np.array([COUNT])]
    first, second = rollouts.batches(64, seed=1), rollouts.batches(64, seed=1)
    for _ in range(3):
        one, other = next(first), next(second)
        assert len(one) == 64 and torch.equal(one.observations, other.observations)


def test_an_unfinished_folder(run: Path, data: Transitions, undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest\.json does not exist"):
        open_rollouts(tmp_path)
    manifest = json.loads((undisturbed / shards.MANIFEST).read_text())
    manifest["shards"].pop()
    (tmp_path / shards.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="has 1,000 of 1,100 transitions"):
        open_rollouts(tmp_path)
    for broken in ("{}", "[]", json.dumps(manifest | {"format_version": 9})):
        (tmp_path / shards.MANIFEST).write_text(broken)
        with pytest.raises(InputError, match=r"manifest\.json"):
            open_rollouts(tmp_path)


def test_the_summary_counts_every_row(undisturbed: Path) -> None:
    rollouts = open_rollouts(undisturbed)
    summary, whole = shards.summarise(rollouts.manifest), rollouts[:]
    assert whole.penalties is not None and whole.step is not None
    assert summary["rows"] == sum(summary["penalty_counts"]) == sum(summary["rows_of_step"]) == COUNT
    assert np.isclose(summary["penalty_mean"], whole.penalties.mean()) and summary["non_finite"] == 0
    assert np.isclose(summary["reward_mean"], whole.rewards.mean())
    edges = torch.tensor(summary["penalty_edges"], dtype=torch.float32)
    expected = torch.bincount(torch.bucketize(whole.penalties, edges, right=True), minlength=len(edges) + 1)
    assert summary["penalty_counts"] == expected.tolist()
    ended = torch.bincount(whole.step[whole.terminals], minlength=3)
    assert summary["terminals_of_step"] == ended.tolist()
    text = shards.as_text(summary)
    assert "1,100 transitions" in text and "step   1" in text and "from" in text


# --- the command


def test_the_command(
    run: Path, dataset: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["rollout", str(run), "--dataset", str(dataset), "--out", str(out), "--count", str(COUNT)]
    command += ["--shard-rows", str(SHARD), "--seed", "7", "--quiet"]
    assert main(command) == 0
    assert "1,100 transitions" in capsys.readouterr().out
    assert content(out) == content(undisturbed)
    assert main([*command, "--penalty-coef", "0"]) == 2
    assert "holds other rollouts" in capsys.readouterr().err
    assert main([*command, "--penalty-coef", "0", "--overwrite"]) == 0
    assert (open_rollouts(out)[:].rewards - open_rollouts(undisturbed)[:].raw_rewards).abs().max() == 0
    for wrong, message in (
        (["rollout"], "say what to roll out"),
        (["rollout", str(run), "--verify", str(out)], "--verify takes a folder and neither"),
        (
            ["rollout", str(run), "--dataset", str(dataset), "--out", "a.hdf5", "--ray", "local"],
            "--ray takes a folder",
        ),
    ):
        assert main(wrong) == 2
        assert message in " ".join(capsys.readouterr().err.split())
