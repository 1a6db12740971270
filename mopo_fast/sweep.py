"""Many trainings on Ray Tune: seeds, penalty coefficients and horizons; a table and a plot of their scores.

One fit for each seed. Every run is a folder of its own, what `train` makes of it alone, so a sweep that was
stopped goes on by the same call.
"""

import csv
import dataclasses
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mopo_fast.bulk.cluster import connected
from mopo_fast.config import RunConfig, TrainConfig, check_runs
from mopo_fast.data import load_dataset
from mopo_fast.errors import InputError
from mopo_fast.fit import fit_and_save
from mopo_fast.run.folder import check_folder, read_summary
from mopo_fast.run.resolve import resolve
from mopo_fast.train import train
from mopo_fast.utils.atomic import atomic_path
from mopo_fast.utils.lock import locked
from mopo_fast.utils.pictures import BLUE, GREEN, GREY, ORANGE, blank_axes, look
from mopo_fast.utils.progress import progress_bar

_COLUMNS = ("seed", "horizon", "penalty_coef", "return_mean", "return_std", "score_mean", "score_std", "run")
COLORS = (BLUE, ORANGE, GREEN, GREY)
Rows = list[dict[str, Any]]


def grid(
    config: TrainConfig, seeds: Sequence[int], penalty_coefs: Sequence[float], horizons: Sequence[int]
) -> dict[str, RunConfig]:
    """A config for each combination, by the name of its folder; with none given, the config's own value.

    Raises:
        InputError: there are too many, two have one name, or as `resolve`.
    """
    check_runs(seeds, penalty_coefs, horizons)
    configs: dict[str, RunConfig] = {}
    for seed in seeds or [config.seed]:
        for horizon in horizons or (config.rollout.horizon,):
            for coef in penalty_coefs or (config.rollout.penalty_coef,):
                rollout = dataclasses.replace(config.rollout, horizon=horizon, penalty_coef=coef)
                one, _ = resolve(dataclasses.replace(config, seed=seed, rollout=rollout))
                name = f"seed{seed}-h{one.rollout.horizon}-coef{one.rollout.penalty_coef:g}"
                if name in configs:
                    raise InputError(
                        f"{name} was asked for twice; give each seed, horizon and coefficient once"
                    )
                configs[name] = one
    return configs


def sweep(
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    seeds: Sequence[int] = (),
    penalty_coefs: Sequence[float] = (),
    horizons: Sequence[int] = (),
    ray: str = "local",
    memory_map: bool = False,
    quiet: bool = False,
) -> Rows:
    """Train every combination, as many side by side as the cluster has CPUs for, or GPUs.

    Args:
        config: of all runs; `threads` of each, by default 1; `dynamics_from` spares the fits.
        out: a folder, on a cluster one that all its machines see: a run's folder for each, a fit's for each
            seed, sweep.csv, sweep.png.
        seeds, penalty_coefs, horizons: all combinations are trained; empty: the config's own.
        ray: "local", "auto" or an address, see `cluster.connected`.

    Returns:
        A row for each run, as in sweep.csv.

    Raises:
        InputError: as `train`; no Ray or no cluster; or a run has failed, when all others have ended.
    """
    out = Path(out).resolve()
    config = dataclasses.replace(config, threads=config.threads or 1)
    # Workers have another working directory.
    if Path(config.dataset).exists():
        config = dataclasses.replace(config, dataset=str(Path(config.dataset).resolve()))
    if config.dynamics_from is not None:
        config = dataclasses.replace(config, dynamics_from=str(Path(config.dynamics_from).resolve()))
    configs = grid(config, seeds, penalty_coefs, horizons)
    with locked(out), connected(ray):
        if config.dynamics_from is None:
            firsts = {one.seed: one for one in configs.values()}
            folders = {seed: out / f"fit-seed{seed}" for seed in firsts}
            fits = [(one, folders[seed], memory_map) for seed, one in firsts.items()]
            _tune(_fit, [fit for fit in fits if not (fit[1] / "fit.json").exists()], config, "fits", quiet)
            configs = {
                name: dataclasses.replace(one, dynamics_from=str(folders[one.seed]))
                for name, one in configs.items()
            }
        for name, one in configs.items():
            check_folder(out / name, one, resume=True)
        runs = [(one, out / name, memory_map) for name, one in configs.items()]
        _tune(_train, [run for run in runs if not (run[1] / "summary.json").exists()], config, "runs", quiet)
        rows = [_row(one, out / name) for name, one in configs.items()]
        _write_csv(out / "sweep.csv", rows)
        _write_plot(out / "sweep.png", rows)
    return rows


# A run, its folder, and whether the data stay in their file.
Job = tuple[RunConfig, Path, bool]


def _fit(job: Job) -> None:
    config, folder, memory_map = job
    fit_and_save(
        load_dataset(config.dataset, memory_map=memory_map, quiet=True),
        folder,
        seed=config.seed,
        config=config.dynamics,
        device=config.device,
        backend=config.backend,
        threads=config.threads,
    )


