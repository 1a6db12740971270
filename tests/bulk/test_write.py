"""Test writing folders of shards: each row is written exactly once, despite kills and interruptions."""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed import CONTEXT, attempt, start
from small_shards import COUNT, SHARD, content, edit, files_of_at_most, make_shards

from mopo_fast import Actor, EnsembleDynamics, InputError, RolloutEngine, Transitions, open_rollouts
from mopo_fast.backends.philox import BATCH_STREAM, random_choice
from mopo_fast.bulk import files, write
from mopo_fast.bulk.generate import Generator
from mopo_fast.bulk.read import verify
from mopo_fast.cli import main
from mopo_fast.config import Checksum
from mopo_fast.data import load_dataset, shards
from mopo_fast.data.manifest import MANIFEST, OLD_MANIFEST, read_manifest
from mopo_fast.utils.seeds import ROLLOUT, START, derive_seed

CONTEXT.set_forkserver_preload(["mopo_fast.bulk.write", "pytest"])


def test_what_a_shard_holds(run: Path, data: Transitions, undisturbed: Path) -> None:
    """Shard k holds the rollouts from k * 2^32 on, cut to its number of rows."""
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


@pytest.mark.parametrize("format", ["hdf5", "parquet"])
def test_a_folder_grows(run: Path, data: Transitions, tmp_path: Path, format: str) -> None:
    """A grown folder has the bytes of one that was asked for the larger count from the start."""
    grown, asked = tmp_path / "grown", tmp_path / "asked"
    make_shards(run, data, grown, format=format)
    first = (grown / f"shard-000000.{format}").stat().st_ino
    make_shards(run, data, grown, format=format, count=COUNT + 550)
    make_shards(run, data, asked, format=format, count=COUNT + 550)
    assert len(content(asked)) == 1 + 9 and content(grown) == content(asked)
    # Whole shards are kept, not made again.
    assert (grown / f"shard-000000.{format}").stat().st_ino == first
    with pytest.raises(InputError, match="there count is 1650, here 1100"):
        make_shards(run, data, grown, format=format)
    assert content(grown) == content(asked)


def test_killed_while_a_folder_grows(run: Path, dataset: Path, undisturbed: Path, tmp_path: Path) -> None:
    out, changes = tmp_path / "out", 1
    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(undisturbed, out)
        done = attempt(grow, run, dataset, out, die_at=(out, changes)) == 0
        assert attempt(grow, run, dataset, out) == 0
        found = content(out)
        if changes == 1:
            expected = found
        assert found == expected and verify(out, quiet=True).plan.count == COUNT + 150
        changes += 1
        if done:
            break
    assert changes > 4


def test_threads_do_not_matter(run: Path, data: Transitions, undisturbed: Path, tmp_path: Path) -> None:
    make_shards(run, data, tmp_path / "out", threads=2)
    assert content(tmp_path / "out") == content(undisturbed)


