"""The command line: `mopo-fast COMMAND --help`.

Results go to standard output, progress and errors to standard error. A command imports what it needs when it
runs, because torch takes seconds, and neither help texts nor most errors need it.

The docstring of a command is its help: the first paragraph stands in the list of commands too, and its
`Examples:` are printed at the end.
"""

import dataclasses
import difflib
import functools
import inspect
import io
import itertools
import json as json_format
import logging
import operator
import os
import re
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.logging import RichHandler
from tyro.conf import FlagCreatePairsOff, Positional, arg, subcommand
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from mopo_fast._version import __version__
from mopo_fast.config import (
    CHECKPOINT_FORMATS,
    CHECKSUMS,
    PRESETS,
    ROLLOUT_DTYPES,
    CheckpointFormat,
    Checksum,
    Compression,
    DataConfig,
    DynamicsConfig,
    ExportFormat,
    FitConfig,
    Hints,
    MatmulPrecision,
    Preset,
    RolloutDtype,
    ShardFormat,
    SweepConfig,
    TrainConfig,
    ZInit,
    check_runs,
    flag,
    of_precision,
    one_of,
    switch,
)
from mopo_fast.errors import InputError, is_interrupt, is_out_of_resources, printable
from mopo_fast.utils.atomic import absolute_file, check_writable, write_json
from mopo_fast.utils.progress import console

Dataset = Annotated[str, Positional, arg(metavar="DATASET")]
Run = Annotated[Path, Positional, arg(metavar="RUN")]
# tyro lets a tuple be empty and would show that as its default; the commands ask for a run themselves.
Runs = Annotated[tuple[Path, ...], Positional, arg(metavar="RUN ...", help_behavior_hint="(required)")]
RunTask = Annotated[str | None, flag("the task in the run's config.json", "TASK")]
AnyPreset = Annotated[Preset | None, flag("the authors' values", one_of(PRESETS))]
Threads = Annotated[int | None, flag("all cores", "INT")]
Switch = Annotated[bool, switch("on", "off")]
_NOT_WRITTEN = flag("not written", "FILE")
_NOT_VERIFY = "(required, except with --verify)"
_FIRST_STEPS = """\
Examples:
    mopo-fast collect hopper-random
    mopo-fast train hopper-random-local
    mopo-fast train --help
    mopo-fast --version

Completion of commands and flags in bash (likewise in zsh and fish):
    mopo-fast --tyro-write-completion bash ~/.local/share/bash-completion/completions/mopo-fast"""


def collect(
    name: Annotated[str, Positional, arg(metavar="NAME")],
    *,
    steps: Annotated[int | None, flag("1000000", "INT")] = None,
    out: Annotated[Path | None, flag("$MOPO_FAST_DATA_DIR, else ~/.mopo_fast/datasets", "PATH")] = None,
    seed: int = 0,
    z_init: ZInit = "constant",
    threads: Threads = None,
    overwrite: Switch = False,
    quiet: Switch = False,
) -> None:
    """Make a data set in MuJoCo by D4RL's protocol and write it to one HDF5 file in D4RL's layout.

    Random sets take uniform actions. All others take a SAC agent, which is trained first.

    The agent is kept in $MOPO_FAST_DATA_DIR/online/TASK-seedSEED and serves every tier of its seed.

    The same command continues the training of an agent that was stopped.

    Args:
        name: Data set, as TASK-TIER. Tasks are halfcheetah, hopper, walker2d and ant. Tiers are random,
            medium, medium-replay, medium-expert, expert and full-replay. The paper's two out-of-distribution
            tasks, halfcheetah-jump and ant-angle, have no tiers: the data are the full replay of an agent
            trained on another reward, with the task's own rewards. `mopo-fast train` finds the set as
            NAME-local.
        steps: Transitions to collect; medium-expert has this many of each half. Replay sets refuse the flag,
            because they hold all that their agent has stored.
        out: HDF5 file, or the folder for it.
        seed: Seed of all random numbers. The same seed gives the same data.
        z_init: Height that the reward of halfcheetah-jump measures from. It is constant, or that at the
            beginning of each episode, within 0.1 m of it, as in the authors' later code. `mopo-fast train`
            evaluates in the same way.
        threads: Number of threads. The data do not depend on it.
        overwrite: Replace the file if it exists.
        quiet: Show no progress bar.

    Examples:
        mopo-fast collect hopper-random
        mopo-fast collect halfcheetah-medium-replay --seed 1
    """
    from mopo_fast.collect import collect

    try:
        path = collect(
            name, steps, seed=seed, z_init=z_init, out=out, threads=threads, overwrite=overwrite, quiet=quiet
        )
    except KeyboardInterrupt:
        kept = "begins anew" if "-random" in name else "goes on with the training"
        raise KeyboardInterrupt(f"stopped; no file was written, and the same command {kept}") from None
    print(path)


def relabel(
    file: Annotated[Path, Positional, arg(metavar="FILE")],
    *,
    task: Annotated[str, arg(metavar="TASK")],
    out: Annotated[Path, arg(metavar="FILE")],
    z_init: ZInit = "constant",
    overwrite: Switch = False,
) -> None:
    """Copy a data set with the rewards of one of the paper's two out-of-distribution tasks.

    Observations are adapted too where the task has others. The result is an HDF5 file in D4RL's layout.

    Args:
        file: Data set, an HDF5 file in D4RL's layout. Any halfcheetah set will do for halfcheetah-jump. For
            ant-angle it must hold x_velocity and y_velocity in its infos, as sets made by `collect` do.
        task: Task of the new rewards: halfcheetah-jump or ant-angle.
        out: HDF5 file to write.
        z_init: Height that the reward of halfcheetah-jump measures from. It is constant, or that at the
            beginning of each episode.
        overwrite: Replace the file if it exists.

    Examples:
        mopo-fast relabel halfcheetah_medium-v2.hdf5 --task halfcheetah-jump --out jump.hdf5
    """
    from mopo_fast.data import find_dataset

    find_dataset(file)
    from mopo_fast.data import relabel_file

    print(relabel_file(file, task, out, z_init=z_init, overwrite=overwrite))


