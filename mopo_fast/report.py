"""The report of a run: learning curves, calibration of penalty and variance, fit, times and settings.

It is one self-contained HTML page, with the pictures beside it as PNG files. The paper's argument is that the
return in the penalised model is a lower bound of the true return wherever the penalty is an upper bound of
the model's error. The calibration section shows how far that holds on the transitions that the fit held out.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mopo_fast.config import DataConfig, DynamicsConfig, RolloutConfig
from mopo_fast.data import Transitions, find_dataset, load_configured
from mopo_fast.data.episodes import find_episodes
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.fit import data_sha256, dynamics_inputs_targets, read_fit, split_holdout
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine
from mopo_fast.run.command import flatten, train_command
from mopo_fast.run.find import REPORTED, check_run
from mopo_fast.run.folder import RecordedConfig, RecordedRollout, read_recorded, read_summary
from mopo_fast.run.log import read_rows
from mopo_fast.tasks import TASKS, Box, TerminationFunction, termination_of
from mopo_fast.utils.atomic import atomic_path, read_json_as
from mopo_fast.utils.pages import (
    code,
    foldable,
    heading,
    missing,
    paragraph,
    picture,
    table,
    to_png,
    write_page,
)
from mopo_fast.utils.pictures import BLUE, GREEN, GREY, ORANGE, blank, blank_axes, label_log, look, thousands
from mopo_fast.utils.seeds import REPORT, derive_seed
from mopo_fast.utils.statistics import spearman

T = TypeVar("T")
# Shares of a normal distribution within one and two standard deviations.
_WITHIN = {1: math.erf(1 / math.sqrt(2)), 2: math.erf(2 / math.sqrt(2))}
# Largest value of a learning curve: larger ones overflow matplotlib's axes.
_LARGEST = 1e100
# Rollouts of a report, and the least and the most steps that it shows of them.
_ROLLOUTS, _LEAST_STEPS, _MOST_STEPS = 1000, 5, 100
# Observations of the data that are drawn.
_SHOWN = 5000
# Weights of the penalty for which the coverage is drawn.
_WEIGHTS = np.logspace(-2, 2, 81)
# Most characters of a setting or a command. A file from elsewhere may hold values of any length.
_LONGEST = 2000


@dataclass(frozen=True)
class HeldOut:
    """Predictions of the ensemble for the transitions that the fit held out.

    Attributes:
        penalty: name of the penalty.
        penalties: [n] penalty u(s, a), as in the run's rollouts.
        errors: [n] norm of the difference between the elites' mean prediction and the true (change of the
            observation, reward), in raw units.
        optimism: [n] reward that the elites' mean predicts minus the true reward.
        residuals: [elites, n, obs_dim + 1] (truth - mean) / std of each elite.
    """

    penalty: str
    penalties: np.ndarray[Any, Any]
    errors: np.ndarray[Any, Any]
    optimism: np.ndarray[Any, Any]
    residuals: np.ndarray[Any, Any]


@dataclass(frozen=True)
class Followed:
    """Open-loop rollouts of the ensemble along the actions of the data, each from a held-out transition.

    Attributes:
        errors: [steps, rollouts] distance between the predicted and the true observation after each step.
        penalties: [steps, rollouts] penalty of each step.
    """

    errors: np.ndarray[Any, Any]
    penalties: np.ndarray[Any, Any]


@dataclass
class _Run:
    """A run folder. Each part raises `InputError` when it is used and cannot be read."""

    folder: Path
    data: Transitions | None = None

    @functools.cached_property
    def dataset(self) -> Transitions:
        """The data set that the ensemble was fitted to, on the CPU."""
        fit = read_fit(self.folder)
        if self.data is None:
            config = self.config()
            data = _local_dataset(config.get("dataset") or fit["dataset"], config.get("data", DataConfig()))
        else:
            data = self.data.to("cpu")
        if data_sha256(data) != fit["data_sha256"]:
            raise InputError(
                f"{data.name} is not the data set that the ensemble was fitted to; restore the original data"
            )
        return data

    def config(self) -> RecordedConfig:
        """Read config.json, or return an empty record where a fit without training has none."""
        path = self.folder / "config.json"
        return read_json_as(path, RecordedConfig) if path.exists() else {}

    @functools.cached_property
    def held_out(self) -> HeldOut:
        engine, held_out = self.engine, self.dataset[self.held_out_rows]
        ensemble = engine.ensemble
        result = engine.step(held_out.observations, held_out.actions, seed=self.seed, distributions=True)
        assert result.mean is not None and result.std is not None and result.penalties is not None
        _, targets = dynamics_inputs_targets(held_out)
        targets[:, :-1] = torch.where(ensemble.absolute, held_out.next_observations, targets[:, :-1])
        mean, std = result.mean[ensemble.elites].double(), result.std[ensemble.elites].double()
        wrong = mean.mean(0) - targets
        return HeldOut(
            engine.penalty,
            result.penalties.double().numpy(),
            wrong.norm(dim=-1).numpy(),
            wrong[:, -1].numpy(),
            ((targets - mean) / std).numpy(),
        )

    @property
    def seed(self) -> int:
        """Seed of the report's random numbers."""
        return derive_seed(read_fit(self.folder)["seed"], REPORT)

    @property
    def held_out_rows(self) -> torch.Tensor:
        """Rows of the data set that the fit held out."""
        fit = read_fit(self.folder)
        sizes = fit["config"]
        config = dataclasses.replace(
            DynamicsConfig(), holdout_fraction=sizes["holdout_fraction"], holdout_max=sizes["holdout_max"]
        )
        return split_holdout(len(self.dataset), fit["seed"], config)[1]

    @functools.cached_property
    def engine(self) -> RolloutEngine:
        """The ensemble, with the penalty of the run's rollouts."""
        return self._make_engine(None)

    def _make_engine(self, termination: str | Box | TerminationFunction | None) -> RolloutEngine:
        rollout: RecordedRollout = self.config().get("rollout", {})
        return RolloutEngine(
            EnsembleDynamics.load(self.folder),
            penalty=rollout.get("penalty", RolloutConfig.penalty),
            penalty_members=rollout.get("penalty_members", RolloutConfig.penalty_members),
            termination=termination,
        )

    @property
    def horizon(self) -> int | None:
        """Horizon of the run's rollouts, or the most steps that are shown."""
        horizon = self.config().get("rollout", {}).get("horizon")
        return None if horizon is None else min(max(horizon, 1), _MOST_STEPS)

    @functools.cached_property
    def policy_rollouts(self) -> Transitions:
        """Rollouts of the run's policy from states of the data, at least as long as those of its training."""
        config, data = self.config(), self.dataset
        # A task in a Python file is not executed for a report, so its rollouts do not end early here.
        task = TASKS.get(config.get("task") or "")
        rule = config.get("rollout", {}).get("termination")
        engine = self._make_engine(None if task is None else termination_of(task, rule))
        rows = np.random.default_rng(self.seed).integers(len(data), size=_ROLLOUTS)
        starts = data.observations[torch.from_numpy(rows)]
        steps = max(self.horizon or 0, _LEAST_STEPS)
        return engine.rollout(Actor.load(self.folder), starts, steps, seed=self.seed)

    @functools.cached_property
    def followed(self) -> Followed:
        data, steps = self.dataset, max(self.horizon or 0, _LEAST_STEPS)
        ends = data.episode_ends().numpy().nonzero()[0]
        rows = self.held_out_rows.numpy()
        # A rollout of some steps needs as many rows of one episode.
        rows = rows[ends[np.searchsorted(ends, rows)] - rows >= steps - 1][:_ROLLOUTS]
        if not len(rows):
            raise InputError(
                f"no held-out transition is followed by {steps - 1} more of its episode, so the rollouts have"
                " no truth to be compared with"
            )
        numbers = torch.from_numpy(rows)
        state, errors, penalties = data.observations[numbers], [], []
        for step in range(steps):
            result = self.engine.step(state, data.actions[numbers + step], seed=self.seed, step=step)
            assert result.penalties is not None
            state = result.next_observations
            if not bool(torch.isfinite(state).all()):
                raise InputError(f"a prediction of the ensemble is not finite after {step + 1} steps")
            errors.append((state.double() - data.next_observations[numbers + step]).norm(dim=-1).numpy())
            penalties.append(result.penalties.double().numpy())
        return Followed(np.array(errors), np.array(penalties))


