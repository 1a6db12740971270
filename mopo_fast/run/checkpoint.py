"""Checkpoints: everything that the next epoch of a run depends on.

Random numbers depend on (seed, epoch) alone, and a rollout on (ensemble, policy, start states, seed). A
checkpoint therefore keeps the policies that filled the model buffer, and not the buffer. A resumed run
generates the same rows again.
"""

import contextlib
import dataclasses
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
from pydantic import Field
from typing_extensions import TypedDict

from mopo_fast.backends.cpu import isa, isas
from mopo_fast.config import RunConfig
from mopo_fast.errors import InputError
from mopo_fast.evaluate import Evaluation
from mopo_fast.run.folder import SpentSeconds, shorten
from mopo_fast.run.log import COLUMNS, EVALUATION_COLUMNS, LATER_COLUMNS
from mopo_fast.utils.atomic import parse_json_as
from mopo_fast.utils.kinds import Count, Number
from mopo_fast.utils.tensors import load_metadata, load_tensors, save_tensors

logger = logging.getLogger("mopo_fast")

FORMAT_VERSION = 3
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Rollout:
    """The rows of one epoch in the model buffer.

    Attributes:
        epoch: number of the epoch, from 1.
        head: index of its first row in the buffer.
        rows: number of its rows.
    """

    epoch: Count
    head: Count
    rows: Count


class Backends(TypedDict):
    """Names of the backends that a run began with. It keeps them when it is resumed."""

    rollout: str
    sac: str
    # The instruction set, if the CPU's kernels are used. Version 0.1.0 did not record it.
    isa: NotRequired[str]


@dataclass(frozen=True)
class State:
    """The state of a run's training between two epochs, except its tensors.

    Attributes:
        epoch: number of finished epochs.
        seconds: seconds that the training has taken so far.
        evaluation: latest finished evaluation.
        rollouts: rollouts whose rows are in the buffer, oldest first.
        pending: rows of progress.csv that are not written yet, each with True where an evaluation is due.
        backends: backends that the run began with.
        data_sha256: digest of the run's data.
        dynamics_sha256: digest of the run's ensemble.
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
    """Write a checkpoint to a run's folder, then remove the older ones.

    Args:
        out: the run's folder.
        state: the state after the epoch.
        tensors: groups of tensors. "sac" is the result of `SAC.state`, "policy.EPOCH" the actor that made the
            rollout of an epoch, "evaluated.EPOCH" the actor that is to be evaluated for an epoch.
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
    """Remove all other checkpoints from the folder of this one."""
    for path in _checkpoints(checkpoint.parent).values():
        if path != checkpoint:
            path.unlink()


def _checkpoints(folder: Path) -> dict[int, Path]:
    """Return the checkpoints in a folder, with their epochs as keys."""
    names = {path: re.fullmatch(r"epoch-(\d{6,})\.safetensors", path.name) for path in folder.glob("epoch-*")}
    return {int(match[1]): path for path, match in names.items() if match}


def warn_of_other_isa(path: Path, backends: Backends) -> None:
    """Warn if the run began on another instruction set than the one in use."""
    made = backends.get("isa")
    if made is not None and made != isa():
        way = f"set MOPO_FAST_ISA={made}" if made in isas() else f"resume on a processor with {made}"
        logger.warning(
            "%s was made on the instruction set %s, and the run continues on %s, which rounds differently;"
            " %s for the same results to the bit",
            path,
            made,
            isa(),
            way,
        )


@contextlib.contextmanager
def suggest_deleting(path: Path) -> Iterator[None]:
    """Add to an `InputError` that the run can be trained again without this checkpoint."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{error}; delete {path} to train from the start") from error


def load_checkpoint(
    path: Path, config: RunConfig, data_sha256: str, dynamics_sha256: str
) -> tuple[State, Tensors]:
    """Read a checkpoint that `save_checkpoint` wrote.

    Args:
        path: file of the checkpoint.
        config: settings of the run.
        data_sha256: digest of the run's data.
        dynamics_sha256: digest of the run's ensemble.

    Returns:
        The state, and all tensors under the names GROUP.NAME.

    Raises:
        InputError: the file is truncated or garbled, belongs to other data or dynamics, or holds a state that
            a run with this config cannot have.
    """
    with suggest_deleting(path):
        tensors, values = load_tensors(path), load_metadata(path).get("state", "{}")
    version = parse_json_as(values, dict[str, Any], path).get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} has format_version {shorten(version)}, this package reads {FORMAT_VERSION}; resume with"
            " the version of mopo_fast that wrote it"
        )
    state = parse_json_as(values, State, path)
    if state.data_sha256 != data_sha256:
        raise InputError(f"{path} was made with other data than {config.dataset}; restore the original data")
    if state.dynamics_sha256 != dynamics_sha256:
        raise InputError(
            f"{path} was made with another ensemble than the one in {path.parent.parent}; restore that"
            " ensemble's files"
        )
    with suggest_deleting(path):
        _check_state(path, state, config)
    return state, tensors


def read_data_sha256(path: Path) -> str | None:
    """Return the digest of the data of a checkpoint's run, or None where the checkpoint has none.

    Raises:
        InputError: the file is truncated or garbled.
    """
    found = parse_json_as(load_metadata(path).get("state", "{}"), dict[str, Any], path).get("data_sha256")
    return found if isinstance(found, str) else None


def select_group(tensors: Tensors, group: str) -> Tensors:
    """Return the tensors of a group, under their own names."""
    prefix = f"{group}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check_state(path: Path, state: State, config: RunConfig) -> None:
    """Raise `InputError` for a state that a run with this config cannot have."""
    if _checkpoints(path.parent).get(state.epoch) != path or not 1 <= state.epoch <= config.epochs:
        raise InputError(
            f"{path} holds epoch {state.epoch}, which does not fit its name or the run's {config.epochs}"
            " epochs"
        )
    capacity = config.rollout.buffer_rows
    first, max_rows = state.rollouts[0], capacity // config.rollout.retain_epochs
    head = first.head
    for epoch, rollout in enumerate(state.rollouts, start=1 + state.epoch - len(state.rollouts)):
        if (rollout.epoch, rollout.head) != (epoch, head) or not 1 <= rollout.rows <= max_rows:
            raise InputError(f"{path}: the rollouts that filled the buffer do not follow one another")
        head = (head + rollout.rows) % capacity
    if not 0 <= first.head < capacity or first.epoch < 1:
        raise InputError(f"{path}: the buffer has no row {first.head}")
    # The first epoch begins at row 0. Its rollout is dropped only when later ones fill the whole buffer.
    rows = sum(rollout.rows for rollout in state.rollouts)
    if not (first.head == 0 if first.epoch == 1 else rows >= capacity):
        raise InputError(f"{path}: some of the rollouts that filled the buffer are missing")
    names = COLUMNS.keys() - set(EVALUATION_COLUMNS)
    for epoch, (row, _) in enumerate(state.pending, start=1 + state.epoch - len(state.pending)):
        expected = epoch, config.updates_after(epoch)
        # An earlier version left rows without `LATER_COLUMNS`.
        known = row.keys() in (names, names - set(LATER_COLUMNS))
        if not known or (row["epoch"], row["updates"]) != expected or epoch < 1:
            raise InputError(f"{path}: its rows of progress.csv do not follow one another")
    if state.epoch == config.epochs and not (state.evaluation or (state.pending and state.pending[-1][1])):
        raise InputError(f"{path} lacks the evaluation of the last policy")