def convert(
    source: Annotated[str, Positional, arg(metavar="SRC")],
    target: Annotated[str, Positional, arg(metavar="DST")],
    *,
    source_format: Annotated[
        CheckpointFormat | None,
        arg(name="from"),
        flag("SRC is a data set", one_of(CHECKPOINT_FORMATS)),
    ] = None,
    target_format: Annotated[CheckpointFormat, arg(name="to")] = "mopo-fast",
    hints: Hints,
    strict: Switch = False,
    overwrite: Switch = False,
    quiet: Switch = False,
) -> None:
    """Convert a data set to another format, or, with --from, trained models of another code.

    DST is written whole or not at all. Its ending says which format a data set is converted to.

    Args:
        source: Name or file of a data set: .hdf5, .npz, .pkl, .parquet, a folder of shards or minari:ID. With
            --from, a file or folder that the other code has written.
        target: Data set to write: .hdf5, .h5, .npz or minari:ID. With --from, the file or folder for the
            models.
        source_format: Code that wrote the models in SRC, which are an ensemble, a policy or both.
        target_format: Code to write the models for. It is used with --from alone.
        hints: Properties of models that another code's files may lack. They are used with --from alone.
        strict: Refuse a conversion that loses or changes anything. Otherwise a model that the other code
            cannot have is left out, and standard error tells all that is lost. It is used with --from alone.
        overwrite: Replace DST if it exists.
        quiet: Show no progress bar.

    Examples:
        mopo-fast convert hopper-medium-v2 hopper-medium.npz
        mopo-fast convert dynamics/ run/ --from offlinerl-kit
    """
    if source_format is not None:
        if not Path(source).exists():
            raise InputError(f"{source} does not exist")
        from mopo_fast.compat import convert_checkpoint

        found = convert_checkpoint(
            source, target, source_format, target_format, hints, strict=strict, overwrite=overwrite
        )
        models = {"dynamics": found.dynamics, "policy": found.policy}
        print(f"{target}: {' and '.join(name for name, model in models.items() if model is not None)}")
        return
    if hints != Hints() or target_format != "mopo-fast" or strict:
        raise InputError(
            "--to, --activation, --elites, --absolute and --strict convert models; name the code of SRC with"
            " --from"
        )
    from mopo_fast.data import find_dataset
    from mopo_fast.data.formats import check_file
    from mopo_fast.data.local import MINARI_PREFIX

    if not target.startswith(MINARI_PREFIX):
        check_file(target, overwrite)
    find_dataset(source)
    from mopo_fast.data.convert import convert

    print(f"{target}: {convert(source, target, overwrite=overwrite, quiet=quiet)} rows")


def info(
    dataset: Annotated[str, Positional, arg(metavar="DATA")],
    *,
    task: Annotated[str | None, flag("read from the data set's name", "TASK")] = None,
    html: Annotated[Path | None, _NOT_WRITTEN] = None,
    json: Switch = False,
    memory_map: Switch = False,
    quiet: Switch = False,
) -> None:
    """Show what is in a data set: rows, episodes, returns, ranges, and what is unusual.

    Unusual are constant dimensions, actions beyond [-1, 1], repeated rows, far outliers, dimensions on a
    scale far from 1, and terminals that contradict the task's termination rule.

    Args:
        dataset: Name or file of the data set, as in `mopo-fast train --help`.
        task: Task of the data, for scores and the termination rule. Give a name, or a Python file, FILE.py,
            which is executed.
        html: HTML page with the same facts and pictures of their distributions. It needs no other file.
        json: Print JSON.
        memory_map: Leave the data in their file, for a data set larger than the memory.
        quiet: Show no progress bar.

    Examples:
        mopo-fast info hopper-medium-v2
        mopo-fast info mine.hdf5 --task hopper --html mine.html
    """
    from mopo_fast.data import load_dataset
    from mopo_fast.data.summary import summarise
    from mopo_fast.info import task_of, to_text, write_info

    if html is not None:
        check_writable(html)
    data = load_dataset(dataset, memory_map=memory_map, quiet=quiet)
    summary = summarise(data, task_of(data, task))
    if html is not None:
        write_info(html, summary, data)
    # Names in the data may hold control characters.
    print(json_format.dumps(dataclasses.asdict(summary)) if json else printable(to_text(summary)))
    if html is not None and not json:
        print(f"\n{html}")


