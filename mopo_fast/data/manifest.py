"""Plan of a folder of shards, and the manifest that lists the finished shards.

Shard k begins at transition k * shard_rows of the folder, and holds the rollouts k * 2^32, k * 2^32 + 1, ...
It depends only on k and on the plan without its count, except that the count may cut the last shard short.
"""

import dataclasses
import hashlib
import json
import os
import re
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, AliasChoices, Field

from mopo_fast.config import (
    CHECKSUMS,
    LARGEST_FLOAT32,
    Checksum,
    Compression,
    MemberDraw,
    Penalty,
    PenaltyMembers,
    RolloutDtype,
    ShardFormat,
)
from mopo_fast.data.stored import Array
from mopo_fast.data.transitions import ROLLOUT_ARRAYS
from mopo_fast.errors import InputError
from mopo_fast.utils.atomic import read_json_as, regular_file, write_json

# Tools for Parquet ignore the files of a folder whose names begin with an underscore.
MANIFEST = "_manifest.json"
# Name of the manifest in folders of version 0.1.0.
OLD_MANIFEST = "manifest.json"
# Arrays of a shard. A time-out marks the last row of a rollout that did not end in a terminal state.
SHARD_ARRAYS = (*ROLLOUT_ARRAYS, "timeouts")
COMPRESSIONS: dict[ShardFormat, tuple[Compression, ...]] = {
    "hdf5": ("none", "lzf", "gzip"),
    "parquet": ("none", "snappy", "zstd"),
}
# Edges of the histogram of penalties: ten bins a decade, besides one bin below and one above all edges.
PENALTY_EDGES = np.geomspace(1e-4, 1e4, 81)
# A shard's number has six digits in its file's name.
_MOST_SHARDS = 10**6

