"""`mopo-fast` with online training of a few seconds, for which the command line has no flags."""

import sys
from dataclasses import dataclass, field

from mopo_fast import config
from mopo_fast.__main__ import run


@dataclass(frozen=True)
class TinyConfig(config.OnlineConfig):
    environments: int = 2
    epoch_steps: int = 60
    random_epochs: int = 1
    epochs: int = 6
    medium_score: float = -100.0
    episodes: int = 1
    sac: config.SACConfig = field(
        default_factory=lambda: config.SACConfig(hidden=(16, 16), batch_size=32, real_ratio=0.0)
    )


if __name__ == "__main__":
    # Set before the command imports the module.
    vars(config)["OnlineConfig"] = TinyConfig
    sys.exit(run())
