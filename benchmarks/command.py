"""Run a function as a command: `run_command(main)`."""

import sys
from collections.abc import Callable
from typing import Any

import tyro

from mopo_fast.errors import InputError


def run_command(function: Callable[..., Any], **keywords: Any) -> None:
    """Call a function with the arguments of the command line.

    Args:
        function: the function, whose signature and docstring are the command's help.
        keywords: those of `tyro.cli`.

    Raises:
        SystemExit: an `InputError` ended the function; its message has been printed, and the code is 2.
    """
    try:
        tyro.cli(function, **keywords)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
