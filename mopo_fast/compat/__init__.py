"""Adapters for other MOPO code bases: this package's kernels behind their interfaces, and their files.

Each code base has one module. It holds replacements for the classes that the code base's training loop calls,
under the same names, and `read` and `write` for its checkpoints. No module imports its code base: the objects
that a user passes in are used through their attributes.

`stable_baselines3` is different: that library has no models of dynamics. The module imports it, and hands its
agents the environments of `ModelVectorEnv`.
"""

import fnmatch
import importlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from mopo_fast.config import CHECKPOINT_FORMATS, CheckpointFormat, Hints
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.utils.lazy import lazy_submodules

__getattr__, __dir__ = lazy_submodules(__name__)

logger = logging.getLogger("mopo_fast")

# Names in a line of the log.
_MOST_NAMED = 8


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The models found in a checkpoint, or to be written to one.

    Attributes:
        dynamics: the ensemble; None if the checkpoint has none.
        policy: the actor; None if the checkpoint has none.
    """

    dynamics: EnsembleDynamics | None = None
    policy: Actor | None = None


class Format(Protocol):
    """Reader and writer of one code base's checkpoints; each module of this package is one.

    Attributes:
        FILES: patterns of the names of the files that `read` knows in a folder; none where it takes one file
            alone.
    """

    FILES: tuple[str, ...]

    def read(self, source: Path, hints: Hints = ...) -> Checkpoint:
        """Read the models in a checkpoint of the code base.

        Args:
            source: file or folder of the checkpoint.
            hints: properties of the model that the checkpoint does not store, such as the activation.

        Raises:
            InputError: the checkpoint is missing or damaged, or its model has a property that
                `EnsembleDynamics` or `Actor` cannot represent. The message names it.
        """

    def check_dynamics(self, ensemble: EnsembleDynamics) -> list[str]:
        """Return a sentence about each property of the dynamics that the code base's files lose or change.

        Raises:
            InputError: the files cannot store these dynamics; the message says why.
        """

    def check_policy(self, policy: Actor) -> list[str]:
        """Return a sentence about each property of the policy that the code base's files lose or change.

        Raises:
            InputError: the files cannot store this policy; the message says why.
        """

    def write(self, checkpoint: Checkpoint, target: Path) -> None:
        """Write the models as a checkpoint that the code base can load; each file is written atomically.

        Properties that the files lose or change are logged as warnings.

        Args:
            checkpoint: models to write.
            target: file or folder of the new checkpoint.

        Raises:
            InputError: the code base cannot represent one of the models, or `target` cannot be written.
        """


def get_format(name: str) -> Format:
    """Import the module that reads and writes one of `config.CHECKPOINT_FORMATS`.

    Raises:
        InputError: there is no format of that name.
    """
    if name not in CHECKPOINT_FORMATS:
        raise InputError(f"unknown format {name!r}; there are: {', '.join(CHECKPOINT_FORMATS)}")
    module = "native" if name == "mopo-fast" else name.replace("-", "_")
    return cast(Format, importlib.import_module(f"mopo_fast.compat.{module}"))


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    source_format: CheckpointFormat,
    target_format: CheckpointFormat,
    hints: Hints | None = None,
    *,
    strict: bool = False,
    overwrite: bool = False,
) -> Checkpoint:
    """Convert a checkpoint of one code base into a checkpoint of another.

    Files in a source folder that its reader does not know are not converted; one line of the log names them.
    A model that the target format cannot store is left out. Each loss is logged as a warning: a model that is
    left out, and a property of a model that the target's files lose or change.

    Args:
        source: file or folder of the checkpoint to read.
        target: file or folder of the checkpoint to write.
        source_format: format of `source`, one of `config.CHECKPOINT_FORMATS`.
        target_format: format of `target`, one of `config.CHECKPOINT_FORMATS`.
        hints: properties of the model that `source` does not store, such as the activation.
        strict: raise an error instead of a warning if anything would be lost or changed.
        overwrite: replace `target` if it exists.

    Returns:
        The models that were written.

    Raises:
        InputError: see `Format.read` and `Format.write`; `target` exists and `overwrite` is False; or the
            target format cannot store any of the models or, with `strict`, all of them unchanged.
    """
    source, target = Path(source), Path(target)
    if not source.exists():
        raise InputError(f"{source} does not exist")
    if not overwrite and (any(target.iterdir()) if target.is_dir() else target.exists()):
        raise InputError(f"{target} exists already; choose another name, or replace it with --overwrite")
    reader, writer = get_format(source_format), get_format(target_format)
    checkpoint = reader.read(source, hints or Hints())
    if checkpoint.dynamics is None and checkpoint.policy is None:
        raise InputError(f"{source} holds no {source_format} dynamics and no {source_format} policy")
    if source.is_dir():
        _tell_of_others(source, reader)
    kept, left_out, changes = _storable(checkpoint, writer)
    if kept.dynamics is None and kept.policy is None:
        raise InputError(f"nothing in {source} can be stored as {target_format}: {'; '.join(left_out)}")
    if strict and (left_out or changes):
        raise InputError(
            f"{source} cannot be stored as {target_format} without a loss: {'; '.join(left_out + changes)};"
            " leave --strict out to convert the rest"
        )
    for sentence in left_out:
        logger.warning("%s", sentence)
    writer.write(kept, target)
    return kept


def _tell_of_others(folder: Path, reader: Format) -> None:
    """Log which files and folders in a checkpoint's folder the reader does not know."""
    others = sorted(
        path.name + "/" * path.is_dir()
        for path in folder.iterdir()
        # A hidden file is a lock or an unfinished file.
        if not any(fnmatch.fnmatchcase(path.name, pattern) for pattern in (".*", *reader.FILES))
    )
    if others:
        more = f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
        logger.info("not converted from %s: %s%s", folder, ", ".join(others[:_MOST_NAMED]), more)


def _storable(checkpoint: Checkpoint, writer: Format) -> tuple[Checkpoint, list[str], list[str]]:
    """Return the models that a format can store, why others are left out, and the changes of those kept."""
    dynamics, policy = checkpoint.dynamics, checkpoint.policy
    left_out: list[str] = []
    changes: list[str] = []
    if dynamics is not None:
        try:
            changes += writer.check_dynamics(dynamics)
        except InputError as error:
            left_out.append(f"the dynamics are left out: {error}")
            dynamics = None
    if policy is not None:
        try:
            changes += writer.check_policy(policy)
        except InputError as error:
            left_out.append(f"the policy is left out: {error}")
            policy = None
    return Checkpoint(dynamics, policy), left_out, changes
