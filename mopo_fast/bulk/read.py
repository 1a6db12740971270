"""Verifying and summarising a folder of shards; `data.shards` reads it."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from mopo_fast.bulk.files import file_checksum
from mopo_fast.data.manifest import (
    Manifest,
    Plan,
    ShardRecord,
    algorithm_of,
    count_rows,
    read_manifest,
)
from mopo_fast.data.shards import check_values, open_rollouts, read_shard
from mopo_fast.data.stored import Array
from mopo_fast.errors import InputError
from mopo_fast.utils.atomic import regular_file
from mopo_fast.utils.machine import size_text
from mopo_fast.utils.progress import progress_bar


def verify(folder: str | os.PathLike[str], *, quiet: bool = False) -> Manifest:
    """Read every shard and check its bytes, arrays, values and statistics against the manifest.

    Args:
        folder: folder of the shards.
        quiet: show no progress bar.

    Returns:
        The manifest.

    Raises:
        InputError: shards are missing, damaged or changed; the message names each of them.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    wrong = []
    with progress_bar("shards", len(manifest.shards), quiet=quiet) as bar:
        for record in manifest.shards:
            try:
                _verify_shard(folder, manifest.plan, record)
            except InputError as error:
                wrong.append(str(error))
            bar.advance()
    if wrong:
        raise InputError(
            "\n".join([f"{len(wrong)} of {len(manifest.shards)} shards are not sound:", *wrong])
            + "\ndelete these shards and run the command that made them again"
        )
    open_rollouts(folder)
    return manifest


def _verify_shard(folder: Path, plan: Plan, record: ShardRecord) -> None:
    path, shard = folder / record.file, plan.shard(record.file)
    size = regular_file(path).st_size
    algorithm = algorithm_of(record.checksum)
    if file_checksum(path, algorithm) != record.checksum:
        raise InputError(f"{path} has changed: its {algorithm} checksum is not that in the manifest")
    arrays, _ = read_shard(path, plan, shard)
    check_values(path, arrays, plan, shard)
    for name, found in {"bytes": size, **count_rows(arrays, plan.rollout.horizon)}.items():
        value = getattr(record, name)
        # The last digits of a sum depend on the order of addition.
        if not (np.isclose(found, value) if name.endswith("_sum") else found == value):
            raise InputError(f"{path}: the manifest has {name} {value!r}, the shard has {found!r}")


def summarise(manifest: Manifest) -> dict[str, Any]:
    """Sum up the statistics of all shards.

    Returns:
        "rows", "bytes", "starts" and "non_finite", summed; "reward_mean" and "penalty_mean", 0 if there are
        no rows; "penalty_edges" and "penalty_counts"; "rows_of_step" and "terminals_of_step".
    """
    shards = manifest.shards
    rows = sum(record.rows for record in shards)

    def added(name: str) -> list[int]:
        return [sum(values) for values in zip(*(getattr(record, name) for record in shards), strict=True)]

    return {
        "rows": rows,
        "bytes": sum(record.bytes for record in shards),
        "starts": sum(record.starts for record in shards),
        "non_finite": sum(record.non_finite for record in shards),
        "reward_mean": sum(record.reward_sum for record in shards) / max(1, rows),
        "penalty_mean": sum(record.penalty_sum for record in shards) / max(1, rows),
        "penalty_edges": manifest.penalty_edges,
        "penalty_counts": added("penalty_counts"),
        "rows_of_step": added("rows_of_step"),
        "terminals_of_step": added("terminals_of_step"),
    }


# Width of a histogram's longest bar in columns.
_WIDTH = 40
# A manifest's histogram that fills fewer bins says little. Bins of the one that is drawn in its place.
_FEW_BINS, _BINS = 5, 10


def narrow_penalties(folder: str | os.PathLike[str], manifest: Manifest) -> Array | None:
    """Return the first shard's penalties, float32, where they fill few bins of the manifest's histogram.

    Raises:
        InputError: the shard is damaged.
    """
    if not manifest.shards or np.count_nonzero(summarise(manifest)["penalty_counts"]) >= _FEW_BINS:
        return None
    first = manifest.shards[0]
    return read_shard(Path(folder) / first.file, manifest.plan, 0)[0]["penalties"]


def as_text(summary: dict[str, Any], penalties: Array | None = None) -> str:
    """Format a summary for a terminal: counts, histogram of penalties, terminations at each step.

    Args:
        summary: what `summarise` returned.
        penalties: penalties to draw the histogram of, as `narrow_penalties` returns them. None draws that of
            the summary, which has ten bins a decade.
    """
    rows, counts = summary["rows"], summary["penalty_counts"]
    lines = [
        f"{rows:,} transitions of {summary['starts']:,} rollouts, {size_text(summary['bytes'])};"
        f" {summary['non_finite']:,} rollouts ended at a non-finite prediction",
        f"mean penalised reward {summary['reward_mean']:.4g}, mean penalty {summary['penalty_mean']:.4g}",
        "",
        "penalty" if penalties is None else f"penalty of the first {len(penalties):,} transitions",
    ]
    edges = ["", *(f"{edge:.3g}" for edge in summary["penalty_edges"])]
    if penalties is not None and penalties.size:
        counts, inner = np.histogram(penalties, bins=_BINS)
        edges = [f"{edge:.4g}" for edge in inner]
    filled = [i for i, count in enumerate(counts) if count]
    most = max(counts, default=0)
    for i in range(filled[0], filled[-1] + 1) if filled else ():
        lines.append(f"  from {edges[i]:>8} {'█' * round(_WIDTH * counts[i] / most):<{_WIDTH}} {counts[i]:,}")
    lines += ["", "ended by termination"]
    for step, (here, ended) in enumerate(
        zip(summary["rows_of_step"], summary["terminals_of_step"], strict=True)
    ):
        share = ended / here if here else 0.0
        lines.append(f"  step {step + 1:>3} {'█' * round(_WIDTH * share):<{_WIDTH}} {share:.2%} of {here:,}")
    return "\n".join(lines)