def fit(
    dataset: Dataset,
    *,
    out: Annotated[Path, arg(metavar="RUN")],
    task: Annotated[str | None, flag("any, for the data are not compared with one", "TASK")] = None,
    seed: int = 0,
    device: str = "cpu",
    backend: str = "auto",
    threads: Threads = None,
    matmul_precision: MatmulPrecision = "highest",
    data: DataConfig,
    dynamics: DynamicsConfig,
    memory_map: Switch = False,
    overwrite: Switch = False,
    quiet: Switch = False,
) -> None:
    """Fit the dynamics ensemble alone, to be used by any number of trainings.

    The folder RUN receives dynamics.safetensors, dynamics.json and fit.json, for `train --dynamics-from RUN`,
    and the settings in config.json.

    The same command continues a fit that was stopped.

    Args:
        dataset: Name or file of the data set, as in `mopo-fast train --help`.
        out: Folder for the ensemble.
        task: Task whose numbers of observation and action dimensions the data must have. Give a name, or a
            Python file, FILE.py, with a task of your own.
        seed: Seed of all random numbers. The same seed reproduces the fit bit for bit on one instruction
            set, backend and dtype.
        device: Device that fits: cpu or cuda.
        backend: Implementation of the fit: auto to choose one, or a name that `mopo-fast doctor` lists.
        threads: Number of threads of the CPU kernels. The result does not depend on it.
        matmul_precision: Precision of the matrix products: highest for float32, high for bfloat16x3 and
            medium for bfloat16 where these are faster, as `mopo-fast doctor` tells. The setting
            dynamics.dtype overrides it.
        data: Transitions that are taken from the data set.
        dynamics: Probabilistic ensemble and its maximum-likelihood fit.
        memory_map: Leave the data in their file, for a data set larger than the memory. Results do not
            change.
        overwrite: Replace the ensemble if the folder holds one.
        quiet: Show no progress bar.

    Examples:
        mopo-fast fit hopper-medium-v2 --out fits/hopper-medium
        mopo-fast train hopper-medium-v2 --dynamics-from fits/hopper-medium
    """
    from mopo_fast.data import find_dataset

    config = FitConfig(
        absolute_file(dataset), task, seed, device, backend, threads, dynamics, matmul_precision, data
    )
    config.validate()
    find_dataset(dataset)
    if task is not None:
        from mopo_fast.tasks import get_task

        get_task(task)
    from mopo_fast.backends.precision import dtypes_of
    from mopo_fast.data import load_configured
    from mopo_fast.fit import fit_and_save
    from mopo_fast.run.folder import check_fit_folder, write_config
    from mopo_fast.run.opening import open_fit
    from mopo_fast.run.resolve import check_sizes
    from mopo_fast.utils.lock import locked
    from mopo_fast.utils.machine import check_device

    check_device(device)
    dtype = dynamics.dtype or dtypes_of(matmul_precision, device, backend).training
    dynamics = dataclasses.replace(dynamics, dtype=dtype)
    config = dataclasses.replace(config, dynamics=dynamics)
    with locked(out):
        check_fit_folder(out, overwrite)
        rows = load_configured(dataset, data, memory_map=memory_map, quiet=quiet)
        if task is not None:
            check_sizes(rows, dataset, get_task(task))
        write_config(out, config)
        open_fit(config, rows, out, quiet=quiet)
        _, record = fit_and_save(
            rows,
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
    preset: AnyPreset = None,
    seeds: Annotated[str | None, flag("that of --seed", "FIRST:END")] = None,
    penalty_coefs: Annotated[tuple[float, ...], flag("that of --penalty-coef", "FLOAT ...")] = (),
    out: Annotated[Path | None, flag("runs/DATASET-seedSEED", "RUN")] = None,
    resume: Switch = False,
    memory_map: Switch = False,
    quiet: Switch = False,
) -> None:
    """Train a policy by MOPO: fit an ensemble of models to the data, then train SAC on rollouts in it.

    The folder RUN receives the policy, the ensemble, learning curves, a checkpoint and report.html.

    At the end the policy's return in MuJoCo is printed, and its normalised score where the task has one.
    Several runs are compared too, as by `mopo-fast report`.

    Hyperparameters are those of MOPO's authors, Yu et al. (2020), unless you set them or choose a preset.

    Args:
        config: Settings of the run.
        preset: Code base whose hyperparameters become the defaults. `mopo-fast train DATASET --preset NAME
            --help` shows them.
        seeds: Seeds of several runs to train at once, as a range (0:8 is 0 to 7) or a list (0,3,5).
        penalty_coefs: Penalty coefficients of several runs to train at once, each with every seed.
        out: Folder of the run. With several runs, each has a folder of its own in it.
        resume: Go on from the last checkpoint in the folder. The result is the same, bit for bit, as that of
            a run without interruption, on the same instruction set, backend and dtype. Give the run's folder
            in place of DATASET, and all settings are read from its config.json. A larger --steps trains a
            finished run on.
        memory_map: Leave the data in their file, for a data set larger than the memory. Results do not
            change; SAC on a CPU takes about a fifth longer.
        quiet: Show no progress bars.

    Examples:
        mopo-fast train hopper-medium-v2
        mopo-fast train hopper-medium-v2 --steps 100000 --seeds 0:4
        mopo-fast train --resume runs/hopper-medium-v2-seed0
        mopo-fast train --resume runs/hopper-medium-v2-seed0 --steps 2000000
    """
    from mopo_fast.run.find import check_run

    # `_commands` has made the preset, or the settings of the run to resume, the defaults of `config`.
    if resume and _is_run(config.dataset):
        if preset is not None or seeds is not None or penalty_coefs or out is not None:
            raise InputError(
                f"--resume {config.dataset} takes the settings of that run; leave out --preset, --seeds,"
                " --penalty-coefs and --out"
            )
        out = Path(config.dataset)
        config = _resumed(config, out)
    elif resume and out is None and _is_folder_without_data(config.dataset):
        check_run(config.dataset)
    configs, names = _population(config, seeds, penalty_coefs)
    _check_settings(config)
    from mopo_fast.run.population import train_many
    from mopo_fast.train import train

    if out is None:
        outs = [Path("runs", f"{_short_name(config.dataset)}-{name}") for name in names]
    else:
        outs = [out] if seeds is None and not penalty_coefs else [out / name for name in names]
    how: dict[str, Any] = {"resume": resume, "memory_map": memory_map, "quiet": quiet}
    one = len(configs) == 1
    new = [str(folder) for folder in outs if resume and not (folder / "config.json").exists()]
    if new:
        _tell(f"no run to resume in {', '.join(new)}; training from the beginning")
    try:
        summaries = [train(configs[0], outs[0], **how)] if one else train_many(configs, outs, **how)
    except KeyboardInterrupt:
        if one:
            raise KeyboardInterrupt(_stopped(outs[0])) from None
        raise KeyboardInterrupt("stopped; the same command with --resume goes on") from None
    for summary, folder in zip(summaries, outs, strict=True):
        print(_outcome(summary))
        print(folder)
    if len(summaries) > 1:
        _compare(outs, out or Path("runs", f"{_short_name(config.dataset)}-comparison"))


