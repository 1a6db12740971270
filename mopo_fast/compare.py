"""Compare many runs: learning curves with bands, means with intervals, and paired differences.

Runs are grouped by their settings apart from the seed. The value of a run is the mean of its last ten
evaluations. Differences between two groups are taken within each seed. `utils/intervals.py` has the means and
their intervals.
"""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from mopo_fast.config import DynamicsConfig
from mopo_fast.data import MEMORY_PREFIX
from mopo_fast.data.local import MINARI_PREFIX
from mopo_fast.errors import InputError, printable
from mopo_fast.fit import read_fit
from mopo_fast.run.command import flatten
from mopo_fast.run.find import find_runs
from mopo_fast.run.folder import WITHOUT_EFFECT, read_config, read_settings, with_defaults
from mopo_fast.run.log import read_rows
from mopo_fast.utils.atomic import atomic_path, read_json_as
from mopo_fast.utils.pages import bullets, heading, number_table, paragraph, picture, to_png, write_page
from mopo_fast.utils.pictures import BLUE, GREEN, GREY, ORANGE, blank, look, thousands
from mopo_fast.utils.statistics import ENOUGH, Estimate, estimate, estimate_curve, estimate_over_tasks

PAGE = "comparison.html"
LAST_EVALUATIONS = 10
"""Number of the last evaluations whose mean is the value of a run."""
# Most settings that a group is named by. Names of more would leave no room for pictures.
_NAMED = 3
# Largest score or return: larger ones overflow matplotlib's axes.
_LARGEST = 1e100
_COLOURS = (BLUE, ORANGE, GREEN, *(colormaps["tab10"](index) for index in (4, 5, 6, 8, 9)), GREY)
# Keys of config.json that name the run and not its settings.
_NAMES = ("dataset", "seed", "dynamics_from")


@dataclass(frozen=True, eq=False)
class Result:
    """The evaluations of one run, with all that tells it from other runs.

    Attributes:
        folder: the run's folder.
        dataset: name of its data set.
        seed: its seed.
        settings: all settings on which its result depends, but data set and seed, by dotted name.
        dynamics_from: folder that the ensemble came from, with "*" in place of the seed, or None.
        steps: number of SAC updates that were asked for.
        updates: number of SAC updates made.
        finished: True if the training has ended.
        by_model: True if the learned model, and not an environment, evaluates the policy.
        curve: [evaluations, 3] updates, mean score (NaN without one) and mean return.
        fit: what tells the run's fit from another one, or None where that is not recorded.
        data: digest of the data that the ensemble was fitted to, likewise.
        preset: code base whose hyperparameters were its defaults, or None.
    """

    folder: Path
    dataset: str
    seed: int
    settings: dict[str, Any]
    dynamics_from: str | None
    steps: int
    updates: int
    finished: bool
    by_model: bool
    curve: np.ndarray[Any, Any]
    fit: tuple[Any, ...] | None
    data: str | None
    preset: str | None


@dataclass(frozen=True)
class Group:
    """Runs of one data set whose settings agree apart from the seed.

    Attributes:
        name: the settings in which it differs from the other groups of the data set.
        settings: these settings, by dotted name.
        runs: finished runs, by seed.
        unfinished: the others.
        values: mean of the last ten evaluations of each finished run, by seed.
        last: the last evaluation of each finished run, by seed.
        mean: estimate from `values`, or None without a finished run.
        mean_last: estimate from `last`, likewise.
    """

    name: str
    settings: dict[str, Any]
    runs: dict[int, Result]
    unfinished: list[Result]
    values: dict[int, float]
    last: dict[int, float]
    mean: Estimate | None
    mean_last: Estimate | None


@dataclass(frozen=True)
class Difference:
    """The difference between two groups of a data set, seed by seed.

    Attributes:
        first: name of the group that the other is taken from.
        second: name of the other group.
        values: first minus second, by seed, for the seeds that both have.
        mean: estimate from `values`, or None where the groups share no seed.
    """

    first: str
    second: str
    values: dict[int, float]
    mean: Estimate | None


@dataclass(frozen=True)
class Section:
    """The comparison of the runs of one data set.

    Attributes:
        dataset: name of the data set.
        metric: "score", or "return" where a run has no score.
        groups: the groups, ordered by their settings.
        differences: every pair of groups.
    """

    dataset: str
    metric: str
    groups: list[Group]
    differences: list[Difference]

    @property
    def quantity(self) -> str:
        """Name of the metric on an axis."""
        return "normalised score" if self.metric == "score" else "return"


