"""Test reading folders of shards: rows across shards, verification, sums."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_shards import COUNT, content, edit, make_shards

from mopo_fast import InputError, Transitions, open_rollouts
from mopo_fast.bulk import files
from mopo_fast.bulk import read as bulk_read
from mopo_fast.bulk.read import as_text, narrow_penalties, summarise, verify
from mopo_fast.cli import main
from mopo_fast.data import load_dataset, shards
from mopo_fast.data.convert import convert
from mopo_fast.data.manifest import MANIFEST, OLD_MANIFEST, read_manifest


@pytest.mark.parametrize("format", ["hdf5", "parquet"])
def test_rows_across_shards(run: Path, data: Transitions, tmp_path: Path, format: str) -> None:
    make_shards(run, data, tmp_path, format=format)
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


def test_repr_is_short(undisturbed: Path, data: Transitions) -> None:
    rollouts = open_rollouts(undisturbed)
    dataset = rollouts.manifest.plan.dataset
    assert repr(rollouts) == (
        f"Rollouts({str(undisturbed)!r}: 1,100 transitions in 6 shards, hdf5, data set {dataset!r})"
    )


def test_an_unfinished_folder(run: Path, data: Transitions, undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest\.json does not exist"):
        open_rollouts(tmp_path)
    manifest = json.loads((undisturbed / MANIFEST).read_text())
    manifest["shards"].pop()
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="has 1,000 of 1,100 transitions"):
        open_rollouts(tmp_path)
    for broken in ("{}", "[]", json.dumps(manifest | {"format_version": 9})):
        (tmp_path / MANIFEST).write_text(broken)
        with pytest.raises(InputError, match=r"manifest\.json"):
            open_rollouts(tmp_path)


def test_recorded_shards_are_read(recorded: Path) -> None:
    manifest = verify(recorded, quiet=True)
    assert len(open_rollouts(recorded)[:]) == manifest.plan.count
    # The metadata of each shard identify the plan by its SHA-256.
    assert open_rollouts(recorded).shard(0).info["plan"] == manifest.plan.sha256()
    # Only the checksums have another name since.
    written = json.loads((recorded / OLD_MANIFEST).read_text())
    for shard in written["shards"]:
        shard["checksum"] = f"sha256:{shard.pop('sha256')}"
    described = dataclasses.asdict(manifest) | {"plan": manifest.plan.described()}
    assert written == described and manifest.checksum == "sha256"


def test_other_files_in_the_folder_are_ignored(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    for name in (".lock", ".shard-000001.hdf5.abcdefgh.tmp", "notes.txt", "shard-000009.hdf5"):
        (out / name).write_text("x")
    assert len(open_rollouts(out)[:]) == COUNT
    verify(out, quiet=True)


# --- other readers of a folder


@pytest.mark.parametrize(("format", "compression"), [("hdf5", "none"), ("hdf5", "gzip"), ("parquet", "zstd")])
def test_a_folder_is_a_data_set(
    run: Path, data: Transitions, tmp_path: Path, format: str, compression: str
) -> None:
    out = tmp_path / "rollouts"
    make_shards(run, data, out, format=format, compression=compression)
    for source in (out, str(out), f"{out}/"):
        loaded, whole = load_dataset(source), open_rollouts(out)[:]
        assert (loaded.name, len(loaded), loaded.raw_rewards) == ("rollouts", COUNT, None)
        for name, array in loaded.arrays().items():
            assert torch.equal(array, whole.arrays()[name]), name
    assert loaded.info["metadata"]["penalty_coef"] == 2.0
    assert convert(str(out), str(tmp_path / "one.hdf5")) == COUNT
    mapped = load_dataset(tmp_path / "one.hdf5", memory_map=True)
    assert torch.equal(mapped.observations, loaded.observations)


def test_a_folder_that_is_no_data_set_is_refused(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="a folder without shards, for it has no _manifest"):
        load_dataset(tmp_path)
    for options in ({"memory_map": True}, {"compat": "d4rl"}):
        with pytest.raises(InputError, match="is a folder, which takes neither compat nor --memory-map"):
            load_dataset(undisturbed, **options)
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    edit(out, lambda manifest: manifest["shards"].pop())
    with pytest.raises(InputError, match="has 1,000 of 1,100 transitions; run its command again"):
        load_dataset(out)
    monkeypatch.setattr("mopo_fast.data.stored.available_memory", lambda: 1000)
    with pytest.raises(InputError, match="does not fit into memory"):
        load_dataset(undisturbed)


def test_values_of_a_folder_are_checked(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    path = out / "shard-000001.hdf5"
    found, metadata = shards.read_file(path)
    arrays = {key: np.array(array) for key, array in found.items()}
    arrays["actions"][3, 0] = np.nan
    files.write_file(tmp_path / "x.hdf5", arrays, metadata, "none")
    (tmp_path / "x.hdf5").replace(path)
    with pytest.raises(InputError, match=r"shard-000001.* actions is not finite at row 3"):
        load_dataset(out)


@pytest.fixture(scope="module")
def parquet(run: Path, data: Transitions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parquet") / "out"
    make_shards(run, data, out, format="parquet")
    return out


def test_pyarrow_reads_a_folder(parquet: Path) -> None:
    dataset = pytest.importorskip("pyarrow.dataset")
    assert_table(dataset.dataset(parquet).to_table(), parquet)


def test_pandas_reads_a_folder(parquet: Path) -> None:
    pandas = pytest.importorskip("pandas")
    assert_table(pandas.read_parquet(parquet), parquet)


def test_polars_reads_a_folder(parquet: Path) -> None:
    polars = pytest.importorskip("polars")
    assert_table(polars.read_parquet(parquet / "*.parquet"), parquet)
    assert_table(polars.scan_parquet(parquet, hidden_file_prefix="_").collect(), parquet)


def test_duckdb_reads_a_folder(parquet: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    assert_table(duckdb.sql(f"from '{parquet}/*.parquet'").df(), parquet)


def assert_table(table: Any, folder: Path) -> None:
    whole = open_rollouts(folder)[:]
    assert np.array_equal(np.stack(table["observations"].to_numpy()), whole.observations)
    assert np.array_equal(table["penalties"].to_numpy(), whole.penalties)
    assert len(table) == COUNT


# --- verification


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
    assert "shard-000002.hdf5 has changed" in error and "shard-000004.hdf5 does not exist" in error
    make_shards(run, data, out)
    assert content(out) == content(undisturbed)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("step", 3, "step must be from 0 to below 3"),
        ("rollout_index", 0, "rollout_index must be from 4294967296"),
        ("members", 256, "members must be from -1 to below 256"),
        ("penalties", -1.0, "penalties must be from 0"),
        ("rewards", 7e4, "rewards are not raw_rewards"),
        ("rewards", np.nan, "rewards is not finite at row 5"),
        ("timeouts", None, "timeouts are not where"),
        ("step", 1, "the manifest has rows_of_step"),
    ],
)
def test_values_out_of_range_are_no_sound_shard(
    undisturbed: Path, tmp_path: Path, name: str, value: float | None, message: str
) -> None:
    """A shard with invalid values is refused even if the manifest lists its checksum."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    path = out / "shard-000001.hdf5"
    found, metadata = shards.read_file(path)
    arrays = {key: np.array(array) for key, array in found.items()}
    other = 5 if value != 1 else int(np.flatnonzero(arrays["step"] == 0)[0])
    arrays[name][other] = ~arrays[name][other] if value is None else value
    size, checksum = files.write_file(tmp_path / "x.hdf5", arrays, metadata, "none")
    (tmp_path / "x.hdf5").replace(path)
    edit(out, lambda manifest: manifest["shards"][1].update(checksum=checksum, bytes=size))
    with pytest.raises(InputError, match=message):
        verify(out, quiet=True)