def sweep(
    config: Annotated[SweepConfig, arg(name="")],
    *,
    preset: AnyPreset = None,
    seeds: Annotated[str, arg(metavar="FIRST:END")] = "0:3",
    penalty_coefs: Annotated[tuple[float, ...], flag("that of --penalty-coef", "FLOAT ...")] = (),
    horizons: Annotated[tuple[int, ...], flag("that of --horizon", "INT ...")] = (),
    out: Annotated[Path | None, flag("runs/DATASET-sweep", "DIR")] = None,
    ray: Annotated[str, arg(metavar="ADDRESS")] = "local",
    memory_map: Switch = False,
    quiet: Switch = False,
) -> None:
    """Train every combination of seeds, penalty coefficients and horizons on Ray Tune.

    The folder DIR receives the folder of each run, a table of all scores, sweep.csv, and the comparison of
    the runs that `mopo-fast report DIR` writes, comparison.html.

    The ensemble is fitted once for each seed. The same command continues a sweep that was stopped.

    Args:
        config: Settings of the runs.
        preset: Code base whose hyperparameters become the defaults. `mopo-fast sweep DATASET --preset NAME
            --help` shows them.
        seeds: Seeds of the runs, as a range (0:8 is 0 to 7) or a list (0,3,5).
        penalty_coefs: Penalty coefficients of the runs.
        horizons: Rollout lengths of the runs.
        out: Folder of the sweep. On a cluster every machine must see it.
        ray: Ray cluster that trains: local for the cores of this machine, auto for the cluster that runs on
            it, or the address of one.
        memory_map: Leave the data in their file, for a data set larger than the memory. Results do not
            change.
        quiet: Show no progress bars.

    Examples:
        mopo-fast sweep hopper-medium-v2 --seeds 0:3 --penalty-coefs 0.5 1 5 --horizons 1 5
    """
    del preset
    _check_settings(config)
    combined = parse_seeds(seeds)
    check_runs(combined, penalty_coefs, horizons)
    from mopo_fast.sweep import sweep

    folder = out or Path("runs", f"{_short_name(config.dataset)}-sweep")
    try:
        rows = sweep(
            config,
            folder,
            seeds=combined,
            penalty_coefs=penalty_coefs,
            horizons=horizons,
            ray=ray,
            memory_map=memory_map,
            quiet=quiet,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on") from None
    print(folder / "sweep.csv")
    _compare([folder / row["run"] for row in rows], folder)


def _short_name(dataset: str) -> str:
    """Return the name of a data set for the folder of its runs."""
    from mopo_fast.data.local import MINARI_PREFIX

    if dataset.startswith(MINARI_PREFIX):
        return dataset.removeprefix(MINARI_PREFIX).replace("/", "-")
    return Path(dataset).stem


def _stopped(run: Path) -> str:
    """Say how a training that was interrupted goes on."""
    from mopo_fast.tasks import resume_command

    if not _is_run(str(run)):
        return "stopped before anything was written; the same command begins anew"
    return f"stopped; `{resume_command(run)}` goes on"


def _is_run(path: str) -> bool:
    # Unlike `Path.is_file`, this is False for a name that is too long.
    return os.path.isfile(os.path.join(path, "config.json"))


def _is_folder_without_data(path: str) -> bool:
    """Tell whether `path` is a folder, but not one of shards."""
    return os.path.isdir(path) and not any(name.endswith("manifest.json") for name in os.listdir(path))


def _resumed(config: TrainConfig, run: Path) -> TrainConfig:
    """Return the settings with which a run goes on, from those of a command that names its folder.

    Raises:
        InputError: the run's task is a Python file, and the command does not name it.
    """
    from mopo_fast.run.folder import read_config
    from mopo_fast.tasks import task_of_run

    recorded = read_config(run)
    task = task_of_run(run / "config.json", recorded.task or "", recorded.task_sha256, config.task)
    return dataclasses.replace(config, dataset=recorded.dataset, task=task.name)


def _check_settings(config: TrainConfig) -> None:
    """Report mistakes in the settings of a run before torch is imported, which takes seconds."""
    from mopo_fast.data import find_dataset
    from mopo_fast.run.find import check_run
    from mopo_fast.tasks import get_task

    config.validate()
    if config.task is not None and not config.task.endswith(".py"):
        get_task(config.task)
    find_dataset(config.dataset)
    if config.dynamics_from is not None:
        check_run(config.dynamics_from, files=("dynamics.json",))


def _population(
    config: TrainConfig, seeds: str | None, penalty_coefs: tuple[float, ...]
) -> tuple[list[TrainConfig], list[str]]:
    """Return a config for each seed and coefficient, and the names of their folders."""
    configs, names = [], []
    numbers = [config.seed] if seeds is None else parse_seeds(seeds)
    check_runs(numbers, penalty_coefs)
    for seed in numbers:
        for coef in penalty_coefs or (config.rollout.penalty_coef,):
            rollout = dataclasses.replace(config.rollout, penalty_coef=coef)
            configs.append(dataclasses.replace(config, seed=seed, rollout=rollout))
            names.append(f"seed{seed}" + (f"-coef{coef:g}" if penalty_coefs else ""))
    return configs, names


def parse_seeds(text: str) -> Sequence[int]:
    """Parse "0:8" or "0,3,5"."""
    mistake = InputError(
        f"--seeds takes FIRST:END, such as 0:8, or a list, such as 0,3,5, got {text[:100]!r}"
    )
    try:
        if ":" in text:
            lowest, end = map(int, text.split(":"))
            # len() fails for a longer range.
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
    stochastic: Switch = False,
    json: Switch = False,
    video: Annotated[Path | None, _NOT_WRITTEN] = None,
    video_episodes: int = 1,
    video_steps: Annotated[int | None, flag("whole episodes", "INT")] = None,
    quiet: Switch = False,
) -> None:
    """Evaluate the policy of a run in MuJoCo and print its return and normalised score.

    Nothing is written but the file of --video.

    Args:
        run: Folder of the run, or of a policy that `mopo-fast convert` has written.
        task: Task of the run. It must be given where the task is a Python file, FILE.py, because that is
            executed, and for a converted policy.
        episodes: Number of episodes. They run side by side.
        seed: Seed of the environments and of the policy's noise.
        stochastic: Sample actions from the policy. Otherwise its mean acts.
        json: Print JSON, which also has the return and length of each episode.
        video: Video of the first episodes, .mp4 or .gif. It is rendered without a window. An .mp4 needs
            `pip install '.[video]'` in the checkout.
        video_episodes: Number of episodes in the video, one after the other.
        video_steps: Most steps of an episode in the video.
        quiet: Show no progress bar.

    Examples:
        mopo-fast evaluate runs/hopper-medium-v2-seed0 --episodes 100
        mopo-fast evaluate runs/hopper-medium-v2-seed0 --video hopper.mp4
        mopo-fast evaluate converted/ --task hopper
    """
    from mopo_fast.run.find import check_policy, check_run, holds_policy_alone
    from mopo_fast.tasks import get_task

    converted = holds_policy_alone(run, task)
    if not converted:
        check_run(run)
    from mopo_fast.bulk.plan import run_settings
    from mopo_fast.evaluate import evaluate
    from mopo_fast.policy import Actor

    whole = get_task(task) if converted and task is not None else run_settings(run, task)[0]
    check_policy(run)
    options: dict[str, Any] = {"episodes": episodes, "seed": seed, "deterministic": not stochastic}
    actor = Actor.load(run)
    film = None
    if video is not None:
        from mopo_fast.video import Film

        film = Film(video, whole, seed=seed, episodes=video_episodes, steps=video_steps)
        options["on_actions"] = film.add_actions
    values = dataclasses.asdict(evaluate(actor, whole, **options))
    try:
        if film is not None:
            film.write(quiet=quiet)
    finally:
        print(json_format.dumps(values) if json else _outcome(values), flush=True)
    if film is not None and not json:
        print(video)


