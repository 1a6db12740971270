"""Rank the policies of runs without an environment: `mopo-fast select`.

The two estimates are those of `estimates.py`. True returns, where they are known, say how well an estimate
ranks the policies; they are never used to rank.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from rich import box
from rich.table import Table
from rich.text import Text

from mopo_fast.config import DataConfig, RunConfig
from mopo_fast.data import Transitions, load_configured, load_dataset
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError, printable
from mopo_fast.estimates import (
    Starts,
    check_q_discount,
    check_rollouts,
    draw_starts,
    fitted_q,
    penalised_returns,
)
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine
from mopo_fast.run.find import find_run_dataset, find_trained_runs
from mopo_fast.run.folder import read_config, read_summary
from mopo_fast.run.kept import kept_policies
from mopo_fast.run.log import read_rows
from mopo_fast.run.resolve import check_run_data, check_sizes, make_engine
from mopo_fast.tasks import Task, task_of_run
from mopo_fast.utils.machine import check_device, resolve_threads, torch_threads
from mopo_fast.utils.progress import Bar, progress_bar
from mopo_fast.utils.seeds import SELECT, derive_seed
from mopo_fast.utils.statistics import finite_or_none, spearman, student_interval

# Second elements of a seed's path.
_STARTS, _MODEL, _FQE = range(3)
# Steps of an episode where no environment says how many it has.
_EPISODE_STEPS = 1000
# Share of its value by which Q may move over its last tenth of updates.
_STILL = 0.05

CAVEAT = (
    "An interval (±, 95 %) covers the choice of start states alone. Neither estimate can tell how wrong the"
    " model or Q is where the data have no such states and actions. So the first policy need not be the best"
    " one in the environment, and a policy that exploits such errors looks better than it is."
)
"""Limits of the estimates, as `to_sentences` says them."""


@dataclass(frozen=True)
class ModelEstimate:
    """The penalised return of a policy in an ensemble.

    Attributes:
        mean: mean over the start states.
        low: lower end of the mean's 95 % interval; None for a single start state.
        high: upper end, likewise.
        unpenalised: mean of the returns without penalties.
        steps: mean number of steps of a rollout.
        non_finite: number of rollouts that a prediction which was not finite has cut short. With any, the
            policy ranks behind all that have none.
        penalty: measure of the ensemble's uncertainty.
        penalty_coef: weight of the penalty.
        judge: folder of the ensemble.
    """

    mean: float
    low: float | None
    high: float | None
    unpenalised: float
    steps: float
    non_finite: int
    penalty: str
    penalty_coef: float
    judge: str

    @property
    def is_sound(self) -> bool:
        """Tell whether the mean can be compared with others."""
        return self.non_finite == 0


@dataclass(frozen=True)
class QEstimate:
    """The value of a policy by fitted Q evaluation, a discounted return.

    Attributes:
        mean: mean over the start states; None where it is not finite.
        low: lower end of the mean's 95 % interval; None for a single start state.
        high: upper end, likewise.
        change: change of the mean over the last tenth of the updates.
        loss: mean squared error of Q at the end, in squared units of the reward.
        diverged: Q is not finite, or beyond all that the rewards allow. The policy then ranks last.
    """

    mean: float | None
    low: float | None
    high: float | None
    change: float | None
    loss: float | None
    diverged: bool

    @property
    def is_sound(self) -> bool:
        """Tell whether the mean can be compared with others."""
        return not self.diverged

    @property
    def is_still(self) -> bool:
        """Tell whether Q has come to rest."""
        assert self.mean is not None and self.change is not None
        return abs(self.change) <= _STILL * abs(self.mean)


@dataclass(frozen=True)
class PolicyEstimates:
    """A policy of a run with its estimates.

    Attributes:
        run: folder of the run.
        updates: number of SAC updates that made the policy; None for the last policy of an unfinished run.
        file: file with the policy's parameters.
        model: penalised return in the model.
        fqe: value by fitted Q evaluation, or None where it was left out.
        true_return: mean return of the run's own evaluation in the environment, where it was asked for.
    """

    run: str
    updates: int | None
    file: str
    model: ModelEstimate
    fqe: QEstimate | None
    true_return: float | None


@dataclass(frozen=True)
class RankingQuality:
    """Agreement of a ranking by estimates with the true returns.

    Attributes:
        policies: number of policies with a true return.
        rank_correlation: Spearman's rank correlation; None where all estimates or all returns are equal.
        regret: true return of the best policy, minus that of the one that ranks first.
        random_regret: the same for a random choice, on average.
    """

    policies: int
    rank_correlation: float | None
    regret: float
    random_regret: float


@dataclass(frozen=True)
class Selection:
    """Policies with their estimates and rankings.

    Attributes:
        policies: all policies, in the order of the runs.
        by_model: numbers of `policies` by penalised return in the model, best first.
        by_fqe: numbers of `policies` by fitted Q evaluation, best first; empty where it was left out.
        dataset: name of the data set.
        starts: number of different start states.
        starts_of_episodes: True where they are first states of episodes, False where they are any states.
        rollouts: number of rollouts of each policy.
        horizon: most steps of a rollout.
        discount: discount factor of the return in the model.
        fqe_updates: number of updates of Q.
        fqe_discount: discount factor of Q.
        stochastic: actions were sampled.
        seed: seed.
        notes: sentences on what limits the comparison.
        model_quality: how well the model ranks the true returns, where they were asked for.
        fqe_quality: likewise for fitted Q evaluation.
    """

    policies: tuple[PolicyEstimates, ...]
    by_model: tuple[int, ...]
    by_fqe: tuple[int, ...]
    dataset: str
    starts: int
    starts_of_episodes: bool
    rollouts: int
    horizon: int
    discount: float
    fqe_updates: int
    fqe_discount: float
    stochastic: bool
    seed: int
    notes: tuple[str, ...]
    model_quality: RankingQuality | None = None
    fqe_quality: RankingQuality | None = None


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A policy of a run.

    Attributes:
        run: folder of the run.
        config: settings of the run.
        updates: as in `PolicyEstimates`.
        file: file with its parameters.
    """

    run: Path
    config: RunConfig
    updates: int | None
    file: Path