# --- sums


def test_the_summary_counts_every_row(undisturbed: Path) -> None:
    rollouts = open_rollouts(undisturbed)
    summary, whole = summarise(rollouts.manifest), rollouts[:]
    assert whole.penalties is not None and whole.step is not None
    assert summary["rows"] == sum(summary["penalty_counts"]) == sum(summary["rows_of_step"]) == COUNT
    assert np.isclose(summary["penalty_mean"], whole.penalties.mean()) and summary["non_finite"] == 0
    assert np.isclose(summary["reward_mean"], whole.rewards.mean())
    edges = torch.tensor(summary["penalty_edges"], dtype=torch.float32)
    expected = torch.bincount(torch.bucketize(whole.penalties, edges, right=True), minlength=len(edges) + 1)
    assert summary["penalty_counts"] == expected.tolist()
    ended = torch.bincount(whole.step[whole.terminals], minlength=3)
    assert summary["terminals_of_step"] == ended.tolist()
    text = as_text(summary)
    assert "1,100 transitions" in text and "step   1" in text and "from" in text


def test_narrow_penalties_have_bins_of_their_own(undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Penalties that fill one or two of the manifest's bins would be one or two bars."""
    manifest = read_manifest(undisturbed)
    first = shards.read_shard(undisturbed / manifest.shards[0].file, manifest.plan, 0)[0]["penalties"]
    monkeypatch.setattr(bulk_read, "_FEW_BINS", 99)
    found = narrow_penalties(undisturbed, manifest)
    assert found is not None and np.array_equal(found, first)
    narrow = np.linspace(1.45, 1.55, 1000, dtype=np.float32)
    text = as_text(summarise(manifest), narrow)
    assert "penalty of the first 1,000 transitions\n  from     1.45 █" in text and text.count("  from ") == 10
    monkeypatch.setattr(bulk_read, "_FEW_BINS", 1)
    assert narrow_penalties(undisturbed, manifest) is None


def test_a_summary_of_nothing(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copy(undisturbed / MANIFEST, tmp_path)
    edit(tmp_path, lambda manifest: manifest.update(shards=[]))
    assert "0 transitions of 0 rollouts" in as_text(summarise(read_manifest(tmp_path)))
