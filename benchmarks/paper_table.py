"""Reproduce the paper's table: `python -m benchmarks.paper_table --runs DIR`.

For each data set, `mopo-fast train` trains all seeds, each with a fit of its own; finished runs are taken as
they are, and stopped ones go on. Their scores are printed beside the published ones.

The settings are those of the code whose results a version is compared with: preset mopo-tf for D4RL's v0 and
for local sets, preset offlinerl-kit for v2. Flags after `--` are those of `mopo-fast train`, which override
them, as in `python -m benchmarks.paper_table --runs DIR --suffix -local -- --steps 100000`.
"""

import contextlib
import csv
import dataclasses
import functools
import json as json_format
import math
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import arg

from benchmarks.record import write_record
from mopo_fast import cli
from mopo_fast.compare import LAST_EVALUATIONS, read_result
from mopo_fast.config import Preset
from mopo_fast.doctor import examine
from mopo_fast.errors import InputError
from mopo_fast.run.folder import read_summary
from mopo_fast.tasks import parse_dataset_name
from mopo_fast.utils.atomic import atomic_path, check_writable
from mopo_fast.utils.statistics import student_interval

TASKS = ("halfcheetah", "hopper", "walker2d")
TIERS = ("random", "medium", "medium-replay", "medium-expert")


@dataclass(frozen=True)
class Published:
    """A published score.

    Attributes:
        mean: mean over seeds of the normalised score.
        std: standard deviation over seeds.
        checked: whether the numbers were compared with their source; otherwise they are quoted from memory.
    """

    mean: float
    std: float
    checked: bool = True

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.std:.1f}" + ("" if self.checked else " *")


def _rows(tiers: dict[str, tuple[float, ...]], unchecked: Sequence[str] = ()) -> dict[str, Published]:
    """Make a table of rows [mean, std] of each task, by the names of tasks and tiers."""
    return {
        f"{task}-{tier}": Published(*values[2 * number : 2 * number + 2], checked=tier not in unchecked)
        for tier, values in tiers.items()
        for number, task in enumerate(TASKS)
    }


# Yu et al. 2020, table 1: D4RL v0, 6 seeds, last iterate of 1 M updates.
PAPER = _rows(
    {
        "random": (35.4, 2.5, 11.7, 0.4, 13.6, 2.6),
        "medium": (42.3, 1.6, 28.0, 12.4, 17.8, 19.3),
        "medium-replay": (53.1, 2.0, 67.5, 24.7, 39.0, 9.6),
        "medium-expert": (63.3, 38.0, 23.7, 6.0, 44.6, 12.9),
    },
    unchecked=("medium", "medium-replay", "medium-expert"),
)
# OfflineRL-Kit, README.md: D4RL v2, 4 seeds, 3 M updates.
OFFLINERL_KIT = _rows(
    {
        "medium": (72.4, 4.2, 62.8, 38.1, 84.1, 3.2),
        "medium-replay": (72.1, 3.8, 92.7, 20.7, 85.9, 5.3),
        "medium-expert": (83.6, 12.5, 74.6, 44.2, 108.2, 4.3),
    }
)


@dataclass(frozen=True)
class Result:
    """Scores of the finished runs on a data set.

    Attributes:
        dataset: name of the data set.
        n: number of finished runs.
        unfinished: number of runs that were asked for and are not finished.
        updates: number of SAC updates of each run, ascending and without repetitions.
        horizon: horizons of the runs, likewise.
        penalty_coef: penalty coefficients of the runs, likewise.
        seeds: seeds of the runs.
        scores: mean score of each run over its last `LAST_EVALUATIONS` evaluations.
        last: score of each run's last evaluation.
        mean: mean of `scores`, or None without runs.
        interval: 95 % interval of that mean by Student's t, or None for fewer than three runs.
        last_mean: mean of `last`, or None without runs.
        paper: the paper's score on v0 of these data, or None.
        offlinerl_kit: OfflineRL-Kit's score on v2 of these data, or None.
    """

    dataset: str
    n: int
    unfinished: int
    updates: tuple[int, ...]
    horizon: tuple[int, ...]
    penalty_coef: tuple[float, ...]
    seeds: tuple[int, ...]
    scores: tuple[float, ...]
    last: tuple[float, ...]
    mean: float | None
    interval: tuple[float, float] | None
    last_mean: float | None
    paper: Published | None
    offlinerl_kit: Published | None


