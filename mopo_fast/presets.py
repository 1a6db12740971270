"""Hyperparameters of other code, as in `mopo-fast train DATASET --preset offlinerl-kit`.

A preset holds the defaults of that code's own MOPO script, as far as there are options for them here.
docs/compat.md lists the remaining differences. The sources are the files named below, in the versions that
docs/compat.md names.
"""

import dataclasses
from typing import Any

from mopo_fast.config import PRESETS, Preset, TrainConfig
from mopo_fast.errors import InputError

# Differences from the authors' defaults, as a dictionary for each part of the config.
_CHANGES: dict[Preset, dict[str, Any]] = {
    # The defaults with the mistake in hopper's rule (examples/config/d4rl, mopo/static/hopper.py) and with
    # the authors' data (mopo/off_policy/loader.py, examples/development/base.py), which lie in a pool of the
    # last 1,000,000 rows.
    "mopo-tf": {
        "data": {"compat": "d4rl", "max_transitions": 1_000_000},
        "rollout": {"termination": "authors"},
    },
    # run_example/run_mopo.py, utils/load_dataset.py, modules/dist_module.py, policy/model_free/sac.py.
    "offlinerl-kit": {
        "steps": 3_000_000,
        "data": {"compat": "offlinerl-kit"},
        # The fit stops after 5 epochs without improvement, the authors' after 6.
        "dynamics": {"patience": 4},
        "rollout": {"tuned": "offlinerl-kit", "termination": "offlinerl-kit"},
        "sac": {
            "actor_learning_rate": 1e-4,
            "alpha_learning_rate": 1e-4,
            "actor_schedule": "cosine",
            "log_std_min": -5.0,
            "log_prob_epsilon": 1e-6,
            "target_entropy": "act_dim",
            "critic_loss": "mse",
            "alpha_max": 1.0,
            "order": "critic_first",
        },
    },
    # algorithms/mopo.py, algorithms/dynamics.py.
    "unifloral": {
        "steps": 3_000_000,
        "data": {"compat": "d4rl"},
        "dynamics": {"activation": "relu", "holdout_max": 2**62, "max_epochs": 400, "patience": 400},
        "rollout": {
            "horizon": 5,
            "penalty_coef": 0.5,
            "penalty_members": "elites",
            "termination": "offlinerl-kit",
        },
        "sac": {
            "hidden": (256, 256, 256),
            "critics": 10,
            "actor_learning_rate": 1e-4,
            "critic_learning_rate": 1e-4,
            "alpha_learning_rate": 1e-4,
            "log_std_min": -5.0,
            "target_entropy": "act_dim",
            "critic_loss": "mse",
            "order": "actor_first",
            "adam_epsilon": 1e-5,
        },
        "evaluation": {"deterministic": False},
    },
    # offlinerl/config/algo/mopo_config.py, algo/modelbase/mopo.py.
    "polixir": {
        "steps": 200_000,
        "dynamics": {"hidden": (256, 256, 256, 256), "patience": 4, "improvement": 0.0},
        "rollout": {"horizon": 5, "penalty_coef": 2.0, "penalty_members": "elites"},
        "sac": {
            "log_std_min": -5.0,
            "target_entropy": "act_dim",
            "critic_loss": "mse",
            "order": "critic_first",
        },
    },
    # d3rlpy/algos/mopo.py, d3rlpy/dynamics/probabilistic_ensemble_dynamics.py.
    "d3rlpy": {
        "dynamics": {
            "members": 5,
            "elites": 5,
            "hidden": (256, 256),
            "activation": "relu",
            "batch_size": 100,
            "weight_decay": (1e-4, 1e-4, 1e-4),
        },
        "rollout": {"horizon": 5, "penalty_coef": 1.0},
        "sac": {
            "batch_size": 100,
            "target_entropy": "act_dim",
            "critic_loss": "mse",
            "order": "critic_first",
        },
    },
    # offline_markov.py, configs/d4rl_loco/base_markov.yaml: the Markov agent of NEUBAY (Ni et al. 2025). Its
    # rollouts go to the end of an episode, and each member makes whole rollouts.
    "neubay-markov": {
        "steps": 2_000_000,
        "dynamics": {
            "members": 128,
            "elites": 100,
            "activation": "relu",
            "layer_norm": True,
            "weight_decay": (5e-5,) * 5,
            "patience": 4,
        },
        "rollout": {
            "horizon": 1000,
            "penalty_coef": 0.0,
            "penalty": "ensemble_std",
            "penalty_members": "elites",
            "member": "per_rollout",
            "truncate_quantile": 1.0,
            "batch_size": 100,
            "retain_epochs": 20,
        },
        "sac": {
            "critics": 10,
            "target_critics": 2,
            "actor_q": "mean",
            "actor_learning_rate": 1e-4,
            "critic_learning_rate": 1e-4,
            "alpha_learning_rate": 1e-4,
            "actor_schedule": "cosine",
            "batch_size": 2048,
            "target_entropy": "act_dim",
        },
    },
    # examples/conf/algorithm/mbpo.yaml, overrides/mbpo_halfcheetah.yaml: MBPO, which has no penalty.
    "mbrl-lib": {
        "dynamics": {"weight_decay": (1e-5,) * 5, "patience": 4},
        "rollout": {"horizon": 1, "penalty_coef": 0.0},
        "sac": {
            "hidden": (512, 512),
            "target_entropy": -1.0,
            "critic_loss": "mse",
            "real_ratio": 0.0,
            "order": "critic_first",
        },
    },
}


def preset(name: str, dataset: str) -> TrainConfig:
    """Make the config of a run on `dataset` with the hyperparameters of the code `name`.

    Raises:
        InputError: the name is unknown.
    """
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}; there are: {', '.join(PRESETS)}")
    config = TrainConfig(dataset=dataset, preset=name)
    changes = {
        part: dataclasses.replace(getattr(config, part), **value) if isinstance(value, dict) else value
        for part, value in _CHANGES[name].items()
    }
    return dataclasses.replace(config, **changes)
