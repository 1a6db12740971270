"""Make the trainings of an experiment of docs/results.md: `python -m benchmarks.study.train penalty`.

The trainings run one after the other. A training that was stopped is resumed, and a finished one is left as
it is, so the same command goes on with the study. The small files of each finished run are copied to
benchmarks/results/study.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.command import run_command
from benchmarks.record import RESULTS
from benchmarks.study.experiments import EXPERIMENTS, Training
from mopo_fast.errors import InputError
from mopo_fast.run.find import REPORTED
from mopo_fast.utils.atomic import atomic_path

STUDY = RESULTS / "study"


def main(
    experiment: tyro.conf.Positional[
        Literal["penalty", "data-handling", "sensitivity", "precision", "other-domain"]
    ],
    *,
    out: Path,
    seeds: tuple[int, ...] = (),
    datasets: tuple[str, ...] = (),
    kept: Path = STUDY,
    quiet: bool = False,
) -> None:
    """Make all trainings of an experiment that are not finished.

    Args:
        experiment: Name of the experiment.
        out: Folder of the whole study. The runs' folders are made below it.
        seeds: Train these seeds alone (default: all of the experiment).
        datasets: Train on these data sets alone (default: all of the experiment).
        kept: Folder of the finished runs' small files.
        quiet: Show no progress bars.
    """
    chosen = [
        training
        for training in EXPERIMENTS[experiment]
        if (not seeds or training.seed in seeds) and (not datasets or training.arguments[0] in datasets)
    ]
    if not chosen:
        raise InputError(f"no training of {experiment} has these seeds and data sets; give others")
    out.mkdir(parents=True, exist_ok=True)
    for number, training in enumerate(chosen, 1):
        print(f"{number} of {len(chosen)}: {training.folder}", flush=True)
        make(training, out, quiet=quiet)
        for run in training.runs:
            keep(out, run, kept)


def make(training: Training, out: Path, *, quiet: bool) -> None:
    """Make a training below the folder `out`, or go on with it.

    Raises:
        SystemExit: the training fails or is interrupted.
    """
    if all((out / run / "summary.json").exists() for run in training.runs):
        return
    command = ["train", *training.arguments, "--out", training.folder]
    if any((out / run / "config.json").exists() for run in training.runs):
        command.append("--resume")
    if quiet:
        command.append("--quiet")
    # Paths in the recorded settings are relative to the study's folder.
    checkout = Path(__file__).resolve().parents[2]
    if training.task_file is not None:
        shutil.copyfile(checkout / "examples" / training.task_file, out / training.task_file)
    paths = os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-m", "mopo_fast", *command], cwd=out, env=environment)
    if done.returncode:
        raise SystemExit(done.returncode)


def keep(out: Path, run: str, kept: Path) -> None:
    """Copy the files of a run that a report is made from to the same place below `kept`."""
    (kept / run).mkdir(parents=True, exist_ok=True)
    for name in REPORTED:
        with atomic_path(kept / run / name) as temporary:
            shutil.copyfile(out / run / name, temporary)


if __name__ == "__main__":
    run_command(main)
