"""`python -m mopo_fast` is `mopo-fast`."""

import sys

from mopo_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