def select(
    runs: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    *,
    data: Any = None,
    task: str | Task | None = None,
    dynamics_from: str | os.PathLike[str] | None = None,
    penalty_coef: float | None = None,
    last: bool = False,
    starts: int = 500,
    horizon: int | None = None,
    discount: float = 1.0,
    fqe_updates: int = 25_000,
    fqe_discount: float = 0.99,
    stochastic: bool = False,
    truth: bool = False,
    seed: int = 0,
    device: str = "cpu",
    backend: str = "auto",
    threads: int | None = None,
    memory_map: bool = False,
    quiet: bool = False,
) -> Selection:
    """Rank the policies of runs by two estimates of their returns, without an environment.

    Every policy is rolled out from the same start states with the same random numbers, and its Q is fitted
    to the same batches.

    Args:
        runs: folders of runs, or folders that hold some.
        data: data set of the start states and of Q, any source of `load_dataset`. None takes that of the
            runs, which must be one.
        task: the runs' task. It must be given where it is a Python file, which is executed.
        dynamics_from: folder of the ensemble that judges all policies. None lets each run's own judge.
        penalty_coef: weight of the penalty for all policies. None takes each run's own. Returns with
            different weights cannot be compared.
        last: rank only the last policy of each run, and not those that `keep_policies` has kept.
        starts: number of start states. They are the first states of different episodes. If the data have
            fewer episodes, each is rolled out several times.
        horizon: most steps of a rollout; None takes the length of the task's episodes.
        discount: discount factor of the return in the model.
        fqe_updates: number of updates of Q for each policy; 0 leaves fitted Q evaluation out.
        fqe_discount: discount factor of Q.
        stochastic: sample the policy's actions, instead of taking its mean action as an evaluation does.
        truth: also compare the rankings with the returns that the runs' own evaluations in the environment
            have found. These returns do not change the rankings.
        seed: seed of all random numbers.
        device: device of all computations, "cpu" or "cuda".
        backend: backend of `RolloutEngine`.
        threads: number of CPU threads; None for all cores.
        memory_map: leave the data in their file.
        quiet: show no progress bar.

    Raises:
        InputError: a folder holds no run or no ensemble, the runs differ in task or data, the data do not fit
            them, fewer than two true returns are known where `truth` is True, or an argument is out of range.
    """
    check_device(device)
    if fqe_updates < 0:
        raise InputError(f"fqe_updates must not be negative, got {fqe_updates}")
    check_q_discount(fqe_discount)
    check_rollouts(1 if horizon is None else horizon, discount)
    folders = find_trained_runs([runs] if isinstance(runs, str | os.PathLike) else runs)
    configs = {run: read_config(run) for run in folders}
    whole = _one_task(configs, task)
    candidates = [one for run, config in configs.items() for one in _policies_of(run, config, last)]
    known = _known_returns(candidates) if truth else [None] * len(candidates)
    judges = _Judges(whole, dynamics_from, penalty_coef, device, backend, threads)
    for run, config in configs.items():
        judges.check(run, config)
    found = _load(configs, data, whole, memory_map=memory_map, quiet=quiet).to(device)
    drawn = draw_starts(found, starts, seed=derive_seed(seed, SELECT, _STARTS))
    repeats = math.ceil(starts / len(drawn.observations))
    steps = horizon or _episode_steps(whole)

    def estimate_model(one: _Candidate, policy: Actor, progress: Callable[[float], None]) -> ModelEstimate:
        engine, judge = judges.engine(one.run, one.config)
        result = penalised_returns(
            *(engine, policy, drawn.observations.repeat(repeats, 1), steps),
            seed=derive_seed(seed, SELECT, _MODEL),
            discount=discount,
            deterministic=not stochastic,
            on_progress=progress,
        )
        # The rollouts of one start state are no independent sample of the start states.
        mean, low, high = mean_interval(result.penalised.view(repeats, -1).mean(0))
        return ModelEstimate(
            *(mean, low, high, result.unpenalised.mean().item(), result.steps.double().mean().item()),
            *(int(result.non_finite.sum()), engine.penalty, engine.penalty_coef, str(judge)),
        )

    def estimate_q(policy: Actor, progress: Callable[[float], None]) -> QEstimate:
        result = fitted_q(
            *(policy, found, drawn.observations),
            discount=fqe_discount,
            updates=fqe_updates,
            seed=derive_seed(seed, SELECT, _FQE),
            deterministic=not stochastic,
            on_progress=progress,
        )
        mean, low, high = map(finite_or_none, mean_interval(result.values))
        change = None if mean is None else finite_or_none(mean - result.earlier)
        return QEstimate(mean, low, high, change, finite_or_none(result.loss), result.diverged)

    with torch_threads(resolve_threads(threads)):
        actors = [Actor.load(one.run, device, tensors_from=one.file) for one in candidates]
        for one, actor in zip(candidates, actors, strict=True):
            _check_policy_sizes(one, actor, whole)
        # Fitted Q takes far longer than rollouts. Only bars of their own can tell the time left.
        modelled: list[ModelEstimate] = []
        with progress_bar("model", len(candidates), unit="estimate", quiet=quiet) as bar:
            for one, actor in zip(candidates, actors, strict=True):
                with _counted(bar, one) as progress:
                    modelled.append(estimate_model(one, actor, progress))
        fitted: list[QEstimate | None] = [None] * len(candidates)
        if fqe_updates:
            with progress_bar("fitted Q", len(candidates), unit="estimate", quiet=quiet) as bar:
                for index, (one, actor) in enumerate(zip(candidates, actors, strict=True)):
                    with _counted(bar, one) as progress:
                        fitted[index] = estimate_q(actor, progress)
    policies = [
        PolicyEstimates(str(one.run), one.updates, str(one.file), model, fqe, true_return)
        for one, model, fqe, true_return in zip(candidates, modelled, fitted, known, strict=True)
    ]
    models = [_score(one) for one in modelled]
    values = [_score(one) for one in fitted if one is not None]
    return Selection(
        policies=tuple(policies),
        by_model=_best_first(models),
        by_fqe=_best_first(values),
        dataset=found.name,
        starts=len(drawn.observations),
        starts_of_episodes=drawn.of_episodes,
        rollouts=repeats * len(drawn.observations),
        horizon=steps,
        discount=discount,
        fqe_updates=fqe_updates,
        fqe_discount=fqe_discount,
        stochastic=stochastic,
        seed=seed,
        notes=tuple(_notes(policies, drawn, starts, judges)),
        model_quality=ranking_quality(models, known) if truth else None,
        fqe_quality=ranking_quality(values, known) if truth and values else None,
    )