def _local_dataset(name: str, config: DataConfig) -> Transitions:
    """Load a data set of this machine. A run folder from elsewhere must not start a download."""
    path, _ = find_dataset(name)
    if not path.exists():
        raise InputError(f"the data set {name} is not on this machine; get it, then run the report again")
    return load_configured(name, config, quiet=True)


# --- Sections of the report: each returns a figure and its caption, or raises InputError if data are missing.


def _learning_curve(run: _Run) -> tuple[Figure, str]:
    path = run.folder / "progress.csv"
    rows = read_rows(path)
    name = "score" if any(row.get("score_mean") for row in rows) else "return"
    points = [
        [float(row[column]) for column in ("updates", f"{name}_mean", f"{name}_std")]
        for row in rows
        if row.get(f"{name}_mean")
    ]
    if not points:
        raise InputError(f"{path} holds no evaluation yet; train further, then run the report again")
    if not (np.abs(points) < _LARGEST).all():
        raise InputError(
            f"{path} holds values that are not finite, or larger than {_LARGEST:g}; restore the file"
        )
    updates, mean, std = np.array(points).T
    figure, axes = blank_axes(7.5, 3.8)
    axes.fill_between(updates, mean - std, mean + std, color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(
        updates,
        mean,
        color=BLUE,
        linewidth=1.8,
        marker="o" if len(points) < 30 else "",
        markersize=4,
        label="policy",
    )
    axes.set(xlabel="SAC updates", ylabel="normalised score" if name == "score" else "return")
    axes.xaxis.set_major_formatter(thousands)
    quantity = "normalised score (0: random policy, 100: expert)" if name == "score" else "return"
    by_model = any(row.get("scored_by") == "model" for row in rows)
    own = None if by_model else _data_returns(run, name)
    if own is not None:
        for value, label, colour, line in zip(
            own, ("data: mean", "data: best"), (ORANGE, GREEN), ("--", ":"), strict=True
        ):
            axes.axhline(value, color=colour, linestyle=line, linewidth=1.5, label=f"{label} {value:.1f}")
        # Above the axes it hides no curve.
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, borderaxespad=0.2)
    place = "the learned model, not in an environment" if by_model else "the real environment"
    caption = (
        f"Mean {quantity} of the policy in {place}. The band shows one standard deviation over the episodes"
        f" of an evaluation. Last evaluation: {mean[-1]:.1f} ± {std[-1]:.1f}. Best: {mean.max():.1f}."
    )
    if own is not None:
        caption += f" The episodes of the data set have a mean of {own[0]:.1f} and a best of {own[1]:.1f}."
    return figure, caption


