"""The command line: `mopo-fast COMMAND --help`.

Commands import what they need when they run, so that help and mistakes answer at once. Results go to standard
output, progress and errors to standard error.
"""

import dataclasses
import functools
import io
import itertools
import json as json_format
import logging
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.logging import RichHandler
from tyro.conf import FlagCreatePairsOff, Positional, arg

from mopo_fast.config import (
    PRESETS,
    CheckpointFormat,
    Compression,
    DynamicsConfig,
    Hints,
    Preset,
    RolloutDtype,
    ShardFormat,
    TrainConfig,
    check_runs,
)
from mopo_fast.errors import InputError, is_interrupt, is_out_of_resources, printable
from mopo_fast.utils.atomic import check_writable, write_json
from mopo_fast.utils.progress import console

Dataset = Annotated[str, Positional, arg(metavar="DATASET")]
Run = Annotated[Path, Positional, arg(metavar="RUN")]
File = Annotated[Path | None, arg(metavar="FILE")]
Number = Annotated[int | None, arg(metavar="INT")]
RunTask = Annotated[str | None, arg(metavar="TASK")]


def collect(
    name: Annotated[str, Positional, arg(metavar="NAME")],
    *,
    steps: Number = None,
    out: File = None,
    seed: int = 0,
    threads: Number = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> None:
    """Make a data set on this machine, in MuJoCo, by D4RL's protocol and in its file layout.

    Every tier but random takes a SAC agent trained online, in $MOPO_FAST_DATA_DIR/online/TASK-seedSEED.
    All tiers of a seed share it; stopped, the same command goes on.

    Args:
        name: TASK-TIER, such as hopper-medium-replay: halfcheetah, hopper, walker2d or ant; random, medium,
            medium-replay, medium-expert, expert or full-replay. Or halfcheetah-jump, ant-angle: the full
            replay of an agent trained by another reward, relabelled. The set is called NAME-local.
        steps: Transitions, by default 1,000,000; of each half of medium-expert. Replays hold what was stored.
        out: A file (.hdf5) or a folder; by default $MOPO_FAST_DATA_DIR, else ~/.mopo_fast/datasets.
        threads: By default every core. The file does not depend on it.
        overwrite: Replace the file if it exists.
        quiet: No progress bar.
    """
    from mopo_fast.collect import collect

    try:
        path = collect(name, steps, seed=seed, out=out, threads=threads, overwrite=overwrite, quiet=quiet)
    except KeyboardInterrupt:
        kept = "begins anew" if "-random" in name else "goes on with the training"
        raise KeyboardInterrupt(f"stopped; no file was written, and the same command {kept}") from None
    print(path)


def relabel(
    file: Annotated[Path, Positional, arg(metavar="FILE")],
    *,
    task: Annotated[str, arg(metavar="TASK")],
    out: Annotated[Path, arg(metavar="FILE")],
    overwrite: bool = False,
) -> None:
    """Give a data set the rewards and observations of one of the paper's two out-of-distribution tasks.

    Args:
        file: HDF5 in D4RL's layout. For halfcheetah-jump any halfcheetah set; for ant-angle one with
            x_velocity and y_velocity in its infos.
        task: halfcheetah-jump or ant-angle.
        out: The file to write, .hdf5.
        overwrite: Replace the file if it exists.
    """
    from mopo_fast.data import relabel_file

    print(relabel_file(file, task, out, overwrite=overwrite))


def convert(
    source: Annotated[str, Positional, arg(metavar="SRC")],
    target: Annotated[str, Positional, arg(metavar="DST")],
    *,
    source_format: Annotated[CheckpointFormat | None, arg(name="from")] = None,
    target_format: Annotated[CheckpointFormat, arg(name="to")] = "mopo-fast",
    hints: Hints,
    overwrite: bool = False,
    quiet: bool = False,
) -> None:
    """Write a data set in another format: .hdf5, .npz, or Minari's. With --from, models in another code's.

    Args:
        source: A name or a file, .pkl too; minari:ID. With --from, a code's file or folder.
        target: A file ending in .hdf5, .h5 or .npz, or minari:ID. With --from, a file or folder.
        source_format: The code that has left dynamics, a policy or both in SRC.
        target_format: The code that they are for.
        overwrite: Replace it if it exists.
        quiet: No progress bar.
    """
    if source_format is not None:
        from mopo_fast.compat import convert_checkpoint

        found = convert_checkpoint(source, target, source_format, target_format, hints, overwrite=overwrite)
        models = {"dynamics": found.dynamics, "policy": found.policy}
        print(f"{target}: {' and '.join(name for name, model in models.items() if model is not None)}")
        return
    if hints != Hints() or target_format != "mopo-fast":
        raise InputError("--to, --activation, --elites and --absolute are for models: say --from what")
    from mopo_fast.data.convert import convert

    print(f"{target}: {convert(source, target, overwrite=overwrite, quiet=quiet)} rows")


def fit(
    dataset: Dataset,
    *,
    out: Annotated[Path, arg(metavar="RUN")],
    seed: int = 0,
    device: str = "cpu",
    backend: str = "auto",
    threads: int | None = None,
    dynamics: DynamicsConfig,
    memory_map: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> None:
    """Fit the dynamics ensemble alone, for `train --dynamics-from RUN`. Run it again to go on if stopped.

    Args:
        dataset: A name or a file.
        out: The folder for dynamics.safetensors, dynamics.json and fit.json.
        device: cpu or cuda.
        backend: auto, or one that `mopo-fast doctor` lists.
        threads: Of the CPU kernel; by default all cores.
        memory_map: Leave the data in their file: for sets larger than the memory.
        overwrite: Replace the fit if the folder holds one.
        quiet: No progress bar.
    """
    from mopo_fast.data import load_dataset
    from mopo_fast.fit import fit_and_save
    from mopo_fast.utils.lock import locked

    with locked(out):
        for name in ("config.json", "fit.json"):
            if (out / name).exists() and not overwrite:
                raise InputError(
                    f"{out / name} exists already; choose another --out, or replace the fit with --overwrite"
                )
        data = load_dataset(dataset, memory_map=memory_map, quiet=quiet)
        _, record = fit_and_save(
            data,
            out,
            seed=seed,
            config=dynamics,
            device=device,
            backend=backend,
            threads=threads,
            quiet=quiet,
        )
    best = [record["best_mse"][member] for member in record["elites"]]
    print(
        f"{out}: {record['epochs']} epochs, {record['seconds']:.0f} s;"
        f" the elites' holdout MSE {min(best):.4g} to {max(best):.4g}"
    )


def train(
    config: Annotated[TrainConfig, arg(name="")],
    *,
    preset: Preset | None = None,
    seeds: Annotated[str | None, arg(metavar="FIRST:END")] = None,
    penalty_coefs: Annotated[tuple[float, ...], arg(metavar="FLOAT ...")] = (),
    out: Annotated[Path | None, arg(metavar="RUN")] = None,
    resume: bool = False,
    memory_map: bool = False,
    quiet: bool = False,
) -> None:
    """Train a policy: fit the ensemble, then SAC on penalised model rollouts, evaluated in MuJoCo.

    Args:
        preset: Another code's hyperparameters as defaults, in place of the authors'; see `--help` with it.
        seeds: Several runs at once: 0:8 is seeds 0 to 7; or a list, 0,3,5.
        penalty_coefs: Several runs at once: each of these for every seed.
        out: The run's folder; by default runs/DATASET-seedSEED. Of several runs, the folder of theirs.
        resume: Go on from the last checkpoint in the run's folder, to the same final bits.
        memory_map: Leave the data in their file: for sets larger than the memory. The result is the same.
        quiet: No progress bars.
    """
    # main has made it the defaults of `config`.
    del preset
    from mopo_fast.run.population import train_many
    from mopo_fast.train import train

    configs, names = _population(config, seeds, penalty_coefs)
    if out is None:
        outs = [Path("runs", f"{Path(config.dataset).stem}-{name}") for name in names]
    else:
        outs = [out] if seeds is None and not penalty_coefs else [out / name for name in names]
    try:
        how = {"resume": resume, "memory_map": memory_map, "quiet": quiet}
        one = len(configs) == 1
        summaries = [train(configs[0], outs[0], **how)] if one else train_many(configs, outs, **how)
    except KeyboardInterrupt:
        again = f"--out {outs[0]} --resume" if len(outs) == 1 else "--resume"
        raise KeyboardInterrupt(f"stopped; the same command with {again} goes on") from None
    for summary, folder in zip(summaries, outs, strict=True):
        print(_outcome(summary))
        print(folder)
    if len(summaries) > 1:
        print(_outcome_of_all(summaries))


def sweep(
    config: Annotated[TrainConfig, arg(name="")],
    *,
    preset: Preset | None = None,
    seeds: Annotated[str, arg(metavar="FIRST:END")] = "0:3",
    penalty_coefs: Annotated[tuple[float, ...], arg(metavar="FLOAT ...")] = (),
    horizons: Annotated[tuple[int, ...], arg(metavar="INT ...")] = (),
    out: Annotated[Path | None, arg(metavar="DIR")] = None,
    ray: Annotated[str, arg(metavar="ADDRESS")] = "local",
    memory_map: bool = False,
    quiet: bool = False,
) -> None:
    """Train all combinations of seeds, penalty coefficients and horizons on Ray Tune; a table and a plot.

    Stopped, the same command goes on; finished runs are left as they are.

    Args:
        preset: Another code's hyperparameters as defaults, in place of the authors'; see `--help` with it.
        seeds: 0:8 is seeds 0 to 7; or a list, 0,3,5.
        penalty_coefs: By default the tuned one of the task and data tier, or --penalty-coef.
        horizons: Likewise, or --horizon.
        out: The folder of all runs; by default runs/DATASET-sweep.
        ray: local: this machine's cores; auto: the cluster that runs on it; or an address.
        memory_map: Leave the data in their file: for sets larger than the memory.
        quiet: No progress bars.
    """
    del preset
    from mopo_fast.sweep import sweep, to_table

    folder = out or Path("runs", f"{Path(config.dataset).stem}-sweep")
    try:
        rows = sweep(
            config,
            folder,
            seeds=_parse_seeds(seeds),
            penalty_coefs=penalty_coefs,
            horizons=horizons,
            ray=ray,
            memory_map=memory_map,
            quiet=quiet,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on") from None
    Console().print(to_table(rows))
    print(f"{folder / 'sweep.csv'}, {folder / 'sweep.png'}")


def _population(
    config: TrainConfig, seeds: str | None, penalty_coefs: tuple[float, ...]
) -> tuple[list[TrainConfig], list[str]]:
    """A config for each seed and coefficient, and the name of its folder."""
    configs, names = [], []
    some = [config.seed] if seeds is None else _parse_seeds(seeds)
    check_runs(some, penalty_coefs)
    for seed in some:
        for coef in penalty_coefs or (config.rollout.penalty_coef,):
            rollout = dataclasses.replace(config.rollout, penalty_coef=coef)
            configs.append(dataclasses.replace(config, seed=seed, rollout=rollout))
            names.append(f"seed{seed}" + (f"-coef{coef:g}" if penalty_coefs else ""))
    return configs, names


def _parse_seeds(text: str) -> Sequence[int]:
    """The numbers of "0:8" or of "0,3,5"."""
    mistake = InputError(f"--seeds takes FIRST:END, such as 0:8, or numbers with commas, got {text[:100]!r}")
    try:
        if ":" in text:
            lowest, end = map(int, text.split(":"))
            # A longer range cannot tell its length.
            seeds: Sequence[int] = range(lowest, min(end, lowest + 2**62))
        else:
            seeds = [int(number) for number in text.split(",")]
            lowest = min(seeds)
    except ValueError:
        raise mistake from None
    if not seeds or lowest < 0:
        raise mistake
    return seeds


def evaluate(
    run: Run,
    *,
    task: RunTask = None,
    episodes: int = 10,
    seed: int = 0,
    stochastic: bool = False,
    json: bool = False,
) -> None:
    """Evaluate a run's policy in MuJoCo.

    Args:
        run: A run's folder.
        task: The run's task; needed where it is a Python file, FILE.py, which is executed.
        episodes: Episodes, run side by side.
        stochastic: Sample actions; by default the policy's mean acts.
        json: Print JSON, with every episode's return and length.
    """
    from mopo_fast.bulk.plan import run_settings
    from mopo_fast.evaluate import evaluate
    from mopo_fast.policy import Actor

    whole, _ = run_settings(run, task)
    result = evaluate(Actor.load(run), whole, episodes=episodes, seed=seed, deterministic=not stochastic)
    values = dataclasses.asdict(result)
    print(json_format.dumps(values) if json else _outcome(values))


def rollout(
    run: Annotated[Path | None, Positional, arg(metavar="RUN")] = None,
    *,
    dataset: Annotated[str | None, arg(metavar="DATASET")] = None,
    out: Annotated[Path | None, arg(metavar="PATH")] = None,
    task: RunTask = None,
    count: int = 250_000,
    horizon: Number = None,
    seed: int = 0,
    penalty_coef: Annotated[float | None, arg(metavar="FLOAT")] = None,
    dtype: RolloutDtype = "float32",
    format: ShardFormat = "hdf5",
    compression: Compression = "none",
    shard_rows: int = 1_000_000,
    ray: Annotated[str | None, arg(metavar="ADDRESS")] = None,
    device: str = "cpu",
    backend: str = "auto",
    threads: Number = None,
    memory_map: bool = False,
    verify: Annotated[Path | None, arg(metavar="DIR")] = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> None:
    """Write penalised model transitions of a run's policy: one file, or any number in shards.

    A folder that a stopped command has left is completed by the same command, to the same bytes.

    Args:
        run: A run's folder.
        dataset: Start states are drawn from its observations: a name or a file.
        out: A file, .hdf5 or .npz, in D4RL's layout; or a folder, for shards of it and a manifest.
        task: The run's task; needed where it is a Python file, FILE.py, which is executed.
        count: Transitions.
        horizon: Steps of each rollout; by default the run's own.
        penalty_coef: By default the run's own.
        dtype: Of the factors of the networks' products; bfloat16 is several times faster on AMX.
        format: Of shards: D4RL's layout in HDF5, or Parquet.
        compression: Of shards: none, lzf or gzip in HDF5; none, snappy or zstd in Parquet.
        shard_rows: Transitions of a shard; two are held in memory.
        ray: Spread shards over a Ray cluster: auto, local or an address. The folder must be seen by all.
        device: cpu or cuda.
        backend: auto, or one that `mopo-fast doctor` lists.
        threads: Of the CPU kernel; by default all cores. On a cluster, of one worker, by default 1.
        memory_map: Leave the data in their file: for sets larger than the memory.
        verify: Read every shard in this folder again, and compare it with the manifest. Nothing else is done.
        overwrite: Replace the file if it exists, or the shards that the folder's manifest lists.
        quiet: No progress bar.
    """
    from mopo_fast.bulk.read import as_text, summarise
    from mopo_fast.bulk.read import verify as verify_shards

    if verify is not None:
        if run is not None or out is not None:
            raise InputError("--verify takes a folder and neither RUN nor --out")
        manifest = verify_shards(verify, quiet=quiet)
        print(f"{verify}: {len(manifest.shards)} shards, all sound")
        print(as_text(summarise(manifest)))
        return
    if run is None or dataset is None or out is None:
        raise InputError("say what to roll out: RUN, --dataset and --out; or --verify DIR")
    from mopo_fast.bulk.files import save_transitions
    from mopo_fast.bulk.generate import generate
    from mopo_fast.bulk.write import generate_shards
    from mopo_fast.data import load_dataset
    from mopo_fast.data.files import check_file

    settings: dict[str, Any] = {
        "count": count,
        "horizon": horizon,
        "seed": seed,
        "penalty_coef": penalty_coef,
    }
    settings |= {"dtype": dtype, "backend": backend, "threads": threads, "task": task}
    if out.suffix:
        check_file(out, overwrite)
        if ray is not None:
            raise InputError("--ray takes a folder as --out, for shards")
        rollouts = generate(run, load_dataset(dataset, memory_map=memory_map, quiet=quiet), **settings)
        save_transitions(out, rollouts, overwrite=overwrite)
        print(f"{out}: {len(rollouts)} transitions, mean penalised reward {rollouts.rewards.mean():.4g}")
        return
    data = load_dataset(dataset, memory_map=memory_map, quiet=quiet)
    try:
        manifest = generate_shards(
            run,
            data,
            out,
            **settings,
            shard_rows=shard_rows,
            format=format,
            compression=compression,
            device=device,
            ray=ray,
            overwrite=overwrite,
            quiet=quiet,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "stopped; finished shards are kept, and the same command makes the others"
        ) from None
    print(f"{out}: {len(manifest.shards)} shards")
    print(as_text(summarise(manifest)))


def bench(
    kernel: Annotated[Literal["rollout", "sac", "fit"], Positional] = "rollout",
    *,
    backend: str = "auto",
    dtype: RolloutDtype | None = None,
    obs_dim: int = 17,
    act_dim: int = 6,
    starts: Number = None,
    horizon: Number = None,
    updates: Number = None,
    runs: Number = None,
    fit_steps: Number = None,
    rounds: int = 5,
    threads: Number = None,
    device: str = "cpu",
    json: File = None,
    plot: File = None,
    quiet: bool = False,
) -> None:
    """Measure a kernel against the PyTorch reference, in turn, round after round; medians.

    Args:
        kernel: What to measure.
        dtype: Precision of the products in a rollout or a fit (default: float32).
        starts: Start states of a rollout (default: 50,000).
        horizon: Steps of a rollout (default: 5).
        updates: SAC updates in a round (default: 100).
        runs: SAC runs that are updated at once (default: 1).
        fit_steps: Steps of the fit in a round (default: 64).
        threads: Threads of the CPU kernels (default: every core).
        device: cpu or cuda.
        json: Also write the rows to this file.
        plot: Also draw their roofline into this file, .png, .svg or .pdf.
        quiet: No progress bar.
    """
    from mopo_fast.bench.measure import bench, to_table
    from mopo_fast.bench.roofline import check_picture, write_roofline

    options = {
        "dtype": (dtype, ("rollout", "fit")),
        "starts": (starts, ("rollout",)),
        "horizon": (horizon, ("rollout",)),
        "updates": (updates, ("sac",)),
        "runs": (runs, ("sac",)),
        "fit_steps": (fit_steps, ("fit",)),
    }
    given = {name: value for name, (value, _) in options.items() if value is not None}
    for name in given:
        kernels = options[name][1]
        if kernel not in kernels:
            flag = name.replace("_", "-")
            raise InputError(
                f"--{flag} belongs to bench {' and bench '.join(kernels)}, not to bench {kernel}"
            )
    if "fit_steps" in given:
        given["steps"] = given.pop("fit_steps")
    if json is not None:
        check_writable(json)
    if plot is not None:
        check_picture(plot)
    rows = bench(
        kernel,
        backend=backend,
        obs_dim=obs_dim,
        act_dim=act_dim,
        rounds=rounds,
        threads=threads,
        device=device,
        quiet=quiet,
        **given,
    )
    Console().print(to_table(rows))
    if json is not None:
        write_json(json, [dataclasses.asdict(row) for row in rows])
    if plot is not None:
        write_roofline(plot, rows)


def report(run: Run) -> None:
    """Write a run's report.html and its pictures.

    Args:
        run: A run's folder.
    """
    from mopo_fast.report import write_report

    print(write_report(run))


def doctor(*, json: bool = False) -> None:
    """Print the machine, the versions, and every backend with why it can or cannot run.

    Args:
        json: Print JSON.
    """
    from mopo_fast.doctor import examine

    findings = examine()
    print(json_format.dumps(dataclasses.asdict(findings), indent=2) if json else findings.text())


COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command
    for command in (collect, relabel, convert, fit, train, sweep, evaluate, rollout, bench, report, doctor)
}


def _outcome(values: dict[str, Any]) -> str:
    """A summary's or an evaluation's return and score, in one line."""
    line = f"return {values['return_mean']:.1f} +- {values['return_std']:.1f}"
    if values["score_mean"] is not None:
        line += f", normalised score {values['score_mean']:.2f} +- {values['score_std']:.2f}"
    return line + (", by the model itself" if values.get("scored_by") == "model" else "")


def _outcome_of_all(summaries: Sequence[dict[str, Any]]) -> str:
    """For each penalty coefficient, the mean and the standard deviation over the seeds."""
    lines = []
    for coef in dict.fromkeys(summary["penalty_coef"] for summary in summaries):
        some = [summary for summary in summaries if summary["penalty_coef"] == coef]
        values: dict[str, Any] = {}
        for name in ("return", "score"):
            means = [summary[f"{name}_mean"] for summary in some]
            known = None not in means
            values[f"{name}_mean"] = statistics.fmean(means) if known else None
            values[f"{name}_std"] = statistics.pstdev(means) if known else None
        lines.append(f"penalty coefficient {coef:g}, {len(some)} seeds: {_outcome(values)}")
    return "\n".join(lines)


def _commands(argv: Sequence[str]) -> dict[str, Callable[..., None]]:
    """COMMANDS, where `train` and `sweep` take their defaults from a --preset."""
    given = [value for flag, value in itertools.pairwise(argv) if flag == "--preset"]
    given += [word.removeprefix("--preset=") for word in argv if word.startswith("--preset=")]
    # What is no preset is tyro's to refuse.
    known = [name for name in given if name in PRESETS]
    if not known:
        return COMMANDS
    from mopo_fast.presets import preset

    config = preset(known[-1], tyro.MISSING)
    return COMMANDS | {
        command.__name__: functools.partial(command, config=config) for command in (train, sweep)
    }


class _Printable(logging.Formatter):
    """Messages without what a terminal would obey: names in them are those of files."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _tell(message: str) -> None:
    print(printable(message), file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    logger = logging.getLogger("mopo_fast")
    handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    handler.setFormatter(_Printable())
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The name of a file may hold bytes that are no text.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        tyro.extras.subcommand_cli_from_dict(
            _commands(sys.argv[1:] if argv is None else argv),
            prog="mopo-fast",
            description="MOPO, model-based offline policy optimization: data set in, policy and score out.",
            args=argv,
            config=(FlagCreatePairsOff,),
        )
    except InputError as error:
        _tell(f"error: {error}")
        return 2
    except KeyboardInterrupt as interrupt:
        _tell(str(interrupt) or "stopped")
        return 130
    except Exception as error:
        if is_interrupt(error):
            _tell("stopped")
            return 130
        if not is_out_of_resources(error):
            raise
        why = str(error).strip().splitlines() or [type(error).__name__]
        advice = "free some, or lower --threads or the sizes"
        _tell(f"error: the system has no more memory or threads ({why[0][:200]}); {advice}")
        return 2
    return 0