def mean_interval(values: torch.Tensor) -> tuple[float, float | None, float | None]:
    """Return the mean of numbers [n] with the ends of its 95 % interval by Student's t.

    The ends are None for a single number, and where the mean is not finite.
    """
    mean = values.mean().item()
    if len(values) < 2 or not math.isfinite(mean):
        return mean, None, None
    return mean, *student_interval(values.cpu().numpy())


def ranking_quality(estimates: Sequence[float], truth: Sequence[float | None]) -> RankingQuality:
    """Say how well estimates rank policies by their true returns.

    Args:
        estimates: an estimate of each policy; -inf for one that ranks last.
        truth: the true return of each policy, or None where it is not known. Such policies are left out.

    Raises:
        InputError: the numbers of estimates and returns differ, or fewer than two returns are known.
    """
    if len(estimates) != len(truth):
        raise InputError(f"there are {len(estimates)} estimates but {len(truth)} true returns")
    known = [(value, true) for value, true in zip(estimates, truth, strict=True) if true is not None]
    if len(known) < 2:
        raise InputError(f"a ranking needs two true returns or more, got {len(known)}")
    values, returns = np.array(known).T
    return RankingQuality(
        policies=len(known),
        rank_correlation=finite_or_none(spearman(values, returns)),
        regret=float(returns.max() - returns[values.argmax()]),
        random_regret=float(returns.max() - returns.mean()),
    )


