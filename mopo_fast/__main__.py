"""The command line as a process: `mopo-fast` and `python -m mopo_fast`."""

import gc
import os
import select
import sys

# Exit code that shells report for a process which wrote into a closed pipe.
_BROKEN_PIPE = 141


def run() -> int:
    """Run the command in `sys.argv` and return its exit code, as `cli.main` does."""
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
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        # Python flushes the rest at exit, and would report the closed pipe once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    finally:
        # Without this, Python's last garbage collection walks all of torch's objects for 0.5 s.
        gc.freeze()


def _output_is_closed() -> bool:
    """Tell whether the reader of standard output, such as `head`, is gone."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


if __name__ == "__main__":
    sys.exit(run())
