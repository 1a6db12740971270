"""The command line as a process: `mopo-fast` and `python -m mopo_fast`."""

import gc
import sys


def run() -> int:
    """Run the command of `sys.argv`; return the exit code, as `cli.main`."""
    try:
        from mopo_fast.cli import main

        return main()
    except KeyboardInterrupt:
        # `main` answers its own interrupts; this one came while it was imported.
        print("stopped", file=sys.stderr)
        return 130
    finally:
        # Python's last garbage collection, over all of torch's objects, takes 0.5 s and frees nothing.
        gc.freeze()


if __name__ == "__main__":
    sys.exit(run())
