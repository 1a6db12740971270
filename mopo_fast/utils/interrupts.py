"""Ctrl-C that takes effect between two steps, not in the middle of one, and that is not lost."""

import contextlib
import signal
import sys
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


def redeliver_lost() -> None:
    """Send Ctrl-C again where Python has lost it, for the rest of this process.

    Python ignores an exception in a destructor or in the callback of a weak reference, even that of Ctrl-C.
    """
    report = sys.unraisablehook
    main = threading.main_thread().ident

    def handle(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt) and main is not None:
            # Later, since it would be lost again in here.
            threading.Timer(0.01, signal.pthread_kill, (main, signal.SIGINT)).start()
        else:
            report(unraisable)

    sys.unraisablehook = handle
