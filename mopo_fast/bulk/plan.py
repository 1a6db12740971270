"""The plan of a folder of shards, and the manifest that lists the finished ones.

Shard k holds transitions k * shard_rows, ... of rollouts k * 2^32, k * 2^32 + 1, ...: it depends on the plan
and k alone.
"""

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import numpy as np
from pydantic import Field

from mopo_fast.config import Compression, Penalty, PenaltyMembers, RolloutDtype, ShardFormat
from mopo_fast.data.stored import Array
from mopo_fast.data.transitions import ROLLOUT_ARRAYS
from mopo_fast.errors import InputError
from mopo_fast.tasks import Task, task_of_run
from mopo_fast.utils.atomic import check_value, read_json_as, regular_file, write_json

MANIFEST = "manifest.json"
# The arrays of a shard. A time-out is a rollout's last row that is no terminal.
SHARD_ARRAYS = (*ROLLOUT_ARRAYS, "timeouts")
COMPRESSIONS: dict[ShardFormat, tuple[Compression, ...]] = {
    "hdf5": ("none", "lzf", "gzip"),
    "parquet": ("none", "snappy", "zstd"),
}
# Edges of the histogram of penalties: ten bins a decade, then one below and one above.
PENALTY_EDGES = np.geomspace(1e-4, 1e4, 81)
# A shard's number has six digits.
_MOST_SHARDS = 10**6

Natural = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
ShardRows = Annotated[int, Field(ge=1, lt=2**32)]
# Rollouts that a shard begins; the next shard's numbers are 2^32 higher.
Starts = Annotated[int, Field(ge=1, le=2**32)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


# --- the settings of rollouts


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run's rollouts: `RolloutConfig`'s fields of these names, none left open."""

    horizon: Annotated[int, Field(ge=1, lt=2**31)]
    penalty: Penalty
    penalty_coef: _NotNegative
    penalty_members: PenaltyMembers
    termination: str | None


@dataclass(frozen=True)
class GenerateConfig(RunSettings):
    """All that rollouts depend on, but for the models and the start states."""

    task: str
    seed: Annotated[int, Field(ge=0, lt=2**64)]
    dtype: RolloutDtype
    backend: str


@dataclass(frozen=True)
class _RunConfig:
    """The part of a run's config.json that is read here."""

    task: str
    rollout: RunSettings
    task_sha256: str | None = None


def run_settings(run: str | os.PathLike[str], task: str | Task | None = None) -> tuple[Task, RunSettings]:
    """Read a run's task and the settings of its rollouts from its config.json.

    Args:
        task: the run's task; None: as config.json says, unless that is a Python file. See `task_of_run`.

    Raises:
        InputError: there is no config.json, or it is not a run's; or `task` is not the run's.
    """
    path = Path(run) / "config.json"
    config = read_json_as(path, _RunConfig)
    return task_of_run(path, config.task, config.task_sha256, task), config.rollout


def generate_config(
    run: str | os.PathLike[str],
    *,
    horizon: int | None,
    seed: int,
    penalty_coef: float | None,
    dtype: RolloutDtype,
    backend: str,
    task: str | Task | None = None,
) -> GenerateConfig:
    """Return the run's own settings, with what is given in their place.

    Raises:
        InputError: a value is out of range; or as `run_settings`.
    """
    task, settings = run_settings(run, task)
    values = dataclasses.asdict(settings)
    values |= {"task": task.name, "seed": seed, "dtype": dtype, "backend": backend}
    given = {"horizon": horizon, "penalty_coef": penalty_coef}
    values |= {name: value for name, value in given.items() if value is not None}
    kinds = get_type_hints(GenerateConfig, include_extras=True)
    return GenerateConfig(**{name: check_value(name, values[name], kind) for name, kind in kinds.items()})


# --- the plan and the manifest, as they are written and read


@dataclass(frozen=True)
class Plan:
    """All that decides the shards' bytes, but for the processor: kernels of other instruction sets round
    differently."""

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
        return -(-self.count // self.shard_rows)

    def rows(self, shard: int) -> int:
        """Return the number of its transitions; the last shard has what is left."""
        return min(self.shard_rows, self.count - shard * self.shard_rows)

    def file(self, shard: int) -> str:
        """Return the name of its file; names sort as numbers do."""
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
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class ShardRecord:
    """A shard's entry in the manifest: its file, and counts over its rows.

    Attributes:
        starts: rollouts begun; `non_finite` of them ended in a prediction that was not finite.
        penalty_counts: the histogram of penalties over `PENALTY_EDGES`.
        rows_of_step, terminals_of_step: rows, and terminals among them, of each step of a rollout.
    """

    file: str
    rows: ShardRows
    bytes: Positive
    sha256: _Digest
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
    """A folder's manifest.json: the plan, and a record of each finished shard, in their order."""

    format_version: Annotated[int, Field(ge=1, le=1)]
    plan: Plan
    penalty_edges: list[_Finite]
    shards: list[ShardRecord]

    def __post_init__(self) -> None:
        plan, before = self.plan, -1
        if len(self.penalty_edges) != len(PENALTY_EDGES) or not np.allclose(
            self.penalty_edges, PENALTY_EDGES
        ):
            raise InputError("penalty_edges are others than format_version 1 has")
        for record in self.shards:
            shard = plan.shard(record.file)
            if shard <= before:
                raise InputError(f"{record.file} is listed twice, or out of order")
            if record.rows != plan.rows(shard):
                raise InputError(f"{record.file} has {record.rows} rows in place of {plan.rows(shard)}")
            if len(record.rows_of_step) != plan.rollout.horizon:
                raise InputError(f"{record.file} has {len(record.rows_of_step)} steps in rows_of_step")
            before = shard


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read a folder's manifest and check it whole.

    Raises:
        InputError: there is none, or it is damaged, of another version, or contradicts itself.
    """
    path = Path(folder) / MANIFEST
    regular_file(path)
    return read_json_as(path, Manifest)


def write_manifest(folder: Path, plan: Plan, records: dict[str, ShardRecord]) -> Manifest:
    """Write the manifest of the shards that are there, whose records are given by file."""
    shards = [records[file] for file in sorted(records)]
    manifest = Manifest(1, plan, PENALTY_EDGES.tolist(), shards)
    write_json(folder / MANIFEST, dataclasses.asdict(manifest))
    return manifest