def data_names(given: Sequence[str], suffix: str | None) -> list[str]:
    """Return the full names of data sets.

    Args:
        given: names with or without a suffix. Without any, all for which there are published scores.
        suffix: "-v0", "-v2", "-local" or another, for the names that have none; None for those of the
            published scores, which are "-v0" for the paper's and "-v2" for OfflineRL-Kit's.

    Raises:
        InputError: a name begins with no task of the table.
    """
    for name in given:
        if not _is_in_table(name):
            raise InputError(f"{name} is not in the paper's table; its tasks are {', '.join(TASKS)}")
    every = [f"{task}-{tier}" for tier in TIERS for task in TASKS]
    names = []
    for name in given or every:
        if re.search(r"-(v\d+|local)$", name):
            names.append(name)
        elif suffix is not None:
            names.append(name + suffix)
        else:
            versions = {"-v0": PAPER, "-v2": OFFLINERL_KIT}
            names += [name + version for version, known in versions.items() if name in known]
    if given and not names:
        raise InputError(f"no scores are published for {', '.join(given)}; name a version with --suffix")
    return list(dict.fromkeys(names))


def _is_in_table(name: str) -> bool:
    """Tell whether a data set is of a task of the table; halfcheetah-jump is a task of its own."""
    with contextlib.suppress(InputError):
        return parse_dataset_name(name)[0] in TASKS
    return False


def preset_of(name: str) -> Preset:
    """Return the preset of the code whose results a data set is compared with."""
    return "offlinerl-kit" if name.endswith("-v2") else "mopo-tf"


def train(name: str, folder: Path, seeds: str, flags: Sequence[str]) -> None:
    """Train all seeds on a data set, or go on with them.

    Raises:
        SystemExit: `mopo-fast train` has printed an error.
    """
    words = ["train", name, "--preset", preset_of(name), "--seeds", seeds, "--out", str(folder), "--resume"]
    # Standard output is the table's.
    with contextlib.redirect_stdout(sys.stderr):
        status = cli.main([*words, *flags])
    if status:
        raise SystemExit(status)


def result_of(name: str, folder: Path, seeds: Sequence[int]) -> Result:
    """Read the runs `folder`/seedN of a data set.

    Raises:
        InputError: a file of a finished run is damaged, or a run is of another data set.
    """
    runs = [folder / f"seed{seed}" for seed in seeds]
    finished = [run for run in runs if (run / "summary.json").is_file()]
    summaries = [read_summary(run) for run in finished]
    for run, summary in zip(finished, summaries, strict=True):
        if Path(summary.get("dataset", name)).stem.replace("_", "-") != name:
            raise InputError(f"{run} is a run on {summary['dataset']}, not on {name}; choose another --runs")
    scores, last = [], []
    for run in finished:
        found = read_result(run).curve[:, 1].tolist()
        if not found or not all(map(math.isfinite, found)):
            raise InputError(f"{run / 'progress.csv'} has no scores; train the run again")
        scores.append(statistics.fmean(found[-LAST_EVALUATIONS:]))
        last.append(found[-1])
    task, tier = parse_dataset_name(name)
    return Result(
        dataset=name,
        n=len(finished),
        unfinished=len(runs) - len(finished),
        **{
            key: tuple(sorted({one[key] for one in summaries}))
            for key in ("updates", "horizon", "penalty_coef")
        },
        seeds=tuple(summary["seed"] for summary in summaries),
        scores=tuple(scores),
        last=tuple(last),
        mean=statistics.fmean(scores) if scores else None,
        interval=t_interval(scores),
        last_mean=statistics.fmean(last) if last else None,
        paper=PAPER.get(f"{task}-{tier}"),
        offlinerl_kit=OFFLINERL_KIT.get(f"{task}-{tier}"),
    )


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean by Student's t, or None for fewer than three values."""
    return student_interval(values) if len(values) >= 3 else None


