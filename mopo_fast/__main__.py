"""The command line as a process: `mopo-fast` and `python -m mopo_fast`."""

import errno
import gc
import os
import select
import sys

from mopo_fast.utils.interrupts import redeliver_lost

# Exit code that shells report for a process which wrote into a closed pipe.
_BROKEN_PIPE = 141


def run() -> int:
    """Run the command in `sys.argv` and return its exit code, as `cli.main` does."""
    _open_closed_streams()
    redeliver_lost()
    try:
        from mopo_fast.cli import main

        try:
            return main()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        # This interrupt came during the import. `main` handles those that come later.
        print("stopped", file=sys.stderr)
        return 130
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            code = _BROKEN_PIPE
        elif error.errno == errno.ENOSPC and error.filename is None:
            print(
                "error: no space left for standard output; free some, or write it elsewhere", file=sys.stderr
            )
            code = 2
        else:
            raise
        # Python flushes the rest at exit, and would report the error once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code
    finally:
        # Without this, Python's last garbage collection walks all of torch's objects for 0.5 s.
        gc.freeze()


def _open_closed_streams() -> None:
    """Send streams that the caller has closed to the null device, before another file takes their place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - it stays open


def _output_is_closed() -> bool:
    """Tell whether the reader of standard output, such as `head`, is gone."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


if __name__ == "__main__":
    sys.exit(run())
