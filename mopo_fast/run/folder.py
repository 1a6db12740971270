"""config.json and summary.json in a run's folder, and the check before a run goes on.

Both files are read with suspicion: a run's folder may have come from anywhere.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from mopo_fast import __version__
from mopo_fast.config import DataConfig, FitConfig, Penalty, PenaltyMembers, RunConfig, SACConfig, to_dict
from mopo_fast.data import MEMORY_PREFIX
from mopo_fast.errors import InputError
from mopo_fast.evaluate import Evaluation
from mopo_fast.tasks import resume_command
from mopo_fast.utils.atomic import parse_json_as, read_json_as, refuse_links, sweep, write_json
from mopo_fast.utils.kinds import Count, Number, Seconds

# A file from elsewhere may hold values of any length, and error messages quote them.
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200
shorten = _short.repr

# Keys of config.json on which no result depends.
_ORIGINS = ("preset", "horizon_from", "penalty_coef_from")
WITHOUT_EFFECT = ("threads", "workers", "keep_policies", *_ORIGINS)


class RecordedRollout(TypedDict, total=False):
    """The part of config.json's `rollout` that a report shows."""

    horizon: Count | None
    penalty_coef: Number | None
    penalty: Penalty
    penalty_members: PenaltyMembers
    termination: str | None


class RecordedSAC(TypedDict, total=False):
    """The part of config.json's `sac` that a report shows."""

    target_entropy: Number | str


class RecordedConfig(TypedDict, total=False):
    """The part of config.json that a report shows."""

    dataset: str
    data: DataConfig
    task: str | None
    seed: int
    device: str
    rollout: RecordedRollout
    sac: RecordedSAC


class SpentSeconds(TypedDict):
    """Seconds that the training has taken so far, by part."""

    rollout: Seconds
    sac: Seconds
    evaluate: Seconds
    total: Seconds


class RecordedSeconds(SpentSeconds):
    """Seconds that a finished run took, by part."""

    fit: Seconds


@with_config(ConfigDict(extra="allow"))
class Summary(TypedDict):
    """The keys of summary.json that are checked; any other key is passed on unchecked."""

    score_mean: Number | None
    score_std: Number | None
    return_mean: Number
    return_std: Number
    updates: Count
    seconds: RecordedSeconds
    seed: int
    penalty_coef: Number
    scored_by: NotRequired[str]
    dataset: NotRequired[str]
    task: NotRequired[str]
    horizon: NotRequired[Count]
    penalty: NotRequired[str]
    backend: NotRequired[str]
    device: NotRequired[str]
    dtype: NotRequired[str]
    dtypes: NotRequired[dict[str, str]]
    isa: NotRequired[str | None]
    versions: NotRequired[dict[str, str]]


def read_summary(run: Path) -> dict[str, Any]:
    """Read a finished run's summary.json.

    Raises:
        InputError: the file is missing, or a value in it cannot be one of a run's.
    """
    return dict(read_json_as(run / "summary.json", Summary))


def write_summary(out: Path, config: RunConfig, evaluation: Evaluation, **results: Any) -> None:
    """Write a finished run's summary.json.

    Args:
        out: the run's folder.
        config: the run's settings, some of which the summary repeats.
        evaluation: the evaluation of the last policy.
        results: other values of the summary, such as `updates` and `seconds`.
    """
    names = ("score_mean", "score_std", "return_mean", "return_std")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "gymnasium", "mujoco")}
    summary = {
        **{name: getattr(evaluation, name) for name in names},
        **results,
        **{name: getattr(config, name) for name in ("device", "dataset", "task", "seed")},
        **{name: getattr(config.rollout, name) for name in ("dtype", "horizon", "penalty", "penalty_coef")},
        "dtypes": {
            "fit": config.dynamics.dtype,
            "rollout": config.rollout.dtype,
            "sac": config.sac.dtype,
        },
        "versions": {"mopo_fast": __version__, "python": platform.python_version(), **versions},
    }
    write_json(out / "summary.json", summary)


def read_config(run: Path) -> RunConfig:
    """Read the settings of a run from its config.json.

    Raises:
        InputError: the file is missing, or does not hold the settings of a run.
    """
    path = run / "config.json"
    return parse_json_as(json.dumps(read_recorded(path)), RunConfig, path)


