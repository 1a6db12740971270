"""Independent 64-bit seeds for the parts of a run, so that each part can be repeated on its own."""

import numpy as np


def derive_seed(seed: int, *path: int) -> int:
    """Derive the seed of the part of a run that `path` names, such as (ROLLOUT, epoch)."""
    state = np.random.SeedSequence(entropy=seed, spawn_key=path).generate_state(1, np.uint64)
    return int(state[0])


# First elements of a path: the parts of a run. Their values decide all random numbers of all runs.
FIT, INIT, START, ROLLOUT, SAC, EVALUATE, COLLECT, REPORT, ONLINE, MEASURE, SELECT, CLONE = range(12)