@dataclass(frozen=True)
class Comparison:
    """A comparison of runs.

    Attributes:
        sections: one for each data set.
        overall: for groups that every one of several data sets has, the estimate over all data sets' runs.
        notes: sentences on what limits the comparison.
    """

    sections: list[Section]
    overall: dict[str, Estimate]
    notes: list[str] = field(default_factory=list)


def read_result(folder: Path) -> Result:
    """Read what a run has reached.

    Raises:
        InputError: a file of the run is damaged.
    """
    config = read_config(folder)
    recorded = read_settings(folder / "config.json")
    fit = read_fit(folder) if (folder / "fit.json").exists() else None
    source = _without_seed(config.dynamics_from, config.seed)
    dynamics: dict[str, Any] = {"from": source and Path(source).name}
    if fit is not None:
        # With an ensemble from elsewhere, the run's own settings of the fit were not used.
        own = read_json_as(folder / "fit.json", dict[str, Any])["config"]
        dynamics = with_defaults(own, DynamicsConfig())
    elif config.dynamics_from is None:
        dynamics = recorded["dynamics"]
    settings = {
        name: value
        for name, value in flatten(recorded | {"dynamics": dynamics})
        if name.rpartition(".")[2] not in WITHOUT_EFFECT and name not in _NAMES
    }
    rows = read_rows(folder / "progress.csv") if (folder / "progress.csv").exists() else []
    return Result(
        folder,
        config.dataset if _is_no_file(config.dataset) else Path(config.dataset).stem,
        config.seed,
        settings,
        source,
        config.steps,
        _updates(rows, folder),
        (folder / "summary.json").exists(),
        any(row.get("scored_by") == "model" for row in rows),
        _curve(rows, folder),
        None if fit is None else (fit["seed"], fit["data_sha256"]),
        None if fit is None else fit["data_sha256"],
        config.preset,
    )


def _is_no_file(dataset: str) -> bool:
    return dataset.startswith((MINARI_PREFIX, MEMORY_PREFIX))


def _without_seed(path: str | None, seed: int) -> str | None:
    return None if path is None else re.sub(rf"(?<!\d){seed}(?!\d)", "*", path)


def _updates(rows: list[dict[str, str]], folder: Path) -> int:
    try:
        return int(rows[-1]["updates"]) if rows else 0
    except (KeyError, ValueError):
        raise InputError(f"{folder / 'progress.csv'} has no numbers of updates; restore the file") from None


def _curve(rows: list[dict[str, str]], folder: Path) -> np.ndarray[Any, Any]:
    """Return the evaluations of a run, [evaluations, 3]: updates, score (NaN without one) and return."""
    path = folder / "progress.csv"
    names = ("updates", "score_mean", "return_mean")
    try:
        found = [[float(row[name] or "nan") for name in names] for row in rows if row["return_mean"]]
    except (KeyError, ValueError):
        raise InputError(f"{path} has no columns of numbers {', '.join(names)}; restore the file") from None
    curve = np.array(found).reshape(-1, 3)
    if not (np.abs(curve[:, [0, 2]]) < _LARGEST).all() or (np.abs(curve) >= _LARGEST).any():
        raise InputError(
            f"{path} holds values that are not finite, or larger than {_LARGEST:g}; restore the file"
        )
    return curve


def compare_runs(paths: Sequence[str | os.PathLike[str]]) -> Comparison:
    """Compare the runs in folders.

    Runs that cannot be read are left out. So are unfinished ones, except from the curves. `notes` says so.

    Args:
        paths: folders of runs, or folders that hold some, at any depth.

    Returns:
        The comparison, with the data sets in the order of their names.

    Raises:
        InputError: there is no run, none can be read, or two runs agree in all settings and the seed.
    """
    results, notes = [], []
    for folder in find_runs(paths):
        try:
            results.append(read_result(folder))
        except InputError as error:
            notes.append(f"Left out, since it cannot be read: {error}.")
    if not results:
        raise InputError(f"no run can be read: {' '.join(notes)}")
    compared = compare_results(results)
    return dataclasses.replace(compared, notes=[*notes, *compared.notes])


