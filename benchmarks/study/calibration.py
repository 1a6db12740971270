"""Compare the penalty with the true error where a policy goes: `python -m benchmarks.study.calibration RUN`.

No training takes place. States that the policy visits in the model are rebuilt in MuJoCo, and each predicted
step is compared with the true one. docs/results.md defines what is compared.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.command import run_command
from benchmarks.record import write_record
from benchmarks.study.simulator import Simulator
from benchmarks.study.train import STUDY
from mopo_fast.config import PENALTIES, PenaltyMembers
from mopo_fast.data import load_configured
from mopo_fast.doctor import examine
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine
from mopo_fast.run.find import find_run_dataset
from mopo_fast.run.folder import read_config, read_summary
from mopo_fast.run.resolve import check_run_data
from mopo_fast.tasks import get_task, termination_of
from mopo_fast.utils.progress import progress_bar
from mopo_fast.utils.seeds import derive_seed
from mopo_fast.utils.statistics import finite_or_none, spearman, student_half, student_interval

Array = npt.NDArray[Any]

# Values of lambda at which coverage is computed.
COEFS = (0.5, 1.0, 2.0, 5.0)
# Lengths of the rollouts whose returns are compared, in steps.
LENGTHS = (1, 5, 20, 100)
# Number that keeps this study's seeds apart from a run's own.
_STUDY = 2210


@dataclasses.dataclass
class Subject:
    """A policy, the ensemble that it was trained in, and the true environment.

    Attributes:
        task: name of the task.
        ensemble: the dynamics.
        policy: the policy.
        starts: observations of the data set, [n, obs_dim].
        scale: standard deviation of each dimension of the observation over the data set, [obs_dim].
        penalty: name of the run's penalty.
        penalty_coef: the run's lambda.
        discount: the run's discount.
        simulator: the true environment.
        termination: the run's rule for the end of an episode; None for the task's own.
        penalty_members: members that the run's penalty is computed from.
    """

    task: str
    ensemble: EnsembleDynamics
    policy: Actor
    starts: torch.Tensor
    scale: Array
    penalty: str
    penalty_coef: float
    discount: float
    simulator: Simulator
    termination: str | None = None
    penalty_members: PenaltyMembers = "all"

    def engine(self, penalty: str, penalty_coef: float = 1.0) -> RolloutEngine:
        """Return an engine with a penalty, in float32."""
        return RolloutEngine(
            self.ensemble,
            penalty=penalty,  # type: ignore[arg-type]
            penalty_coef=penalty_coef,
            penalty_members=self.penalty_members,
            termination=termination_of(get_task(self.task), self.termination),
            penalties=True,
        )


def main(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    *,
    starts: int = 2000,
    steps: int = 20,
    episodes: int = 64,
    seed: int = 0,
    json: Path | None = None,
    quiet: bool = False,
) -> None:
    """Compare penalties and true errors of the policies of some runs, and their returns.

    Args:
        runs: Folders of finished runs that differ in their seeds alone. Their data set is one of halfcheetah,
            hopper or walker2d.
        starts: Start states of the rollouts in the model.
        steps: Steps of these rollouts.
        episodes: Start states whose returns are compared, and episodes of the open-loop comparison.
        seed: Seed of all random numbers.
        json: File of the results (default: benchmarks/results/study/calibration-DATASET.json).
        quiet: Show no progress bar.
    """
    if not runs:
        raise InputError("give the folder of a run")
    results = []
    with progress_bar("calibration", 3 * len(runs), quiet=quiet) as bar:
        for run in runs:
            subject = open_run(run)
            result: dict[str, Any] = {"seed": read_summary(run)["seed"]}
            result["by_step"] = calibrate(subject, starts, steps, seed)
            bar.advance(1)
            result["open_loop"] = compare_open_loop(subject, episodes, steps, seed)
            bar.advance(1)
            result["returns"] = compare_returns(subject, episodes, seed)
            bar.advance(1)
            results.append(result)
            subject.simulator.close()
    summary = read_summary(runs[0])
    settings = {
        "dataset": summary["dataset"],
        "task": subject.task,
        "penalty": subject.penalty,
        "penalty_coef": subject.penalty_coef,
        "starts": starts,
        "steps": steps,
        "episodes": episodes,
        "seed": seed,
    }
    for title, header, rows in tables(results):
        table = Table(*header, title=title)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    path = json or STUDY / f"calibration-{summary['dataset']}.json"
    write_record(path, "study.calibration", examine(), {"settings": settings, "runs": results})
    print(path)


def open_run(run: Path) -> Subject:
    """Load what is compared from the folder of a finished run, whose data set is on this machine."""
    config, summary = read_config(run), read_summary(run)
    data = load_configured(find_run_dataset(run), config.data, quiet=True)
    check_run_data(run, data)
    task = get_task(summary["task"]).name
    return Subject(
        task,
        EnsembleDynamics.load(run),
        Actor.load(run),
        data.observations,
        data.observations.double().numpy().std(axis=0),
        config.rollout.penalty,
        summary["penalty_coef"],
        config.sac.discount,
        Simulator(task),
        config.rollout.termination,
        config.rollout.penalty_members,
    )


def calibrate(subject: Subject, starts: int, steps: int, seed: int) -> dict[str, Any]:
    """Compare penalties with true one-step errors along the policy's rollouts in the model.

    The error of a step is the distance between the elites' mean prediction and the truth, over the changes
    of the observation and the reward in raw units.

    Returns:
        Lists over the steps: numbers of rows, quantiles of the error, and for each penalty its quantiles,
        its rank correlation with the error, and the share of rows whose error is at most lambda times the
        penalty, for each lambda of `COEFS`. "rebuilt": the share of rows whose state could be rebuilt.
    """
    chosen = derive_seed(seed, _STUDY, 0)
    rows = torch.randint(len(subject.starts), (starts,), generator=torch.Generator().manual_seed(chosen))
    made = subject.engine(subject.penalty).rollout(
        subject.policy, subject.starts[rows], steps, seed=derive_seed(seed, _STUDY, 1)
    )
    assert made.step is not None
    observations, actions = made.observations.double().numpy(), made.actions.double().numpy()
    truth = subject.simulator.step(observations, actions)
    errors = np.full(len(made), np.nan)
    penalties = {}
    for penalty in PENALTIES:
        step = subject.engine(penalty).step(
            made.observations, made.actions, seed=0, distributions=penalty == PENALTIES[0]
        )
        assert step.penalties is not None
        penalties[penalty] = step.penalties.double().numpy()
        if step.mean is not None:
            mean = step.mean[subject.ensemble.elites].double().numpy().mean(axis=0)
            right = true_outputs(subject.ensemble, observations, truth.next_observations, truth.rewards)
            errors = np.linalg.norm(mean - right, axis=1)
    number = made.step.numpy()
    columns: dict[str, Any] = {"step": [], "rows": [], "rebuilt": [], "error": [], "penalties": {}}
    for t in range(steps):
        here = number == t
        used = here & truth.known
        if used.sum() < 20:
            break
        columns["step"].append(t + 1)
        columns["rows"].append(int(used.sum()))
        columns["rebuilt"].append(float(used.sum() / here.sum()))
        columns["error"].append(_quantiles(errors[used]))
        for penalty, values in penalties.items():
            parts = columns["penalties"].setdefault(
                penalty, {"value": [], "spearman": [], **{f"coverage_{coef:g}": [] for coef in COEFS}}
            )
            parts["value"].append(_quantiles(values[used]))
            parts["spearman"].append(finite_or_none(spearman(values[used], errors[used])))
            for coef in COEFS:
                parts[f"coverage_{coef:g}"].append(float((errors[used] <= coef * values[used]).mean()))
    return columns


def true_outputs(
    ensemble: EnsembleDynamics, observations: Array, next_observations: Array, rewards: Array
) -> Array:
    """Return true steps of n rows in the form of the ensemble's outputs, [n, obs_dim + 1]."""
    change = next_observations - np.where(ensemble.absolute.numpy(), 0.0, observations)
    return np.concatenate([change, rewards[:, None]], axis=1)


