"""Work in processes that are killed midway, to test what they leave behind and how it is resumed."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

CONTEXT = multiprocessing.get_context("forkserver")


def start(work: Callable[..., Any], *arguments: Any, die_at: tuple[Path, int] | None = None) -> Any:
    """Start a process that does the work; `attempt` describes `die_at`."""
    process = CONTEXT.Process(target=_until, args=(die_at, work, arguments))
    process.start()
    return process


def attempt(
    work: Callable[..., Any],
    *arguments: Any,
    die_at: tuple[Path, int] | None = None,
    kill_after: float | None = None,
) -> int:
    """Run the work in a process and return its exit code, which is 0 or -SIGKILL.

    Args:
        die_at: a folder and a number n: the process is killed just before its n-th renaming or removal there.
        kill_after: seconds after which the process is killed, or None.
    """
    process = start(work, *arguments, die_at=die_at)
    process.join(kill_after)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), "the attempt failed of itself"
    return int(process.exitcode)


def _until(die_at: tuple[Path, int] | None, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if "mopo_fast.report" in sys.modules:
        from unrendered import render_nothing

        render_nothing(pytest.MonkeyPatch())
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
