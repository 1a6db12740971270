"""The command line as a process: `mopo-fast` and `python -m mopo_fast`."""

import gc
import sys


def run() -> int:
    """Run the command in `sys.argv` and return its exit code, as `cli.main` does."""
    try:
        from mopo_fast.cli import main

        return main()
    except KeyboardInterrupt:
        # This interrupt came during the import. `main` handles those that come later.
        print("stopped", file=sys.stderr)
        return 130
    finally:
        # Without this, Python's last garbage collection walks all of torch's objects for 0.5 s.
        gc.freeze()


if __name__ == "__main__":
    sys.exit(run())
