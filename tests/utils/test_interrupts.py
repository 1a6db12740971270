"""Test the deferral of Ctrl-C."""

import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator

import pytest

from mopo_fast.utils.interrupts import deferred


@pytest.fixture(autouse=True)
def raising() -> Iterator[None]:
    """Let Ctrl-C raise, even if the tests run in the background, and restore the handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_it_waits_for_a_look() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), deferred() as interrupts:
        for step in range(5):
            if step == 2:
                interrupt()
            done.append(step)
            interrupts.look()
    assert done == [0, 1, 2]


def test_it_waits_for_the_end() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), deferred():
        interrupt()
        done.append("whole")
    assert done == ["whole"]


def test_a_second_one_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), deferred():
        interrupt()
        interrupt()
        pytest.fail("it waited")


def test_an_inner_block_leaves_it_to_the_outer_one() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), deferred() as outer:
        with deferred() as inner:
            interrupt()
            inner.look()
            done.append("inner")
        done.append("between")
        outer.look()
        done.append("after")
    assert done == ["inner", "between"]


def test_it_is_not_lost_where_python_loses_exceptions() -> None:
    """Python drops exceptions in the callback of a weak reference, as in garbage collection."""

    class Some:
        pass

    with pytest.raises(KeyboardInterrupt), deferred() as interrupts:
        some = Some()
        reference = weakref.ref(some, lambda _: interrupt())
        del some
        assert reference() is None
        interrupts.look()
        pytest.fail("it was lost")


# Ctrl-C comes in a callback, whose exceptions Python ignores. The error of another one is reported as usual.
LOST = """
import signal, sys, time, weakref
from mopo_fast.utils.interrupts import redeliver_lost

class Thing: pass

signal.signal(signal.SIGINT, signal.default_int_handler)
redeliver_lost()
first, second = Thing(), Thing()
interrupt = lambda _: signal.raise_signal(signal.SIGINT)
callbacks = [weakref.ref(first, lambda _: 1 / 0), weakref.ref(second, interrupt)]
del first, second
try:
    time.sleep(20)
except KeyboardInterrupt:
    print("stopped")
"""


def test_a_lost_one_is_delivered_again() -> None:
    found = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (0, "stopped\n")
    assert "ZeroDivisionError" in found.stderr and "KeyboardInterrupt" not in found.stderr


# As above, in the command's process.
LOST_BY_THE_COMMAND = """
import signal, sys, time, weakref
import mopo_fast.__main__, mopo_fast.cli

class Thing: pass

def main():
    thing = Thing()
    callback = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    del thing
    time.sleep(20)

signal.signal(signal.SIGINT, signal.default_int_handler)
mopo_fast.cli.main = main
sys.exit(mopo_fast.__main__.run())
"""


def test_the_command_loses_none() -> None:
    command = [sys.executable, "-c", LOST_BY_THE_COMMAND]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stderr) == (130, "stopped\n")


def test_other_threads_need_nothing() -> None:
    seen = []

    def work() -> None:
        with deferred() as interrupts:
            interrupts.look()
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