def compare_results(results: Sequence[Result]) -> Comparison:
    """Compare at least one run that has been read.

    Raises:
        InputError: two runs agree in all settings and the seed.
    """
    sections, notes = [], []
    for dataset in sorted({result.dataset for result in results}):
        own = [result for result in results if result.dataset == dataset]
        section = _compare(dataset, own)
        notes += _notes(section, own)
        sections.append(section)
    return Comparison(sections, _overall(sections), [*notes, *_notes_on_numbers(sections)])


def _compare(dataset: str, results: list[Result]) -> Section:
    """Group the runs of one data set, and compare the groups."""
    scored = [result for result in results if len(result.curve)]
    metric = "score" if scored and not any(np.isnan(one.curve[:, 1]).any() for one in scored) else "return"
    column = 1 if metric == "score" else 2
    groups = []
    grouped = _grouped(results)
    names = _group_names([(settings, runs[0]) for settings, runs in grouped])
    for name, (settings, runs) in zip(names, grouped, strict=True):
        finished = {one.seed: one for one in sorted(runs, key=lambda one: one.seed) if _counts(one)}
        values = {seed: float(one.curve[-LAST_EVALUATIONS:, column].mean()) for seed, one in finished.items()}
        last = {seed: float(one.curve[-1, column]) for seed, one in finished.items()}
        groups.append(
            Group(
                name,
                settings,
                finished,
                [one for one in runs if not _counts(one)],
                values,
                last,
                estimate(list(values.values())) if values else None,
                estimate(list(last.values())) if last else None,
            )
        )
    differences = []
    for base, other in itertools.combinations(groups, 2):
        pairs = {seed: other.values[seed] - base.values[seed] for seed in other.values if seed in base.values}
        mean = estimate(list(pairs.values())) if pairs else None
        differences.append(Difference(other.name, base.name, pairs, mean))
    return Section(dataset, metric, groups, differences)


def _counts(result: Result) -> bool:
    return result.finished and len(result.curve) > 0


