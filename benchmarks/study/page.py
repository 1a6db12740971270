"""Write the study's tables and pictures of docs/results.md: `python -m benchmarks.study.page`.

A table stands between `<!-- study: NAME -->` and `<!-- /study -->`. Everything comes from the small files of
the runs in benchmarks/results/study, whose last evaluations are averaged here. Nothing is trained.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.command import run_command
from benchmarks.pictures import PICTURES, save_svg, svg_look
from benchmarks.study.calibration import tables
from benchmarks.study.discount import HEADER, table_rows
from benchmarks.study.experiments import HALFCHEETAH, HOPPER, WALKER2D
from benchmarks.study.fits import WAYS as FIT_WAYS
from benchmarks.study.parity import WAYS
from benchmarks.study.train import STUDY
from benchmarks.tables import DOCS, markdown_table
from mopo_fast.compare import Comparison, Result, compare_results, draw_curves, read_result, varied_settings
from mopo_fast.config import PENALTIES
from mopo_fast.fit import read_fit
from mopo_fast.utils.atomic import atomic_path
from mopo_fast.utils.pictures import BLUE, GREEN, ORANGE, blank, label_log
from mopo_fast.utils.statistics import Estimate, estimate, student_half

PAGE = DOCS / "results.md"
BLOCK = re.compile(r"(<!-- study: ([\w-]+)(?: ([\w-]+))? -->\n).*?(<!-- /study -->)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class View:
    """The runs of an experiment, and the settings that its tables compare.

    Attributes:
        folders: patterns of the runs' folders, below the study's.
        names: settings by the names that the tables give them.
        also: other settings that differ with them.
    """

    folders: tuple[str, ...]
    names: dict[str, str]
    also: tuple[str, ...] = ()


_LAMBDA = {"lambda": "rollout.penalty_coef"}
_SEEDS = "seed[0-2]/seed*"
VIEWS = {
    "penalty": View(("penalty/*/*/seed*",), _LAMBDA),
    "data-handling": View(
        (f"data-handling/*/*/{_SEEDS}", f"penalty/{HOPPER}/{_SEEDS}-coef1"),
        {"compat": "data.compat"},
        ("data.max_transitions",),
    ),
    "sensitivity": View(
        (f"sensitivity/{HOPPER}/*/{_SEEDS}", f"penalty/{HOPPER}/{_SEEDS}"),
        {"horizon": "rollout.horizon", **_LAMBDA},
    ),
    "precision": View(
        ("precision/*/*/seed*", f"penalty/{HALFCHEETAH}/*/seed*"),
        {"precision": "matmul_precision", **_LAMBDA},
        ("dynamics.dtype", "rollout.dtype", "sac.dtype"),
    ),
    "other-domain": View(("other-domain/*/*/seed*",), _LAMBDA),
}


def read_view(name: str, study: Path = STUDY) -> Comparison:
    """Compare the runs of an experiment.

    Args:
        name: key of `VIEWS`.
        study: folder of the study's results.

    Raises:
        FileNotFoundError: no run is there.
        ValueError: runs differ in a setting that the view does not name.
    """
    view = VIEWS[name]
    folders = [folder for pattern in view.folders for folder in sorted(study.glob(pattern))]
    if not folders:
        raise FileNotFoundError(f"no runs in {', '.join(view.folders)} below {study}")
    results = [read_result(folder) for folder in folders]
    _check(results, {*view.names.values(), *view.also})
    return compare_results(
        [
            dataclasses.replace(
                result, settings={short: result.settings.get(full) for short, full in view.names.items()}
            )
            for result in results
        ]
    )


def _check(results: list[Result], expected: set[str]) -> None:
    for dataset in {result.dataset for result in results}:
        every = [result.settings for result in results if result.dataset == dataset]
        if unexpected := sorted(set(varied_settings(every)) - expected):
            raise ValueError(f"runs on {dataset} differ in {', '.join(unexpected)}")


def read_parity(study: Path = STUDY) -> tuple[Comparison, dict[str, list[dict[str, Any]]]]:
    """Compare the trainings of `benchmarks.study.parity`.

    Returns:
        The comparison, and the records of each data set.

    Raises:
        FileNotFoundError: there are none.
    """
    records: dict[str, list[dict[str, Any]]] = {}
    results = []
    for way, name in WAYS.items():
        for path in sorted(study.glob(f"parity/*/*/{way}.json")):
            record = json.loads(path.read_text())
            records.setdefault(record["dataset"], []).append(record)
            curve = np.array([record["updates"], record["score"], record["return"]], float).T
            updates = record["updates"][-1]
            results.append(
                Result(
                    path, record["dataset"], record["seed"], {"by": name}, None, updates, updates,
                    finished=True, by_model=False, curve=curve, fit=None, data=None, preset=None,
                )
            )  # fmt: skip
    if not results:
        raise FileNotFoundError(f"no trainings in {study / 'parity'}")
    return compare_results(results), records


# --- Tables


def update(text: str, study: Path = STUDY) -> str:
    """Return a page's text with every marked table drawn anew from the files in `study`."""

    def draw(match: re.Match[str]) -> str:
        name, dataset = match[2], match[3]
        if name in _BY_DATASET:
            made = _BY_DATASET[name](study, dataset)
        elif name == "data":
            made = _data(study)
        elif name == "parity":
            made = _parity(study)
        else:
            made = _comparison(read_view(name, study))
        return f"{match[1]}\n{made}\n\n{match[4]}"

    return BLOCK.sub(draw, text)


