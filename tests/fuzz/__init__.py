"""Fuzz tests of the package's file readers, with mutated files: `make fuzz`, or `python -m tests.fuzz`."""

import os

# Libraries read these when imported. The process must have no threads, since children are forked from it.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
