"""The arrays of a small data set, for tests that write files of their own."""

from typing import Any

import numpy as np

ROWS = 20


def arrays() -> dict[str, Any]:
    """Make arrays of D4RL's names, the same ones at every call."""
    random = np.random.default_rng(0)
    return {
        "observations": random.normal(size=(ROWS, 3)).astype(np.float32),
        "next_observations": random.normal(size=(ROWS, 3)).astype(np.float32),
        "actions": random.uniform(-1, 1, (ROWS, 2)).astype(np.float32),
        "rewards": random.normal(size=ROWS).astype(np.float32),
        "terminals": np.arange(ROWS) % 7 == 6,
        "timeouts": np.zeros(ROWS, bool),
    }