def _data_returns(run: _Run, name: str) -> tuple[float, float] | None:
    """Return the mean and the best return of the data's own episodes.

    Args:
        run: the run.
        name: "score" for returns on D4RL's scale, or "return".

    Returns:
        Both values; None where the data are not on this machine or have no episodes, or where the task, such
        as one in a Python file, has no reference returns here.
    """
    try:
        episodes = find_episodes(run.dataset)
        if episodes is None:
            return None
        mean, best = float(episodes.returns.mean()), float(episodes.returns.max())
        if name == "score":
            task = TASKS[run.config()["task"] or ""]
            scores = task.normalized_score(mean), task.normalized_score(best)
            if scores[0] is None or scores[1] is None:
                return None
            mean, best = scores[0], scores[1]
    except (InputError, KeyError):
        return None
    return (mean, best) if max(abs(mean), abs(best)) < _LARGEST else None


# Columns of progress.csv, each with the title of its curve.
_CURVES = {
    "q": "Q-value",
    "critic_loss": "Critic loss",
    "actor_loss": "Actor loss",
    "alpha": "Entropy weight α",
    "entropy": "Entropy",
    "penalty": "Penalty u(s, a)",
    "raw_reward": "Reward of the model",
}


def _training_curves(run: _Run) -> tuple[Figure, str]:
    path = run.folder / "progress.csv"
    rows = read_rows(path)
    curves: dict[str, np.ndarray[Any, Any]] = {}
    for name in _CURVES:
        found = [[float(row["updates"]), float(row[name])] for row in rows if row.get(name)]
        if found:
            curves[name] = np.array(found)
    if not curves:
        raise InputError(f"{path} has none of the columns {', '.join(_CURVES)}; restore the file")
    if not all((np.abs(points) < _LARGEST).all() for points in curves.values()):
        raise InputError(
            f"{path} holds values that are not finite, or larger than {_LARGEST:g}; restore the file"
        )
    columns = min(4, len(curves))
    lines = math.ceil(len(curves) / columns)
    figure = blank(10.0, 0.3 + 2.1 * lines)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in grid[len(curves) :]:
        axes.set_axis_off()
    for axes, (name, points) in zip(grid, curves.items(), strict=False):
        axes.plot(*points.T, color=BLUE, linewidth=1.5, marker="o" if len(points) < 30 else "", markersize=3)
        axes.set_title(_CURVES[name], fontsize=10.5)
        axes.xaxis.set_major_formatter(thousands)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.tick_params(labelsize=9)
    target = run.config().get("sac", {}).get("target_entropy")
    if "entropy" in curves and isinstance(target, (int, float)) and abs(target) < _LARGEST:
        axes = grid[list(curves).index("entropy")]
        axes.axhline(target, color=GREY, linestyle="--", linewidth=1.2, label="target")
        axes.legend(loc="best", fontsize=9)
    caption = (
        "Means over the SAC updates of each epoch, by the number of updates. Penalty and reward are means"
        " over the epoch's rollouts in the learned model. The policy is trained on the reward minus λ times"
        " the penalty."
    )
    return figure, caption