def test_torch_leaves_the_cores_to_the_kernels_and_the_writer(
    run: Path, data: Transitions, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, rollout, before = set(), RolloutEngine.rollout, torch.get_num_threads()

    def observed(*args: Any, **options: Any) -> Transitions:
        seen.add(torch.get_num_threads())
        return rollout(*args, **options)

    monkeypatch.setattr(RolloutEngine, "rollout", observed)
    torch.set_num_threads(2)
    try:
        make_shards(run, data, tmp_path / "out", backend="cpu")
        assert seen == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert content(tmp_path / "out") == content(undisturbed)


# --- processes that are killed, and others at the same time


def go_on(run: Path, dataset: Path, out: Path) -> None:
    make_shards(run, load_dataset(dataset), out)


def grow(run: Path, dataset: Path, out: Path) -> None:
    make_shards(run, load_dataset(dataset), out, count=COUNT + 150)


def test_killed_at_its_own_writes(run: Path, dataset: Path, undisturbed: Path, tmp_path: Path) -> None:
    out, changes = tmp_path / "out", 1
    while attempt(go_on, run, dataset, out, die_at=(out, changes)) != 0:
        # Finished shards are kept, and no partial file has a shard's name.
        for name, value in content(out).items():
            assert name == MANIFEST or name.startswith(".") or value == content(undisturbed)[name]
        changes += 1
    assert changes > 4
    assert content(out) == content(undisturbed)


def test_killed_at_random_moments(run: Path, dataset: Path, undisturbed: Path, tmp_path: Path) -> None:
    rng, longest = random.Random(0), 0.6
    for number in range(4):
        out = tmp_path / f"out-{number}"
        while attempt(go_on, run, dataset, out, kill_after=rng.uniform(0, longest)) == 0:
            # The work ended before the kill, so start over with shorter delays.
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
        while not (out / MANIFEST).exists():
            assert first.is_alive()
            time.sleep(0.001)
        os.kill(first.pid, signal.SIGSTOP)
        with contextlib.suppress(FileNotFoundError):
            before = content(out)
            with pytest.raises(InputError, match="another process is at work"):
                make_shards(run, data, out)
            assert content(out) == before
    finally:
        first.kill()
        first.join()


# --- disks


def test_a_full_disk(run: Path, data: Transitions, undisturbed: Path, tmp_path: Path) -> None:
    """Finished shards are kept, and the same call writes the others once there is space."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    for number in (1, 4):
        (out / f"shard-00000{number}.hdf5").unlink()
    with files_of_at_most(16_384), pytest.raises(InputError, match=r"cannot write .*shard-000001"):
        make_shards(run, data, out)
    assert {name for name in content(out) if name.startswith("shard")} == {
        f"shard-00000{number}.hdf5" for number in (0, 2, 3, 5)
    }
    make_shards(run, data, out)
    assert content(out) == content(undisturbed)


def test_too_little_room_is_told_before(
    run: Path, data: Transitions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1000))
    with pytest.raises(InputError, match=r"takes another [\d.]+ KiB, the disk has 1,000 bytes free"):
        make_shards(run, data, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- what is refused


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
            make_shards(run, data, out, **change)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").touch()
    with pytest.raises(InputError, match="holds other files"):
        make_shards(run, data, tmp_path / "full")
    (out / MANIFEST).unlink()
    with pytest.raises(InputError, match="holds other files"):
        make_shards(run, data, out)
    assert content(out).keys() == content(undisturbed).keys() - {MANIFEST}


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
        ({"ray": "127.0.0.1:1"}, "cannot reach a Ray cluster|--ray needs Ray"),
        ({"count": 0}, "count must be greater than or equal to 1, got 0"),
        ({"shard_rows": 0}, "shard_rows must be greater than or equal to 1"),
        ({"format": "csv"}, "no format 'csv'.*there are hdf5: none, lzf, gzip; parquet: none, snappy, zstd"),
        ({"checksum": "md5"}, "unknown checksum 'md5'; choose one of xxh3_128, sha256"),
        ({"compression": "zstd"}, "no format 'hdf5' with compression 'zstd'"),
        ({"horizon": 2**31 - 1}, "lower count, shard_rows or horizon"),
        ({"backend": "abacus"}, "unknown backend 'abacus'"),
    ],
)
def test_bad_numbers(
    run: Path, data: Transitions, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_shards(run, data, tmp_path / "new" / "out", **change)
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
        make_shards(broken, data, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_parquet_without_pyarrow(
    run: Path, data: Transitions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"need pyarrow; .* '\.\[parquet\]'"):
        make_shards(run, data, tmp_path / "out", format="parquet")


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
    """The third shard is interrupted while the second is being written."""
    writing = threading.Event()
    write_file, make_shard = files.write_file, Generator.make_shard

    def slowly(path: Path, arrays: Any, metadata: Any, *options: Any) -> Any:
        *how, check = options

        def slow_check() -> None:
            if metadata["shard"] == 1:
                writing.set()
                time.sleep(0.05)
            check()

        return write_file(path, arrays, metadata, *how, slow_check)

    def interrupted(generator: Generator, plan: Any, shard: int, ring: Any, advance: Any) -> Any:
        if shard == 2:
            assert writing.wait(10)
            raise KeyboardInterrupt
        return make_shard(generator, plan, shard, ring, advance)

    monkeypatch.setattr(files, "write_file", slowly)
    monkeypatch.setattr(Generator, "make_shard", interrupted)
    monkeypatch.setattr(files, "_BLOCK", 64)
    monkeypatch.setattr(files, "_ROW_GROUP", 2)
    options: dict[str, Any] = {"format": format, "compression": compression}
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        make_shards(run, data, tmp_path / "out", **options)
    assert time.monotonic() - started < 5
    assert content(tmp_path / "out").keys() == {f"shard-000000.{format}", MANIFEST}
    assert len(read_manifest(tmp_path / "out").shards) == 1
    monkeypatch.undo()
    make_shards(run, data, tmp_path / "out", **options)
    verify(tmp_path / "out", quiet=True)


def test_an_interruption_before_the_first_shard_leaves_nothing(
    run: Path, data: Transitions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "make_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_shards(run, data, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- folders that others have changed


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
        lambda: verify(out, quiet=True),
        lambda: make_shards(run, data, out),
        lambda: make_shards(run, data, out, overwrite=True),
    ):
        with pytest.raises(InputError, match=r"manifest\.json: .* is none of the plan's 6 shards"):
            call()
    assert content(out) == before and precious.read_text() == "precious"


@pytest.mark.parametrize("name", [MANIFEST, "shard-000002.hdf5"])
def test_symbolic_links_are_refused(
    run: Path, data: Transitions, undisturbed: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    (out / name).rename(tmp_path / name)
    (out / name).symlink_to(tmp_path / name)
    for call in (
        lambda: open_rollouts(out)[:],
        lambda: verify(out, quiet=True),
        lambda: make_shards(run, data, out),
        lambda: make_shards(run, data, out, overwrite=True),
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
            make_shards(run, data, out, overwrite=True, **change)
        assert content(out) == content(undisturbed)


def test_overwriting_other_rollouts(run: Path, data: Transitions, undisturbed: Path, tmp_path: Path) -> None:
    """A folder with other rollouts is refused, even if only their manifest is left."""
    make_shards(run, data, tmp_path / "there", seed=8)
    make_shards(run, data, tmp_path / "gone", seed=8)
    for path in (tmp_path / "gone").glob("shard-*"):
        path.unlink()
    for name in ("there", "gone"):
        with pytest.raises(InputError, match="there seed is 8, here 7"):
            make_shards(run, data, tmp_path / name)
        make_shards(run, data, tmp_path / name, overwrite=True)
        assert content(tmp_path / name) == content(undisturbed)


def test_a_shard_that_no_manifest_lists_yet_must_be_the_plans(
    run: Path, data: Transitions, undisturbed: Path, tmp_path: Path
) -> None:
    """There is no digest to check it by, so it is made again if it is the plan's, and else refused."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    path = out / "shard-000005.hdf5"
    arrays, metadata = shards.read_file(path)
    for change in ({"shard": 1}, {"plan": "x"}):
        edit(out, lambda manifest: manifest["shards"].pop())
        files.write_file(tmp_path / "x.hdf5", arrays, metadata | change, "none")
        (tmp_path / "x.hdf5").replace(path)
        with pytest.raises(InputError, match=r"shard-000005\.hdf5 belongs to another plan; delete it"):
            make_shards(run, data, out)
        shutil.rmtree(out)
        shutil.copytree(undisturbed, out)
    changed = {name: np.array(array) for name, array in arrays.items()}
    changed["rewards"][3] += 1
    files.write_file(tmp_path / "x.hdf5", changed, metadata, "none")
    for damaged in ((tmp_path / "x.hdf5").read_bytes(), b"", path.read_bytes()[:-10]):
        edit(out, lambda manifest: manifest["shards"].pop())
        path.write_bytes(damaged)
        make_shards(run, data, out)
        assert content(out) == content(undisturbed)


# --- going on


@pytest.mark.parametrize("cut", [0, 10])
def test_a_damaged_shard_is_named_and_made_again(
    run: Path,
    data: Transitions,
    undisturbed: Path,
    tmp_path: Path,
    cut: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    path = out / "shard-000002.hdf5"
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 1
    path.write_bytes(damaged[: len(damaged) - cut])
    os.utime(path, ns=(0, 0))
    make_shards(run, data, out)
    assert [record.getMessage() for record in caplog.records if "again" in record.getMessage()] == [
        f"{path} is made again: it is not the file that the manifest lists"
    ]
    assert content(out) == content(undisturbed)


def test_a_manifest_without_shards_binds_nobody(
    run: Path, data: Transitions, undisturbed: Path, tmp_path: Path
) -> None:
    """A first command with wrong settings was killed before its first shard."""
    out = tmp_path / "out"
    make_shards(run, data, out, seed=8, format="parquet")
    edit(out, lambda manifest: manifest["shards"].clear())
    for path in out.glob("shard-*"):
        path.unlink()
    make_shards(run, data, out)
    assert content(out) == content(undisturbed)


def test_an_old_manifest_is_renamed(run: Path, data: Transitions, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    (out / MANIFEST).rename(out / OLD_MANIFEST)
    (out / "shard-000001.hdf5").unlink()
    assert read_manifest(out) == read_manifest(undisturbed)
    with pytest.raises(InputError, match="there seed is 7, here 8"):
        make_shards(run, data, out, seed=8)
    assert (out / OLD_MANIFEST).exists()
    make_shards(run, data, out)
    assert content(out) == content(undisturbed)


# --- checksums


@pytest.mark.parametrize("format", ["hdf5", "parquet"])
@pytest.mark.parametrize("checksum", ["xxh3_128", "sha256"])
def test_a_flipped_byte_is_found(
    run: Path, data: Transitions, tmp_path: Path, checksum: Checksum, format: str
) -> None:
    """By `verify`, and by the call that made the shards, which keeps the folder's algorithm."""
    out = tmp_path / "out"
    made = make_shards(run, data, out, checksum=checksum, format=format)
    assert made == verify(out, quiet=True) and made.checksum == checksum
    whole, path = content(out), out / f"shard-000002.{format}"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=f"shard-000002.* has changed: its {checksum} checksum is not that"):
        verify(out, quiet=True)
    make_shards(run, data, out, format=format)
    assert content(out) == whole


def test_a_folder_keeps_its_checksum(run: Path, data: Transitions, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_shards(run, data, out, checksum="sha256")
    before = content(out)
    with pytest.raises(InputError, match="holds shards with sha256 checksums, and checksum is 'xxh3_128'"):
        make_shards(run, data, out, checksum="xxh3_128")
    assert content(out) == before
    assert make_shards(run, data, out, count=COUNT + 550).checksum == "sha256"
    assert make_shards(run, data, out, overwrite=True).checksum == "xxh3_128"


def test_a_folder_of_version_0_1_0_goes_on_with_its_sha256(
    run: Path, data: Transitions, tmp_path: Path
) -> None:
    out, new = tmp_path / "out", tmp_path / "new"
    for folder in (out, new):
        make_shards(run, data, folder, checksum="sha256")

    def as_before(manifest: Any) -> None:
        manifest["format_version"] = 1
        for shard in manifest["shards"]:
            shard["sha256"] = shard.pop("checksum").removeprefix("sha256:")

    edit(out, as_before)
    (out / MANIFEST).rename(out / OLD_MANIFEST)
    verify(out, quiet=True)
    path = out / "shard-000001.hdf5"
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"shard-000001\.hdf5 has changed: its sha256 checksum"):
        verify(out, quiet=True)
    for folder in (out, new):
        make_shards(run, data, folder, count=COUNT + 150)
    assert content(out) == content(new)


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
        (["rollout"], "needs RUN and --out"),
        (["rollout", str(run), "--verify", str(out)], "--verify takes a folder and neither"),
        (
            ["rollout", str(run), "--dataset", str(dataset), "--out", "a.hdf5", "--ray", "local"],
            "--ray takes a folder",
        ),
    ):
        assert main(wrong) == 2
        assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("halt_reward", [None, -9.0])
def test_shards_of_a_run_whose_penalties_end_rollouts(
    run: Path, data: Transitions, undisturbed: Path, tmp_path: Path, halt_reward: float | None
) -> None:
    penalties = open_rollouts(undisturbed)[:].penalties
    assert penalties is not None
    limit, own = float(penalties.median()), tmp_path / "run"
    shutil.copytree(run, own)
    config = json.loads((own / "config.json").read_text())
    config["rollout"] |= {"truncate_at": limit, "halt_reward": halt_reward, "member": "per_rollout"}
    (own / "config.json").write_text(json.dumps(config))
    make_shards(own, data, tmp_path / "out")
    verify(tmp_path / "out", quiet=True)
    rows = open_rollouts(tmp_path / "out")[:]
    assert rows.penalties is not None and rows.rollout_index is not None
    above = rows.penalties > limit
    ends = torch.cat([rows.rollout_index.diff() != 0, torch.ones_like(above[:1])])
    assert above.any() and ends[above].all()
    if halt_reward is None:
        assert not rows.terminals[above].all() and not (rows.rewards == -9.0).any()
    else:
        assert torch.equal(rows.rewards == -9.0, above) and rows.terminals[above].all()
