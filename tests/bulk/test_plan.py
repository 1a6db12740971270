"""Test the settings in a run's folder and manifests, including damaged and forged ones."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_shards import CONFIG, content, edit

from mopo_fast import InputError
from mopo_fast.bulk.plan import generate_config, run_settings
from mopo_fast.bulk.read import as_text, summarise, verify
from mopo_fast.data.manifest import OLD_MANIFEST, read_manifest


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"config\.json does not exist"),
        ("{", r"config\.json is not a readable JSON file"),
        ("[]", r"config\.json: the whole: .*object"),
        (json.dumps({"task": "hopper"}), r"config\.json has no settings of rollouts"),
        (json.dumps(CONFIG).replace('"horizon": 3', '"horizon": 0'), r"rollout\.horizon: .*at least|greater"),
        (
            json.dumps({**CONFIG, "rollout": {**CONFIG["rollout"], "horizon": "3"}}),
            r"config\.json: rollout\.horizon: Input should be a valid integer",
        ),
        (json.dumps({**CONFIG, "task": "cheetah"}), "unknown task 'cheetah'"),
    ],
)
def test_a_folder_that_is_no_run_is_named(tmp_path: Path, config: str | None, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match=message):
        run_settings(tmp_path)


# --- the manifest


def places(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value in a manifest, with only the first and the last element of a list."""
    yield where
    some = value if isinstance(value, dict) else {0, len(value) - 1} if isinstance(value, list) else ()
    for key in some:
        yield from places(value[key], (*where, key))


@pytest.mark.parametrize("recorded", ["hdf5"], indirect=True)
def test_every_change_of_a_manifest_is_refused_or_harmless(
    recorded: Path,
) -> None:
    original = (recorded / OLD_MANIFEST).read_text()
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
            (recorded / OLD_MANIFEST).write_text(json.dumps(manifest))
            try:
                manifest = read_manifest(recorded)
                as_text(summarise(manifest))
                assert {record.file for record in manifest.shards} <= before
            except InputError as error:
                refused += 1
                assert "manifest.json" in str(error) and "\n" not in str(error)
            else:
                # These names, sums and settings may have another value.
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


def test_a_shard_listed_twice_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    edit(out, lambda manifest: manifest["shards"].__setitem__(1, manifest["shards"][0]))
    with pytest.raises(InputError, match=r"shard-000000\.hdf5 is listed twice"):
        verify(out, quiet=True)


@pytest.mark.parametrize(
    ("checksum", "message"),
    [
        ("sha256:" + 64 * "0", "checksums of different algorithms: sha256, xxh3_128; a folder has one"),
        (64 * "0", "checksums of different algorithms: sha256, xxh3_128; a folder has one"),
        ("md5:" + 32 * "0", "unknown checksum 'md5', known are xxh3_128, sha256; read the folder with"),
        ("xxh3_128:" + 31 * "0", "a xxh3_128 checksum has 32 hexadecimal digits, got '0000"),
        ("xxh3_128:" + 32 * "G", "a xxh3_128 checksum has 32 hexadecimal digits, got 'GGGG"),
        ("x", "a sha256 checksum has 64 hexadecimal digits, got 'x'"),
    ],
)
def test_checksums_that_are_refused(undisturbed: Path, tmp_path: Path, checksum: str, message: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    edit(out, lambda manifest: manifest["shards"][1].update(checksum=checksum))
    with pytest.raises(InputError, match=f"_manifest.json: .*{message}"):
        read_manifest(out)


def test_limits_of_a_runs_rollouts(tmp_path: Path) -> None:
    """A quantile of the data's penalties is taken from the summary, which has the penalty."""
    run, config = tmp_path, json.loads(json.dumps(CONFIG))
    (run / "config.json").write_text(json.dumps(config))
    settings: dict[str, Any] = {
        "horizon": None,
        "seed": 0,
        "penalty_coef": None,
        "dtype": "float32",
        "backend": "auto",
    }
    plain = generate_config(run, **settings)
    assert (plain.truncate_at, plain.halt_reward, plain.member) == (None, None, "per_step")
    assert not plain.described().keys() & {"truncate_at", "halt_reward", "member"}
    config["rollout"] |= {"truncate_quantile": 0.9, "halt_reward": -2.0, "member": "per_rollout"}
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"is in its summary\.json, .* finish the run first"):
        generate_config(run, **settings)
    (run / "summary.json").write_text(json.dumps({"rollouts": {"truncate_at": 1.25, "length": 3.5}}))
    found = generate_config(run, **settings)
    assert (found.truncate_at, found.halt_reward, found.member) == (1.25, -2.0, "per_rollout")
    assert found.described()["truncate_at"] == 1.25