def _calibration(run: _Run) -> tuple[Figure, str]:
    held_out = run.held_out
    penalties, errors = held_out.penalties, held_out.errors
    figure = blank(10.0, 4.3)
    scatter, reliability = figure.subplots(1, 2, width_ratios=(1.15, 1.0))

    scatter.set(xscale="log", yscale="log", xlabel=f"penalty u(s, a): {held_out.penalty}")
    scatter.set_ylabel("error of the one-step prediction")
    dense = len(penalties) > 3000
    if dense:
        scatter.hexbin(
            penalties, errors, xscale="log", yscale="log", gridsize=45, bins="log", cmap="Blues", mincnt=1
        )
    else:
        scatter.plot(penalties, errors, ".", color=BLUE, alpha=0.35, markersize=5, markeredgewidth=0)
    ends = np.array([max(penalties.min(), errors.min()), min(penalties.max(), errors.max())])
    scatter.plot(ends, ends, color=GREY, linewidth=1.2, linestyle="--", label="error = penalty")
    scatter.legend(loc="upper left")
    scatter.set_title("Each held-out transition")

    deciles = [part for part in np.array_split(np.argsort(penalties, kind="stable"), 10) if len(part)]
    number = np.arange(1, len(deciles) + 1)
    mean_error = np.array([errors[part].mean() for part in deciles])
    spread = np.array([1.96 * errors[part].std() / math.sqrt(len(part)) for part in deciles])
    mean_penalty = np.array([penalties[part].mean() for part in deciles])
    reliability.errorbar(
        number, mean_error, spread, color=ORANGE, marker="o", markersize=5, capsize=3, label="error"
    )
    reliability.plot(number, mean_penalty, color=BLUE, marker="s", markersize=5, label="penalty")
    reliability.set(yscale="log", xlabel="decile of the penalty (1: lowest)", ylabel="mean of the decile")
    reliability.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    reliability.legend(loc="upper left")
    reliability.set_title("By decile of the penalty")
    for axis in (scatter.xaxis, scatter.yaxis, reliability.yaxis):
        label_log(axis)

    covered, correlation = float((errors <= penalties).mean()), spearman(penalties, errors)
    caption = (
        f"Measured on the {len(errors):,} transitions that the fit held out. The error is the distance, in"
        " raw units, from the true next observation and reward to the elites' mean prediction. A good penalty"
        f" rises with the error: their rank correlation (Spearman) is {correlation:.2f}, where 1 is perfect."
        f" The penalty is at least as large as the error on {covered:.0%} of the transitions. Mean error:"
        f" {errors.mean():.3g}. Mean penalty: {penalties.mean():.3g}. Bars show 95% confidence intervals."
    )
    return figure, caption