def rollout(
    run: Annotated[Path | None, Positional, arg(metavar="RUN", help_behavior_hint=_NOT_VERIFY)] = None,
    *,
    dataset: Annotated[str | None, flag("the data set that the run was trained on", "DATASET")] = None,
    out: Annotated[Path | None, arg(metavar="PATH", help_behavior_hint=_NOT_VERIFY)] = None,
    task: RunTask = None,
    count: int = 250_000,
    horizon: Annotated[int | None, flag("the run's", "INT")] = None,
    seed: int = 0,
    penalty_coef: Annotated[float | None, flag("the run's", "FLOAT")] = None,
    matmul_precision: MatmulPrecision = "highest",
    dtype: Annotated[RolloutDtype | None, of_precision(ROLLOUT_DTYPES)] = None,
    format: ShardFormat = "hdf5",
    compression: Compression = "none",
    checksum: Annotated[
        Checksum | None, flag("the folder's, xxh3_128 in a new one", one_of(CHECKSUMS))
    ] = None,
    shard_rows: int = 1_000_000,
    ray: Annotated[str | None, flag("this process alone", "ADDRESS")] = None,
    device: str = "cpu",
    backend: str = "auto",
    threads: Annotated[int | None, flag("all cores; with --ray, 1 for each worker", "INT")] = None,
    memory_map: Switch = False,
    verify: Annotated[Path | None, flag("make rollouts", "DIR")] = None,
    overwrite: Switch = False,
    quiet: Switch = False,
) -> None:
    """Roll out a run's policy in its ensemble and write the penalised transitions to disk.

    They go to one file, or to a folder of shards with a manifest, which may be larger than the memory.

    The same command completes a folder that was stopped, to the same bytes. It makes damaged shards again.

    A larger --count lets the folder grow.

    Args:
        run: Folder of the run whose policy and ensemble are used.
        dataset: Name or file of the data set that start states are drawn from, as in `mopo-fast
            train --help`. Give it where the run's own is on another machine or has changed.
        out: File to write, .hdf5 or .npz, in D4RL's layout, or a folder for shards.
        task: Task of the run. It must be given where the task is a Python file, FILE.py, because that is
            executed.
        count: Number of transitions.
        horizon: Steps of each rollout.
        seed: Seed of all random numbers. The same seed gives the same transitions, bit for bit on one
            instruction set, backend and dtype.
        penalty_coef: Weight of the penalty in the reward.
        matmul_precision: Precision of the matrix products: highest for float32, high for bfloat16x3 on a CPU
            and TF32 on a GPU, medium for bfloat16. Rollouts take float32 if they are no faster in the lower
            precision.
        dtype: Precision of the networks. With tfloat32, bfloat16, bfloat16x3 or float16 only the factors of
            matrix products are rounded; everything else is float32. In bfloat16x3 a factor is the sum of two
            numbers in bfloat16.
        format: Format of the shards. In HDF5 they have D4RL's layout.
        compression: Compression of the shards: none, lzf or gzip in HDF5, and none, snappy or zstd in
            Parquet.
        checksum: Algorithm of the shards' checksums in the manifest. xxh3_128 finds accidental damage and is
            the faster one. sha256 also finds forged shards, if nobody can change the manifest.
        shard_rows: Transitions of one shard. Two shards are held in memory.
        ray: Ray cluster that makes the shards: local for the cores of this machine, auto for the cluster that
            runs on it, or the address of one. Every machine must see the folder.
        device: Device that makes the rollouts: cpu or cuda.
        backend: Implementation of the rollouts: auto to choose one, or a name that `mopo-fast doctor` lists.
        threads: Number of threads of the CPU kernels. The result does not depend on it.
        memory_map: Leave the data in their file, for a data set larger than the memory. Results do not
            change.
        verify: Folder of shards to read and compare with its manifest. Nothing is written.
        overwrite: Replace the file if it exists, or the shards that the folder's manifest lists.
        quiet: Show no progress bar.

    Examples:
        mopo-fast rollout RUN --out rollouts.hdf5
        mopo-fast rollout RUN --dataset hopper-medium-v2 --out shards/ --count 100000000
        mopo-fast rollout --verify shards/
    """
    if verify is not None:
        if run is not None or out is not None:
            raise InputError("--verify takes a folder and neither RUN nor --out")
        if not verify.is_dir():
            raise InputError(f"{verify} is no folder of shards; give the --out of a `mopo-fast rollout`")
        from mopo_fast.bulk.read import as_text, narrow_penalties, summarise
        from mopo_fast.bulk.read import verify as verify_shards

        manifest = verify_shards(verify, quiet=quiet)
        print(f"{verify}: {_shards(len(manifest.shards))}, all sound")
        print(as_text(summarise(manifest), narrow_penalties(verify, manifest)))
        return
    if run is None or out is None:
        raise InputError("rollout needs RUN and --out; or --verify DIR, to check a folder of shards")
    from mopo_fast.data import find_dataset
    from mopo_fast.data.formats import check_file
    from mopo_fast.run.find import check_policy, check_run, find_run_dataset, read_data_config

    check_run(run)
    check_policy(run)
    if out.suffix:
        check_file(out, overwrite)
        if ray is not None:
            raise InputError("--ray takes a folder as --out, for shards")
    if dataset is None:
        source = find_run_dataset(run)
    else:
        source = dataset
        find_dataset(source)
    from mopo_fast.backends.precision import describe, dtypes_of
    from mopo_fast.bulk.files import save_transitions
    from mopo_fast.bulk.generate import generate
    from mopo_fast.bulk.read import as_text, narrow_penalties, summarise
    from mopo_fast.bulk.write import generate_shards
    from mopo_fast.data import load_configured
    from mopo_fast.run.resolve import check_run_data

    settings: dict[str, Any] = {
        "count": count,
        "horizon": horizon,
        "seed": seed,
        "penalty_coef": penalty_coef,
    }
    if dtype is None:
        dtypes = dtypes_of(matmul_precision, device, backend)
        dtype = dtypes.rollout
        if dtypes.why and not quiet:
            logging.getLogger("mopo_fast").info(
                "precision: %s", describe(matmul_precision, dtypes.why, {"rollouts": dtype})
            )
    settings |= {"dtype": dtype, "device": device, "backend": backend, "threads": threads, "task": task}
    data = load_configured(source, read_data_config(run), memory_map=memory_map, quiet=quiet)
    if dataset is None:
        check_run_data(run, data)
    if out.suffix:
        rollouts = generate(run, data, **settings)
        save_transitions(out, rollouts, overwrite=overwrite)
        print(f"{out}: {len(rollouts)} transitions, mean penalised reward {rollouts.rewards.mean():.4g}")
        return
    try:
        manifest = generate_shards(
            run,
            data,
            out,
            **settings,
            shard_rows=shard_rows,
            format=format,
            compression=compression,
            checksum=checksum,
            ray=ray,
            overwrite=overwrite,
            quiet=quiet,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "stopped; finished shards are kept, and the same command makes the others"
        ) from None
    print(f"{out}: {_shards(len(manifest.shards))}")
    print(as_text(summarise(manifest), narrow_penalties(out, manifest)))