def read_recorded(path: Path) -> dict[str, Any]:
    """Read a config.json; version 0.1.0's `sac.simultaneous` becomes today's `sac.order`.

    Raises:
        InputError: the file is missing, or does not hold a JSON object.
    """
    recorded = read_json_as(path, dict[str, Any])
    sac = recorded.get("sac")
    if not isinstance(sac, dict) or "simultaneous" not in sac:
        return recorded
    rest = {name: value for name, value in sac.items() if name != "simultaneous"}
    before = sac["simultaneous"]
    # Another value is refused where the settings are read.
    order = ("simultaneous" if before else "critic_first") if isinstance(before, bool) else before
    return recorded | {"sac": {"order": order} | rest}


def read_settings(path: Path) -> dict[str, Any]:
    """Read a config.json as today's version would have written it, with all settings.

    Raises:
        InputError: as `read_recorded`.
    """
    # Version 0.1.0 had SAC in float32 alone, and did not record it.
    return with_defaults(read_recorded(path), RunConfig("", sac=SACConfig(dtype="float32")))


def check_folder(out: Path, config: RunConfig, resume: bool) -> None:
    """Check that a run of this config may begin, or go on, in the folder `out`.

    Only `steps` may be larger than those in config.json, if the result is that of a run which was asked for
    the larger number from the start.

    Raises:
        InputError: the folder holds a run and `resume` is False, its run has another config, or one of its
            subfolders is a link.
    """
    refuse_links(out / "checkpoint", out / "policies", out / "tensorboard-fit")
    if resume:
        # A killed session leaves temporary files. Other subfolders may belong to runs that are at work.
        for folder in (out, out / "checkpoint", out / "policies"):
            sweep(folder)
    # config.json is the first file of a run.
    if not holds_run(out):
        return
    if not resume:
        raise InputError(f"{out} already holds a run; {_ways_on(out)}, or choose another folder (--out)")
    recorded = read_settings(out / "config.json")
    current = as_json(config)
    for each in (recorded, current):
        # A run may go on from another directory. Digests of the data and of the ensemble are compared later.
        for name in ("dataset", "dynamics_from"):
            if isinstance(each.get(name), str):
                each[name] = Path(each[name]).name
    if recorded.get("task_sha256") is None and recorded.get("task") == current["task"]:
        # Early versions did not record the task file's digest.
        del current["task_sha256"]
    if _is_longer(recorded, config):
        _check_longer(out, recorded["steps"], config)
        recorded["steps"] = config.steps
    difference = first_difference(recorded, current)
    if difference and difference.startswith("data_sha256"):
        raise InputError(
            f"the run in {out} was made with other data, or with data in memory; resume it in Python with the"
            " same data, or choose another folder"
        )
    if difference and difference.startswith("task_sha256"):
        raise InputError(
            f"the task file {config.task} has changed since the run in {out} began; restore the file,"
            " or choose another --out"
        )
    if difference:
        way = f", which `{resume_command(out)}` takes from the folder" if not recorded["data_sha256"] else ""
        raise InputError(
            f"{out} was made with {difference}; resume with the same settings{way}, or choose another --out"
        )


def _ways_on(out: Path) -> str:
    """Say how the run in `out` is continued, in Python and, unless its data were in memory, by a command."""
    in_python = "`train(config, out, resume=True)` in Python"
    dataset = read_json_as(out / "config.json", dict[str, Any]).get("dataset")
    if isinstance(dataset, str) and dataset.startswith(MEMORY_PREFIX):
        return f"its data were in memory; continue it with {in_python}"
    return f"continue it with `{resume_command(out)}`, or with {in_python}"


def with_defaults(recorded: dict[str, Any], defaults: Any) -> dict[str, Any]:
    """Return a recorded config with the default of every setting that it lacks.

    An earlier version, which did not have the setting yet, did what its default does.

    Args:
        recorded: the config as JSON.
        defaults: the config's dataclass with all defaults.
    """
    filled: dict[str, Any] = as_json(defaults) | recorded
    for entry in dataclasses.fields(defaults):
        part, value = getattr(defaults, entry.name), filled[entry.name]
        if dataclasses.is_dataclass(part) and isinstance(value, dict):
            filled[entry.name] = with_defaults(value, part)
    return filled