def coverage(held_out: HeldOut, weights: np.ndarray[Any, Any]) -> tuple[Any, Any]:
    """Compute how much of a model's error the penalty covers, for each weight lambda.

    Returns:
        The share of the held-out transitions whose whole error is at most lambda * u, and the share whose
        penalised reward, predicted reward - lambda * u, is at most the true reward; each [weights].
    """
    lost = weights[:, None] * held_out.penalties
    return (held_out.errors <= lost).mean(1), (held_out.optimism <= lost).mean(1)


def _coverage(run: _Run) -> tuple[Figure, str]:
    whole, reward = coverage(run.held_out, _WEIGHTS)
    figure, axes = blank_axes(7.5, 3.8)
    axes.plot(_WEIGHTS, 100 * whole, color=BLUE, linewidth=1.8, label="error ≤ λ u")
    axes.plot(_WEIGHTS, 100 * reward, color=ORANGE, linewidth=1.8, label="penalised reward ≤ true reward")
    caption = (
        "Share of the held-out transitions that a penalty of weight λ covers. Blue: the whole error of the"
        " one-step prediction, in raw units, is at most λ u(s, a). Orange: the penalised reward, which is the"
        " elites' mean reward minus λ u(s, a), is at most the true reward."
    )
    own = run.config().get("rollout", {}).get("penalty_coef")
    if own is not None and own > 0:
        at = coverage(run.held_out, np.array([own]))
        if _WEIGHTS[0] <= own <= _WEIGHTS[-1]:
            axes.axvline(own, color=GREY, linestyle="--", linewidth=1.2, label=f"this run: λ = {own:g}")
        caption += f" With this run's λ of {own:g} the shares are {at[0][0]:.0%} and {at[1][0]:.0%}."
    axes.set(xscale="log", xlabel="λ", ylabel="share of transitions, %", ylim=(-2, 102))
    label_log(axes.xaxis, (1.0,))
    axes.legend(loc="best", fontsize=9)
    return figure, caption


def _by_step(run: _Run) -> tuple[Figure, str]:
    followed, horizon = run.followed, run.horizon
    # A fit alone has no policy.
    has_policy = (run.folder / "policy.json").exists()
    figure = blank(10.0 if has_policy else 6.0, 3.9)
    panels = figure.subplots(1, 1 + has_policy, squeeze=False)[0]
    number = np.arange(1, len(followed.errors) + 1)
    _draw_spread(panels[0], number, list(followed.errors), "error", ORANGE, "o")
    _draw_spread(panels[0], number, list(followed.penalties), "penalty", BLUE, "s")
    panels[0].set_title("Along the data's actions")
    first, last = (float(np.median(followed.errors[step])) for step in (0, -1))
    correlation = spearman(followed.penalties.ravel(), followed.errors.ravel())
    caption = (
        f"{followed.errors.shape[1]:,} rollouts from held-out transitions take the data's own actions, so"
        " that the true observations are known. The error is the distance from the predicted to the true"
        f" observation, in raw units: in the median {first:.3g} after the first step and {last:.3g} after"
        f" step {len(number)}. It adds up over the steps, whereas a penalty is that of one step. Their rank"
        f" correlation (Spearman) is {correlation:.2f}. Lines are medians, bands hold 80% of the rollouts."
    )
    if has_policy:
        made = run.policy_rollouts
        assert made.step is not None and made.penalties is not None
        own = [made.penalties[made.step == step].double().numpy() for step in range(len(number))]
        reached = [some for some in own if len(some)]
        _draw_spread(panels[1], number[: len(reached)], reached, "penalty", BLUE, "s")
        panels[1].set_title("The policy's own rollouts")
        caption += " Right: the penalty where the last policy leads, from states of the data."
    for axes in panels:
        axes.set(xlabel="step of the rollout", yscale="log")
        label_log(axes.yaxis)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if horizon is not None:
            axes.axvline(horizon, color=GREY, linestyle="--", linewidth=1.2, label="horizon of the run")
        axes.legend(loc="best", fontsize=9)
    return figure, caption


