"""Test the ranges of settings that other test files do not cover: rollouts, evaluation, online training."""

import math
import re
from typing import Any

import pytest

from mopo_fast.config import EvaluationConfig, OnlineConfig, RolloutConfig, SACConfig
from mopo_fast.errors import InputError


@pytest.mark.parametrize(
    ("config", "setting", "value", "message"),
    [
        *(
            (RolloutConfig, name, value, f"rollout {name} must be at least 1, got {value}")
            for name in ("horizon", "batch_size", "interval", "retain_epochs")
            for value in (0, -1)
        ),
        (RolloutConfig, "tuned", "mine", "unknown tuned 'mine'; there are: authors, offlinerl-kit"),
        (RolloutConfig, "penalty_coef", math.nan, "penalty_coef must be finite, got nan"),
        (RolloutConfig, "penalty_coef", math.inf, "penalty_coef must be finite, got inf"),
        (EvaluationConfig, "episodes", 0, "evaluation episodes must be at least 1, got 0"),
        (EvaluationConfig, "interval", 0, "evaluation interval must be at least 1, got 0"),
        *(
            (OnlineConfig, name, 0, f"{name} must be at least 1, got 0")
            for name in ("environments", "round_steps", "epoch_steps", "random_epochs", "medium_window")
        ),
        (OnlineConfig, "episodes", 0, "episodes must be at least 1, got 0"),
        (OnlineConfig, "round_steps", 7, "epoch_steps must be a multiple of round_steps, got 1000 and 7"),
        (OnlineConfig, "epochs", 2, "epochs must be more than random_epochs, got 2 and 2"),
        (OnlineConfig, "sac", SACConfig(discount=1.0), "discount must be in [0, 1), got 1.0"),
    ],
)
def test_a_value_out_of_range_is_named(config: Any, setting: str, value: Any, message: str) -> None:
    config().validate()
    with pytest.raises(InputError, match=re.escape(message)):
        config(**{setting: value}).validate()