def varied_settings(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of the settings that are not the same in all of some runs, in their order."""
    names = dict.fromkeys(name for one in settings for name in one)
    return [name for name in names if len({json.dumps(one.get(name)) for one in settings}) > 1]


def _grouped(results: list[Result]) -> list[tuple[dict[str, Any], list[Result]]]:
    """Return groups of runs, each with the settings in which it differs from the others, in their order."""

    def group(settings: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], list[int]]:
        varied[:] = varied_settings(settings)
        found: dict[tuple[str, ...], list[int]] = {}
        for number, one in enumerate(settings):
            key = tuple(json.dumps(one.get(name), sort_keys=True) for name in varied)
            found.setdefault(key, []).append(number)
        return found

    varied: list[str] = []
    every = [result.settings for result in results]
    groups = group(every)
    if _repeated(results, groups):
        # The folders of the ensembles, which differ from seed to seed, tell such runs apart.
        every = [result.settings | {"dynamics_from": result.dynamics_from} for result in results]
        groups = group(every)
    if same := _repeated(results, groups):
        first, second = (str(results[number].folder) for number in same)
        raise InputError(f"{first} and {second} have the same settings and seed; give one of them")
    made = [
        ({name: every[numbers[0]].get(name) for name in varied}, [results[number] for number in numbers])
        for numbers in groups.values()
    ]
    return sorted(made, key=lambda each: [_order(value) for value in each[0].values()])


def _repeated(results: list[Result], groups: dict[tuple[str, ...], list[int]]) -> tuple[int, int] | None:
    """Return the numbers of two runs in one group that have the same seed."""
    for numbers in groups.values():
        seen: dict[int, int] = {}
        for number in numbers:
            if (before := seen.setdefault(results[number].seed, number)) != number:
                return before, number
    return None


def _order(value: Any) -> tuple[int, float, str]:
    """Return a key that sorts values of a setting: numbers by size, then the others by their text."""
    if isinstance(value, (int, float)):
        return 0, float(value), ""
    return 1, 0.0, json.dumps(value)


def _group_names(groups: list[tuple[dict[str, Any], Result]]) -> list[str]:
    """Name groups by the settings in which they differ, by their presets, or by letters if these are many."""
    if len(groups[0][0]) <= _NAMED:
        return [_describe(settings, result) for settings, result in groups]
    presets = [f"preset {result.preset}" if result.preset else "no preset" for _, result in groups]
    if len(set(presets)) == len(presets):
        return presets
    return [_letters(number) for number in range(len(groups))]


def _letters(number: int) -> str:
    """Return A to Z, then AA, AB and so on."""
    before, last = divmod(number, 26)
    return (_letters(before - 1) if before else "") + chr(ord("A") + last)


def _describe(settings: dict[str, Any], result: Result) -> str:
    """Describe a group by its settings, each without the part of the config where that is clear."""
    # Nothing tells a group without another one apart.
    usual = ("rollout.horizon", "rollout.penalty_coef")
    shown = settings or {name: result.settings.get(name) for name in usual}
    every = [name.rpartition(".")[2] for name in result.settings]
    words = []
    for name, value in shown.items():
        text = f"{value:g}" if isinstance(value, float) else str(value)
        short = name.rpartition(".")[2]
        words.append(f"{short if every.count(short) <= 1 else name} {_cut(text)}")
    return ", ".join(words)


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _overall(sections: list[Section]) -> dict[str, Estimate]:
    """Estimate over all data sets for groups that each of them has, with enough runs and with scores."""
    if len(sections) < 2 or any(section.metric != "score" for section in sections):
        return {}
    by_name = [{group.name: group for group in section.groups} for section in sections]
    return {
        name: estimate_over_tasks([list(groups[name].values.values()) for groups in by_name])
        for name in by_name[0]
        if all(name in groups and len(groups[name].values) >= ENOUGH for groups in by_name)
    }


def _notes(section: Section, results: list[Result]) -> list[str]:
    """Say what limits the comparison of the runs of one data set."""
    notes = []
    for result in results:
        if not _counts(result):
            notes.append(
                f"Left out of the table, since it is not finished: {result.folder}, with"
                f" {result.updates:,} of {result.steps:,} updates."
            )
    counted = [result for result in results if _counts(result)]
    where = f"On {section.dataset}"
    short = [result for result in counted if len(result.curve) < LAST_EVALUATIONS]
    if short:
        notes.append(
            f"{where} {len(short)} of {len(counted)} runs have fewer than {LAST_EVALUATIONS} evaluations, so"
            " their mean is over all of these."
        )
    lengths = sorted({result.updates for result in counted})
    if len(lengths) > 1:
        notes.append(
            f"{where} the runs have different lengths, from {lengths[0]:,} to {lengths[-1]:,} updates. Each"
            " one's last evaluations count."
        )
    for group in section.groups:
        fits = [run.fit for run in group.runs.values()]
        if None not in fits and len(set(fits)) < len(fits):
            notes.append(
                f"{where} the {len(fits)} runs of {group.name} share {_counted(len(set(fits)), 'fit')}, so"
                " their interval leaves out how much fits differ."
            )
    if any(len(data) > 1 for data in _data_by_rows(results).values()):
        notes.append(f"{where} not all runs were trained on the same data, though their files' names agree.")
    if any(result.by_model for result in counted):
        notes.append(f"{where} the learned model evaluates the policies, not an environment.")
    for group in section.groups:
        if len(group.settings) > _NAMED:
            described = _describe(group.settings, (*group.runs.values(), *group.unfinished)[0])
            notes.append(f"{where} {group.name} stands for: {described}.")
    apart = [one for one in section.differences if one.mean is None]
    if len(apart) == 1:
        notes.append(
            f"{where} {apart[0].first} and {apart[0].second} have no seed of a finished run in common."
        )
    elif apart:
        notes.append(f"{where} {len(apart)} pairs of settings have no seed of a finished run in common.")
    every = [group.values.keys() for group in section.groups]
    if alone := sorted(set().union(*every) - set(every[0]).intersection(*every)):
        notes.append(
            f"{where} not every group has a finished run of {'seed' if len(alone) == 1 else 'the seeds'}"
            f" {_cut(', '.join(map(str, alone)))}. A difference takes the seeds that both groups have."
        )
    return notes


def _data_by_rows(results: list[Result]) -> dict[str, set[str]]:
    """Return the digests of the runs' data by the settings that choose rows of a data set."""
    found: dict[str, set[str]] = {}
    for result in results:
        if result.data is not None:
            rows = {name: value for name, value in result.settings.items() if name.startswith("data.")}
            found.setdefault(json.dumps(rows, sort_keys=True), set()).add(result.data)
    return found


def _notes_on_numbers(sections: list[Section]) -> list[str]:
    """Say what the means and intervals are."""
    groups = [group for section in sections for group in section.groups]
    means = [group.mean for group in groups if group.mean is not None]
    counts = [mean.count for mean in means]
    notes = []
    if any(count >= ENOUGH for count in counts):
        notes.append(
            "IQM is the interquartile mean over the runs. Its interval is the 95 % percentile interval of a"
            " stratified bootstrap, as in rliable."
        )
    if any(1 < count < ENOUGH for count in counts):
        notes.append(
            f"Groups of fewer than {ENOUGH} runs have the plain mean and Student's 95 % interval. So few runs"
            " say little."
        )
    if 1 in counts:
        notes.append("A group of one run has no interval.")
    pairs = [one for section in sections for one in section.differences if one.mean is not None]
    if len(pairs) > 1:
        notes.append(
            f"There are {len(pairs)} differences. Even if none is real, about one 95 % interval in twenty"
            " leaves out 0."
        )
    return notes


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# --- As text and JSON


def _number(value: float) -> str:
    return f"{value:.2f}"


def _interval(mean: Estimate | None, sign: str = "") -> str:
    if mean is None or mean.low is None or mean.high is None:
        return "–"
    return f"{mean.low:{sign}.2f} to {mean.high:{sign}.2f}"


def _value(mean: Estimate | None, sign: str = "") -> str:
    if mean is None:
        return "–"
    return f"{mean.value:{sign}.2f}" + (" IQM" if mean.kind == "iqm" else "")


def _group_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Return a table of all groups, with its header."""
    rows: list[tuple[str, ...]] = [
        (_first(comparison, "settings"), "runs", "last ten", "95 % interval", "last")
    ]
    for section in comparison.sections:
        for group in section.groups:
            name = _in(comparison, section, group.name)
            values = _value(group.mean), _interval(group.mean), _value(group.mean_last)
            rows.append((name, str(len(group.values)), *values))
    for name, mean in comparison.overall.items():
        rows.append((f"all data sets: {name}", str(mean.count), _value(mean), _interval(mean), "–"))
    return rows


def _difference_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Return a table of all differences, with its header; the header alone where there are none."""

    def outside(mean: Estimate | None) -> str:
        return "–" if mean is None or mean.low is None else "yes" if mean.excludes_zero else "no"

    first = _first(comparison, "difference")
    rows: list[tuple[str, ...]] = [(first, "pairs", "last ten", "95 % interval", "leaves out 0")]
    for section in comparison.sections:
        for one in section.differences:
            name = _in(comparison, section, f"{one.first} minus {one.second}")
            values = _value(one.mean, "+"), _interval(one.mean, "+"), outside(one.mean)
            rows.append((name, str(len(one.values)), *values))
    return rows


def _first(comparison: Comparison, what: str) -> str:
    """Return the header of the first column, which names the data set if there is only one."""
    one = comparison.sections[0]
    if len(comparison.sections) > 1:
        return f"data set: {what}"
    return f"{one.dataset}: {what}" + (", return" if one.metric == "return" else "")


def _in(comparison: Comparison, section: Section, name: str) -> str:
    if len(comparison.sections) == 1:
        return name
    return f"{section.dataset}: {name}" + (", return" if section.metric == "return" else "")


def to_tables(comparison: Comparison, *, plain: bool) -> list[Table]:
    """Format a comparison for a terminal, as a table of groups and one of differences where there are some.

    Args:
        comparison: the comparison.
        plain: leave out the frames, as for a file or a pipe.
    """
    tables = []
    for header, *rows in (_group_rows(comparison), _difference_rows(comparison)):
        if not rows:
            continue
        table = Table(box=None, pad_edge=False) if plain else Table()
        for number, name in enumerate(header):
            side: Literal["left", "right"] = "right" if number else "left"
            table.add_column(Text(printable(name)), justify=side, no_wrap=bool(number) or plain)
        for row in rows:
            # Names in a run's files may hold control characters and rich's own marks.
            table.add_row(*(Text(printable(cell)) for cell in row))
        tables.append(table)
    return tables


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as JSON takes it: all numbers in full, and each run's own."""

    def mean(one: Estimate | None) -> dict[str, Any] | None:
        return None if one is None else dataclasses.asdict(one)

    return {
        "evaluations": LAST_EVALUATIONS,
        "datasets": [
            {
                "dataset": section.dataset,
                "metric": section.metric,
                "groups": [
                    {
                        "name": group.name,
                        "settings": group.settings,
                        "mean": mean(group.mean),
                        "mean_last": mean(group.mean_last),
                        "runs": [
                            {
                                "seed": seed,
                                "folder": str(run.folder),
                                "updates": run.updates,
                                "evaluations": len(run.curve),
                                "mean": group.values[seed],
                                "last": group.last[seed],
                            }
                            for seed, run in group.runs.items()
                        ],
                        "unfinished": [
                            {"seed": run.seed, "folder": str(run.folder), "updates": run.updates}
                            for run in group.unfinished
                        ],
                    }
                    for group in section.groups
                ],
                "differences": [
                    {
                        "first": one.first,
                        "second": one.second,
                        "mean": mean(one.mean),
                        "pairs": [{"seed": seed, "difference": value} for seed, value in one.values.items()],
                    }
                    for one in section.differences
                ],
            }
            for section in comparison.sections
        ],
        "all_datasets": {name: mean(one) for name, one in comparison.overall.items()},
        "notes": comparison.notes,
    }


# --- As a page


def write_comparison(comparison: Comparison, out: str | os.PathLike[str]) -> Path:
    """Write comparison.html and its pictures to the folder `out`.

    Returns:
        The path of comparison.html.

    Raises:
        InputError: a file cannot be written.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make the folder {folder} ({error.strerror}); choose another for --out"
        ) from error
    parts = [
        paragraph(
            "The value of a run is the mean of its last ten evaluations: of normalised scores (0: random"
            " policy, 100: expert), or of returns where a run has no score. The last evaluation is shown"
            " beside it. Runs of a group differ in the seed alone."
        ),
        number_table(*_split(_group_rows(comparison))),
    ]
    differences = _difference_rows(comparison)
    with look():
        pictures = [
            ("Learning curves", "curves", to_png(draw_curves(comparison))),
            ("Means", "means", to_png(_draw_means(comparison))),
        ]
        if len(differences) > 1:
            drawn = to_png(_draw_differences(comparison))
            pictures.append(("Differences between settings", "differences", drawn))
    captions = {
        "curves": "A thick line is the mean of the finished runs of a group, the band its 95 % interval at"
        " each evaluation, which may reach beyond the picture, and a thin line one run. Dashed runs are"
        " not finished.",
        "means": "Each dot is a run, the bar the group's mean, and the line its 95 % interval.",
        "differences": "Each dot is the difference of two runs of the same seed.",
    }
    for title, name, png in pictures:
        path = folder / f"comparison_{name}.png"
        with atomic_path(path) as temporary:
            temporary.write_bytes(png)
        parts += [heading(title)]
        if name == "differences":
            parts.append(number_table(*_split(differences)))
        parts += [picture(title, png), paragraph(captions[name])]
    if len(differences) == 1:
        (folder / "comparison_differences.png").unlink(missing_ok=True)
    parts += [
        heading("Each run"),
        number_table(("run", "seed", "updates", "last ten", "last"), _run_rows(comparison)),
    ]
    if comparison.notes:
        parts += [heading("Limits of these numbers"), bullets(comparison.notes)]
    write_page(folder / PAGE, "MOPO runs compared", parts)
    return folder / PAGE


def _split(rows: list[tuple[str, ...]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    return rows[0], rows[1:]


def _run_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for section in comparison.sections:
        for group in section.groups:
            for seed, run in group.runs.items():
                values = _number(group.values[seed]), _number(group.last[seed])
                rows.append((str(run.folder), str(seed), f"{run.updates:,}", *values))
            for run in group.unfinished:
                rows.append((str(run.folder), str(run.seed), f"{run.updates:,}", "not finished", "–"))
    return rows


def draw_curves(comparison: Comparison, columns: int = 2) -> Figure:
    """Draw the learning curves of all groups, in panels of one data set each.

    Args:
        comparison: the comparison.
        columns: largest number of panels side by side.
    """
    columns = min(columns, len(comparison.sections))
    lines = -(-len(comparison.sections) // columns)
    figure = blank(7.5 if columns == 1 else 6.0 * columns, 4.2 * lines)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in grid[len(comparison.sections) :]:
        axes.set_axis_off()
    for axes, section in zip(grid, comparison.sections, strict=False):
        _draw_section(axes, section)
    return figure


def _draw_section(axes: Axes, section: Section) -> None:
    column = 1 if section.metric == "score" else 2
    for number, group in enumerate(section.groups):
        colour = _COLOURS[number % len(_COLOURS)]
        runs = list(group.runs.values())
        for run in runs + group.unfinished:
            line = "-" if run in runs else "--"
            axes.plot(run.curve[:, 0], run.curve[:, column], line, color=colour, linewidth=0.7, alpha=0.4)
        # At an evaluation that some runs lack, the mean would be one of other runs.
        shared = set.intersection(*(set(run.curve[:, 0]) for run in runs)) if runs else set()
        if not shared:
            continue
        updates = np.array(sorted(shared))
        values = np.array([run.curve[np.isin(run.curve[:, 0], updates), column] for run in runs])
        mean, low, high = estimate_curve(values)
        if len(runs) > 1:
            axes.fill_between(updates, low, high, color=colour, alpha=0.16, linewidth=0)
        axes.plot(
            updates,
            mean,
            color=colour,
            linewidth=2.0,
            marker="o" if len(updates) < 30 else "",
            markersize=3.5,
            label=f"{group.name} ({len(runs)})",
        )
    drawn = [
        one.curve[:, column] for group in section.groups for one in (*group.runs.values(), *group.unfinished)
    ]
    if found := [float(value) for curve in drawn for value in curve]:
        # The band of few runs is so wide that it would flatten the curves.
        room = 0.25 * (max(found) - min(found)) or 1.0
        axes.set_ylim(min(found) - room, max(found) + room)
    axes.set(xlabel="SAC updates", ylabel=section.quantity)
    axes.xaxis.set_major_formatter(thousands)
    axes.set_title(_literal(section.dataset))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", fontsize=9)


def _draw_means(comparison: Comparison) -> Figure:
    """Draw the values of the runs of each group, their mean and its interval."""
    return _draw_estimates(
        [
            (
                section.dataset,
                section.quantity,
                [(group.name, list(group.values.values()), group.mean) for group in section.groups],
            )
            for section in comparison.sections
        ],
        zero=False,
    )


def _draw_differences(comparison: Comparison) -> Figure:
    """Draw the paired differences between groups, their means and intervals."""
    return _draw_estimates(
        [
            (
                section.dataset,
                "difference of the scores" if section.metric == "score" else "difference of the returns",
                [
                    (f"{one.first}\nminus {one.second}", list(one.values.values()), one.mean)
                    for one in section.differences
                ],
            )
            for section in comparison.sections
            if section.differences
        ],
        zero=True,
    )


def _draw_estimates(
    sections: list[tuple[str, str, list[tuple[str, list[float], Estimate | None]]]], *, zero: bool
) -> Figure:
    """Draw values, their mean and its interval in a line each.

    Args:
        sections: for each data set its name, the label of the axis, and (name, values, mean) of each line.
        zero: mark 0.
    """
    heights = [0.9 + 0.42 * len(rows) for _, _, rows in sections]
    figure = blank(8.5, sum(heights) + 0.3)
    grid = figure.subplots(len(sections), 1, squeeze=False, height_ratios=heights).ravel()
    for axes, (dataset, label, rows) in zip(grid, sections, strict=True):
        for number, (_, values, mean) in enumerate(rows):
            colour = GREY if zero else _COLOURS[number % len(_COLOURS)]
            axes.plot(values, [number] * len(values), "o", color=colour, alpha=0.6, markersize=5, zorder=3)
            if mean is None:
                continue
            axes.plot([mean.value], [number], "|", color="black", markersize=14, markeredgewidth=2)
            if mean.low is not None and mean.high is not None:
                axes.plot([mean.low, mean.high], [number, number], color="black", linewidth=1.6)
        if zero:
            axes.axvline(0.0, color=ORANGE, linestyle="--", linewidth=1.2)
        axes.set_yticks(range(len(rows)), [_literal(name) for name, _, _ in rows])
        axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel=label)
        axes.set_title(_literal(dataset))
    return figure


def _literal(text: str) -> str:
    """Return a text that matplotlib draws as it is."""
    return printable(text).replace("$", r"\$")