def _is_longer(recorded: dict[str, Any], config: RunConfig) -> bool:
    return isinstance(recorded.get("steps"), int) and recorded["steps"] < config.steps


def _check_longer(out: Path, steps: int, config: RunConfig) -> None:
    """Raise `InputError` if a run of fewer steps has not begun as one of this config would have."""
    interval, why = config.rollout.interval, None
    if config.sac.actor_schedule == "cosine":
        why = f"sac.actor_schedule is cosine, which lowered the learning rate to zero over {steps} steps"
    elif steps % interval:
        why = f"the last epoch had {steps % interval} of the {interval} steps of rollout.interval"
    if why:
        raise InputError(
            f"{out} was made with steps = {steps}, not {config.steps}, and cannot go on beyond them: {why};"
            " choose another --out"
        )


def is_finished(out: Path, config: RunConfig) -> bool:
    """Return whether the run in `out`, which `check_folder` has checked, has made all steps of `config`."""
    if not (out / "summary.json").exists():
        return False
    return not _is_longer(read_json_as(out / "config.json", dict[str, Any]), config)


def lengthen(out: Path, config: RunConfig) -> None:
    """Record that the run in `out` goes on to more steps, unless config.json says so already.

    The results of the shorter run are removed. They go first, so that a kill leaves a run to be finished.
    """
    recorded = read_json_as(out / "config.json", dict[str, Any])
    if _is_longer(recorded, config):
        for name in ("report.html", "summary.json"):
            (out / name).unlink(missing_ok=True)
        # The origins of the settings are those of the run's beginning.
        origins = {name: recorded[name] for name in _ORIGINS if name in recorded}
        write_json(out / "config.json", to_dict(config) | origins)


def holds_run(out: Path) -> bool:
    """Tell whether a folder holds a run; the config.json of a fit alone has no settings of a training."""
    path = out / "config.json"
    return path.exists() and read_json_as(path, dict[str, Any]).keys() - _FIT_KEYS != set()


_FIT_KEYS = {field.name for field in dataclasses.fields(FitConfig)}


def check_fit_folder(out: Path, overwrite: bool) -> None:
    """Raise `InputError` where `mopo-fast fit` may not write to the folder `out`."""
    found = "config.json" if holds_run(out) else "fit.json"
    if (out / found).exists() and not overwrite:
        raise InputError(
            f"{out / found} exists already; choose another --out, or replace the fit with --overwrite"
        )


def as_json(config: Any) -> Any:
    """Return a config as JSON reads it back, such as lists in place of tuples."""
    return json.loads(json.dumps(to_dict(config)))


def first_difference(recorded: Any, current: Any, name: str = "") -> str | None:
    """Describe the first setting in which two configs read from JSON differ.

    Settings on which no result depends, such as `threads`, are not compared; nor are the origins of others.

    Args:
        recorded: the config in a file.
        current: the config to compare it with.
        name: the path of keys to this part of the config.

    Returns:
        A text such as "seed = 1, not 2", or None where the configs agree.
    """
    if isinstance(recorded, dict) and isinstance(current, dict):
        for key in {**recorded, **current}:
            if key in WITHOUT_EFFECT:
                continue
            difference = first_difference(recorded.get(key), current.get(key), f"{name}.{key}".lstrip("."))
            if difference:
                return difference
        return None
    return None if recorded == current else f"{name} = {shorten(recorded)}, not {shorten(current)}"


@contextlib.contextmanager
def suggest_resuming(*outs: Path) -> Iterator[None]:
    """Turn an `OSError`, such as a full disk, into an `InputError` that says how to continue these runs."""
    try:
        yield
    except OSError as error:
        folders = ", ".join(map(str, outs))
        raise InputError(
            f"the run in {folders} stopped ({error}); remove the cause, then continue it with --resume"
        ) from error


def write_config(out: Path, config: RunConfig | FitConfig) -> None:
    """Write config.json, the first file of a run or of a fit, unless the folder holds a run."""
    if not holds_run(out):
        write_json(out / "config.json", to_dict(config))
