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
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from typing_extensions import TypedDict

from mopo_fast.config import RunConfig
from mopo_fast.errors import InputError
from mopo_fast.evaluate import Evaluation
from mopo_fast.run.folder import COLUMNS, EVALUATED, shorten
from mopo_fast.utils.atomic import parse_json_as
from mopo_fast.utils.kinds import Count, Number, Seconds
from mopo_fast.utils.tensors import load_into, load_metadata, load_tensors, save_tensors

FORMAT_VERSION = 3
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Rollout:
    """An epoch with rows in the model buffer, and what it takes to make them again.

    Attributes:
        epoch: its number, from 1.
        head: the row of the buffer where its first row is.
        rows: how many it has.
        policy: the actor's parameters that made them.
    """

    epoch: int
    head: int
    rows: int
    policy: Tensors


@dataclass(eq=False)
class Pending:
    """A row of progress.csv that waits for its policy's evaluation, or for an earlier row's.

    Attributes:
        row: all of it but the evaluation.
        policy: the actor's parameters to be evaluated; None: it is not evaluated.
        evaluation: the evaluation of these, at work.
    """

    row: dict[str, Any]
    policy: Tensors | None = None
    evaluation: "Future[Evaluation] | None" = None


class Backends(TypedDict):
    """The backends that a run has begun with, and keeps."""

    rollout: str
    sac: str


class _SavedSeconds(TypedDict):
    rollout: Seconds
    sac: Seconds
    evaluate: Seconds
    total: Seconds


class _SavedRollout(TypedDict):
    epoch: Count
    head: Count
    rows: Count


@dataclass(frozen=True)
class _Saved:
    """A checkpoint's values that are no tensors; `pending`: rows, and whether each has a policy."""

    epoch: Count
    seconds: _SavedSeconds
    evaluation: Evaluation | None
    rollouts: Annotated[list[_SavedRollout], Field(min_length=1)]
    pending: list[tuple[dict[str, Count | Number], bool]]
    backends: Backends
    data_sha256: str
    dynamics_sha256: str


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of a run's training between two epochs.

    Attributes:
        epoch: epochs made.
        seconds: spent on rollout, sac, evaluate and in total.
        evaluation: the last one that is there.
        rollouts, pending: see there; in the order of their epochs.
        data_sha256, dynamics_sha256: digests of the data and the ensemble that it belongs to.
        sac: what `SAC.state` returns.
    """

    epoch: int
    seconds: dict[str, float]
    evaluation: Evaluation | None
    rollouts: list[Rollout]
    pending: list[Pending]
    backends: Backends
    data_sha256: str
    dynamics_sha256: str
    sac: Tensors

    def save(self, out: Path) -> None:
        """Write it to the run's folder, then remove older ones."""
        evaluation = dataclasses.asdict(self.evaluation) if self.evaluation else None
        state = {
            "format_version": FORMAT_VERSION,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "evaluation": evaluation,
            "rollouts": [
                {"epoch": rollout.epoch, "head": rollout.head, "rows": rollout.rows}
                for rollout in self.rollouts
            ],
            "pending": [[pending.row, pending.policy is not None] for pending in self.pending],
            "backends": self.backends,
            "data_sha256": self.data_sha256,
            "dynamics_sha256": self.dynamics_sha256,
        }
        policies = {f"policy.{rollout.epoch}": rollout.policy for rollout in self.rollouts}
        policies |= {f"evaluated.{pending.row['epoch']}": pending.policy or {} for pending in self.pending}
        tensors = {
            f"{prefix}.{name}": tensor
            for prefix, some in {"sac": self.sac, **policies}.items()
            for name, tensor in some.items()
        }
        path = out / "checkpoint" / f"epoch-{self.epoch:06}.safetensors"
        save_tensors(path, tensors, {"state": json.dumps(state)})
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
    path: Path, config: RunConfig, data_sha256: str, dynamics_sha256: str, policy: Mapping[str, torch.Tensor]
) -> Checkpoint:
    """Read what `Checkpoint.save` wrote; `policy` are an actor's parameters, for their shapes.

    Raises:
        InputError: the file is truncated or garbled, or belongs to other data or dynamics, or no run of this
            config leaves it.
    """
    with deletable(path):
        tensors, state = load_tensors(path), load_metadata(path).get("state", "{}")
    version = parse_json_as(state, dict[str, Any], path).get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(f"{path} has format_version {shorten(version)}, this package reads {FORMAT_VERSION}")
    saved = parse_json_as(state, _Saved, path)
    if saved.data_sha256 != data_sha256:
        raise InputError(f"{config.dataset} is not the data that {path} was made with; bring that data back")
    if saved.dynamics_sha256 != dynamics_sha256:
        raise InputError(
            f"the dynamics beside {path.parent} are not those that {path} was made with;"
            " resume with the dynamics that the run began with"
        )

    def policy_of(prefix: str, epoch: int) -> Tensors:
        targets = {name: torch.empty_like(value) for name, value in policy.items()}
        load_into(path, _within(tensors, f"{prefix}.{epoch}."), targets)
        return targets

    with deletable(path):
        _check_saved(path, saved, config)
        return Checkpoint(
            epoch=saved.epoch,
            seconds=cast(dict[str, float], saved.seconds),
            evaluation=saved.evaluation,
            rollouts=[Rollout(**made, policy=policy_of("policy", made["epoch"])) for made in saved.rollouts],
            pending=[
                Pending(row, policy_of("evaluated", int(row["epoch"])) if evaluated else None)
                for row, evaluated in saved.pending
            ],
            backends=saved.backends,
            data_sha256=saved.data_sha256,
            dynamics_sha256=saved.dynamics_sha256,
            sac=_within(tensors, "sac."),
        )


def _check_saved(path: Path, saved: _Saved, config: RunConfig) -> None:
    """Refuse values that no run of this config leaves."""
    if _checkpoints(path.parent).get(saved.epoch) != path or not 1 <= saved.epoch <= config.epochs:
        raise InputError(f"{path} holds epoch {saved.epoch}, which its name or the run does not have")
    capacity = config.rollout.buffer_rows
    first, most = saved.rollouts[0], capacity // config.rollout.retain_epochs
    head = first["head"]
    for number, made in enumerate(saved.rollouts, start=1 + saved.epoch - len(saved.rollouts)):
        if (made["epoch"], made["head"]) != (number, head) or not 1 <= made["rows"] <= most:
            raise InputError(f"{path}: the rollouts that filled the buffer do not follow each other")
        head = (head + made["rows"]) % capacity
    if not 0 <= first["head"] < capacity or first["epoch"] < 1:
        raise InputError(f"{path}: the buffer has no row {first['head']}")
    # Rows were overwritten by later ones alone.
    rows = sum(made["rows"] for made in saved.rollouts)
    if not (first["head"] == 0 if first["epoch"] == 1 else rows >= capacity):
        raise InputError(f"{path}: rollouts are missing of those that filled the buffer")
    known = COLUMNS.keys() - set(EVALUATED)
    for number, (row, _) in enumerate(saved.pending, start=1 + saved.epoch - len(saved.pending)):
        expected = number, config.updates_after(number)
        if row.keys() != known or (row["epoch"], row["updates"]) != expected or number < 1:
            raise InputError(f"{path}: its rows of progress.csv do not follow each other")
    if saved.epoch == config.epochs and not (saved.evaluation or (saved.pending and saved.pending[-1][1])):
        raise InputError(f"{path}: the last policy was not evaluated")


def _within(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
