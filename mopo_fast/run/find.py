"""Find out whether a folder holds a run, before its files are read and torch is imported."""

import os
from pathlib import Path

from mopo_fast.errors import InputError

REPORTED = ("config.json", "summary.json", "progress.csv", "fit.json")
"""Files of a run, or of a fit alone, that a report is made from."""


def check_run(folder: str | os.PathLike[str], *, files: tuple[str, ...] = ("config.json",)) -> None:
    """Check that `folder` is a run's folder, which holds at least one of `files`.

    Raises:
        InputError: it is not. The message names the runs in it if it is the parent folder of some.
    """
    folder = Path(folder)
    if any((folder / file).is_file() for file in files):
        return
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give the folder of a run")
    runs = sorted(str(path.parent) for path in folder.glob(f"*/{files[0]}"))
    if runs:
        raise InputError(
            f"{folder} is not a run but holds {len(runs)}; give one of them, such as {runs[0]}"
        )
    lacks = f"it holds none of {', '.join(files)}" if len(files) > 1 else f"{folder / files[0]} does not exist"
    raise InputError(f"{folder} is not a run folder, {lacks}; give another folder")