def _data(study: Path) -> str:
    rows = []
    for path in sorted(study.glob("data-*.json")):
        record = json.loads(path.read_text())
        scores = {key: "" if value is None else f" ({value:.1f})" for key, value in record["score"].items()}
        returns = (f"{value:,.1f}{scores[key]}" for key, value in record["return"].items())
        sizes = (f"{record[key]:,}" for key in ("transitions", "episodes"))
        rows.append([record["dataset"], *sizes, *returns])
    header = ["data set", "transitions", "episodes", "mean return (score)", "best return (score)"]
    return markdown_table(header, rows)


def _comparison(comparison: Comparison) -> str:
    notes = [f"- {note}" for note in comparison.notes]
    parts = [_fits(comparison), _groups(comparison), _differences(comparison), "\n".join(notes)]
    return "\n\n".join(part for part in parts if part)


def _fits(comparison: Comparison) -> str:
    rows = []
    for section in comparison.sections:
        # Runs of a seed share their fit, and each has a copy of its record.
        folders = {run.fit: run.folder for group in section.groups for run in group.runs.values() if run.fit}
        if not folders:
            return ""
        fits = [read_fit(folder) for folder in folders.values()]
        errors = [fit["best_mse"][elite] for fit in fits for elite in fit["elites"]]
        epochs = [fit["epochs"] for fit in fits]
        sizes = sorted({fit["transitions"] for fit in fits})
        rows.append(
            [
                section.dataset,
                ", ".join(f"{size:,}" for size in sizes),
                str(len(fits)),
                _range(epochs, "d"),
                _range(errors, ".3g"),
            ]
        )
    header = ["data set", "transitions", "fits", "epochs", "elites' holdout MSE"]
    return markdown_table(header, rows)


def _range(values: Sequence[float], form: str) -> str:
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _groups(comparison: Comparison) -> str:
    rows = [
        [
            section.dataset,
            group.name,
            *_estimate(group.mean),
            ", ".join(f"{value:.1f}" for value in group.values.values()),
            _estimate(group.mean_last)[0],
        ]
        for section in comparison.sections
        for group in section.groups
    ]
    rows += [
        ["all", name, *_estimate(mean), f"{mean.count} runs", ""] for name, mean in comparison.overall.items()
    ]
    header = ["data set", "setting", "last ten: mean", "95 % interval", "each seed", "last evaluation: mean"]
    return markdown_table(header, rows)


def _differences(comparison: Comparison) -> str:
    rows = [
        [
            section.dataset,
            f"{one.first} minus {one.second}",
            *_estimate(one.mean, "+z.1f"),
            _student(list(one.values.values())),
            ", ".join(f"{value:+z.1f}" for value in one.values.values()),
        ]
        for section in comparison.sections
        for one in section.differences
    ]
    if not rows:
        return ""
    header = ["data set", "difference", "last ten: mean", "95 % interval", "plain mean, Student's interval"]
    header.append("each seed")
    return markdown_table(header, rows)


