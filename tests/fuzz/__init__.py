"""Every reader of a file in the package, fed with mutated files: `make fuzz`, or `python -m tests.fuzz`."""

import os

# Read by libraries when they are imported: children are forked of a process without threads.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
