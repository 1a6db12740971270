"""Deferred Ctrl-C: an interrupt takes effect between two steps, not in the middle of one."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Interrupts:
    """A Ctrl-C that waits until no step is half done.

    Args:
        handler: signal handler to call when the Ctrl-C takes effect.
    """

    def __init__(self, handler: Callable[..., Any]) -> None:
        self._handler = handler
        self._waiting: tuple[Any, ...] | None = None

    def catch(self, *arguments: Any) -> None:
        """Handle a signal. The first one waits, a second one takes effect at once."""
        if self._waiting is not None:
            self._handler(*arguments)
        self._waiting = arguments

    def look(self) -> None:
        """Let a waiting Ctrl-C take effect. Call this between two steps of a loop."""
        if self._waiting is not None:
            arguments, self._waiting = self._waiting, None
            self._handler(*arguments)


@contextlib.contextmanager
def deferred() -> Iterator[Interrupts]:
    """Let Ctrl-C wait until the block calls `Interrupts.look` or ends, so that no step is left half done.

    A second Ctrl-C does not wait. In threads other than the main one nothing is done, since signals only
    reach the main thread. Waiting also keeps the exception from being raised in a garbage collection, where
    Python would lose it.
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