def _student(values: list[float]) -> str:
    """Return the mean of paired differences, with half of Student's interval where there are several."""
    if len(values) < 2:
        return "–"
    return f"{float(np.mean(values)):+z.1f} ± {float(student_half(np.array(values))):.1f}"


def _estimate(mean: Estimate | None, form: str = ".1f") -> tuple[str, str]:
    """Return a mean and its interval."""
    if mean is None:
        return "–", "–"
    if mean.low is None or mean.high is None:
        return format(mean.value, form), "–"
    return format(mean.value, form), f"{mean.low:{form}} to {mean.high:{form}}"


def _parity(study: Path) -> str:
    comparison, records = read_parity(study)
    rows = []
    for dataset, every in sorted(records.items()):
        for way, name in WAYS.items():
            some = [record for record in every if record["way"] == way]
            columns = [
                _estimate(estimate([record[quantity] for record in some]), form=".3g")
                for quantity in ("q_at_end", "alpha_at_end", "entropy_at_end")
            ]
            rows.append([dataset, name, *(f"{mean} ({interval})" for mean, interval in columns)])
    header = ["data set", "trained by", "Q", "alpha", "entropy"]
    return _comparison(comparison) + "\n\nAfter the last update:\n\n" + markdown_table(header, rows)


def _calibration(study: Path, dataset: str) -> str:
    record = json.loads((study / f"calibration-{dataset}.json").read_text())
    parts = [f"Policies of {len(record['runs'])} seeds. Command: `{record['command']}`."]
    for title, header, rows in tables(record["runs"]):
        parts += [f"{title}:", markdown_table(header, rows)]
    return "\n\n".join(parts)


def _selection(study: Path, dataset: str) -> str:
    """Return how well each estimate of `mopo-fast select --truth` ranks the policies of the runs."""
    rows = []
    for path in sorted(study.glob(f"selection-{dataset}-*.json")):
        record = json.loads(path.read_text())
        judges = {policy["model"]["judge"] for policy in record["policies"]}
        judge = "another fit" if len(judges) == 1 else "each run's own ensemble"
        names = {"model": f"penalised return, {judge}", "fqe": "fitted Q evaluation"}
        for name, label in names.items():
            if quality := record[f"{name}_quality"]:
                rows.append(
                    [
                        label,
                        str(quality["policies"]),
                        f"{quality['rank_correlation']:.2f}",
                        f"{quality['regret']:,.0f}",
                        f"{quality['random_regret']:,.0f}",
                    ]
                )
    header = ["estimate", "policies", "rank correlation", "regret", "regret of a random choice"]
    return markdown_table(header, rows)


def _discount(study: Path, dataset: str) -> str:
    record = json.loads((study / f"discount-{dataset}.json").read_text())
    return f"Command: `{record['command']}`.\n\n{markdown_table(HEADER, table_rows(record['runs']))}"


def _fits_of_both(study: Path, dataset: str) -> str:
    """Return how the fits of `benchmarks.study.fits` compare, on rows that none has seen."""
    record = json.loads((study / f"fits-{dataset}.json").read_text())
    found = {way: [fit for fit in record["fits"] if fit["way"] == way] for way in FIT_WAYS}
    quantities: dict[str, Callable[[dict[str, Any]], float]] = {
        "epochs": lambda fit: fit["epochs"],
        "mean squared error": lambda fit: fit["mse"],
        "log-likelihood of a row": lambda fit: fit["log_likelihood"],
    }
    for quantile in record["fits"][0]["penalty"]:
        quantities[f"{quantile} quantile of the penalty"] = lambda fit, q=quantile: fit["penalty"][q]  # type: ignore[misc]
    rows = []
    for name, of in quantities.items():
        values = {way: [of(fit) for fit in some] for way, some in found.items()}
        pairs = [ours - theirs for theirs, ours in zip(values["kit"], values["mopo_fast"], strict=True)]
        estimates = [*map(estimate, values.values()), estimate(pairs)]
        cells = (_estimate(one, form=".4g") for one in estimates)
        rows.append([name, *(f"{mean} ({interval})" for mean, interval in cells)])
    described = f"{len(found['kit'])} fits by each. Command: `{record['command']}`."
    return f"{described}\n\n" + markdown_table(["", *FIT_WAYS.values(), "difference"], rows)


