"""A run's checkpoint: all that its next epoch depends on.

Every epoch's randomness depends on (seed, epoch) alone, and a rollout on (ensemble, policy, start states,
seed). So a checkpoint keeps, in place of the model buffer, the policies that filled it, and a resumed run
makes the same rows again.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from typing_extensions import TypedDict

from mopo_fast.config import RunConfig
from mopo_fast.errors import InputError
from mopo_fast.evaluate import Evaluation
from mopo_fast.run.folder import COLUMNS, EVALUATED, SpentSeconds, shorten
from mopo_fast.utils.atomic import parse_json_as
from mopo_fast.utils.kinds import Count, Number
from mopo_fast.utils.tensors import load_metadata, load_tensors, save_tensors

FORMAT_VERSION = 3
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Rollout:
    """An epoch with rows in the model buffer.

    Attributes:
        epoch: its number, from 1.
        head: the row of the buffer where its first row is.
        rows: how many it has.
    """

    epoch: Count
    head: Count
    rows: Count


class Backends(TypedDict):
    """The backends that a run has begun with, and keeps."""

    rollout: str
    sac: str


@dataclass(frozen=True)
class State:
    """The state of a run's training between two epochs, the tensors left out.

    Attributes:
        epoch: epochs made.
        evaluation: the last one that is there.
        rollouts: those that filled the buffer.
        pending: rows of progress.csv that wait, and whether each has a policy that is to be evaluated.
        data_sha256, dynamics_sha256: digests of the data and the ensemble that it belongs to.
    """

    epoch: Count
    seconds: SpentSeconds
    evaluation: Evaluation | None
    rollouts: Annotated[list[Rollout], Field(min_length=1)]
    pending: list[tuple[dict[str, Count | Number], bool]]
    backends: Backends
    data_sha256: str
    dynamics_sha256: str


def save_checkpoint(out: Path, state: State, tensors: Mapping[str, Tensors]) -> None:
    """Write a checkpoint to a run's folder, then remove older ones.

    Args:
        tensors: "sac": what `SAC.state` returns; "policy.EPOCH": the actor's parameters that made a rollout;
            "evaluated.EPOCH": those that are to be evaluated.
    """
    path = out / "checkpoint" / f"epoch-{state.epoch:06}.safetensors"
    flat = {f"{prefix}.{name}": tensor for prefix, some in tensors.items() for name, tensor in some.items()}
    values = {"format_version": FORMAT_VERSION, **dataclasses.asdict(state)}
    save_tensors(path, flat, {"state": json.dumps(values)})
    remove_older(path)


def last_checkpoint(out: Path) -> Path | None:
    """Return the newest checkpoint in a run's folder."""
    found = _checkpoints(out / "checkpoint")
    return found[max(found)] if found else None


def remove_older(checkpoint: Path) -> None:
    """Remove all checkpoints beside this one."""
    for path in _checkpoints(checkpoint.parent).values():
        if path != checkpoint:
            path.unlink()


def _checkpoints(folder: Path) -> dict[int, Path]:
    """Return the checkpoints in a folder by their epochs."""
    names = {path: re.fullmatch(r"epoch-(\d{6,})\.safetensors", path.name) for path in folder.glob("epoch-*")}
    return {int(match[1]): path for path, match in names.items() if match}


@contextlib.contextmanager
def deletable(path: Path) -> Iterator[None]:
    """Add to an `InputError` that the run can do without this checkpoint."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{error}; delete {path} to train from the start") from error


def load_checkpoint(
    path: Path, config: RunConfig, data_sha256: str, dynamics_sha256: str
) -> tuple[State, Tensors]:
    """Read what `save_checkpoint` wrote; the tensors' names begin with their prefixes.

    Raises:
        InputError: the file is truncated or garbled, or belongs to other data or dynamics, or no run of this
            config leaves it.
    """
    with deletable(path):
        tensors, values = load_tensors(path), load_metadata(path).get("state", "{}")
    version = parse_json_as(values, dict[str, Any], path).get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(f"{path} has format_version {shorten(version)}, this package reads {FORMAT_VERSION}")
    state = parse_json_as(values, State, path)
    if state.data_sha256 != data_sha256:
        raise InputError(f"{config.dataset} is not the data that {path} was made with; bring that data back")
    if state.dynamics_sha256 != dynamics_sha256:
        raise InputError(
            f"the dynamics beside {path.parent} are not those that {path} was made with;"
            " resume with the dynamics that the run began with"
        )
    with deletable(path):
        _check_state(path, state, config)
    return state, tensors


def within(tensors: Tensors, prefix: str) -> Tensors:
    """Return the tensors under a prefix, by their names without it."""
    whole = f"{prefix}."
    return {name.removeprefix(whole): tensor for name, tensor in tensors.items() if name.startswith(whole)}


def _check_state(path: Path, state: State, config: RunConfig) -> None:
    """Refuse values that no run of this config leaves."""
    if _checkpoints(path.parent).get(state.epoch) != path or not 1 <= state.epoch <= config.epochs:
        raise InputError(f"{path} holds epoch {state.epoch}, which its name or the run does not have")
    capacity = config.rollout.buffer_rows
    first, most = state.rollouts[0], capacity // config.rollout.retain_epochs
    head = first.head
    for number, made in enumerate(state.rollouts, start=1 + state.epoch - len(state.rollouts)):
        if (made.epoch, made.head) != (number, head) or not 1 <= made.rows <= most:
            raise InputError(f"{path}: the rollouts that filled the buffer do not follow each other")
        head = (head + made.rows) % capacity
    if not 0 <= first.head < capacity or first.epoch < 1:
        raise InputError(f"{path}: the buffer has no row {first.head}")
    # Rows were overwritten by later ones alone.
    rows = sum(made.rows for made in state.rollouts)
    if not (first.head == 0 if first.epoch == 1 else rows >= capacity):
        raise InputError(f"{path}: rollouts are missing of those that filled the buffer")
    known = COLUMNS.keys() - set(EVALUATED)
    for number, (row, _) in enumerate(state.pending, start=1 + state.epoch - len(state.pending)):
        expected = number, config.updates_after(number)
        if row.keys() != known or (row["epoch"], row["updates"]) != expected or number < 1:
            raise InputError(f"{path}: its rows of progress.csv do not follow each other")
    if state.epoch == config.epochs and not (state.evaluation or (state.pending and state.pending[-1][1])):
        raise InputError(f"{path}: the last policy was not evaluated")
