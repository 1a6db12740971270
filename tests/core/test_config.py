"""Test the ranges of settings that other test files do not cover: rollouts, evaluation, online training."""

import math
import re
from typing import Any

import pytest

from mopo_fast.config import (
    DynamicsConfig,
    EvaluationConfig,
    OnlineConfig,
    RolloutConfig,
    SACConfig,
    TrainConfig,
)
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
        (EvaluationConfig, "episodes", 10**9, "evaluation episodes must be at most 10,000, got 1000000000"),
        (EvaluationConfig, "workers", 10**10, "evaluation workers must be 0 to 1,000, got 10000000000"),
        (EvaluationConfig, "workers", -1, "evaluation workers must be 0 to 1,000, got -1"),
        *(
            (config, name, value, f"{name} must be at most 3.4e+38 in size, as float32 is, got {value}")
            for config, name, value in (
                (RolloutConfig, "penalty_coef", 1e300),
                (SACConfig, "actor_learning_rate", 1e300),
                (SACConfig, "target_entropy", -1e39),
                (DynamicsConfig, "learning_rate", 1e39),
                (DynamicsConfig, "max_logvar", 1e300),
                (DynamicsConfig, "weight_decay", (1e300, 0.0, 0.0, 0.0, 0.0)),
            )
        ),
        (DynamicsConfig, "logvar_bound_weight", -1.0, "logvar_bound_weight must not be negative, got -1.0"),
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


def test_a_large_number_of_steps_has_an_exact_number_of_epochs() -> None:
    steps = 2**60 + 1
    assert TrainConfig("", steps=steps).epochs == steps // 1000 + 1