def bench(
    kernel: Annotated[
        Literal["rollout", "sac", "fit"], Positional, arg(metavar="[{rollout,sac,fit}]")
    ] = "rollout",
    *,
    backend: str = "auto",
    dtype: Annotated[RolloutDtype | None, flag("float32", one_of(ROLLOUT_DTYPES))] = None,
    obs_dim: int = 17,
    act_dim: int = 6,
    starts: Annotated[int | None, flag("50000", "INT")] = None,
    horizon: Annotated[int | None, flag("5", "INT")] = None,
    penalty_coef: Annotated[float | None, flag("1.0", "FLOAT")] = None,
    updates: Annotated[int | None, flag("200", "INT")] = None,
    runs: Annotated[int | None, flag("1", "INT")] = None,
    fit_steps: Annotated[int | None, flag("128", "INT")] = None,
    rounds: int = 5,
    threads: Threads = None,
    device: str = "cpu",
    json: Annotated[Path | None, _NOT_WRITTEN] = None,
    plot: Annotated[Path | None, _NOT_WRITTEN] = None,
    quiet: Switch = False,
) -> None:
    """Measure the speed of a kernel beside the PyTorch reference and the peak of the machine.

    All take turns, round after round. The medians are printed as a table.

    Args:
        kernel: Kernel to measure: rollouts in the ensemble, SAC updates, or the fit of the ensemble.
        backend: Implementation to measure: auto to choose one, or a name that `mopo-fast doctor` lists.
        dtype: Precision of the matrix products. SAC and the fit have float32, bfloat16 and
            bfloat16x3.
        obs_dim: Dimensions of an observation.
        act_dim: Dimensions of an action.
        starts: Start states of a rollout. Only for bench rollout.
        horizon: Steps of a rollout. Only for bench rollout.
        penalty_coef: Weight of the penalty in the reward. With 0, only the drawn member computes a row. Only
            for bench rollout.
        updates: Number of SAC updates in a round. Only for bench sac.
        runs: Number of SAC runs that are updated at once. Only for bench sac.
        fit_steps: Gradient steps of the fit in a round. Only for bench fit.
        rounds: Number of rounds. More rounds give steadier medians.
        threads: Number of threads of the CPU kernels.
        device: Device to measure: cpu or cuda.
        json: File for the measurements in JSON.
        plot: File for the roofline plot of the measurements: .png, .svg or .pdf.
        quiet: Show no progress bar.

    Examples:
        mopo-fast bench rollout --dtype bfloat16
        mopo-fast bench sac --json sac.json --plot sac.png
    """
    options = {
        "dtype": (dtype, ("rollout", "sac", "fit")),
        "starts": (starts, ("rollout",)),
        "horizon": (horizon, ("rollout",)),
        "penalty_coef": (penalty_coef, ("rollout",)),
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
    from mopo_fast.bench.measure import bench, to_table
    from mopo_fast.bench.roofline import check_picture, write_roofline

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


def select(
    runs: Runs,
    *,
    dataset: Annotated[str | None, flag("the data set that the runs were trained on", "DATASET")] = None,
    task: Annotated[str | None, flag("the task in the runs' config.json", "TASK")] = None,
    dynamics_from: Annotated[Path | None, flag("each run's own", "RUN")] = None,
    penalty_coef: Annotated[float | None, flag("each run's own", "FLOAT")] = None,
    last: Switch = False,
    starts: int = 500,
    horizon: Annotated[int | None, flag("the length of the task's episodes, mostly 1000", "INT")] = None,
    discount: float = 1.0,
    fqe_updates: int = 25_000,
    fqe_discount: float = 0.99,
    stochastic: Switch = False,
    truth: Switch = False,
    seed: int = 0,
    device: str = "cpu",
    backend: str = "auto",
    threads: Threads = None,
    memory_map: Switch = False,
    json: Annotated[Path | None, _NOT_WRITTEN] = None,
    quiet: Switch = False,
) -> None:
    """Rank the policies of runs without an environment, by two estimates of their returns.

    The first estimate is the penalised return of long rollouts in an ensemble. The second one is fitted Q
    evaluation, which learns the value of the policy from the data set alone.

    The last policy of each run is ranked, and those that `mopo-fast train --keep-policies` has kept.

    Args:
        runs: Folders of runs, or a folder that holds some. The runs must have one task and one data set.
        dataset: Name or file of the data set, as in `mopo-fast train --help`. It gives the start states, and
            fitted Q learns from it.
        task: Task of the runs. It must be given where the task is a Python file, FILE.py, because that is
            executed.
        dynamics_from: Folder of a run or of `mopo-fast fit`, whose ensemble judges all policies. An ensemble
            that no policy was trained in judges most fairly.
        penalty_coef: Weight of the penalty in the returns of all policies. Give it for runs with different
            weights, because their returns cannot be compared otherwise.
        last: Rank the last policy of each run alone.
        starts: Number of rollouts of each policy. They start from the first states of episodes in the data
            set.
        horizon: Most steps of a rollout.
        discount: Discount factor of the return in the model. With 1 all steps count alike, as in an
            evaluation.
        fqe_updates: Number of updates of the fitted Q of each policy. With 0 this estimate is left out.
        fqe_discount: Discount factor of fitted Q, less than 1.
        stochastic: Sample actions from the policies. Otherwise their means act, as in an evaluation.
        truth: Compare the rankings with the returns in the environment that the runs' own evaluations have
            found. The rankings do not depend on these returns.
        seed: Seed of all random numbers.
        device: Device of all computations: cpu or cuda.
        backend: Implementation of the rollouts: auto to choose one, or a name that `mopo-fast doctor` lists.
        threads: Number of CPU threads.
        memory_map: Leave the data in their file, for a data set larger than the memory.
        json: File for all estimates in JSON.
        quiet: Show no progress bar.

    Examples:
        mopo-fast select runs/hopper
        mopo-fast select runs/lambda0 runs/lambda1 --penalty-coef 1 --dynamics-from runs/fit-judge
    """
    from mopo_fast.data import find_dataset
    from mopo_fast.run.find import check_run, find_run_dataset, find_trained_runs

    if json is not None:
        check_writable(json)
    folders = find_trained_runs(runs)
    if dynamics_from is not None:
        check_run(dynamics_from, files=("dynamics.json",))
    if dataset is None:
        find_run_dataset(folders[0])
    else:
        find_dataset(dataset)
    from mopo_fast.select import select, to_sentences, to_tables

    selection = select(
        folders,
        data=dataset,
        task=task,
        dynamics_from=dynamics_from,
        penalty_coef=penalty_coef,
        last=last,
        starts=starts,
        horizon=horizon,
        discount=discount,
        fqe_updates=fqe_updates,
        fqe_discount=fqe_discount,
        stochastic=stochastic,
        truth=truth,
        seed=seed,
        device=device,
        backend=backend,
        threads=threads,
        memory_map=memory_map,
        quiet=quiet,
    )
    if json is not None:
        write_json(json, dataclasses.asdict(selection))
    out = Console()
    if not out.is_terminal:
        # In a pipe no line is broken.
        out = Console(width=1000)
    for table in to_tables(selection):
        out.print(table)
    print("\n".join(map(printable, to_sentences(selection))))


def report(
    runs: Runs,
    *,
    out: Annotated[Path | None, flag("the folder given, else runs/comparison", "DIR")] = None,
    json: Switch = False,
) -> None:
    """Write the report of a run again, or compare many runs.

    One run gets report.html and its pictures, in its own folder.

    Several runs, or a folder that holds some, are compared in comparison.html and its pictures: learning
    curves, a mean with its interval for each group, and differences within each seed.

    Runs are grouped by their settings apart from the seed. The value of a run is the mean of its last ten
    evaluations.

    Args:
        runs: Folder of a run; or several, or folders that hold runs at any depth.
        out: Folder for the comparison.
        json: Print the comparison as JSON, with each run's own values, in place of tables.

    Examples:
        mopo-fast report runs/hopper-medium-v2-seed0
        mopo-fast report runs/hopper
        mopo-fast report runs/lambda0 runs/lambda1 --out compared
    """
    from mopo_fast.run.find import REPORTED, check_run, holds_files

    if not runs:
        raise InputError("report needs a RUN; give the folder of a run, or of several")
    if len(runs) == 1 and (holds_files(runs[0], REPORTED) or not runs[0].is_dir()):
        check_run(runs[0], files=REPORTED)
        if out is not None or json:
            raise InputError(
                f"--out and --json are for comparing runs, and {runs[0]} is one run; give more, or leave them"
                " out"
            )
        from mopo_fast.report import write_report

        print(write_report(runs[0]))
        return
    _compare(runs, out or (runs[0] if len(runs) == 1 else Path("runs", "comparison")), json=json)


def _compare(runs: Sequence[Path], out: Path, *, json: bool = False) -> None:
    """Compare runs, print the comparison, and write its page to `out`."""
    from mopo_fast.compare import compare_runs, to_json, to_tables, write_comparison

    comparison = compare_runs(runs)
    page = write_comparison(comparison, out)
    if json:
        print(json_format.dumps(to_json(comparison)))
        return
    terminal = sys.stdout.isatty()
    # A pipe gets whole lines, whatever their length.
    shown = Console() if terminal else Console(width=10_000)
    for table in to_tables(comparison, plain=not terminal):
        shown.print(table)
    for note in comparison.notes:
        print(printable(note))
    print(page)


def export(
    run: Run,
    *,
    to: ExportFormat = "onnx",
    out: Annotated[Path | None, flag("export in RUN", "DIR")] = None,
    distribution: Switch = False,
    overwrite: Switch = False,
) -> None:
    """Write the policy and the dynamics of a run as ONNX files, or as programs of torch.export.

    Other programs run these files without this package: policy.onnx and dynamics.onnx, or policy.pt2 and
    dynamics.pt2. All take any number of rows.

    Each file is run on random inputs before it gets its name, and compared with the networks in float64. Its
    largest error is printed beside that of PyTorch in float32.

    Args:
        run: Folder of the run, of `mopo-fast fit` or of `mopo-fast convert`. It may hold a policy alone, or
            dynamics alone.
        to: Format of the files: onnx for ONNX, torch for torch.export. ONNX needs `pip install '.[onnx]'` in
            the checkout.
        out: Folder for the files.
        distribution: Let the policy return mean and log_std too, those of its Gaussian before the tanh.
            Otherwise it returns actions alone, tanh(mean).
        overwrite: Replace files that exist.

    Examples:
        mopo-fast export runs/hopper-medium-v2-seed0
        mopo-fast export runs/hopper-medium-v2-seed0 --to torch --out models/
    """
    from mopo_fast.run.find import check_run

    check_run(run, files=("policy.json", "dynamics.json"))
    from mopo_fast.export import export_run

    for file in export_run(run, out, to=to, distribution=distribution, overwrite=overwrite):
        print(f"{file.path}: largest error {file.error:.2g}, PyTorch's own {file.usual_error:.2g}")


def push(
    run: Run,
    *,
    repo: Annotated[str, arg(metavar="USER/NAME")],
    private: Switch = False,
    checkpoint: Switch = False,
    quiet: Switch = False,
) -> None:
    """Upload a run to the Hugging Face Hub, with a model card.

    The repository receives the policy, the dynamics, the settings, the results and the kept policies, in one
    commit. Absolute paths in the settings are replaced by names of files.

    It needs `pip install '.[hub]'` in the checkout, and a token: log in with `hf auth login`, or set
    HF_TOKEN.

    Args:
        run: Folder of the run.
        repo: Repository of models. It is made if it does not exist.
        private: Make a new repository private.
        checkpoint: Upload the checkpoint too, with which the training goes on. It has the state of the
            optimizers and the model buffer.
        quiet: Show no progress bars.

    Examples:
        mopo-fast push runs/hopper-medium-v2-seed0 --repo me/mopo-hopper-medium
    """
    from mopo_fast.run.find import check_policy, check_run

    check_run(run)
    check_policy(run)
    from mopo_fast.hub import push

    print(push(run, repo, private=private, checkpoint=checkpoint, quiet=quiet).url)


def pull(
    repo: Annotated[str, Positional, arg(metavar="USER/NAME")],
    *,
    out: Annotated[Path | None, flag("runs/NAME", "RUN")] = None,
    revision: Annotated[str | None, flag("the latest commit", "REVISION")] = None,
    quiet: Switch = False,
) -> None:
    """Download a run from the Hugging Face Hub that `mopo-fast push` has uploaded.

    All files are checked before the folder gets its name. Nothing in them is executed.

    The same command continues a download that was stopped.

    It needs `pip install '.[hub]'` in the checkout. Private repositories need a token, as for `push`.

    Args:
        repo: Repository of the run.
        out: Folder for the run, which must not exist.
        revision: Branch, tag or commit of the repository.
        quiet: Show no progress bars.

    Examples:
        mopo-fast pull me/mopo-hopper-medium
        mopo-fast evaluate runs/mopo-hopper-medium
    """
    if out is not None and os.path.lexists(out):
        raise InputError(f"{out} exists already; choose another --out")
    from mopo_fast.hub import pull

    try:
        print(pull(repo, out, revision=revision, quiet=quiet))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on") from None


def doctor(*, json: Switch = False) -> None:
    """Print the machine, the versions, the data sets found, and for each backend why it can or cannot run.

    Args:
        json: Print JSON.

    Examples:
        mopo-fast doctor
    """
    from mopo_fast.doctor import examine

    findings = examine()
    print(json_format.dumps(dataclasses.asdict(findings), indent=2) if json else findings.text())


COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command
    for command in (
        collect,
        relabel,
        convert,
        info,
        fit,
        train,
        sweep,
        evaluate,
        rollout,
        bench,
        select,
        report,
        export,
        push,
        pull,
        doctor,
    )
}
for _command in COMMANDS.values():
    # tyro ends a line of the help where the docstring does, so an argument's text is put on one line.
    _command.__doc__ = re.sub(r"\n {8,}", " ", inspect.cleandoc(_command.__doc__ or ""))


