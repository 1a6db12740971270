"""Show a data set to a person: as text for the terminal, and as an HTML page with pictures."""

import math
import os
import textwrap
from collections.abc import Iterator

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mopo_fast.data import Transitions
from mopo_fast.data.episodes import Episodes, find_episodes
from mopo_fast.data.origin import origin_of
from mopo_fast.data.stored import Array
from mopo_fast.data.summary import SAMPLE, Spread, Summary, sample_rows
from mopo_fast.errors import InputError
from mopo_fast.tasks import Task, evaluated_in, get_task, in_version, parse_dataset_name
from mopo_fast.utils.pages import (
    bullets,
    foldable,
    heading,
    missing,
    number_table,
    paragraph,
    picture,
    table,
    to_png,
    write_page,
)
from mopo_fast.utils.pictures import BLUE, GREEN, GREY, ORANGE, blank, blank_axes, look

_WIDTH = 80
_COLUMNS = ("mean", "std", "min", "25%", "median", "75%", "max")
# Histograms cut off so many percent of the values at each end, which would squeeze all others.
_CUT = 0.1
# Most values in a histogram, and most dimensions that get one.
_DRAWN, _SHOWN = 100_000, 48


def task_of(data: Transitions, given: str | None = None) -> Task | None:
    """Return the task of a data set.

    Args:
        data: data set, whose name may begin with a task.
        given: name of the task, or a Python file that defines one, which is executed.

    Returns:
        The task; None where none is given and the name does not begin with one.

    Raises:
        InputError: there is no task of the given name.
    """
    if given is not None:
        task = get_task(given)
    else:
        try:
            task = get_task(parse_dataset_name(data.name)[0])
        except InputError:
            return None
    origin = origin_of(data.info.get("metadata", {}))
    if evaluated_in(task, origin.env_id) is None:
        return task
    return in_version(task, None, origin.reference_returns, data.name)


