"""The rollout and the epoch of OfflineRL-Kit: its MOPOPolicy, of halfcheetah's sizes, on random data."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.offlinerl_kit import make_buffers, make_importable, make_policy
from mopo_fast import Transitions

OBS_DIM, ACT_DIM = 17, 6


def contenders(
    checkout: Path, *, batch_size: int, updates: int, **options: Any
) -> dict[str, Callable[[], object]]:
    """Return calls by name; each is a rollout of 5 steps, or that and `updates` as of MBPolicyTrainer."""
    make_importable(checkout)
    random = np.random.default_rng(0)
    arrays = [
        torch.from_numpy(random.normal(size=(10_000, dim)).astype(np.float32))
        for dim in (OBS_DIM, ACT_DIM, OBS_DIM)
    ]
    observations, actions, successors = arrays
    data = Transitions(
        observations, actions.tanh(), torch.zeros(10_000), successors, torch.zeros(10_000, dtype=torch.bool)
    )
    torch.manual_seed(0)
    calls: dict[str, Callable[[], object]] = {}
    for name, theirs in (("as shipped", True), ("fused", False)):
        policy = make_policy(
            OBS_DIM, ACT_DIM, "halfcheetah-medium-v2", 0.5, theirs, **({} if theirs else options)
        )
        policy.train()
        real, fake = make_buffers(data, 5 * 5 * batch_size)
        policy.dynamics.scaler.fit(np.concatenate([data.observations, data.actions], 1))

        def rollout(policy: Any = policy, real: Any = real, fake: Any = fake) -> None:
            start = real.sample(batch_size)["observations"].cpu().numpy()
            made, _ = policy.rollout(start, 5)
            fake.add_batch(**made)

        def epoch(rollout: Any, policy: Any = policy, real: Any = real, fake: Any = fake) -> None:
            rollout()
            for _ in range(updates):
                policy.learn({"real": real.sample(12), "fake": fake.sample(244)})

        calls[f"rollout, {name}"] = rollout
        calls[f"epoch, {name}"] = functools.partial(epoch, rollout)
    return dict(
        sorted(calls.items(), key=lambda item: (item[0].startswith("epoch"), "shipped" not in item[0]))
    )