def _quantiles(values: Array) -> dict[str, float]:
    low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
    return {"mean": float(values.mean()), "q10": float(low), "median": float(middle), "q90": float(high)}


def compare_open_loop(subject: Subject, episodes: int, steps: int, seed: int) -> dict[str, Any]:
    """Follow true trajectories of the policy in the model, with the same actions.

    The model takes the mean over its members at each step, without noise. The error is the root mean square
    over dimensions of (model - truth) / standard deviation of the data.

    Returns:
        Lists over the steps: numbers of trajectories that have not ended, and quantiles of the error.
    """
    starts = _starts(subject, episodes, seed)
    noise = np.random.default_rng(derive_seed(seed, _STUDY, 2))
    engine = subject.engine(subject.penalty)
    state, model = starts.double().numpy(), starts.clone()
    alive: Array = np.ones(len(state), dtype=bool)
    columns: dict[str, Any] = {"step": [], "rows": [], "error": []}
    for t in range(steps):
        draws = torch.from_numpy(noise.standard_normal((len(state), subject.policy.act_dim))).float()
        actions = subject.policy.act(torch.from_numpy(state).float(), draws)
        truth = subject.simulator.step(state, actions.double().numpy())
        model = engine.step(model, actions, seed=0, deterministic=True).next_observations
        alive = alive & truth.known & torch.isfinite(model).all(dim=1).numpy()
        if alive.sum() < 10:
            break
        difference = (model.double().numpy() - truth.next_observations)[alive] / subject.scale
        columns["step"].append(t + 1)
        columns["rows"].append(int(alive.sum()))
        columns["error"].append(_quantiles(np.sqrt(np.square(difference).mean(axis=1))))
        # The terminal step itself counts.
        alive = alive & ~truth.terminals
        state = np.where(alive[:, None], truth.next_observations, state)
        model = torch.where(torch.from_numpy(alive)[:, None], model, starts)
    return columns