def to_text(summary: Summary) -> str:
    """Format a summary as text of at most 80 columns, except for long names."""
    lines = [summary.name or "data set"]
    for name, value in _facts(summary):
        indent = " " * 14
        lines += textwrap.wrap(
            f"{name.lower():<14}{value}",
            _WIDTH,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    lines += ["", f"{'':16}" + "".join(f"{column:>9}" for column in _COLUMNS)]
    lines += [f"{name:16}" + "".join(f"{cell:>9}" for cell in cells) for name, cells in _ranges(summary)]
    lines += ["", "Unusual:" if summary.oddities else "Nothing unusual was found."]
    for oddity in summary.oddities:
        lines += textwrap.wrap(
            oddity, _WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False
        )
    return "\n".join(lines)


def write_info(path: str | os.PathLike[str], summary: Summary, data: Transitions) -> None:
    """Write the page of a data set: one HTML file that needs no other.

    Args:
        path: HTML file to write.
        summary: summary of `data`.
        data: the data set.

    Raises:
        InputError: the file cannot be written.
    """
    episodes = find_episodes(data)
    parts = [
        table([*_facts(summary)]),
        heading("Unusual"),
        bullets(summary.oddities) if summary.oddities else paragraph("Nothing unusual was found."),
    ]
    with look():
        if episodes is None:
            parts += [heading("Episodes"), missing("The rows do not follow one another: no episodes.")]
        else:
            parts += _section("Episodes", *_draw_episodes(episodes, summary))
        parts += _section("Rewards", *_draw_rewards(data))
        parts += _section("Observations", *_draw_dimensions(data.observations))
        parts += _section("Actions", *_draw_dimensions(data.actions))
    ranges = [(name, *cells) for name, cells in _ranges(summary)]
    parts.append(heading("Ranges"))
    parts.append(foldable(f"All {len(ranges)} quantities", number_table(("", *_COLUMNS), ranges)))
    if summary.rows > SAMPLE:
        parts.append(paragraph(_sampled(summary)))
    write_page(path, f"Data set: {summary.name or 'without a name'}", parts)


def _facts(summary: Summary) -> Iterator[tuple[str, str]]:
    if summary.path is not None:
        yield "File", summary.path
    yield "Task", summary.task or "unknown; name it with --task for scores and the termination rule"
    left_out = summary.stored_rows - summary.rows
    yield "Rows", f"{summary.rows:,}" + (f" of {summary.stored_rows:,} in the source" if left_out else "")
    yield "Dimensions", f"{summary.obs_dim} observation, {summary.act_dim} action"
    penalised = "penalised: " if summary.penalised else ""
    if summary.returns is None or summary.lengths is None:
        yield "Episodes", "none, the rows do not follow one another"
    else:
        lengths, returns, scores = summary.lengths, summary.returns, summary.scores
        several = f"{lengths.min:.0f} to {lengths.max:.0f}, median {lengths.median:.0f}"
        steps = f"{lengths.min:.0f}" if lengths.min == lengths.max else several
        yield "Episodes", f"{summary.episodes:,}; steps: {steps}"
        yield "Return", f"{penalised}mean {returns.mean:.1f}, std {returns.std:.1f}, best {returns.max:.1f}"
        if scores is not None:
            text = f"mean {scores.mean:.2f}, std {scores.std:.2f}, best {scores.max:.2f}"
            yield "Score", f"{text} (0: random policy, 100: expert)"
    yield "Rewards", f"{penalised}mean {summary.rewards.mean:.4g}, std {summary.rewards.std:.4g}"
    share = summary.terminals / summary.rows
    terminals = f"{summary.terminals:,} ({share:.2%} of the rows)" if summary.terminals else "none"
    lost = summary.terminals_left_out
    yield "Terminals", terminals + (f"; {lost:,} more were left out" if lost else "")
    if summary.successors is not None:
        yield "Successors", summary.successors
    if summary.rows > SAMPLE:
        yield "Quartiles", _sampled(summary)


def _sampled(summary: Summary) -> str:
    step = math.ceil(summary.rows / SAMPLE)
    return f"Quartiles of rows and dimensions are those of every {step}th row."


def _ranges(summary: Summary) -> Iterator[tuple[str, list[str]]]:
    named = {
        "return": summary.returns,
        "score": summary.scores,
        "steps": summary.lengths,
        "reward": summary.rewards,
        **{f"observation {dim}": one for dim, one in enumerate(summary.observations)},
        **{f"action {dim}": one for dim, one in enumerate(summary.actions)},
    }
    for name, one in named.items():
        if one is not None:
            yield name, _cells(one)


def _cells(one: Spread) -> list[str]:
    values = (one.mean, one.std, one.min, one.q25, one.median, one.q75, one.max)
    return [_number(value) for value in values]


def _number(value: float) -> str:
    """Format a number in at most eight characters."""
    return next(text for digits in (4, 3, 2, 1) if len(text := f"{value:.{digits}g}") <= 8 or digits == 1)


def _section(title: str, figure: Figure, caption: str) -> list[str]:
    return [heading(title), picture(title, to_png(figure)), paragraph(caption)]


def _histogram(axes: Axes, values: Array, bins: int = 60) -> None:
    low, high = np.percentile(values, (_CUT, 100 - _CUT))
    axes.hist(values.clip(low, high), bins=bins if low < high else 1, color=BLUE, alpha=0.75)


def _draw_episodes(episodes: Episodes, summary: Summary) -> tuple[Figure, str]:
    returns, lengths = episodes.returns, episodes.lengths
    constant = lengths.min() == lengths.max()
    figure = blank(10.0, 3.6)
    histogram, order, *rest = figure.subplots(1, 2 if constant else 3)
    bins = min(60, max(10, len(returns) // 4))
    histogram.hist(returns, bins=bins, color=BLUE, alpha=0.75)
    for value, name, colour in ((returns.mean(), "mean", ORANGE), (returns.max(), "best", GREEN)):
        histogram.axvline(value, color=colour, linestyle="--", linewidth=1.4, label=f"{name} {value:.1f}")
    histogram.set(xlabel="return of an episode", ylabel="episodes")
    histogram.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    histogram.legend(loc="best", fontsize=9)
    histogram.set_title("Returns")
    order.plot(np.arange(1, len(returns) + 1), returns, ".", color=BLUE, alpha=0.5, markeredgewidth=0)
    order.set(xlabel="number of the episode", ylabel="return")
    order.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    order.set_title("In the order of the data")
    for axes in rest:
        axes.hist(lengths, bins=bins, color=BLUE, alpha=0.75)
        axes.set(xlabel="steps of an episode")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.set_title("Lengths")
    caption = f"Returns of the {len(returns):,} episodes in the data."
    if constant:
        caption += f" All have {lengths[0]:,} steps."
    if summary.scores is not None:
        caption += f" Normalised scores: mean {summary.scores.mean:.1f}, best {summary.scores.max:.1f}."
    return figure, caption


def _draw_rewards(data: Transitions) -> tuple[Figure, str]:
    figure, axes = blank_axes(10.0, 2.8)
    _histogram(axes, sample_rows(data.rewards, _DRAWN))
    axes.set(xlabel="reward of a step", ylabel="rows")
    return figure, f"Rewards of single steps. {_drawn(len(data))}"


def _draw_dimensions(array: torch.Tensor) -> tuple[Figure, str]:
    shown = min(array.shape[1], _SHOWN)
    columns = min(6, shown)
    lines = math.ceil(shown / columns)
    figure = blank(10.0, 0.3 + 1.45 * lines)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    values = sample_rows(array[:, :shown], _DRAWN)
    for dim, axes in enumerate(grid):
        if dim >= shown:
            axes.set_axis_off()
            continue
        _histogram(axes, values[:, dim], 40)
        axes.set_title(str(dim), fontsize=9.5)
        axes.set_yticks([])
        axes.grid(False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="x", labelsize=8, colors=GREY)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=3))
    more = array.shape[1] - shown
    caption = f"Distribution of each dimension. {_drawn(len(array))}"
    return figure, caption + (f" {more} more dimensions are in the table of ranges." if more else "")


def _drawn(rows: int) -> str:
    text = f"The lowest and highest {_CUT:g}% of the values are drawn at the edge."
    step = math.ceil(rows / _DRAWN)
    return text + (f" Every {step}th row is drawn." if step > 1 else "")
