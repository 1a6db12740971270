"""Ctrl-C between two steps of work in Python, and not in the middle of one."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Interrupts:
    """Ctrl-C that waits for a moment at which nothing is half done.

    Args:
        handler: for a Ctrl-C whose moment has come.
    """

    def __init__(self, handler: Callable[..., Any]) -> None:
        self._handler = handler
        self._waiting: tuple[Any, ...] | None = None

    def catch(self, *arguments: Any) -> None:
        """Handle the signal: the first one waits, a second one does not."""
        if self._waiting is not None:
            self._handler(*arguments)
        self._waiting = arguments

    def look(self) -> None:
        """Let a Ctrl-C that waits happen now, between two steps of a loop."""
        if self._waiting is not None:
            arguments, self._waiting = self._waiting, None
            self._handler(*arguments)


@contextlib.contextmanager
def deferred() -> Iterator[Interrupts]:
    """Let Ctrl-C wait until the block looks for it, or has ended: what it changes is changed whole.

    Python loses an exception that a signal raises in the middle of a garbage collection; one that waits is
    not lost. A second Ctrl-C does not wait. Signals reach Python's main thread alone; in any other, nothing
    needs to be done.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield Interrupts(lambda *_: None)
        return
    interrupts = Interrupts(handler)
    signal.signal(signal.SIGINT, interrupts.catch)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, handler)
        interrupts.look()
