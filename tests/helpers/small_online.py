"""Online training that takes seconds, and a reader of HDF5 arrays."""

from pathlib import Path
from typing import Any

import h5py

from mopo_fast.collect import collect
from mopo_fast.config import OnlineConfig, SACConfig

SMALL = OnlineConfig(
    environments=2,
    epoch_steps=60,
    random_epochs=1,
    epochs=5,
    # Every policy scores more, so the second evaluation ends the medium part.
    medium_score=-1000.0,
    medium_window=2,
    episodes=2,
    sac=SACConfig(hidden=(16, 16), batch_size=16, target_entropy="act_dim", real_ratio=0.0),
)
EPOCH_ROWS = 120
SAMPLED = 300


def make(name: str, **options: Any) -> Path:
    steps = None if "replay" in name else SAMPLED
    return collect(name, steps, **{"online": SMALL, "quiet": True, "threads": 1, **options})


def read(path: Path) -> dict[str, Any]:
    arrays: dict[str, Any] = {}

    def take(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[name] = item[()]

    with h5py.File(path) as file:
        file.visititems(take)
    return arrays
