"""Ctrl-C between two steps of work in Python, and not in the middle of one."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let Ctrl-C wait until the block has ended: what it changes is changed whole.

    A second Ctrl-C does not wait.
    Signals reach Python's main thread alone; in any other, nothing needs to be done.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    caught: list[tuple[Any, ...]] = []

    def catch(*arguments: Any) -> None:
        if caught:
            handler(*arguments)
        caught.append(arguments)

    signal.signal(signal.SIGINT, catch)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if caught:
            handler(*caught[0])