def compare_returns(subject: Subject, episodes: int, seed: int) -> list[dict[str, Any]]:
    """Compare discounted returns of the policy in the model and in MuJoCo, from states of the data set.

    The policy is stochastic in both. A rollout in the model draws a member at each step, as in training. For
    each start state the model's return is a mean over 16 rollouts, the true one over 4.

    Returns:
        For each of `LENGTHS`: means over the start states with 95 % intervals (Student's t) of the true
        return, of the model's, and of the penalised one at the run's lambda; of the differences to the true
        return; and the share of start states at which the penalised return is at most the true one.
    """
    starts = _starts(subject, episodes, seed)
    in_model, in_truth = 16, 4
    longest = max(LENGTHS)
    engine = subject.engine(subject.penalty, subject.penalty_coef)
    made = engine.rollout(
        subject.policy, starts.repeat(in_model, 1), longest, seed=derive_seed(seed, _STUDY, 3)
    )
    assert made.step is not None and made.rollout_index is not None and made.raw_rewards is not None
    place = (made.rollout_index.numpy(), made.step.numpy())
    model, penalised = (np.zeros((in_model * len(starts), longest)) for _ in range(2))
    model[place], penalised[place] = made.raw_rewards.double().numpy(), made.rewards.double().numpy()
    truth, known = _true_rewards(subject, starts.repeat(in_truth, 1), longest, seed)

    known = known.reshape(in_truth, len(starts), longest).all(axis=0)
    compared = []
    for length in LENGTHS:
        weights = subject.discount ** np.arange(length)
        used = known[:, length - 1]
        if used.sum() < 10:
            break
        values = {
            name: (rewards[:, :length] @ weights).reshape(count, len(starts)).mean(axis=0)[used]
            for name, rewards, count in (
                ("true", truth, in_truth),
                ("model", model, in_model),
                ("penalised", penalised, in_model),
            )
        }
        row: dict[str, Any] = {"steps": length, "starts": int(used.sum())}
        for name, some in values.items():
            row[name] = _mean(some)
        for name in ("model", "penalised"):
            row[f"{name}_less_true"] = _mean(values[name] - values["true"])
        row["below_true"] = float((values["penalised"] <= values["true"]).mean())
        compared.append(row)
    return compared


