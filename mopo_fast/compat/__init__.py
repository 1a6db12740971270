"""Other MOPO code with our kernels inside, and its files read and written.

One module for each code base holds what its loop calls, under its own names, and `read` and `write` of its
files. None imports the code base: what it hands over is used through the attributes it has there.
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

logger = logging.getLogger("mopo_fast")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The models that a run has left; either may be missing."""

    dynamics: EnsembleDynamics | None = None
    policy: Actor | None = None


class Format(Protocol):
    """What each module of this package offers for its code base's files.

    `WRITES_POLICIES`: its code keeps policies alone, or beside dynamics, in files that `write` can make.
    """

    WRITES_POLICIES: bool

    def read(self, source: Path, hints: Hints = ...) -> Checkpoint:
        """The models in a file or folder of theirs.

        Raises:
            InputError: it is missing, damaged, or holds what our models are not; says what.
        """

    def write(self, checkpoint: Checkpoint, target: Path) -> None:
        """Write the models as they would have, each file whole or not at all.

        Raises:
            InputError: their code has no such model, or `target` cannot be written.
        """


def get_format(name: str) -> Format:
    """The module for one of `config.CHECKPOINT_FORMATS`.

    Raises:
        InputError: an unknown name.
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
    """Write the dynamics and the policy that one code base has left as another one keeps them.

    Args:
        source: a file or folder in `source_format`.
        target: a file or folder in `target_format`.
        hints: what `source` leaves open.
        overwrite: replace what is there.

    Returns:
        What has been written: without the policy where the target has no files for policies, which is logged.

    Raises:
        InputError: see `Format.read` and `Format.write`; or `target` exists.
    """
    source, target = Path(source), Path(target)
    if not source.exists():
        raise InputError(f"{source} does not exist")
    if not overwrite and (any(target.iterdir()) if target.is_dir() else target.exists()):
        raise InputError(f"{target} exists already; choose another name, or replace it with --overwrite")
    reader, writer = get_format(source_format), get_format(target_format)
    checkpoint = reader.read(source, hints or Hints())
    if checkpoint.dynamics is None and checkpoint.policy is None:
        raise InputError(f"{source} holds neither dynamics nor a policy of {source_format}")
    if checkpoint.policy is not None and not writer.WRITES_POLICIES:
        if checkpoint.dynamics is None:
            raise InputError(f"{source} holds a policy alone, and {target_format} has no files for policies")
        logger.warning("the policy is left out: %s has no files for policies", target_format)
        checkpoint = Checkpoint(checkpoint.dynamics)
    writer.write(checkpoint, target)
    return checkpoint