def _shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count} shards"


def _outcome(values: dict[str, Any]) -> str:
    """Describe the return and score of a summary or an evaluation in one line."""
    line = f"return {values['return_mean']:.1f} +- {values['return_std']:.1f}"
    if values["score_mean"] is not None:
        line += f", normalised score {values['score_mean']:.2f} +- {values['score_std']:.2f}"
    return line + (", by the model itself" if values.get("scored_by") == "model" else "")


def _commands(argv: Sequence[str]) -> dict[str, Callable[..., None]]:
    """Return `COMMANDS`, with defaults from a --preset, or from the run that `train --resume` names."""
    # tyro takes --flag=value too.
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if argv[:1] == ["train"] and "--resume" in argv:
        for flag, value in itertools.pairwise(argv):
            if flag not in ("--out", "--dynamics-from") and _is_run(value):
                return COMMANDS | {"train": functools.partial(train, config=_recorded(Path(value)))}
    given = [value for flag, value in itertools.pairwise(argv) if flag == "--preset"]
    # tyro reports unknown presets.
    known = [name for name in given if name in PRESETS]
    if not known:
        return COMMANDS
    from mopo_fast.presets import preset

    config = preset(known[-1], tyro.MISSING)
    return COMMANDS | {
        "train": functools.partial(train, config=config),
        "sweep": functools.partial(sweep, config=SweepConfig(**vars(config))),
    }


