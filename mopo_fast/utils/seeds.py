"""Independent 64-bit seeds from one: what makes every part of a run repeatable on its own."""

import numpy as np


def derive_seed(seed: int, *path: int) -> int:
    """The seed of the part of a run named by `path`, e.g. (ROLLOUT, epoch)."""
    state = np.random.SeedSequence(entropy=seed, spawn_key=path).generate_state(1, np.uint64)
    return int(state[0])


# First element of a path: who asks.
FIT, INIT, START, ROLLOUT, SAC, EVALUATE, COLLECT, REPORT, ONLINE = range(9)