_BY_DATASET = {
    "calibration": _calibration,
    "selection": _selection,
    "discount": _discount,
    "fits": _fits_of_both,
}


# --- Pictures


def draw_calibration(study: Path = STUDY) -> Figure:
    """Draw the rank correlation of each penalty with the true error, and the size of both, by step."""
    found = [
        (dataset, json.loads(path.read_text())["runs"])
        for dataset in (HALFCHEETAH, HOPPER, WALKER2D)
        if (path := study / f"calibration-{dataset}.json").exists()
    ]
    if not found:
        raise FileNotFoundError(f"no calibration-*.json in {study}")
    figure = blank(5.0 * len(found), 7.2)
    grid = figure.subplots(2, len(found), squeeze=False)
    for column, (dataset, runs) in enumerate(found):
        parts = [run["by_step"] for run in runs]
        ranks, sizes = grid[:, column]
        for penalty in PENALTIES:
            values = [part["penalties"][penalty]["spearman"] for part in parts]
            _draw_mean(ranks, parts, values, penalty)
        ranks.set(ylim=(-0.25, 1.0), ylabel="rank correlation with the error", title=dataset)
        ranks.legend(fontsize=9, loc="lower right")
        medians = [[each["median"] for each in part["error"]] for part in parts]
        _draw_runs(sizes, parts, medians, ORANGE, "error")
        for penalty, colour in (("max_aleatoric", BLUE), ("ensemble_std", GREEN)):
            medians = [[each["median"] for each in part["penalties"][penalty]["value"]] for part in parts]
            _draw_runs(sizes, parts, medians, colour, penalty)
        sizes.set(yscale="log", xlabel="step of the rollout", ylabel="median, in raw units")
        label_log(sizes.yaxis)
        sizes.legend(fontsize=9)
    return figure


def _draw_mean(axes: Axes, parts: list[dict[str, Any]], values: list[list[float]], label: str) -> None:
    """Draw the mean over the runs by step, with Student's t interval."""
    steps, numbers = _by_step(axes, parts, values)
    mean = numbers.mean(axis=0)
    (line,) = axes.plot(steps, mean, "o-", markersize=3, linewidth=1.6, label=label)
    if len(numbers) > 1:
        half = student_half(numbers)
        axes.fill_between(steps, mean - half, mean + half, color=line.get_color(), alpha=0.15, linewidth=0)


def _draw_runs(
    axes: Axes, parts: list[dict[str, Any]], values: list[list[float]], colour: str, label: str
) -> None:
    """Draw each run by step, and their geometric mean."""
    steps, numbers = _by_step(axes, parts, values)
    for run in numbers:
        axes.plot(steps, run, color=colour, linewidth=0.7, alpha=0.5)
    mean = np.exp(np.log(numbers).mean(axis=0))
    axes.plot(steps, mean, "o-", markersize=3, linewidth=1.6, color=colour, label=label)


def _by_step(
    axes: Axes, parts: list[dict[str, Any]], values: list[list[float]]
) -> tuple[list[int], np.ndarray[Any, Any]]:
    """Return the steps that all runs have, and the values there, [runs, steps]."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    count = min(len(part["step"]) for part in parts)
    return parts[0]["step"][:count], np.array([run[:count] for run in values], dtype=float)


FIGURES: dict[str, Callable[[Path], Figure]] = {
    "study-penalty": lambda study: draw_curves(read_view("penalty", study), columns=3),
    "study-calibration": draw_calibration,
}
"""Pictures of the page, by the names of their files."""


def draw(study: Path, out: Path) -> None:
    """Draw every picture whose results are there to the folder `out`."""
    for name, make in FIGURES.items():
        with svg_look(), contextlib.suppress(FileNotFoundError):
            save_svg(make(study), out / f"{name}.svg")


def main(
    page: Annotated[Path, tyro.conf.arg(help="Page whose tables are written.")] = PAGE,
    out: Annotated[Path, tyro.conf.arg(help="Folder of the pictures.")] = PICTURES,
) -> None:
    """Write the tables and pictures of the results page from the committed files of the study."""
    text = update(page.read_text(encoding="utf-8"))
    with atomic_path(page) as path:
        path.write_text(text, encoding="utf-8")
    draw(STUDY, out)
    print(page)


if __name__ == "__main__":
    run_command(main)
