"""`mopo-fast` whose online training is of seconds: the command line has no flags for its settings."""

import sys
from importlib import import_module

from mopo_fast.cli import main
from mopo_fast.config import OnlineConfig, SACConfig

TINY = OnlineConfig(
    environments=2,
    epoch_steps=60,
    random_epochs=1,
    epochs=8,
    round_steps=10,
    medium_score=-100.0,
    episodes=1,
    sac=SACConfig(
        hidden=(16, 16), batch_size=32, target_entropy="act_dim", critic_loss="mse", real_ratio=0.0
    ),
)

if __name__ == "__main__":
    vars(import_module("mopo_fast.data.collect"))["OnlineConfig"] = lambda: TINY
    sys.exit(main())