def to_tables(selection: Selection) -> list[Table]:
    """Format the rankings as tables for a terminal, best first."""
    policies = selection.policies
    columns = {
        "run": _short_names([one.run for one in policies]),
        "updates": ["last" if one.updates is None else f"{one.updates:,}" for one in policies],
    }
    truth = {}
    if selection.model_quality is not None:
        truth["true return"] = [_number(one.true_return) for one in policies]
    title = f"Penalised return in the model, at most {selection.horizon} steps"
    if selection.discount < 1.0:
        title += f", discount {selection.discount:g}"
    model = {
        "estimate": [_with_interval(one.model) for one in policies],
        "unpenalised": [_number(one.model.unpenalised) for one in policies],
        "lambda": [f"{one.model.penalty_coef:g}" for one in policies],
        "steps": [_number(one.model.steps) for one in policies],
    }
    tables = [_table(title, selection.by_model, columns | model | truth)]
    if selection.by_fqe:
        title = f"Fitted Q evaluation, discount {selection.fqe_discount:g}"
        fqe = {"estimate": [_with_interval(one.fqe) for one in policies]}
        tables.append(_table(title, selection.by_fqe, columns | fqe | truth))
    return tables


def _table(title: str, order: Sequence[int], columns: dict[str, list[str]]) -> Table:
    """Make a table of some columns, with its rows in an order."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    # rich breaks a title that is wider than its table.
    table.min_width = len(title)
    # Columns of numbers end at the same place.
    for name in ("", *columns):
        table.add_column(name, justify="left" if name == "run" else "right", overflow="fold")
    for rank, number in enumerate(order, start=1):
        table.add_row(str(rank), *(Text(printable(column[number])) for column in columns.values()))
    return table


def _with_interval(estimate: ModelEstimate | QEstimate | None) -> str:
    """Format a mean with half of the length of its interval, and a mark where it is not sound."""
    if estimate is None:
        return ""
    text = "not finite" if estimate.mean is None else _number(estimate.mean)
    if estimate.mean is not None and estimate.high is not None:
        text += f" ± {estimate.high - estimate.mean:.2g}"
    return text if estimate.is_sound else f"{text} (!)"


def to_sentences(selection: Selection) -> list[str]:
    """Say what the rankings rest on, how well they agree with true returns, and what they cannot tell."""
    lines = list(selection.notes)
    qualities = {"the return in the model": selection.model_quality, "fitted Q": selection.fqe_quality}
    for name, quality in qualities.items():
        if quality is not None:
            rank = "undefined" if quality.rank_correlation is None else f"{quality.rank_correlation:.2f}"
            lines.append(
                f"True returns of {quality.policies} policies: rank correlation with {name} {rank}; its first"
                f" policy has a return {_number(quality.regret)} below the best one's, a random one"
                f" {_number(quality.random_regret)} on average."
            )
    return [*lines, CAVEAT]


def _one_task(configs: dict[Path, RunConfig], given: str | Task | None) -> Task:
    """Return the task of all runs."""
    tasks = {
        run: task_of_run(run / "config.json", config.task or "", config.task_sha256, given)
        for run, config in configs.items()
    }
    (first, task), *others = tasks.items()
    for run, other in others:
        if other.name != task.name:
            raise InputError(
                f"{run} is a run of the task {other.name}, {first} one of {task.name}; give runs of one task"
            )
    return task


def _policies_of(run: Path, config: RunConfig, last: bool) -> Iterator[_Candidate]:
    """Yield the policies of a run, the last one last."""
    final = run / "policy.safetensors"
    updates = read_summary(run)["updates"] if (run / "summary.json").exists() else None
    for number, file in {} if last else kept_policies(run).items():
        # The last policy may have been kept too.
        if number != updates:
            yield _Candidate(run, config, number, file)
    yield _Candidate(run, config, updates, final)


def _known_returns(candidates: Sequence[_Candidate]) -> list[float | None]:
    """Return each policy's return in the environment, from the log of its run."""
    rows: dict[Path, dict[int, float]] = {}
    for run in {one.run for one in candidates}:
        path = run / "progress.csv"
        some = read_rows(path) if path.exists() else []
        try:
            rows[run] = {
                int(row["updates"]): float(row["return_mean"])
                for row in some
                if row["scored_by"] == "environment"
            }
        except (KeyError, ValueError) as error:
            raise InputError(f"{path} has a row that is not a run's ({error}); restore the file") from error
    known = [finite_or_none(rows[one.run].get(one.updates or -1, math.nan)) for one in candidates]
    if sum(value is not None for value in known) < 2:
        raise InputError(
            "fewer than two of the policies were evaluated in an environment by their runs; leave out --truth"
        )
    return known