def _true_rewards(subject: Subject, starts: torch.Tensor, steps: int, seed: int) -> tuple[Array, Array]:
    """Return the policy's rewards in MuJoCo, 0 after an end, and where they are known, [n, steps] each."""
    noise = np.random.default_rng(derive_seed(seed, _STUDY, 4))
    state = starts.double().numpy()
    rewards, known = np.zeros((len(state), steps)), np.ones((len(state), steps), dtype=bool)
    going = np.ones(len(state), dtype=bool)
    for t in range(steps):
        draws = torch.from_numpy(noise.standard_normal((len(state), subject.policy.act_dim))).float()
        actions = subject.policy.act(torch.from_numpy(state).float(), draws).double().numpy()
        rows = np.flatnonzero(going)
        if not len(rows):
            break
        truth = subject.simulator.step(state[rows], actions[rows])
        rewards[rows, t] = np.where(truth.known, truth.rewards, 0.0)
        # A velocity at the limit of the observation hides the state: the return is unknown from here on.
        known[rows[~truth.known], t:] = False
        state[rows] = np.where(truth.known[:, None], truth.next_observations, state[rows])
        going[rows] = truth.known & ~truth.terminals
    return rewards, known


def _starts(subject: Subject, count: int, seed: int) -> torch.Tensor:
    """Draw observations of the data set whose states can be rebuilt."""
    generator = np.random.default_rng(derive_seed(seed, _STUDY, 5))
    known = np.flatnonzero(subject.simulator.knows(subject.starts.double().numpy()))
    return subject.starts[torch.from_numpy(generator.choice(known, count, replace=False))]


def _mean(values: Array) -> dict[str, float]:
    """Return the mean and its 95 % interval by Student's t."""
    low, high = student_interval(values)
    return {"mean": float(values.mean()), "low": low, "high": high}


# Steps that the tables show.
_SHOWN = (1, 2, 5, 10, 20)


def tables(runs: list[dict[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return the tables of some runs' results, each as title, header and rows.

    A number is the mean over the runs, ± half of its 95 % interval by Student's t where there are several.
    """
    return [_penalty_table(runs), _open_loop_table(runs), _returns_table(runs)]


def _penalty_table(runs: list[dict[str, Any]]) -> tuple[str, list[str], list[list[str]]]:
    parts = [run["by_step"] for run in runs]
    shown = _shown(parts)
    errors = [_spread([part["error"][t - 1]["median"] for part in parts], ".3g") for t in shown]
    rows = [["", "median error", *errors]]
    for penalty in parts[0]["penalties"]:
        columns = [part["penalties"][penalty] for part in parts]
        medians = [_spread([column["value"][t - 1]["median"] for column in columns], ".3g") for t in shown]
        ranks = [_spread([column["spearman"][t - 1] for column in columns], ".2f") for t in shown]
        shares = [_spread([column["coverage_1"][t - 1] for column in columns], ".0%") for t in shown]
        rows += [
            [penalty, "median", *medians],
            ["", "rank correlation with the error", *ranks],
            ["", "error is at most the penalty", *shares],
        ]
    return "Penalty against the true error", ["penalty", "", *(f"step {t}" for t in shown)], rows


def _open_loop_table(runs: list[dict[str, Any]]) -> tuple[str, list[str], list[list[str]]]:
    parts = [run["open_loop"] for run in runs]
    shown = _shown(parts)
    rows = [
        [label, *(_spread([part["error"][t - 1][name] for part in parts], ".3g") for t in shown)]
        for label, name in (("median", "median"), ("90 % quantile", "q90"))
    ]
    return "Error in open loop, in the data's std", ["", *(f"step {t}" for t in shown)], rows


def _returns_table(runs: list[dict[str, Any]]) -> tuple[str, list[str], list[list[str]]]:
    rows = []
    for parts in zip(*(run["returns"] for run in runs), strict=False):
        names = ("true", "model", "penalised", "penalised_less_true")
        means = [_spread([part[name]["mean"] for part in parts], ".2f") for name in names]
        share = _spread([part["below_true"] for part in parts], ".0%")
        rows.append([str(parts[0]["steps"]), *means, share])
    header = ["steps", "true", "model", "penalised", "penalised less true", "starts where it is at most true"]
    return "Discounted returns from states of the data", header, rows


def _shown(parts: list[dict[str, Any]]) -> list[int]:
    return [t for t in _SHOWN if all(t in part["step"] for part in parts)]


def _spread(values: list[float | None], form: str) -> str:
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return "–"
    mean = format(float(np.mean(numbers)), form)
    if len(numbers) > 1:
        mean += f" ± {format(float(student_half(np.array(numbers))), form)}"
    return mean.replace("%", " %")


if __name__ == "__main__":
    run_command(main)