def _train(job: Job) -> None:
    config, folder, memory_map = job
    train(config, folder, resume=True, memory_map=memory_map, quiet=True)


def _tune(task: Callable[[Job], None], jobs: list[Job], config: TrainConfig, what: str, quiet: bool) -> None:
    """Each job as one trial; raise `InputError` where some have failed, once all have ended."""
    if not jobs:
        return
    # Else Ray takes Ctrl-C for itself and comes back as if all trials had ended.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    from ray import tune

    with progress_bar(what, len(jobs), quiet=quiet) as bar, tempfile.TemporaryDirectory() as scratch:

        class Progress(tune.Callback):
            def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
                bar.advance()

            def __reduce__(self) -> Any:
                # Ray keeps a copy of its callbacks; a bar is of this terminal alone.
                return tune.Callback, ()

        def trial(parameters: dict[str, int]) -> dict[str, str]:
            # An error would be printed by Ray with a traceback of its own.
            try:
                task(jobs[parameters["job"]])
            except InputError as error:
                return {"refused": str(error)}
            return {}

        # A trial that is lost with its machine is made again, from the checkpoint in its own folder.
        results = tune.Tuner(
            tune.with_resources(trial, {"cpu": config.threads or 1, "gpu": int(config.device == "cuda")}),
            param_space={"job": tune.grid_search(list(range(len(jobs))))},
            run_config=tune.RunConfig(
                name=what,
                storage_path=scratch,
                verbose=0,
                callbacks=[Progress()],
                failure_config=tune.FailureConfig(max_failures=2),
            ),
        ).fit()
    failed = []
    for one in (results[number] for number in range(len(results))):
        assert one.config is not None
        why = _last_line(one.error) if one.error is not None else (one.metrics or {}).get("refused")
        if why is not None:
            failed.append(f"{jobs[one.config['job']][1]}: {why}")
    if failed:
        raise InputError("\n".join([f"{len(failed)} of {len(jobs)} {what} have failed:", *failed]))


def _last_line(error: BaseException) -> str:
    """What the trial itself raised, without the traceback that Ray makes part of it."""
    return str(error).strip().splitlines()[-1]


def _row(config: TrainConfig, folder: Path) -> dict[str, Any]:
    summary = read_summary(folder)
    rollout = config.rollout
    own: dict[str, Any] = {
        "seed": config.seed,
        "horizon": rollout.horizon,
        "penalty_coef": rollout.penalty_coef,
        "run": folder.name,
    }
    return {name: own.get(name, summary.get(name)) for name in _COLUMNS}


def _write_csv(path: Path, rows: Rows) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def over_seeds(rows: Rows) -> Rows:
    """For each horizon and coefficient: the mean over the seeds and its standard deviation.

    Of the score, or of the return where there is none: `metric`.
    """
    metric = "return" if any(row["score_mean"] is None for row in rows) else "score"
    groups: dict[tuple[int, float], list[float]] = {}
    for row in rows:
        groups.setdefault((row["horizon"], row["penalty_coef"]), []).append(row[f"{metric}_mean"])
    return [
        {
            "horizon": horizon,
            "penalty_coef": coef,
            "seeds": len(values),
            "metric": metric,
            "mean": statistics.fmean(values),
            "std": statistics.pstdev(values),
        }
        for (horizon, coef), values in sorted(groups.items())
    ]


def to_table(rows: Rows) -> Table:
    """`over_seeds`, for a terminal."""
    table = Table("horizon", "penalty coefficient", "seeds", over_seeds(rows)[0]["metric"])
    for group in over_seeds(rows):
        outcome = f"{group['mean']:.2f} ± {group['std']:.2f}"
        table.add_row(str(group["horizon"]), f"{group['penalty_coef']:g}", str(group["seeds"]), outcome)
    return table


def _write_plot(path: Path, rows: Rows) -> None:
    """The score over the penalty coefficient, a line for each horizon; bars are standard deviations."""
    groups = over_seeds(rows)
    coefs = sorted({group["penalty_coef"] for group in groups})
    with look(), atomic_path(path) as temporary:
        figure, axes = blank_axes(7.0, 4.2)
        for number, horizon in enumerate(sorted({group["horizon"] for group in groups})):
            some = [group for group in groups if group["horizon"] == horizon]
            axes.errorbar(
                [coefs.index(group["penalty_coef"]) for group in some],
                [group["mean"] for group in some],
                [group["std"] for group in some],
                color=COLORS[number % len(COLORS)],
                marker="o",
                capsize=3,
                label=f"horizon {horizon}",
            )
        # Coefficients are tried in no regular steps.
        axes.set_xticks(range(len(coefs)), [f"{coef:g}" for coef in coefs])
        axes.set_xlabel("penalty coefficient")
        axes.set_ylabel("normalised score" if groups[0]["metric"] == "score" else "return")
        axes.legend()
        figure.savefig(temporary, format="png")