def _draw_spread(
    axes: Axes, number: np.ndarray[Any, Any], values: list[Any], label: str, colour: str, marker: str
) -> None:
    low, middle, high = np.array([np.quantile(some, (0.1, 0.5, 0.9)) for some in values]).T
    axes.fill_between(number, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(number, middle, color=colour, marker=marker, markersize=4, linewidth=1.6, label=label)


def _states(run: _Run) -> tuple[Figure, str]:
    data, made = run.dataset, run.policy_rollouts
    rng = np.random.default_rng(run.seed)
    rows = torch.from_numpy(rng.permutation(len(data))[:_SHOWN])
    known = data.observations[rows].double().numpy()
    horizon = run.horizon or _LEAST_STEPS
    assert made.step is not None
    visited = made.next_observations[made.step < horizon].double().numpy()
    visited = visited[np.isfinite(visited).all(1)]
    mean, std = known.mean(0), known.std(0)
    std[std == 0] = 1.0
    scaled, others = (known - mean) / std, (visited - mean) / std
    # The two directions along which the data vary most.
    variances, directions = np.linalg.eigh(np.atleast_2d(np.cov(scaled, rowvar=False, bias=True)))
    share = variances[-2:] / max(variances.sum(), 1e-300)
    low, high = np.quantile(known, (0.005, 0.995), axis=0)
    outside = 100 * ((visited < low) | (visited > high)).mean(0)
    expected = 100 * ((known < low) | (known > high)).mean(0)

    figure = blank(10.0, 4.2)
    plane, dims = figure.subplots(1, 2, width_ratios=(1.15, 1.0))
    for states, colour, label in ((scaled, GREY, "data"), (others, ORANGE, "rollouts")):
        points = states @ directions[:, :-3:-1]
        second = points[:, 1] if points.shape[1] > 1 else np.zeros(len(points))
        plane.plot(
            points[:, 0], second, ".", color=colour, alpha=0.25, markersize=3, markeredgewidth=0, label=label
        )
    plane.set(xlabel="first principal component", ylabel="second principal component")
    legend = plane.legend(loc="best", fontsize=9, markerscale=4)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1.0)
    plane.set_title("Observations")
    number = np.arange(len(low))
    dims.bar(number, outside, color=ORANGE, width=0.7, label="rollouts")
    dims.plot(number, expected, "_", color=GREY, markersize=9, label="data")
    dims.set(xlabel="dimension of the observation", ylabel="outside the data's inner 99%, %")
    dims.xaxis.set_major_locator(MaxNLocator(integer=True))
    dims.legend(loc="best", fontsize=9)
    dims.set_title("Each dimension")
    caption = (
        f"Observations of {_ROLLOUTS:,} rollouts of the last policy, of up to {horizon} steps from states of"
        f" the data, beside {len(known):,} observations of the data. Left: both in the plane of the data's"
        f" first two principal components, which holds {share.sum():.0%} of their variance after each"
        " dimension is scaled to a standard deviation of 1. Right: the share below the 0.5% or above the"
        " 99.5% quantile of the data in each dimension; over all dimensions it is"
        f" {outside.mean():.1f}% for the rollouts and {expected.mean():.1f}% for the data."
    )
    return figure, caption


def _residuals(run: _Run) -> tuple[Figure, str]:
    residuals = run.held_out.residuals
    flat = residuals.reshape(-1, residuals.shape[-1])
    figure = blank(10.0, 3.9)
    histogram, dims = figure.subplots(1, 2, width_ratios=(1.0, 1.35))

    grid = np.linspace(-5, 5, 201)
    histogram.hist(flat.clip(-5, 5).ravel(), bins=80, range=(-5, 5), density=True, color=BLUE, alpha=0.55)
    normal = np.exp(-0.5 * grid**2) / math.sqrt(2 * math.pi)
    histogram.plot(grid, normal, color="black", linewidth=1.2, label="standard normal")
    histogram.set(xlabel="(true value − predicted mean) / predicted std", ylabel="density")
    histogram.legend(loc="upper left", fontsize=9)
    histogram.set_title("All dimensions")

    number = np.arange(flat.shape[1])
    for sigmas, colour in ((1, BLUE), (2, GREEN)):
        share = 100 * (np.abs(flat) <= sigmas).mean(0)
        dims.axhline(100 * _WITHIN[sigmas], color=colour, linestyle="--", linewidth=1.2, alpha=0.8)
        dims.plot(number, share, "o", color=colour, markersize=6, label=f"within {sigmas} std")
    lowest = 100 * min(float((np.abs(flat) <= 1).mean(0).min()), 0.5)
    dims.set(
        ylim=(max(0.0, lowest - 10), 102),
        ylabel="share of transitions, %",
        xlabel="dimension of the observation; r: reward",
    )
    shown = number[:: math.ceil(len(number) / 24)]
    dims.set_xticks(shown, ["r" if dim == len(number) - 1 else str(dim) for dim in shown])
    dims.legend(loc="lower right", ncols=2, fontsize=9)
    dims.set_title("Each dimension; dashed: a calibrated model")

    shares = {sigmas: float((np.abs(flat) <= sigmas).mean()) for sigmas in _WITHIN}
    caption = (
        f"Errors of the elites on the held-out transitions, divided by the standard deviation that each elite"
        f" predicts. {shares[1]:.1%} lie within one standard deviation (calibrated model: {_WITHIN[1]:.1%})"
        f" and {shares[2]:.1%} within two (calibrated model: {_WITHIN[2]:.1%}). Smaller shares mean that the"
        f" model underestimates its error."
    )
    return figure, caption


