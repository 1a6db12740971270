"""Describe the study's data sets: `python -m benchmarks.study.data NAME ...`.

The last episode of a file whose end is not marked is not complete, and is left out of the returns.
"""

from pathlib import Path
from typing import Any

import tyro

from benchmarks.command import run_command
from benchmarks.record import write_record
from benchmarks.study.train import STUDY
from mopo_fast import load_dataset
from mopo_fast.data.episodes import find_episodes
from mopo_fast.doctor import examine
from mopo_fast.errors import InputError
from mopo_fast.fit import data_sha256
from mopo_fast.info import task_of


def main(
    names: tyro.conf.Positional[tuple[str, ...]], *, task: str | None = None, kept: Path = STUDY
) -> None:
    """Write a file data-NAME.json for each data set.

    Args:
        names: Names or files of data sets.
        task: Name of their task, or a Python file that defines it (default: the one that a name begins with).
        kept: Folder of the results.
    """
    if not names:
        raise InputError("give the name of a data set")
    for name in names:
        row = describe(name, task)
        write_record(kept / f"data-{row['dataset']}.json", "study.data", examine(), row)
        print(row)


def describe(name: str, task: str | None) -> dict[str, Any]:
    """Return the size of a data set, and the mean and best return of its episodes with their scores."""
    data = load_dataset(name)
    episodes = find_episodes(data)
    if episodes is None:
        raise InputError(f"{name} has no episodes, since its rows do not follow one another")
    known = task_of(data, task)
    returns = episodes.returns
    if data.timeouts is not None and not bool((data.terminals | data.timeouts)[-1]):
        returns = returns[:-1]
    values = {"mean": float(returns.mean()), "best": float(returns.max())}
    return {
        "dataset": data.name,
        "sha256": data_sha256(data),
        "transitions": len(data),
        "episodes": len(returns),
        "return": values,
        "score": {key: known and known.normalized_score(value) for key, value in values.items()},
    }


if __name__ == "__main__":
    run_command(main)