class _Judges:
    """The ensembles that judge policies.

    Args:
        task: task of the runs.
        dynamics_from: folder of one ensemble for all runs, or None.
        penalty_coef: weight of the penalty for all runs, or None.
        device: device of the ensembles.
        backend: backend of the engines.
        threads: number of their threads.

    Attributes:
        digests: digest of each ensemble, by its folder.
    """

    def __init__(
        self,
        task: Task,
        dynamics_from: str | os.PathLike[str] | None,
        penalty_coef: float | None,
        device: str,
        backend: str,
        threads: int | None,
    ) -> None:
        self._task, self._common = task, None if dynamics_from is None else Path(dynamics_from)
        self._penalty_coef, self._device = penalty_coef, device
        self._backend, self._threads = backend, threads
        self._latest: tuple[Path, EnsembleDynamics] | None = None
        self.digests: dict[Path, str] = {}

    def check(self, run: Path, config: RunConfig) -> None:
        """Raise `InputError` where a run has no ensemble that can judge it."""
        self.engine(run, config)

    def engine(self, run: Path, config: RunConfig) -> tuple[RolloutEngine, Path]:
        """Return the engine that judges the policies of a run, and the folder of its ensemble."""
        folder = self._common or run
        # A common judge is read once.
        if self._latest is None or self._latest[0] != folder:
            self._latest = folder, self._read(folder)
        own = config.rollout.penalty_coef
        coef = own if self._penalty_coef is None else self._penalty_coef
        # The return is that of whole episodes, so no penalty ends them.
        free = dataclasses.replace(config.rollout, truncate_at=None, truncate_quantile=None, halt_reward=None)
        rollout = dataclasses.replace(free, penalty_coef=coef, dtype="float32")
        config = dataclasses.replace(config, rollout=rollout, threads=self._threads)
        return make_engine(config, self._task, self._latest[1], self._backend), folder

    def _read(self, folder: Path) -> EnsembleDynamics:
        if not (folder / "dynamics.json").is_file():
            raise InputError(f"{folder} holds no ensemble (dynamics.json); name one with --dynamics-from")
        ensemble = EnsembleDynamics.load(folder, self._device)
        if (ensemble.obs_dim, ensemble.act_dim) != (self._task.obs_dim, self._task.act_dim):
            raise InputError(
                f"the ensemble in {folder} is for {ensemble.obs_dim} observation and {ensemble.act_dim}"
                f" action dimensions, the task {self._task.name} has {self._task.obs_dim} and"
                f" {self._task.act_dim}; name another with --dynamics-from"
            )
        self.digests[folder] = ensemble.sha256()
        return ensemble


def _load(
    configs: dict[Path, RunConfig], data: Any, task: Task, *, memory_map: bool, quiet: bool
) -> Transitions:
    """Load the data set, and check that it is the runs' where none was given."""
    given, (first, *others) = data is not None, configs
    if given:
        found = load_dataset(data, memory_map=memory_map, quiet=quiet)
    else:
        name, settings = Path(configs[first].dataset).name, configs[first].data
        for run in others:
            other = Path(configs[run].dataset).name
            if other != name or configs[run].data != settings:
                mine, its = (other, name) if other != name else map(_rows, (configs[run].data, settings))
                raise InputError(
                    f"{run} was trained on {mine}, {first} on {its}; name one data set for all with --dataset"
                )
        source = find_run_dataset(first)
        found = load_configured(source, settings, memory_map=memory_map, quiet=quiet)
    check_sizes(found, found.name or "the data set", task)
    if not given:
        for run in configs:
            check_run_data(run, found)
    return found


