"""Adapters for other MOPO code bases: this package's kernels behind their interfaces, and their files.

Each code base has one module. It holds replacements for the classes that the code base's training loop calls,
under the same names, and `read` and `write` for its checkpoints. No module imports its code base: the objects
that a user passes in are used through their attributes.
"""

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
        WRITES_POLICIES: True if `write` can store a policy. False where the code base has no file that holds
            a policy without its critics and optimizers.
    """

    WRITES_POLICIES: bool

    def read(self, source: Path, hints: Hints = ...) -> Checkpoint:
        """Read the models in a checkpoint of the code base.

        Args:
            source: file or folder of the checkpoint.
            hints: properties of the model that the checkpoint does not store, such as the activation.

        Raises:
            InputError: the checkpoint is missing or damaged, or its model has a property that
                `EnsembleDynamics` or `Actor` cannot represent. The message names it.
        """

    def write(self, checkpoint: Checkpoint, target: Path) -> None:
        """Write the models as a checkpoint that the code base can load; each file is written atomically.

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
    overwrite: bool = False,
) -> Checkpoint:
    """Convert a checkpoint of one code base into a checkpoint of another.

    A policy is left out, with a warning in the log, if the target format has no file for a policy alone.

    Args:
        source: file or folder of the checkpoint to read.
        target: file or folder of the checkpoint to write.
        source_format: format of `source`, one of `config.CHECKPOINT_FORMATS`.
        target_format: format of `target`, one of `config.CHECKPOINT_FORMATS`.
        hints: properties of the model that `source` does not store, such as the activation.
        overwrite: replace `target` if it exists.

    Returns:
        The models that were written.

    Raises:
        InputError: see `Format.read` and `Format.write`; or `target` exists and `overwrite` is False.
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
    if checkpoint.policy is not None and not writer.WRITES_POLICIES:
        if checkpoint.dynamics is None:
            raise InputError(f"{source} holds a policy alone, and {target_format} has no files for policies")
        logger.warning("the policy is left out: %s has no files for policies", target_format)
        checkpoint = Checkpoint(checkpoint.dynamics)
    writer.write(checkpoint, target)
    return checkpoint