def to_table(results: Sequence[Result]) -> Table:
    """Format results for a terminal."""
    table = Table(
        *("data set", "updates", "horizon", "lambda", "n", "score", "95 % interval", "last evaluation"),
        *("paper, v0", "OfflineRL-Kit, v2"),
    )
    for one in results:
        if one.interval is None:
            interval = "few seeds" if one.n else "no run"
        else:
            interval = "{:.1f} to {:.1f}".format(*one.interval)
        table.add_row(
            one.dataset,
            *(", ".join(f"{value:,g}" for value in values) for values in (one.updates, one.horizon)),
            ", ".join(f"{value:g}" for value in one.penalty_coef),
            f"{one.n}" + (f" of {one.n + one.unfinished}" if one.unfinished else ""),
            "" if one.mean is None else f"{one.mean:.1f}",
            interval,
            "" if one.last_mean is None else f"{one.last_mean:.1f}",
            *("" if value is None else str(value) for value in (one.paper, one.offlinerl_kit)),
        )
    return table


def notes(results: Sequence[Result]) -> list[str]:
    """Return the sentences that the table needs to be read."""
    said = [
        f"score: mean over runs of the mean of the last {LAST_EVALUATIONS} evaluations, or of all if a run"
        " has fewer. Published: mean ± standard deviation over seeds. The paper's is of the last iterate of"
        " 1,000,000 updates and 6 seeds, OfflineRL-Kit's of 3,000,000 updates and 4 seeds.",
    ]
    if any(one.paper is not None and not one.paper.checked for one in results):
        said.append("* quoted from memory and not compared with the paper.")
    if any(one.dataset.endswith("-local") for one in results):
        said.append(
            "Local sets are other data than D4RL's, so their scores need not agree with published ones."
        )
    return said


def write(path: Path, results: Sequence[Result]) -> None:
    """Write results as JSON, with the command, commit and machine, or as CSV where the name ends in .csv."""
    rows = [dataclasses.asdict(one) for one in results]
    if path.suffix != ".csv":
        write_record(path, "paper_table", examine(), {"notes": notes(results), "rows": rows})
        return
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Result)])
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    return json_format.dumps(value) if isinstance(value, tuple | list | dict) else value


def paper_table(
    *,
    runs: Path,
    data: tuple[str, ...] = (),
    seeds: Annotated[str, arg(metavar="FIRST:END")] = "0:5",
    suffix: str | None = None,
    train_runs: Annotated[bool, arg(name="train")] = True,
    json: Path | None = None,
    flags: tyro.conf.Suppress[tuple[str, ...]] = (),
) -> None:
    """Train the paper's table and print it beside the published scores.

    Args:
        runs: Folder that receives a folder for each data set, with one for each seed.
        data: Data sets, such as hopper-medium (default: all that have published scores).
        seeds: Seeds, as a range (0:5 is 0 to 4) or a list (0,3,5).
        suffix: Version of the data sets whose names have none: -v0, -v2 or -local (default: -v0 and -v2).
        train_runs: Train what is missing. Otherwise only finished runs are read.
        json: File for the results: JSON, or CSV if its name ends in .csv.
        flags: Flags of `mopo-fast train` after `--`.
    """
    names = data_names(data, suffix)
    numbers = cli.parse_seeds(seeds)
    if not runs.is_dir() and (runs.exists() or not train_runs):
        what = "a file" if runs.exists() else "not there"
        raise InputError(f"{runs} is {what}; choose a folder for --runs")
    if json is not None:
        check_writable(json)
    if train_runs:
        for name in names:
            train(name, runs / name, seeds, flags)
    results = [result_of(name, runs / name, numbers) for name in names]
    # A piped table has no terminal to be fitted to.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(to_table(results))
    for note in notes(results):
        print(note)
    if json is not None:
        write(json, results)


def main(words: Sequence[str]) -> int:
    """Run the command, and return its exit code."""
    own, flags = list(words), []
    if "--" in own:
        own, flags = own[: own.index("--")], own[own.index("--") + 1 :]
    if "--suffix" in own[:-1]:
        # Suffixes begin with a dash, so tyro would take them for flags.
        at = own.index("--suffix")
        own[at : at + 2] = [f"--suffix={own[at + 1]}"]
    try:
        tyro.cli(functools.partial(paper_table, flags=tuple(flags)), args=own, prog="benchmarks.paper_table")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