Natural = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
ShardRows = Annotated[int, Field(ge=1, lt=2**32)]
# Number of rollouts that a shard begins; the next shard's rollouts are numbered 2^32 higher.
Starts = Annotated[int, Field(ge=1, le=2**32)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Float32 = Annotated[float, Field(ge=-LARGEST_FLOAT32, le=LARGEST_FLOAT32)]
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
# Hexadecimal digits of each checksum.
_DIGITS: dict[str, int] = {"xxh3_128": 32, "sha256": 64}


def _named_checksum(text: str) -> str:
    """Return a checksum with the name of its algorithm; a bare one, of format_version 1, is a SHA-256."""
    name, colon, digits = text.rpartition(":")
    name = name if colon else "sha256"
    if name not in CHECKSUMS:
        raise InputError(
            f"unknown checksum {reprlib.repr(name)}, known are {', '.join(CHECKSUMS)};"
            " read the folder with the version of mopo_fast that wrote it"
        )
    if not re.fullmatch(f"[0-9a-f]{{{_DIGITS[name]}}}", digits):
        raise InputError(
            f"a {name} checksum has {_DIGITS[name]} hexadecimal digits, got {reprlib.repr(digits)}"
        )
    return f"{name}:{digits}"


# Algorithm and hexadecimal digits, as in "xxh3_128:0123...". The field is called sha256 in format_version 1.
_Checksum = Annotated[
    str, Field(validation_alias=AliasChoices("checksum", "sha256")), AfterValidator(_named_checksum)
]


# --- the settings of rollouts


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run's rollouts: fields of `RolloutConfig`, resolved to values."""

    horizon: Annotated[int, Field(ge=1, lt=2**31)]
    penalty: Penalty
    penalty_coef: _NotNegative
    penalty_members: PenaltyMembers
    termination: str | None
    # Manifests of earlier versions have none of these.
    truncate_at: Annotated[_NotNegative, Field(le=LARGEST_FLOAT32)] | None = field(default=None, kw_only=True)
    halt_reward: _Float32 | None = field(default=None, kw_only=True)
    member: MemberDraw = field(default="per_step", kw_only=True)


# Their defaults are left out of digests and of shards, which so keep those of earlier versions.
_LATER = {one.name: one.default for one in dataclasses.fields(RunSettings) if one.kw_only}


@dataclass(frozen=True)
class GenerateConfig(RunSettings):
    """Everything that rollouts depend on, except the models and the start states."""

    task: str
    seed: Annotated[int, Field(ge=0, lt=2**64)]
    dtype: RolloutDtype
    backend: str

    def described(self) -> dict[str, Any]:
        """Return the settings without the later ones that have their defaults."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in _LATER or value != _LATER[name]}


# --- the plan and the manifest, as they are written and read


@dataclass(frozen=True)
class Plan:
    """Everything that decides the bytes of a folder's shards, except the processor.

    Kernels of another instruction set, or of another backend, round differently.

    Attributes:
        count: transitions of all shards together.
        shard_rows: transitions of each shard but the last.
        format: format of the files.
        compression: compression inside the files.
        rollout: settings of the rollouts.
        dataset: name of the data set that start states are drawn from.
        observations_sha256: digest of that data set's observations.
        dynamics_sha256: digest of the ensemble.
        policy_sha256: digest of the policy.
        mopo_fast: version of this package.
    """

    count: Positive
    shard_rows: ShardRows
    format: ShardFormat
    compression: Compression
    rollout: GenerateConfig
    dataset: str
    observations_sha256: _Digest
    dynamics_sha256: _Digest
    policy_sha256: _Digest
    mopo_fast: str

    def __post_init__(self) -> None:
        if self.compression not in COMPRESSIONS.get(self.format, ()):
            known = "; ".join(f"{name}: {', '.join(some)}" for name, some in COMPRESSIONS.items())
            raise InputError(
                f"no format {self.format!r} with compression {self.compression!r}; there are {known}"
            )
        if self.shards > _MOST_SHARDS:
            raise InputError(
                f"{self.shards:,} shards are more than {_MOST_SHARDS:,}; raise shard_rows or lower count"
            )

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.shard_rows)

    def rows(self, shard: int) -> int:
        """Return the number of transitions in a shard; the last shard may have fewer than the others."""
        return min(self.shard_rows, self.count - shard * self.shard_rows)

    def file(self, shard: int) -> str:
        """Return the name of a shard's file; names sort in the order of the numbers."""
        return f"shard-{shard:06d}.{self.format}"

    def shard(self, file: str) -> int:
        """Return the number of the shard that `file` names.

        Raises:
            InputError: no shard of the plan has that name.
        """
        digits = re.match("shard-([0-9]{6})[.]", file)
        shard = int(digits[1]) if digits else 0
        if not (shard < self.shards and file == self.file(shard)):
            raise InputError(f"{file!r} is none of the plan's {self.shards} shards")
        return shard

    def sha256(self) -> str:
        """Return the SHA-256 of the plan in hexadecimal."""
        return _sha256(self.described())

    def settings_sha256(self) -> str:
        """Return the SHA-256 of the plan without its count, which identifies its shards."""
        values = self.described()
        del values["count"]
        return _sha256(values)

    def described(self) -> dict[str, Any]:
        """Return the plan as a manifest has it."""
        return dataclasses.asdict(self) | {"rollout": self.rollout.described()}


def _sha256(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class ShardRecord:
    """Entry of a shard in the manifest: its file, and statistics of its rows.

    Attributes:
        file: name of the file.
        rows: number of transitions.
        bytes: size of the file in bytes.
        checksum: name of the algorithm, a colon, and the checksum of the file in hexadecimal.
        starts: number of rollouts begun.
        non_finite: number of rollouts that ended at a non-finite prediction.
        reward_sum: sum of the penalised rewards.
        penalty_sum: sum of the penalties.
        penalty_counts: histogram of the penalties over `PENALTY_EDGES`.
        rows_of_step: number of rows at each step of a rollout.
        terminals_of_step: number of terminal rows at each step of a rollout.
    """

    file: str
    rows: ShardRows
    bytes: Positive
    checksum: _Checksum
    starts: Starts
    non_finite: Natural
    reward_sum: _Finite
    penalty_sum: _NotNegative
    penalty_counts: list[Natural]
    rows_of_step: list[Natural]
    terminals_of_step: list[Natural]

    def __post_init__(self) -> None:
        if not sum(self.penalty_counts) == sum(self.rows_of_step) == self.rows:
            raise InputError(f"the counts of {self.file} do not add up to its {self.rows} rows")
        if len(self.penalty_counts) != len(PENALTY_EDGES) + 1:
            raise InputError(f"{self.file} has {len(self.penalty_counts)} penalty_counts")
        if len(self.terminals_of_step) != len(self.rows_of_step):
            raise InputError(f"{self.file} has terminals_of_step and rows_of_step of different lengths")
        ended = zip(self.terminals_of_step, self.rows_of_step, strict=True)
        if any(terminals > rows for terminals, rows in ended) or self.non_finite > self.starts:
            raise InputError(f"{self.file} has more ends than rollouts")


def count_rows(arrays: dict[str, Array], horizon: int) -> dict[str, Any]:
    """Return the fields of a `ShardRecord` that follow from the shard's arrays."""
    step = arrays["step"]
    bins = np.searchsorted(PENALTY_EDGES.astype(np.float32), arrays["penalties"], side="right")
    return {
        "rows": len(step),
        "reward_sum": float(arrays["rewards"].sum(dtype=np.float64)),
        "penalty_sum": float(arrays["penalties"].sum(dtype=np.float64)),
        "penalty_counts": np.bincount(bins, minlength=len(PENALTY_EDGES) + 1).tolist(),
        "rows_of_step": np.bincount(step, minlength=horizon).tolist(),
        "terminals_of_step": np.bincount(step[arrays["terminals"]], minlength=horizon).tolist(),
    }


@dataclass(frozen=True)
class Manifest:
    """Content of a folder's manifest.

    Attributes:
        format_version: version of the manifest's format. In version 1 all checksums are SHA-256.
        plan: plan of the folder.
        penalty_edges: edges of the histograms of penalties.
        shards: records of the finished shards, in the order of their numbers.
    """

    format_version: Annotated[int, Field(ge=1, le=2)]
    plan: Plan
    penalty_edges: list[_Finite]
    shards: list[ShardRecord]

    def __post_init__(self) -> None:
        plan, before = self.plan, -1
        if len(self.penalty_edges) != len(PENALTY_EDGES) or not np.allclose(
            self.penalty_edges, PENALTY_EDGES
        ):
            raise InputError("penalty_edges differ from those that mopo_fast writes")
        for record in self.shards:
            shard = plan.shard(record.file)
            if shard <= before:
                raise InputError(f"{record.file} is listed twice, or out of order")
            if record.rows != plan.rows(shard):
                raise InputError(f"{record.file} has {record.rows} rows, expected {plan.rows(shard)}")
            if len(record.rows_of_step) != plan.rollout.horizon:
                raise InputError(f"{record.file} has {len(record.rows_of_step)} steps in rows_of_step")
            before = shard
        algorithms = {algorithm_of(record.checksum) for record in self.shards}
        if len(algorithms) > 1:
            raise InputError(
                f"the shards have checksums of different algorithms: {', '.join(sorted(algorithms))};"
                " a folder has one"
            )

    @property
    def checksum(self) -> Checksum | None:
        """Algorithm of the shards' checksums; None if there are no shards."""
        return algorithm_of(self.shards[0].checksum) if self.shards else None


def algorithm_of(checksum: str) -> Checksum:
    """Return the algorithm of a checksum in a manifest."""
    name: Any = checksum.partition(":")[0]
    return name  # type: ignore[no-any-return]


def manifest_path(folder: str | os.PathLike[str]) -> Path:
    """Return the path of a folder's manifest, which has another name in folders of version 0.1.0."""
    path, old = Path(folder) / MANIFEST, Path(folder) / OLD_MANIFEST
    return old if os.path.lexists(old) and not os.path.lexists(path) else path


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read a folder's manifest and check it completely.

    Raises:
        InputError: the manifest is missing or damaged, has another version, or contradicts itself.
    """
    path = manifest_path(folder)
    regular_file(path)
    return read_json_as(path, Manifest)


def write_manifest(folder: Path, plan: Plan, records: dict[str, ShardRecord]) -> Manifest:
    """Write a folder's manifest.

    Args:
        folder: folder of the shards.
        plan: plan of the folder.
        records: records of the finished shards, by file name.
    """
    shards = [records[file] for file in sorted(records)]
    manifest = Manifest(2, plan, PENALTY_EDGES.tolist(), shards)
    write_json(folder / MANIFEST, dataclasses.asdict(manifest) | {"plan": plan.described()})
    return manifest
