"""Adapter for OfflineRL-Kit: its dynamics, rollouts and SAC updates on fused kernels, and its files.

In OfflineRL-Kit's `run_mopo.py`, import `EnsembleDynamics` from here and wrap the trainer:

    from mopo_fast.compat.offlinerl_kit import EnsembleDynamics, fuse_trainer
    dynamics = EnsembleDynamics(dynamics_model, dynamics_optim, scaler, termination_fn, penalty_coef=2.5)
    policy_trainer = fuse_trainer(MBPolicyTrainer(policy, ...))

The loop, the logger, the evaluation and the checkpoints stay OfflineRL-Kit's. In this package, "the original"
is OfflineRL-Kit's own class or method of the same name.

Source: github.com/yihaosun1124/OfflineRL-Kit, commit e3ce697.
"""

from mopo_fast.compat.offlinerl_kit.dynamics import PENALTIES, EnsembleDynamics, termination_box
from mopo_fast.compat.offlinerl_kit.files import FILES, check_dynamics, check_policy, read, write
from mopo_fast.compat.offlinerl_kit.policy import fuse_learn, fuse_rollout
from mopo_fast.compat.offlinerl_kit.training import fuse_trainer

__all__ = [
    "FILES",
    "PENALTIES",
    "EnsembleDynamics",
    "check_dynamics",
    "check_policy",
    "fuse_learn",
    "fuse_rollout",
    "fuse_trainer",
    "read",
    "termination_box",
    "write",
]