def _recorded(run: Path) -> TrainConfig:
    """Return the settings in a run's config.json, without the data set and a task that is a Python file."""
    from mopo_fast.run.folder import read_config

    recorded = read_config(run)
    values = {field.name: getattr(recorded, field.name) for field in dataclasses.fields(TrainConfig)}
    if recorded.task is not None and recorded.task.endswith(".py"):
        # The file is executed only if the command names it too.
        values["task"] = None
    return TrainConfig(**values | {"dataset": tyro.MISSING})


def _docstring(command: str) -> str:
    return COMMANDS[command].__doc__ or ""


def _run(argv: Sequence[str]) -> None:
    """Parse a command line and run its command.

    Raises:
        SystemExit: a help text was printed, or tyro cannot parse the arguments.
    """
    options: dict[str, Any] = {"config": (FlagCreatePairsOff,), "registry": _registry()}
    commands = _commands(argv)
    if argv and argv[0] in commands:
        # Without the other commands, an error about a flag names this command's flags alone.
        tyro.cli(commands[argv[0]], prog=f"mopo-fast {argv[0]}", args=argv[1:], **options)
        return
    # The list of commands has only the first paragraph of each help.
    types = [
        Annotated[
            Any, subcommand(name, description=_docstring(name).partition("\n\n")[0], constructor=command)
        ]
        for name, command in commands.items()
    ]
    any_command: Any = functools.reduce(operator.or_, types)
    tyro.cli(
        any_command,
        prog="mopo-fast",
        description="MOPO, model-based offline policy optimization: data set in, policy and score out.",
        args=argv,
        **options,
    )


def _check_words(argv: Sequence[str]) -> None:
    """Raise `InputError` where the first word of a command line is no command, or a word is empty."""
    # An empty path would be the current folder.
    for before, word in itertools.pairwise(["mopo-fast", *argv]):
        if word == "" or (word.startswith("--") and word.endswith("=")):
            flag = word.rstrip("=") or before
            raise InputError(f"the value after {flag} is empty; give one, or leave out the flag")
    name = argv[0] if argv else "--help"
    if name.startswith("-") or name in COMMANDS:
        return
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f", did you mean {close[0]}?" if close else "."
    raise InputError(f"unknown command {name!r}{hint} The commands are: {', '.join(COMMANDS)}")


def _whole_number(text: str) -> int:
    """Parse a whole number, which may be written as 1000000, 1_000_000 or 1e6."""
    mistake = ValueError(f"{text[:100]!r} is no whole number, such as 1000 or 1e6")
    try:
        number = Decimal(text)
    except InvalidOperation:
        raise mistake from None
    # Other numbers of this size would take long to write out.
    if not number.is_finite() or number.adjusted() > 100 or number != number.to_integral_value():
        raise mistake
    return int(number)


def _whole_numbers(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
    """Return the rule by which tyro parses an int, or None for any other type."""
    if kind.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: _whole_number(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    )


def _registry() -> ConstructorRegistry:
    registry = ConstructorRegistry()
    registry.primitive_rule(_whole_numbers)
    return registry


def _epilog(argv: Sequence[str]) -> str:
    """Return the text at the end of a help: a command's examples, or how to set up completion."""
    if not argv or argv[0] not in COMMANDS:
        return _FIRST_STEPS
    return "".join(_docstring(argv[0]).partition("Examples:")[1:])


class _Printable(logging.Formatter):
    """Formats messages, and marks warnings. Control characters, which names may hold, are spelled out."""

    def format(self, record: logging.LogRecord) -> str:
        """Format the record."""
        mark = "warning: " if record.levelno >= logging.WARNING else ""
        return mark + printable(super().format(record))


def _tell(message: str) -> None:
    print(printable(message), file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 2 for a user's mistake, or 130 after an interrupt.

    Args:
        argv: the arguments after the program's name, by default those of the process.

    Raises:
        SystemExit: after a help text, or where tyro cannot parse the arguments.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    logger = logging.getLogger("mopo_fast")
    # In a log file a message is one line, whatever its length.
    handler: logging.Handler = logging.StreamHandler()
    if console.is_terminal:
        handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    handler.setFormatter(_Printable())
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files may hold bytes that are not valid UTF-8.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if arguments[:1] == ["--version"]:
            print(f"mopo_fast {__version__}")
            return 0
        _check_words(arguments)
        _run(arguments or ["--help"])
    except SystemExit as end:
        if not end.code and (not arguments or {"-h", "--help"} & set(arguments)):
            print(f"\n{_epilog(arguments)}")
        if not arguments:
            return 2
        raise
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


if __name__ == "__main__":
    sys.exit(main())
