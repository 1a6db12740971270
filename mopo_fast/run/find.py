"""Find out whether a folder holds a run, and its data set, before torch is imported."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mopo_fast.config import DataConfig
from mopo_fast.data import find_dataset
from mopo_fast.errors import InputError
from mopo_fast.tasks import resume_command
from mopo_fast.utils.atomic import read_json_as

REPORTED = ("config.json", "summary.json", "progress.csv", "fit.json")
"""Files of a run, or of a fit alone, that a report is made from."""


def holds_files(folder: Path, files: tuple[str, ...]) -> bool:
    """Tell whether a folder holds at least one of `files`."""
    return any((folder / file).is_file() for file in files)


def check_run(folder: str | os.PathLike[str], *, files: tuple[str, ...] = ("config.json",)) -> None:
    """Check that `folder` is a run's folder, which holds at least one of `files`.

    Raises:
        InputError: it is not. The message names the runs in it if it is the parent folder of some.
    """
    folder = Path(folder)
    if holds_files(folder, files):
        return
    if not folder.is_dir():
        lacks = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{folder} is not a run folder, it {lacks}; give the folder of a run")
    runs = sorted(str(path.parent) for path in folder.glob(f"*/{files[0]}"))
    if runs:
        raise InputError(f"{folder} holds {len(runs)} runs but is none; give one of them, such as {runs[0]}")
    raise InputError(
        f"{folder} is not a run folder, it holds none of {', '.join(files)}; give another folder"
        if len(files) > 1
        else f"{folder / files[0]} does not exist; give the folder of a run"
    )


def find_runs(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the folders of the runs that are, or lie anywhere below, the folders in `paths`.

    Raises:
        InputError: one of them is no folder, or has no run of a training in it.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            check_run(path)
        runs = list(_runs_below(path))
        if not runs:
            raise InputError(
                f"{path} holds no run of `mopo-fast train`; give runs, or folders that hold some"
            )
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _runs_below(path: Path) -> Iterator[Path]:
    """Yield the runs in a folder in the order of their names; a run's own folders are not searched."""
    for parent, folders, files in os.walk(path):
        folders.sort()
        if "config.json" in files and _is_run(Path(parent)):
            folders.clear()
            yield Path(parent)


def _is_run(folder: Path) -> bool:
    """Tell a run from a fit alone and from other programs' folders; a damaged config.json counts as one."""
    try:
        recorded = read_json_as(folder / "config.json", dict[str, Any])
    except InputError:
        return True
    return {"dataset", "rollout", "sac"} <= recorded.keys()


def find_trained_runs(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the folders of runs that have a policy, each once.

    Args:
        paths: folders of runs, or folders that hold some, see `find_runs`; in these, runs without a policy
            are left out.

    Raises:
        InputError: a path is no such folder, a run that is named has no policy yet, or none has one.
    """
    runs, named = find_runs(paths), {Path(path).resolve() for path in paths}
    for run in runs:
        if run.resolve() in named:
            check_policy(run)
    trained = [run for run in runs if (run / "policy.json").is_file()]
    if not trained:
        raise InputError("there is no run with a policy; give the folder of one, or more")
    return trained


def holds_policy_alone(folder: str | os.PathLike[str], task: str | None) -> bool:
    """Tell whether `folder` holds a policy without a run, as `mopo-fast convert` writes it.

    Args:
        folder: the folder.
        task: task that the user named for the policy, or None.

    Raises:
        InputError: it does, and `task` is None, since only a run records its task.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file() or not (folder / "policy.json").is_file():
        return False
    if task is None:
        raise InputError(f"{folder} holds a policy without a config.json, which names the task; give --task")
    return True


def check_policy(run: str | os.PathLike[str]) -> None:
    """Raise `InputError` where a run has no policy yet, because it was stopped in the fit or first epoch."""
    if not (Path(run) / "policy.json").is_file():
        raise InputError(
            f"the run in {run} has no policy yet, it was stopped before the end of its first epoch; continue"
            f" it with `{resume_command(run)}`"
        )


@dataclass(frozen=True)
class _RecordedDataset:
    """The fields of a run's config.json that are read here."""

    dataset: str
    data: DataConfig = field(default_factory=DataConfig)


def read_data_config(run: str | os.PathLike[str]) -> DataConfig:
    """Return the settings of a run's data from its config.json, which early versions did not record.

    Raises:
        InputError: config.json is missing or damaged.
    """
    check_run(run)
    return read_json_as(Path(run) / "config.json", _RecordedDataset).data


def find_run_dataset(run: str | os.PathLike[str]) -> str:
    """Return the name or path of the data set that a run was trained on, from its config.json.

    Raises:
        InputError: config.json is missing or damaged, or the data set is not there any more.
    """
    check_run(run)
    dataset = read_json_as(Path(run) / "config.json", _RecordedDataset).dataset
    try:
        find_dataset(dataset)
    except InputError as error:
        raise InputError(
            f"the data set of the run in {run} is not found; name one with --dataset ({error})"
        ) from error
    return dataset
