"""Arrays of a small data set, for tests that write files."""

from typing import Any

import numpy as np

ROWS = 20


def arrays() -> dict[str, Any]:
    """Make arrays with D4RL's names; each call returns equal ones."""
    random = np.random.default_rng(0)
    return {
        "observations": random.normal(size=(ROWS, 3)).astype(np.float32),
        "next_observations": random.normal(size=(ROWS, 3)).astype(np.float32),
        "actions": random.uniform(-1, 1, (ROWS, 2)).astype(np.float32),
        "rewards": random.normal(size=ROWS).astype(np.float32),
        "terminals": np.arange(ROWS) % 7 == 6,
        "timeouts": np.zeros(ROWS, bool),
    }
