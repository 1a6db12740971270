"""Attempts at some work that are killed on the way: for tests of what is left, and of going on."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")


def start(work: Callable[..., Any], *arguments: Any, die_at: tuple[Path, int] | None = None) -> Any:
    """A process at the work."""
    process = CONTEXT.Process(target=_until, args=(die_at, work, arguments))
    process.start()
    return process


def attempt(
    work: Callable[..., Any],
    *arguments: Any,
    die_at: tuple[Path, int] | None = None,
    kill_after: float | None = None,
) -> int:
    """The exit code of one attempt: 0, or -SIGKILL where it was killed in time.

    Args:
        die_at: a folder, and which of the renames and removals in it is the last thing that it does not do.
        kill_after: seconds.
    """
    process = start(work, *arguments, die_at=die_at)
    process.join(kill_after)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), "the attempt failed of itself"
    return int(process.exitcode)


def _until(die_at: tuple[Path, int] | None, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if die_at is not None:
        folder, number = die_at
        changes = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal changes
            if event in ("os.rename", "os.remove") and str(folder) in str(arguments):
                changes += 1
                if changes == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
    work(*arguments)