def _fit_curves(run: _Run) -> tuple[Figure, str]:
    fit = read_fit(run.folder)
    mse = np.array(fit["holdout_mse"], dtype=float)
    elites = fit["elites"]
    figure, axes = blank_axes(7.5, 3.8)
    epochs = np.arange(1, len(mse) + 1)
    others = [member for member in range(mse.shape[1]) if member not in elites]
    for members, label, colour, line in (
        (elites, "elites", BLUE, "-"),
        (others, "other members", ORANGE, "--"),
    ):
        for member in members:
            name = label if member == members[0] else None
            axes.plot(epochs, mse[:, member], line, color=colour, alpha=0.85, linewidth=1.4, label=name)
    axes.legend()
    axes.set(xlabel="epoch of the fit", ylabel="holdout mean squared error, raw units", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    label_log(axes.yaxis)
    best = np.mean([fit["best_mse"][member] for member in elites])
    caption = (
        f"Mean squared error of each ensemble member on {fit['holdout']:,} of the {fit['transitions']:,}"
        f" transitions, which the fit held out. The fit took {fit['epochs']} epochs and"
        f" {_duration(fit['seconds'])}. Each member keeps the weights of its best epoch. The elites' mean"
        f" error with these weights is {best:.4g}."
    )
    return figure, caption


def _time(run: _Run) -> tuple[Figure, str]:
    seconds = read_summary(run.folder)["seconds"]
    labels = {
        "fit": "ensemble fit",
        "rollout": "model rollouts",
        "sac": "SAC updates",
        "evaluate": "evaluation",
    }
    parts = {label: float(seconds[name]) for name, label in labels.items()}
    total = float(seconds["total"])
    parts["other"] = max(0.0, total - sum(parts.values()))
    figure, axes = blank_axes(7.5, 2.4)
    names = list(parts)[::-1]
    bars = axes.barh(names, [parts[name] for name in names], color=BLUE, height=0.62)
    shares = [f"{_duration(parts[name])}  ({parts[name] / max(total, 1e-9):.0%})" for name in names]
    axes.bar_label(bars, shares, padding=5, fontsize=10)
    axes.set(xlim=(0, 1.25 * max(*parts.values(), 1e-9)))
    axes.xaxis.set_visible(False)
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(left=False)
    return figure, f"The run took {_duration(total)} in total."


_SECTIONS: tuple[tuple[str, str, Callable[[_Run], tuple[Figure, str]]], ...] = (
    ("Learning curve", "learning_curve", _learning_curve),
    ("Training", "training", _training_curves),
    ("Is the penalty calibrated?", "penalty_calibration", _calibration),
    ("Coverage by weight of the penalty", "coverage", _coverage),
    ("Error and penalty by step of the rollout", "by_step", _by_step),
    ("States of the rollouts beside the data", "states", _states),
    ("Is the model's variance calibrated?", "residuals", _residuals),
    ("Fit of the ensemble", "fit", _fit_curves),
    ("Time by part", "time", _time),
)


def _summary_rows(run: _Run) -> list[tuple[str, str]]:
    summary = read_summary(run.folder) if (run.folder / "summary.json").exists() else {}
    # The sections report errors in these files.
    config: Mapping[str, Any] = {}
    fit: Mapping[str, Any] = {}
    with contextlib.suppress(InputError):
        config = run.config()
    with contextlib.suppress(InputError):
        fit = read_fit(run.folder)
    rollout = config.get("rollout", {})

    def first(name: str, *places: Mapping[str, Any]) -> str:
        values = (place.get(name) for place in places)
        return next((_shorten(str(value)) for value in values if value is not None), "–")

    def mean_std(name: str) -> str:
        mean, std = summary.get(f"{name}_mean"), summary.get(f"{name}_std")
        return "–" if mean is None or std is None else f"{mean:.1f} ± {std:.1f}"

    versions = ", ".join(f"{name} {version}" for name, version in summary.get("versions", {}).items())
    updates = summary.get("updates")
    seconds = summary.get("seconds", {}).get("total")
    return [
        ("Data set", first("dataset", summary, config, fit)),
        ("Task", first("task", summary, config)),
        ("Seed", first("seed", summary, config, fit)),
        ("Horizon", first("horizon", summary, rollout)),
        ("Penalty", first("penalty", summary, rollout)),
        ("Penalty coefficient λ", first("penalty_coef", summary, rollout)),
        ("Normalised score", mean_std("score")),
        ("Return", mean_std("return")),
        ("SAC updates", "–" if updates is None else f"{updates:,}"),
        ("Time", "–" if seconds is None else _duration(seconds)),
        ("Backend", f"{first('backend', summary)}, {first('dtype', summary)}"),
        ("Device", first("device", summary, config, fit)),
        ("Versions", versions or "–"),
    ]


def write_report(run: str | os.PathLike[str], *, data: Transitions | None = None) -> Path:
    """Write report.html and its pictures to the run folder `run`.

    A section whose data are missing becomes one line that says why.

    Args:
        run: folder of `mopo-fast train` or `mopo-fast fit`.
        data: data set of the run; None loads it by the name in config.json.

    Returns:
        The path of report.html.

    Raises:
        InputError: `run` is not a run folder, or cannot be written.
    """
    folder = Path(run)
    check_run(folder, files=REPORTED)
    found = [name for name in REPORTED if (folder / name).is_file()]
    state = _Run(folder, data)
    # Other programs write a config.json too.
    if found == ["config.json"] and "dataset" not in state.config():
        raise InputError(
            f"{folder} is not a run folder, its config.json names no data set; give another folder"
        )
    rows = _attempt(lambda: _summary_rows(state))
    parts = [missing(rows) if isinstance(rows, str) else table(rows), *_settings(folder)]
    for title, name, build in _SECTIONS:
        parts.append(heading(title))
        file = folder / f"{name}.png"
        with look():
            section = _attempt(functools.partial(_draw, build, state))
        if isinstance(section, str):
            _remove(file)
            parts.append(missing(section))
            continue
        png, caption = section
        with atomic_path(file) as temporary:
            temporary.write_bytes(png)
        parts += [picture(title, png), paragraph(caption)]
    write_page(folder / "report.html", f"MOPO run: {folder.resolve().name}", parts)
    return folder / "report.html"


def _settings(folder: Path) -> list[str]:
    """Return the command of a run and a table of all its settings; nothing where config.json is missing."""
    path = folder / "config.json"
    if not path.exists():
        return []

    def build() -> list[str]:
        recorded = read_recorded(path)
        rows = [(name, _shorten(json.dumps(value, ensure_ascii=False))) for name, value in flatten(recorded)]
        return [
            code(_shorten(train_command(recorded))),
            foldable(f"All settings ({len(rows)})", table(rows)),
        ]

    parts = _attempt(build)
    # The sections report a damaged config.json.
    return [] if isinstance(parts, str) else parts


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _draw(build: Callable[[_Run], tuple[Figure, str]], run: _Run) -> tuple[bytes, str]:
    """Build a section, and return its picture as PNG and its caption."""
    figure, caption = build(run)
    return to_png(figure), caption


def _attempt(build: Callable[[], T]) -> T | str:
    """Return the result of `build`, or one line that says why it failed."""
    try:
        return build()
    except InputError as error:
        return f"Missing: {error}."
    except MemoryError:
        return "Missing: there is not enough memory; run `mopo-fast report` again with more of it."
    except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError, OSError) as error:
        return f"Missing: a file of the run is damaged ({type(error).__name__}: {error})."


def _remove(picture: Path) -> None:
    try:
        picture.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot remove {picture}: {error.strerror}; remove it by hand") from error


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
