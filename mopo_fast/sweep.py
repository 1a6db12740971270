"""Trainings of many seeds, penalty coefficients and horizons on Ray Tune.

The ensemble is fitted once for each seed. Every run has a folder of its own, as `train` makes it, so the same
call continues a sweep that was stopped. A table of all scores is written at the end.
"""

import contextlib
import csv
import dataclasses
import io
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mopo_fast.bulk.cluster import connected
from mopo_fast.config import RunConfig, TrainConfig, check_runs
from mopo_fast.data import load_configured
from mopo_fast.errors import InputError
from mopo_fast.fit import fit_and_save
from mopo_fast.run.folder import check_folder, is_finished, read_summary
from mopo_fast.run.opening import warn_of_origins
from mopo_fast.run.resolve import resolve
from mopo_fast.train import train
from mopo_fast.utils.atomic import atomic_path
from mopo_fast.utils.lock import locked
from mopo_fast.utils.progress import progress_bar

_COLUMNS = ("seed", "horizon", "penalty_coef", "return_mean", "return_std", "score_mean", "score_std", "run")
Rows = list[dict[str, Any]]


def grid(
    config: TrainConfig, seeds: Sequence[int], penalty_coefs: Sequence[float], horizons: Sequence[int]
) -> dict[str, RunConfig]:
    """Return a config for each combination, by the name of its folder.

    Args:
        config: settings of all runs.
        seeds: seeds to combine. Here and below an empty sequence stands for the config's own value.
        penalty_coefs: penalty coefficients to combine.
        horizons: horizons to combine.

    Raises:
        InputError: there are too many combinations, two have the same name, or one is refused by `resolve`.
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
    """Train every combination, as many at a time as the cluster has CPUs or GPUs for.

    Args:
        config: settings of all runs. `threads` is that of one run, by default 1. With `dynamics_from` nothing
            is fitted.
        out: folder that receives a folder for each run, a folder for the fit of each seed, and sweep.csv. On
            a cluster every machine must see it.
        seeds: seeds to combine. Here and below an empty sequence stands for the config's own value.
        penalty_coefs: penalty coefficients to combine.
        horizons: horizons to combine.
        ray: "local", "auto" or an address, as in `cluster.connected`.
        memory_map: leave the data in their file.
        quiet: show no progress bars.

    Returns:
        A row for each run, as in sweep.csv.

    Raises:
        InputError: `train` refuses a run, Ray or its cluster is missing, or a run has failed. In the last
            case all other runs have ended.
    """
    out = Path(out).resolve()
    config = dataclasses.replace(config, threads=config.threads or 1)
    if not isinstance(config.dataset, str | Path):
        raise InputError("every process of a sweep reads the data; save them with `Transitions.save` first")
    # Their paths are absolute, because Ray's workers have another working directory.
    configs = grid(config, seeds, penalty_coefs, horizons)
    warn_of_origins(config, next(iter(configs.values())))
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
        try:
            _tune(_train, [run for run in runs if not is_finished(run[1], run[0])], config, "runs", quiet)
        except InputError as error:
            raise InputError(f"{error}\n`mopo-fast report {out}` compares the finished ones.") from error
        rows = [_row(one, out / name) for name, one in configs.items()]
        _write_csv(out / "sweep.csv", rows)
    return rows


# A run's config and folder, and whether the data stay in their file.
Job = tuple[RunConfig, Path, bool]


def _fit(job: Job) -> None:
    config, folder, memory_map = job
    fit_and_save(
        load_configured(config.dataset, config.data, memory_map=memory_map, quiet=True),
        folder,
        seed=config.seed,
        config=config.dynamics,
        device=config.device,
        backend=config.backend,
        threads=config.threads,
        quiet=True,
    )


def _train(job: Job) -> None:
    from ray import tune

    def report(row: dict[str, Any]) -> None:
        tune.report({name: value for name, value in row.items() if value is not None})

    config, folder, memory_map = job
    train(config, folder, resume=True, memory_map=memory_map, quiet=True, on_epoch=report)


def _tune(task: Callable[[Job], None], jobs: list[Job], config: TrainConfig, what: str, quiet: bool) -> None:
    """Run each job as one trial; raise `InputError` where some have failed, once all have ended."""
    if not jobs:
        return
    # Otherwise Ray handles Ctrl-C itself and returns as if all trials had ended.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    from ray import tune

    with (
        progress_bar(what, len(jobs), quiet=quiet) as bar,
        tempfile.TemporaryDirectory() as scratch,
        # Even with verbose=0, Ray prints temporary folders as those of the results.
        contextlib.redirect_stdout(io.StringIO()),
    ):

        class Progress(tune.Callback):
            def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
                bar.advance()

            def __reduce__(self) -> Any:
                # Ray pickles its callbacks, and a progress bar cannot be pickled.
                return tune.Callback, ()

        def trial(parameters: dict[str, int]) -> dict[str, str]:
            # Ray would print an error with its own traceback.
            try:
                task(jobs[parameters["job"]])
            except InputError as error:
                return {"refused": str(error)}
            return {}

        # Ray repeats a trial that was lost with its machine. It goes on from the checkpoint in its folder.
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
    """Return the error that the trial itself raised, without the traceback that Ray adds to its text."""
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