def _rows(config: DataConfig) -> str:
    """Name the rows that a run was trained on by its settings."""
    return f"rows with --data.compat {config.compat} --data.max-transitions {config.max_transitions or 'all'}"


def _episode_steps(task: Task) -> int:
    """Return the most steps of an episode of a task."""
    try:
        steps = gymnasium.spec(task.env_id).max_episode_steps if task.env_id else None
    except gymnasium.error.Error:
        steps = None
    return steps or _EPISODE_STEPS


def _check_policy_sizes(one: _Candidate, policy: Actor, task: Task) -> None:
    if (policy.obs_dim, policy.act_dim) != (task.obs_dim, task.act_dim):
        raise InputError(
            f"the policy in {one.file} is for {policy.obs_dim} observation and {policy.act_dim} action"
            f" dimensions, the task {task.name} has {task.obs_dim} and {task.act_dim}; train it again"
        )


@contextlib.contextmanager
def _counted(bar: Bar, one: _Candidate) -> Iterator[Callable[[float], None]]:
    """Count an estimate of a policy in a progress bar; yield a function of the share of it that is done."""
    before = bar.completed
    bar.update(note=one.run.name if one.updates is None else f"{one.run.name}, {one.updates:,} updates")
    yield lambda share: bar.update(completed=before + min(share, 0.999))
    bar.update(completed=before + 1)
    bar.report()


def _notes(policies: Sequence[PolicyEstimates], drawn: Starts, wanted: int, judges: _Judges) -> Iterator[str]:
    """Yield sentences on what limits the comparison."""
    count = len(drawn.observations)
    if not drawn.of_episodes:
        yield f"The data set has no episodes in order, so the {count} start states are any of its states."
    elif count < wanted:
        times = math.ceil(wanted / count)
        yield f"The data set has {count} episode starts, so each is rolled out {times} times."
    if count < 2:
        yield "With one start state there is no interval."
    models = [one.model for one in policies]
    if len(set(judges.digests.values())) > 1:
        yield (
            "Policies are judged by different ensembles, each by its run's own. Name one judge for all with"
            " --dynamics-from, best one that no policy was trained in."
        )
    if len({one.penalty_coef for one in models}) > 1:
        coefs = ", ".join(f"{coef:g}" for coef in sorted({one.penalty_coef for one in models}))
        yield (
            f"The penalty has different weights ({coefs}), so these returns cannot be compared. Name one"
            " weight for all with --penalty-coef."
        )
    if len({one.penalty for one in models}) > 1:
        yield f"The penalties differ: {', '.join(sorted({one.penalty for one in models}))}."
    cut = sum(not one.is_sound for one in models)
    if cut:
        rollouts = sum(one.non_finite for one in models)
        yield (
            f"{rollouts} rollouts of {cut} policies, marked (!), ended before a prediction that was not"
            " finite. Their returns count the steps before, and these policies rank behind the others."
        )
    values = [one.fqe for one in policies if one.fqe is not None]
    diverged = sum(one.diverged for one in values)
    if diverged:
        yield (
            f"Fitted Q has diverged for {diverged} of {len(values)} policies, marked (!), which rank last."
        )
    moving = sum(not one.diverged and not one.is_still for one in values)
    if moving:
        yield (
            f"Fitted Q of {moving} of {len(values)} policies still moved by more than {_STILL:.0%} in the"
            " last tenth of its updates. Give more with --fqe-updates."
        )


def _score(estimate: ModelEstimate | QEstimate) -> float:
    """Return the number that an estimate ranks by."""
    return estimate.mean if estimate.is_sound and estimate.mean is not None else -math.inf


def _best_first(scores: Sequence[float]) -> tuple[int, ...]:
    return tuple(sorted(range(len(scores)), key=lambda number: -scores[number]))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _short_names(runs: Sequence[str]) -> list[str]:
    """Return names of runs without the folders that all of them share."""
    parents = {os.path.dirname(os.path.abspath(run)) for run in runs}
    return [os.path.relpath(os.path.abspath(run), os.path.commonpath(parents)) for run in runs]
